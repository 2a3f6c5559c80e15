"""Small networks, data and comparisons that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from randsurgery.format.checkpoint import Checkpoint, Memory, read_checkpoint
from randsurgery.format.container import pack
from randsurgery.format.writing import write_checkpoint
from randsurgery.surgery.method import Method
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.tensors import from_torch
from randsurgery.training.settings import TrainSettings

TABLE_1 = {
    "densenet_bc_100_12": {
        "@norm": 23_988, "conv1": 24_636, "block1": 194_484, "block2": 258_996,
        "block3": 291_252, "fc": 27_418,
    },
    "wrn_28_4": {
        "@norm": 7_200, "conv1": 7_632, "block1": 275_488, "block2": 1_121_312,
        "block3": 4_463_648, "fc": 9_770,
    },
}  # fmt: skip
"""Learned parameters by what is learned: Rosenfeld & Tsotsos, Table 1."""

CONV2 = {"width": 0.1, "num_classes": 10}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that -0.0 differs from +0.0 and a NaN equals itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(bits(first), bits(second))
    )


def assert_same_state(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """Two state dicts, names and bits."""
    assert sorted(first) == sorted(second)
    different = [name for name in first if not same_bits(first[name], second[name])]
    assert not different, different


def logits(model: nn.Module, size: int = 32, channels: int = 3, count: int = 2) -> torch.Tensor:
    """What the module says of fixed images, in evaluation mode."""
    images = torch.linspace(-1, 1, count * channels * size * size).view(count, channels, size, size)
    with torch.no_grad():
        return model.eval()(images)


def attach(model: nn.Module, method: Method) -> nn.Module:
    """The method on the module, without the warnings of the library's own function."""
    return method.attach(model)


def conv2(**more: Any) -> Checkpoint:
    """A tiny network as a recipe."""
    return make_recipe("conv2", seed=3, args={**CONV2, **more})


class Everything(nn.Module):
    """Each kind of layer that popup masks, and a norm. Input (N, 3, 8, 8), output (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden = nn.Linear(8, 30)
        self.head = nn.Linear(30, 5)  # 150 weights: the paper's count at k = 0.9 zeroes 15

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.grouped(x)).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.head(torch.relu(self.hidden(x)))


MASKED = (
    "stem.weight", "grouped.weight", "attention.in_proj_weight", "attention.out_proj.weight",
    "hidden.weight", "head.weight",
)  # fmt: skip


def everything(seed: int = 0) -> Everything:
    """The module with values that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Everything()
        nn.init.normal_(model.norm.weight)
        nn.init.normal_(model.norm.bias)
    return model


def train_steps(model: nn.Module, steps: int = 2, lr: float = 0.5, seed: int = 1) -> None:
    """A few steps of plain gradient descent on random images of 8 pixels and 5 classes."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=lr, momentum=0.9, weight_decay=1e-3)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        images = torch.randn(6, 3, 8, 8, generator=draw)
        labels = torch.randint(0, 5, (6,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def write(path: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint and return its path."""
    write_checkpoint(path, checkpoint)
    return path


def read(path: Path, **options: Any) -> Checkpoint:
    """Read a checkpoint whole, so that the file is closed."""
    with read_checkpoint(path, **options) as found:
        payloads = Memory({name: found.payloads.read(name) for name in found.payloads.infos})
        return Checkpoint(found.recipe, payloads, found.bases, found.path)


def save_dense(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A plain dense safetensors file."""
    tensors = {name: from_torch(tensor, name) for name, tensor in state.items()}
    path.write_bytes(b"".join(bytes(piece) for piece in pack(tensors, {"format": "pt"})))
    return path


def quick(**more: Any) -> TrainSettings:
    """Settings of a run that takes a moment."""
    return TrainSettings(**{"epochs": 1, "batch_size": 16, "crop_padding": 2, **more})


def write_images(folder: Path, classes: dict[str, int], size: int = 20, seed: int = 0) -> None:
    """PNG images, ``classes`` giving how many of each."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = draw.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
