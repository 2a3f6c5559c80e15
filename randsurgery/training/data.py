"""Datasets by name or folder -> batches of normalised images on the device.

Sets that fit in memory (digits, torchvision's small ones) live on the device as bytes and are
augmented a batch at a time; folders and streamed sets go through timm's transforms and torch's
loader. Order and augmentation come from the generator by (seed, epoch), so a run depends on its
seed and not on workers, batches already drawn, or a global generator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from randsurgery.errors import DataError, near, reason
from randsurgery.format.generator import integers, permutation, torch_seed
from randsurgery.format.recipe import DatasetSpec, InputSpec
from randsurgery.surgery.randomness import borrowed
from randsurgery.training.images import (
    Bounded,
    Caught,
    Part,
    Paths,
    Pictures,
    collate,
    image_mode,
    whole,
)
from randsurgery.training.settings import TrainSettings

Batch = tuple[torch.Tensor, torch.Tensor]
Split = Literal["train", "test"]

MAX_RESIDENT = 2 << 30
"""Bytes of images that may live on the device; larger sets are streamed."""

KNOWN = (
    "digits", "torch/mnist", "torch/fashion_mnist", "torch/kmnist", "torch/qmnist",
    "torch/cifar10", "torch/cifar100", "torch/imagenet", "torch/places365", "torch/inaturalist",
)  # fmt: skip


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


# --- finding datasets ----------------------------------------------------------------------------


def open_data(
    spec: DatasetSpec,
    look: InputSpec,
    split: Split,
    *,
    data_dir: str | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
    classes: tuple[str, ...] | None = None,
) -> Data:
    """A split by dataset spec. Raises DataError with the remedy.

    ``classes``: the names that labels stand for, if they are known; a folder's own may be fewer.
    """
    where = torch.device(device)
    if spec.name == "digits":
        return _resident(_digits(split), _DIGIT_NAMES, look, where)
    if spec.name != "folder" and not spec.name.startswith(("torch/", "hfds/")):
        raise DataError(
            f"unknown dataset {spec.name!r}, expected digits, torch/NAME, hfds/NAME, or a folder "
            "with --data-dir" + (near(spec.name, KNOWN) or near(f"torch/{spec.name}", KNOWN))
        )
    if spec.name.startswith("torch/") and spec.name.lower() not in KNOWN:
        raise DataError(
            f"unknown dataset {spec.name!r}, expected one of {', '.join(KNOWN[1:])}"
            + near(spec.name, KNOWN)
        )
    if data_dir is None and not spec.name.startswith("hfds/"):
        raise DataError(f"dataset {spec.name} needs --data-dir FOLDER")
    if data_dir is not None and not download and not Path(data_dir).is_dir():
        raise DataError(f"{data_dir}: no such folder, expected the one that holds {spec.name}")
    if spec.name == "folder":
        dataset, names = _folder(spec, look, split, str(data_dir), classes)
    else:
        dataset = _timm_dataset(spec, look, split, data_dir, download)
        names = class_names(dataset)
    small = spec.name.lower() in _SMALL
    if small and len(dataset) * look.channels * math.prod(look.size) <= MAX_RESIDENT:
        return _resident(_to_bytes(dataset, look), names, look, where)
    samples = getattr(getattr(dataset, "reader", None), "samples", ())  # of a folder
    paths = [path for path, _ in samples]
    return Streamed(dataset, len(dataset), names, look, where, workers, paths)


def open_images(
    paths: Sequence[str], look: InputSpec, device: torch.device | str = "cpu", workers: int = 0
) -> Data:
    """Image files as a split without labels or classes, shown as a folder's images are."""
    pictures = Pictures(Paths(paths), image_mode(look))
    return Streamed(pictures, len(paths), (), look, torch.device(device), workers, paths)


_SMALL = (
    "torch/mnist", "torch/fashion_mnist", "torch/kmnist", "torch/qmnist", "torch/cifar10",
    "torch/cifar100",
)  # fmt: skip
_DIGIT_NAMES = tuple(str(digit) for digit in range(10))


def _folder(
    spec: DatasetSpec,
    look: InputSpec,
    split: Split,
    data_dir: str,
    classes: tuple[str, ...] | None,
) -> tuple[Any, tuple[str, ...]]:
    """A folder of images: a folder a split (train, validation), in it a folder a class."""
    if split == "train" and not (Path(data_dir) / "train").is_dir():
        raise DataError(
            f"{data_dir}: has no folder 'train', expected train/CLASS and validation/CLASS"
        )
    dataset = _timm_dataset(spec, look, split, data_dir, False)
    found = class_names(dataset)
    if classes is None or classes == found:
        return dataset, found
    if strange := [name for name in found if name not in classes]:
        raise DataError(
            f"{data_dir} ({split}): {strange[0]!r} is not one of the {len(classes)} known classes"
            + near(strange[0], classes)
        )
    labels = {name: label for label, name in enumerate(classes)}
    return _timm_dataset(spec, look, split, data_dir, False, labels), classes


def _timm_dataset(
    spec: DatasetSpec,
    look: InputSpec,
    split: Split,
    data_dir: str | None,
    download: bool,
    labels: dict[str, int] | None = None,
) -> Any:
    from timm.data import ImageDataset, create_dataset

    name, mode = "" if spec.name == "folder" else spec.name, image_mode(look)
    try:
        dataset = create_dataset(
            name,
            root=data_dir,
            split=spec.train_split if split == "train" else spec.test_split,
            is_training=split == "train",
            download=download,
            class_map=labels or "",
            input_img_mode=mode,
        )
    except Exception as error:  # whatever torchvision, datasets or the disk raises
        hint = "" if download else "; if it is not there yet, pass --dataset-download"
        raise DataError(f"{spec.name} ({split}) in {data_dir}: {reason(error)}{hint}") from None
    if len(dataset) == 0:
        raise DataError(f"{spec.name} ({split}) in {data_dir}: no images")
    return Pictures(dataset.reader, mode) if isinstance(dataset, ImageDataset) else dataset


def class_names(dataset: Any) -> tuple[str, ...]:
    """The class names a dataset knows, by label."""
    if isinstance(getattr(dataset, "classes", None), (list, tuple)):
        # torchvision's ImageNet gives a tuple of synonyms for each class
        return tuple(n if isinstance(n, str) else ", ".join(n) for n in dataset.classes)
    index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if index:
        return tuple(str(name) for name in sorted(index, key=index.get))
    labels = getattr(dataset, "targets", None)
    return tuple(str(i) for i in range(int(max(labels)) + 1)) if labels is not None else ()


def _resize(image: Any, look: InputSpec) -> Any:
    """A PIL image at the wanted size and number of channels, as (H, W, C) bytes."""
    from PIL import Image

    image = image.convert("L" if look.channels == 1 else "RGB")
    if image.size != (look.size[1], look.size[0]):
        image = image.resize(
            (look.size[1], look.size[0]), Image.Resampling[look.interpolation.upper()]
        )
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _to_bytes(dataset: Any, look: InputSpec) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.empty((len(dataset), *look.size, look.channels), dtype=np.uint8)
    labels = np.empty(len(dataset), dtype=np.int64)
    for index in range(len(dataset)):
        image, labels[index] = dataset[index]
        images[index] = _resize(image, look)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def _digits(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 scanned digits: 8 x 8 values 0..16, each shown as 4 x 4 pixels.

    A fixed split: of the permutation with seed 0, the first 1,437 train, the last 360 test.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    order = permutation(len(found.target), seed=0, stream="digits")
    chosen = order[:1437] if split == "train" else order[1437:]
    pixels = np.rint(found.images[chosen] * (255 / 16)).astype(np.uint8)
    shown = np.kron(pixels, np.ones((1, 4, 4), dtype=np.uint8))
    images = torch.from_numpy(shown)[:, None].expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(found.target[chosen].astype(np.int64))


def _interpolate(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bytes (N, C, H, W) -> bytes (N, C, *size)."""
    sized = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
    return sized.round().clamp(0, 255).to(torch.uint8)


def _resident(
    data: tuple[torch.Tensor, torch.Tensor],
    classes: tuple[str, ...],
    look: InputSpec,
    device: torch.device,
) -> Resident:
    images, labels = data
    if images.shape[1] != look.channels:
        images = images[:, :1].expand(-1, look.channels, -1, -1)
    if tuple(images.shape[2:]) != tuple(look.size):
        if (wanted := len(images) * look.channels * math.prod(look.size)) > MAX_RESIDENT:
            raise DataError(
                f"{len(images):,} images of {look.size[0]} x {look.size[1]} pixels take "
                f"{wanted / 1e9:,.1f} GB; choose a smaller --img-size"
            )
        images = torch.cat([_interpolate(part, look.size) for part in torch.split(images, 256)])
    return Resident(images.contiguous().to(device), labels.to(device), classes, look)
