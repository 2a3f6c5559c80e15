"""Datasets by name, folder or image files -> splits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from randsurgery.errors import DataError, near, reason
from randsurgery.format.generator import permutation
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.training.data import Data, Resident, Streamed
from randsurgery.training.images import Paths, Pictures, image_mode

Split = Literal["train", "test"]

MAX_RESIDENT = 2 << 30
"""Bytes of images that may live on the device; larger sets are streamed."""

KNOWN = (
    "digits", "torch/mnist", "torch/fashion_mnist", "torch/kmnist", "torch/qmnist",
    "torch/cifar10", "torch/cifar100", "torch/imagenet", "torch/places365", "torch/inaturalist",
)  # fmt: skip


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
