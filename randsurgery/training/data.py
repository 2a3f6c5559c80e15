"""Splits: batches of normalised images on the device, in an order that the seed decides.

Sets that fit in memory (digits, torchvision's small ones) live on the device as bytes and are
augmented a batch at a time; folders, streamed sets and what only pictures can be put through
(timm's policies, random resized crops) go through timm's transforms and torch's loader. Order and
augmentation come from the generator by (seed, epoch, image), so a run depends on its seed and not
on workers, batches already drawn, or a global generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from randsurgery.errors import DataError
from randsurgery.format.generator import permutation, torch_seed
from randsurgery.format.specs import InputSpec
from randsurgery.training.augmentation import (
    augment,
    erase,
    evaluation_transform,
    moves,
    plain,
    seeded,
    training_transform,
)
from randsurgery.training.images import Bounded, Caught, Failure, Part, collate, refuse
from randsurgery.training.settings import TrainSettings

Batch = tuple[torch.Tensor, torch.Tensor]
Labels = npt.NDArray[np.int64]


class Data(Protocol):
    """One split: how many images, and its batches.

    ``where``: what a person calls the place its images came from ("val/"); empty if that is the
    dataset. ``paths``: empty if images are no files of their own. ``labels``: (N,), or None where
    only decoding tells them. ``skipped``: unreadable images that it was told to go without.
    """

    classes: tuple[str, ...]
    spec: InputSpec
    where: str
    paths: Sequence[str]
    skipped: int

    @property
    def labels(self) -> Labels | None: ...

    def __len__(self) -> int: ...

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""

    def training(self, settings: TrainSettings, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Augmented batches in random order, from the ``first`` on: images (B, C, H, W), labels
        (B,)."""

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order. Raises DataError, after the last, for all that cannot be
        read."""

    def parts(self, batch_size: int) -> Iterator[Part]:
        """As ``evaluation``, with what cannot be read as failures."""

    def subset(self, indices: Sequence[int], where: str | None = None) -> Data:
        """The images of these indices, in this order."""


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
    """A split that lives on the device. ``images`` (N, C, H, W) bytes, ``targets`` (N,)."""

    images: torch.Tensor
    targets: torch.Tensor
    classes: tuple[str, ...]
    spec: InputSpec
    where: str = ""
    paths: Sequence[str] = ()
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def labels(self) -> Labels:
        """Shape (N,)."""
        return self.targets.cpu().numpy().astype(np.int64)

    def subset(self, indices: Sequence[int], where: str | None = None) -> Resident:
        """The images of these indices, in this order."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64), device=self.images.device)
        return replace(
            self,
            images=self.images[chosen],
            targets=self.targets[chosen],
            where=self.where if where is None else where,
        )

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""
        return train_steps(len(self), batch_size)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        mean, std = normalisation(self.spec, images.device)
        return (images.float() - mean) / std

    def training(self, settings: TrainSettings, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Augmented batches in random order."""
        if not plain(settings):
            yield from self._as_pictures(settings).training(settings, epoch, first)
            return
        order = torch.from_numpy(
            permutation(len(self), seed=settings.seed, stream=f"epoch-{epoch}")
        )
        drawn = moves(len(self), settings, epoch)
        for step in range(first, self.steps(settings.batch_size)):
            chosen = order[step * settings.batch_size : (step + 1) * settings.batch_size]
            here = chosen.to(self.images.device)
            shifts = drawn[chosen].to(self.images.device)
            images = augment(self.images[here], shifts, settings.crop_padding or 0)
            images = erase(self._normalise(images), chosen.tolist(), settings, epoch)
            yield images, self.targets[here]

    def _as_pictures(self, settings: TrainSettings) -> Streamed:
        shown = _Shown(self.images.cpu(), self.labels)
        cut = {"crop": (1.0).hex(), "crop_mode": "center"}  # the images are cut already
        look = self.spec.model_copy(update=cut)
        return Streamed(
            shown, self.classes, look, self.images.device, settings.workers, self.where,
            known=self.labels,
        )  # fmt: skip

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order."""
        for part in self.parts(batch_size):
            yield part.images, part.labels

    def parts(self, batch_size: int) -> Iterator[Part]:
        """All images once, in order; none fails."""
        for start in range(0, len(self), batch_size):
            indices = list(range(start, min(start + batch_size, len(self))))
            images = self._normalise(self.images[start : start + batch_size])
            yield Part(images, self.targets[start : start + batch_size], indices, [])


class _Shown(torch.utils.data.Dataset[Any]):
    """Bytes (N, C, H, W) as pictures."""

    def __init__(self, images: torch.Tensor, labels: Labels) -> None:
        self.images, self.labels = images, labels
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = self.images[index].permute(1, 2, 0).numpy()
        picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(picture), int(self.labels[index])


class _Seeded(torch.utils.data.Dataset[Any]):
    """A dataset whose random transforms are drawn by (seed, epoch, index) alone."""

    def __init__(self, dataset: Any, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        with seeded(torch_seed(self.seed, f"epoch-{self.epoch}-image-{index}")):
            return self.dataset[index]


class _Chosen(torch.utils.data.Dataset[Any]):
    """Some images of a dataset. Its transform is the dataset's."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, [int(index) for index in indices]
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        # two splits may share a dataset, so the transform is put in each time
        self.dataset.transform = self.transform
        return self.dataset[self.indices[index]]


@dataclass
class Streamed:
    """A split read image by image, through timm's transforms."""

    dataset: Any  # Pictures or a torchvision dataset; its transform is set here
    classes: tuple[str, ...]
    spec: InputSpec
    device: torch.device
    workers: int = 0
    where: str = ""
    paths: Sequence[str] = ()
    known: Labels | None = field(default=None, repr=False)
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Labels | None:
        """Shape (N,), if they are known without decoding."""
        return self.known

    def subset(self, indices: Sequence[int], where: str | None = None) -> Streamed:
        """The images of these indices, in this order."""
        return replace(
            self,
            dataset=_Chosen(self.dataset, indices),
            where=self.where if where is None else where,
            paths=[self.paths[index] for index in indices] if self.paths else (),
            known=None if self.known is None else self.known[np.asarray(indices, dtype=np.intp)],
        )

    def steps(self, batch_size: int) -> int:
        """Batches in one training epoch."""
        return train_steps(len(self), batch_size)

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
        """Augmented batches in random order. Raises DataError for an image that cannot be read or
        has no label."""
        order = permutation(len(self), seed=settings.seed, stream=f"epoch-{epoch}")
        begin = first * settings.batch_size
        end = self.steps(settings.batch_size) * settings.batch_size
        shown = training_transform(self.spec, settings)
        # of a random resized crop only a part is resized
        whole = settings.crop_padding is not None
        self.dataset.transform = Bounded(shown, self.spec) if whole else shown
        drawn = _Seeded(self.dataset, settings.seed, epoch)
        for part in self._parts(drawn, settings.batch_size, order[begin:end].tolist()):
            refuse(part.failures, self.paths)
            self._check_labelled(part.indices, part.labels)
            yield erase(part.images, part.indices, settings, epoch), part.labels

    def evaluation(self, batch_size: int) -> Iterator[Batch]:
        """All images once, in order. Raises DataError, after the last, for all that cannot be
        read."""
        failures: list[Failure] = []
        for part in self.parts(batch_size):
            failures += part.failures
            if part.indices:
                yield part.images, part.labels
        refuse(failures, self.paths)

    def parts(self, batch_size: int) -> Iterator[Part]:
        """All images once, in order, with what cannot be read as failures."""
        self.dataset.transform = Bounded(evaluation_transform(self.spec), self.spec)
        yield from self._parts(self.dataset, batch_size, range(len(self)))

    def _check_labelled(self, indices: Sequence[int], labels: torch.Tensor) -> None:
        missing = [
            index for index, label in zip(indices, labels.tolist(), strict=True) if label < 0
        ]
        if missing:
            raise unlabelled(missing, self.paths)


def unlabelled(indices: Sequence[int], paths: Sequence[str]) -> DataError:
    """The error of images without a label, of which it names the first ten."""
    named = [paths[index] if paths else f"image {index}" for index in indices[:10]]
    more = f" and {len(indices) - 10:,} more" if len(indices) > 10 else ""
    return DataError(
        f"no label: {', '.join(named)}{more}; choose a split whose images all have one"
    )


def check_labelled(data: Data) -> None:
    """Raises DataError naming the images of a split that have no label."""
    if data.labels is not None and (missing := np.flatnonzero(data.labels < 0)).size:
        raise unlabelled(missing.tolist(), data.paths)
