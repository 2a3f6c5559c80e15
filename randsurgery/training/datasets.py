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
from randsurgery.training.augmentation import evaluation_transform
from randsurgery.training.catalogue import DATASETS, known
from randsurgery.training.data import Data, Labels, Resident, Streamed
from randsurgery.training.folders import Folder, Part
from randsurgery.training.images import Paths, Pictures, image_mode

Split = Literal["train", "test"]

MAX_RESIDENT = 2 << 30
"""Bytes of images that may live on the device; larger sets are streamed."""


def check_name(spec: DatasetSpec) -> None:
    """Raises DataError for a dataset that nothing here knows."""
    if spec.name in ("digits", "folder"):
        return
    if not spec.name.startswith(("torch/", "hfds/")):
        raise DataError(
            f"unknown dataset {spec.name!r}, expected digits, torch/NAME, hfds/NAME, or a folder "
            "with --data-dir" + (near(spec.name, DATASETS) or near(f"torch/{spec.name}", DATASETS))
        )
    if spec.name.startswith("torch/") and spec.name.lower() not in DATASETS:
        names = ", ".join(name for name in DATASETS if name != "digits")
        raise DataError(
            f"unknown dataset {spec.name!r}, expected one of {names}" + near(spec.name, DATASETS)
        )


def open_data(
    spec: DatasetSpec,
    look: InputSpec,
    split: Split,
    *,
    data_dir: str | None = None,
    download: bool = False,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Data:
    """A split of a dataset that is known by name (no folder). Raises DataError with the remedy."""
    where = torch.device(device)
    check_name(spec)
    if spec.name == "digits":
        images, labels = _digits(split)
        return Resident(_shown(images, look).to(where), labels.to(where), _DIGIT_NAMES, look)
    if data_dir is None and not spec.name.startswith("hfds/"):
        raise DataError(f"dataset {spec.name} needs --data-dir FOLDER")
    if data_dir is not None and not download and not Path(data_dir).is_dir():
        raise DataError(f"{data_dir}: no such folder, expected the one that holds {spec.name}")
    dataset = _timm_dataset(spec, look, split, data_dir, download)
    names = class_names(dataset)
    small = known(spec.name).resident
    if small and len(dataset) * look.channels * math.prod(look.size) <= MAX_RESIDENT:
        images, labels = _to_bytes(dataset, look)
        return Resident(images.to(where), labels.to(where), names, look)
    paths = [path for path, _ in getattr(dataset, "samples", ())]  # of torchvision's folders
    return Streamed(dataset, names, look, where, workers, paths=paths, known=_known_labels(dataset))


def folder_data(
    folder: Folder,
    part: Part,
    look: InputSpec,
    classes: Sequence[str],
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Streamed:
    """A split of a folder, whose labels count within ``classes``. Raises DataError for a split that
    is not there and for a class that is not among them."""
    listing = folder.split(part)
    index = {name: label for label, name in enumerate(classes)}
    if strange := sorted(set(listing.labels) - set(index)):
        raise DataError(
            f"{folder.root} ({listing.where}): {strange[0]!r} is not one of the {len(classes)} "
            f"known classes{near(strange[0], classes)}; rename the folder, or pass --any-classes "
            "to go by their numbers"
        )
    labels = np.array([index[name] for name in listing.labels], dtype=np.int64)
    pictures = Pictures(Paths(listing.paths, labels.tolist()), image_mode(look))
    return Streamed(
        pictures, tuple(classes), look, torch.device(device), workers, listing.where,
        listing.paths, labels,
    )  # fmt: skip


def open_images(
    paths: Sequence[str], look: InputSpec, device: torch.device | str = "cpu", workers: int = 0
) -> Data:
    """Image files as a split without labels or classes, shown as a folder's images are."""
    pictures = Pictures(Paths(paths), image_mode(look))
    return Streamed(pictures, (), look, torch.device(device), workers, paths=paths)


_DIGIT_NAMES = tuple(str(digit) for digit in range(10))


def _timm_dataset(
    spec: DatasetSpec, look: InputSpec, split: Split, data_dir: str | None, download: bool
) -> Any:
    from timm.data import ImageDataset, create_dataset

    mode = image_mode(look) if not known(spec.name).resident else "RGB"
    try:
        dataset = create_dataset(
            spec.name,
            root=data_dir,
            split=spec.train_split if split == "train" else spec.test_split,
            is_training=split == "train",
            download=download,
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
    labels = _known_labels(dataset)
    return tuple(str(i) for i in range(int(labels.max()) + 1)) if labels is not None else ()


def _known_labels(dataset: Any) -> Labels | None:
    """The labels (N,) that a dataset tells without decoding its images."""
    found = getattr(dataset, "targets", None)
    if found is None and hasattr(dataset, "index"):  # torchvision's INaturalist
        found = [category for category, _ in dataset.index]
    reader: Any = getattr(dataset, "reader", None)
    if found is None and hasattr(reader, "dataset"):  # of the Hub
        try:
            found = reader.dataset[reader.label_key][:]
        except (KeyError, TypeError):
            return None
    if found is None:
        return None
    labels = np.asarray(found, dtype=np.int64)
    labels = labels[:, 0] if labels.ndim == 2 else labels  # QMNIST's first column is the class
    return labels if labels.shape == (len(dataset),) else None


def _to_bytes(dataset: Any, look: InputSpec) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.empty((len(dataset), look.channels, *look.size), dtype=np.uint8)
    labels = np.empty(len(dataset), dtype=np.int64)
    shown = evaluation_transform(look)
    whole = float.fromhex(look.crop) == 1.0
    mode = "L" if look.channels == 1 else "RGB"
    for index in range(len(dataset)):
        image, labels[index] = dataset[index]
        if whole and image.size == (look.size[1], look.size[0]):  # as the transform would, sooner
            array = np.asarray(image.convert(mode))
            images[index] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        else:
            images[index] = np.asarray(shown(image))
    return torch.from_numpy(images), torch.from_numpy(labels)


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


def _interpolate(images: torch.Tensor, look: InputSpec) -> torch.Tensor:
    """Bytes (N, C, H, W) -> bytes (N, C, *look.size): resized, then the middle cut out."""
    crop = float.fromhex(look.crop)
    size = [math.floor(side / crop) for side in look.size]
    how: dict[str, Any] = {"mode": look.interpolation}
    if look.interpolation != "nearest":
        how["antialias"] = True
    sized = F.interpolate(images.float(), size, **how)
    top, left = ((have - side) // 2 for have, side in zip(size, look.size, strict=True))
    cut = sized[:, :, top : top + look.size[0], left : left + look.size[1]]
    return cut.round().clamp(0, 255).to(torch.uint8)


def _shown(images: torch.Tensor, look: InputSpec) -> torch.Tensor:
    """Grey bytes (N, 3, H, W) with the channels and at the size that are asked for. Raises
    DataError for images that would take too much memory."""
    images = images[:, :1].expand(-1, look.channels, -1, -1)
    if tuple(images.shape[2:]) != tuple(look.size) or float.fromhex(look.crop) != 1.0:
        if (wanted := len(images) * look.channels * math.prod(look.size)) > MAX_RESIDENT:
            raise DataError(
                f"{len(images):,} images of {look.size[0]} x {look.size[1]} pixels take "
                f"{wanted / 1e9:,.1f} GB; choose a smaller --img-size"
            )
        images = torch.cat([_interpolate(part, look) for part in torch.split(images, 256)])
    return images.contiguous()
