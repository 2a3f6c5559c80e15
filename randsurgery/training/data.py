"""Splits: batches of normalised images on the device, in an order that the seed decides.

Sets that fit in memory (digits, torchvision's small ones) live on the device as bytes and are
augmented a batch at a time; folders and streamed sets go through timm's transforms and torch's
loader. Order and augmentation come from the generator by (seed, epoch), so a run depends on its
seed and not on workers, batches already drawn, or a global generator.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from randsurgery.format.generator import integers, permutation, torch_seed
from randsurgery.format.specs import InputSpec
from randsurgery.surgery.randomness import borrowed
from randsurgery.training.images import (
    Bounded,
    Caught,
    Part,
    collate,
    whole,
)
from randsurgery.training.settings import TrainSettings

Batch = tuple[torch.Tensor, torch.Tensor]


class Data(Protocol):
    """One split: how many images, and its batches. ``paths`` is empty if images are no files of
    their own."""

    classes: tuple[str, ...]
    spec: InputSpec
    paths: Sequence[str]

    def __len__(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""

    def training(self, settings: TrainSettings, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Augmented batches in random order, from the ``first`` on: images (B, C, H, W), labels
        (B,)."""

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order. Raises DataError for one that cannot be read."""

    def parts(self, batch_size: int) -> Iterator[Part]:
        """As ``evaluation``, with what cannot be read as failures."""


def normalisation(spec: InputSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation for byte values, each of shape (1, C, 1, 1)."""
    mean = torch.tensor([float.fromhex(m) * 255 for m in spec.mean], device=device)
    std = torch.tensor([float.fromhex(s) * 255 for s in spec.std], device=device)
    return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def train_steps(size: int, batch_size: int) -> int:
    """Batches an epoch: a last, smaller one is left out, unless it is the only one."""
    return max(1, size // batch_size)


@dataclass
class Resident:
    """A split that lives on the device. ``images`` (N, C, H, W) bytes, ``labels`` (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    spec: InputSpec
    paths: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""
        return train_steps(len(self), batch_size)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = normalisation(self.spec, images.device)
        return (images.float() - mean) / std

    def training(self, settings: TrainSettings, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Augmented batches in random order."""
        device = self.images.device
        order = torch.from_numpy(
            permutation(len(self), seed=settings.seed, stream=f"epoch-{epoch}")
        ).to(device)
        moves = _augmentation(len(self), settings, epoch).to(device)
        for step in range(first, self.steps(settings.batch_size)):
            chosen = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            images = augment(self.images[chosen], moves[chosen], settings.crop_padding)
            yield self._normalise(images), self.labels[chosen]

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order."""
        for part in self.parts(batch_size):
            yield part.images, part.labels

    def parts(self, batch_size: int) -> Iterator[Part]:
        """All images once, in order; none fails."""
        for start in range(0, len(self), batch_size):
            indices = list(range(start, min(start + batch_size, len(self))))
            images = self._normalise(self.images[start : start + batch_size])
            yield Part(images, self.labels[start : start + batch_size], indices, [])


def _augmentation(size: int, settings: TrainSettings, epoch: int) -> torch.Tensor:
    """(N, 3) integers: row and column offset of the crop, and 1 for a flip."""
    reach = 2 * settings.crop_padding + 1

    def draw(what: str, high: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return integers(size, high, seed=settings.seed, stream=f"epoch-{epoch}-{what}")

    flips = draw("flip", 2) if settings.hflip else np.zeros(size, dtype=np.int64)
    return torch.from_numpy(np.stack([draw("row", reach), draw("column", reach), flips], axis=1))


def augment(images: torch.Tensor, moves: torch.Tensor, padding: int) -> torch.Tensor:
    """Random crop after zero padding, and flip, all images of a batch at once.

    ``images`` (B, C, H, W), ``moves`` (B, 3): row offset and column offset in [0, 2 * padding],
    flip. Returns (B, C, H, W).
    """
    count, _, height, width = images.shape
    rows = moves[:, 0:1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(moves[:, 2:3] == 1, width - 1 - columns, columns) + moves[:, 1:2]
    padded = F.pad(images, (padding,) * 4) if padding else images
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


class _Seeded(torch.utils.data.Dataset[Any]):
    """A dataset whose random transforms are drawn by (seed, epoch, index) alone."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        drawn = torch_seed(self.seed, f"epoch-{self.epoch}-image-{index}")
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            with borrowed(drawn):
                random.seed(drawn)
                np.random.seed(drawn & 0xFFFFFFFF)  # noqa: NPY002
                return self.dataset[index]
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@dataclass
class Streamed:
    """A split read from disk image by image, through timm's transforms."""

    dataset: Any  # Pictures or a torchvision dataset; its transform is set here
    size: int
    classes: tuple[str, ...]
    spec: InputSpec
    device: torch.device
    workers: int = 0
    paths: Sequence[str] = ()

    def __len__(self) -> int:
        return self.size

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""
        return train_steps(self.size, batch_size)

    def _transform(self, training: bool, hflip: bool) -> Any:
        from timm.data import create_transform

        return create_transform(
            (self.spec.channels, *self.spec.size),
            is_training=training,
            use_prefetcher=True,  # bytes out; normalisation happens on the device
            hflip=0.5 if hflip else 0.0,
            color_jitter=None,
            interpolation=self.spec.interpolation,
            crop_pct=float.fromhex(self.spec.crop),
            crop_mode=self.spec.crop_mode,
        )

    def _parts(self, dataset: Any, batch_size: int, order: Sequence[int]) -> Iterator[Part]:
        mean, std = normalisation(self.spec, self.device)
        loader: Any = torch.utils.data.DataLoader(
            Caught(dataset),
            batch_size=batch_size,
            sampler=order,
            num_workers=self.workers,
            collate_fn=collate,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for part in loader:
            if part.indices:
                images = (part.images.to(self.device).float() - mean) / std
                part = part._replace(images=images, labels=part.labels.to(self.device))
            yield part

    def training(self, settings: TrainSettings, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Augmented batches in random order (timm's random resized crop and flip)."""
        order = permutation(self.size, seed=settings.seed, stream=f"epoch-{epoch}")
        begin = first * settings.batch_size
        end = self.steps(settings.batch_size) * settings.batch_size
        self.dataset.transform = self._transform(True, settings.hflip)
        seeded = _Seeded(self.dataset, settings.seed, epoch)
        for part in self._parts(seeded, settings.batch_size, order[begin:end].tolist()):
            yield whole(part, self.paths)

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order. Raises DataError for one that cannot be read."""
        for part in self.parts(batch_size):
            yield whole(part, self.paths)

    def parts(self, batch_size: int) -> Iterator[Part]:
        """All images once, in order, with what cannot be read as failures."""
        self.dataset.transform = Bounded(self._transform(False, False), self.spec)
        yield from self._parts(self.dataset, batch_size, range(self.size))
