"""A network of every kind of layer that can be sliced, and how it is trained for a few steps."""

from __future__ import annotations

import torch
from torch import nn

from randsurgery.format.recipe import Learned


class Net(nn.Module):
    """Plain, grouped, strided and dilated layers, a bias here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.stepped = nn.Conv2d(8, 8, 1, stride=(2, 1), bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=(1, 2), padding=1)
        self.same = nn.Conv2d(8, 6, 3, padding="same")
        self.mirrored = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(6, 10, (3, 1), dilation=(2, 1), bias=False)
        self.hidden = nn.Linear(10, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stepped(self.point(self.norm(self.conv1(x)).tanh()).tanh())
        x = self.mirrored(self.same(self.grouped(x).tanh()).tanh()).tanh()
        x = self.dilated(x).mean((2, 3)).tanh()
        out: torch.Tensor = self.fc(self.hidden(x).tanh())
        return out


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 12, 12, generator=draw, dtype=dtype)
    return images, torch.randint(5, (6,), generator=draw)


def part_of(tensor: torch.Tensor, part: Learned) -> torch.Tensor:
    if part.part == "whole":
        return tensor
    assert part.dim is not None
    assert part.count is not None
    return tensor.narrow(part.dim, 0, part.count)


def steps(model: nn.Module, mode: str, count: int = 3) -> None:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for turn in range(count):
        x, y = batch(turn)
        if mode == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
