"""A twin of hidden-networks' networks: its names, its layers, its forward, written for the tests.

Weights and scores are drawn from a generator of torch's that is lent for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Scored(nn.Conv2d):
    """A convolution without bias whose lowest |scores| are zeroed: the share ``k`` stays."""

    k = 0.5

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, bias=False)
        self.scores = nn.Parameter(torch.empty_like(self.weight))

    def mask(self) -> torch.Tensor:
        """By sorting, and by their count: floats, cut off."""
        zeroed = int((1 - self.k) * self.scores.numel())
        order = self.scores.detach().abs().flatten().sort(stable=True).indices
        flat = torch.ones(self.scores.numel())
        flat[order[:zeroed]] = 0
        return flat.view_as(self.scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight * self.mask(), None)


class Positive(Scored):
    """Keeps the positive scores."""

    def mask(self) -> torch.Tensor:
        return (self.scores.detach() > 0).float()


class Fixed(Scored):
    """The scores are the mask."""

    def mask(self) -> torch.Tensor:
        return self.scores.detach()


Layer = Callable[..., nn.Module]


class Plain(nn.Module):
    """Conv2 .. Conv8 (``pairs`` of convolutions), and FC with none."""

    def __init__(
        self, pairs: int, layer: Layer, first: Layer, width: float = 1.0, side: int = 32
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        channels = 3
        for pair in range(pairs):
            for _ in range(2):
                out = int(width * (64 << pair))
                kind = layer if parts else first
                parts += [kind(channels, out, 3, padding=1), nn.ReLU()]
                channels = out
            parts.append(nn.MaxPool2d(2))
        if parts:
            self.convs = nn.Sequential(*parts)
        sizes = [channels * (side >> pairs) ** 2, int(256 * width), int(256 * width), 10]
        if not parts:
            sizes = [side * side, 300, 100, 10]
        full: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            full += [layer(inputs, outputs, 1), nn.ReLU()]
        self.linear = nn.Sequential(*full[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs(x) if hasattr(self, "convs") else x
        return self.linear(x.flatten(1)[:, :, None, None])[:, :, 0, 0]


class Block(nn.Module):
    """A basic block; ``branch`` is what the projection is called."""

    def __init__(
        self, inputs: int, out: int, stride: int, layer: Layer, norm: Layer, branch: str
    ) -> None:
        super().__init__()
        self.conv1 = layer(inputs, out, 3, stride=stride, padding=1)
        self.bn1 = norm(out)
        self.conv2 = layer(out, out, 3, padding=1)
        self.bn2 = norm(out)
        self.branch = branch if stride != 1 or inputs != out else ""
        if self.branch:
            self.add_module(branch, nn.Sequential(layer(inputs, out, 1, stride=stride), norm(out)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (getattr(self, self.branch)(x) if self.branch else x))


class ResNet18(nn.Module):
    """``cifar``: their 3x3 stem without pooling and ``shortcut``; else ImageNet's."""

    def __init__(
        self,
        layer: Layer,
        *,
        cifar: bool,
        classes: int,
        norm: Layer,
        first: Layer | None = None,
        last: Layer | None = None,
    ) -> None:
        super().__init__()
        stem = {"kernel_size": 3, "padding": 1} if cifar else {"kernel_size": 7, "padding": 3}
        self.conv1 = (first or layer)(3, 64, stride=1 if cifar else 2, **stem)
        self.bn1 = norm(64)
        self.cifar = cifar
        inputs = 64
        for number in range(4):
            out, stride = 64 << number, 1 if number == 0 else 2
            branch = "shortcut" if cifar else "downsample"
            blocks = (Block(inputs, out, stride, layer, norm, branch),
                      Block(out, out, 1, layer, norm, branch))  # fmt: skip
            self.add_module(f"layer{number + 1}", nn.Sequential(*blocks))
            inputs = out
        self.fc = (last or layer)(512, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = x if self.cifar else F.max_pool2d(x, 3, stride=2, padding=1)
        for number in range(4):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1)).flatten(1)


def bare_norm(width: int) -> nn.Module:
    """A norm without scale and shift."""
    return nn.BatchNorm2d(width, affine=False)


def dense_layer(*args: Any, **kwargs: Any) -> nn.Module:
    """A layer that bears no scores."""
    return nn.Conv2d(*args, **kwargs, bias=False)


def drawn(model: nn.Module, *, signed: bool = True, seed: int = 0) -> nn.Module:
    """Weights (Kaiming, normal or its signed constant), scores and running statistics."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                fan = module.weight[0].numel()
                module.weight.normal_(0, math.sqrt(2 / fan), generator=draw)
                if signed:
                    module.weight.copy_(module.weight.sign() * math.sqrt(2 / fan))
                if module.bias is not None:
                    module.bias.normal_(generator=draw)
            if isinstance(module, Scored):
                module.scores.uniform_(-1, 1, generator=draw)
                if isinstance(module, Fixed):
                    module.scores.copy_((module.scores > 0.2).float())
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
                module.num_batches_tracked.fill_(7)
                if module.affine:
                    module.weight.uniform_(0.5, 2, generator=draw)
                    module.bias.normal_(0, 0.1, generator=draw)
    return model.eval()


def set_k(model: nn.Module, k: float) -> nn.Module:
    """Tell every scored layer its share."""
    for module in model.modules():
        if isinstance(module, Scored):
            module.k = k
    return model


def checkpoint(
    model: nn.Module, arch: str, *, parallel: bool = True, **more: Any
) -> dict[str, Any]:
    """What their program saves; its schedule leaves a NumPy number in the learning rate."""
    state = model.state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict()
    optimizer["param_groups"][0]["lr"] = np.float64(0.1) * np.cos(0.3)
    return {
        "epoch": 100, "arch": arch, "best_acc1": 86.4, "curr_acc1": "Not evaluated",
        "state_dict": {f"module.{n}": t for n, t in state.items()} if parallel else state,
        "optimizer": optimizer, **more,
    }  # fmt: skip
