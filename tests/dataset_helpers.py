"""Stand-ins for the papers' data sets: few images of noise, laid out as their authors lay them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100 = tuple(f"fine {label}" for label in range(100))
TINY_WNIDS = tuple(f"n{1_443_537 + 9_973 * index:08}" for index in range(200))


def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC 2012 by WordNet id, as timm knows them."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


# --- CIFAR, torchvision's "python version" -------------------------------------------------------


def _batch(path: Path, key: str, classes: int, count: int, seed: int) -> None:
    """``count`` images of noise as rows of 3,072 bytes, their labels in turn."""
    rows = np.random.default_rng(seed).integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
    labels = [index % classes for index in range(count)]
    names = [f"{path.name}_{index}.png" for index in range(count)]
    _pickle(path, {"batch_label": path.name, key: labels, "data": rows, "filenames": names})


def _pickle(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def cifar10(root: Path, each: int = 20) -> None:
    """``root/cifar-10-batches-py``: five batches to train on, one to test on, of ``each``
    images."""
    folder = root / "cifar-10-batches-py"
    for number in range(1, 6):
        _batch(folder / f"data_batch_{number}", "labels", 10, each, number)
    _batch(folder / "test_batch", "labels", 10, each, 0)
    meta = {"label_names": list(CIFAR10), "num_cases_per_batch": each, "num_vis": 3072}
    _pickle(folder / "batches.meta", meta)


def cifar100(root: Path, train: int = 200, test: int = 100) -> None:
    """``root/cifar-100-python``: one file to train on, one to test on."""
    folder = root / "cifar-100-python"
    _batch(folder / "train", "fine_labels", 100, train, 1)
    _batch(folder / "test", "fine_labels", 100, test, 0)
    coarse = [f"coarse {label}" for label in range(20)]
    _pickle(folder / "meta", {"fine_label_names": list(CIFAR100), "coarse_label_names": coarse})


def without_checksums(patch: pytest.MonkeyPatch) -> None:
    """torchvision knows CIFAR's files by their MD5 sums; for a stand-in it is to ask for none."""
    from torchvision import datasets

    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        for files in ("train_list", "test_list"):
            patch.setattr(kind, files, [[name, None] for name, _ in getattr(kind, files)])
        patch.setattr(kind, "meta", {**kind.meta, "md5": None})


# --- folders -------------------------------------------------------------------------------------


def _photographs(width: int, height: int, seed: int) -> Iterator[bytes]:
    """JPEG files of noise, each unlike the others."""
    generator = np.random.default_rng(seed)
    while True:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        yield file.getvalue()


def _put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def tiny_imagenet(root: Path, each: int = 2, wnids: Sequence[str] = TINY_WNIDS) -> None:
    """As ``tiny-imagenet-200.zip`` unpacks: boxes beside the training images, the validation
    images in one folder with a table, test images without labels."""
    images = _photographs(64, 64, seed=1)
    table: list[str] = []
    for number, wnid in enumerate(wnids):
        for index in range(each):
            _put(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", next(images))
        boxes = "".join(f"{wnid}_{index}.JPEG\t0\t0\t63\t63\n" for index in range(each))
        _put(root / "train" / wnid / f"{wnid}_boxes.txt", boxes)
        _put(root / "val" / "images" / f"val_{number}.JPEG", next(images))
        table.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    _put(root / "val" / "val_annotations.txt", "".join(table))
    for number in range(3):
        _put(root / "test" / "images" / f"test_{number}.JPEG", next(images))
    _put(root / "wnids.txt", "".join(f"{wnid}\n" for wnid in wnids))
    _put(root / "words.txt", "".join(f"{wnid}\tsome thing\n" for wnid in wnids))


def imagenet(root: Path) -> None:
    """The 1,000 class folders of ImageNet under train/ and val/, one small image in each."""
    images = _photographs(20, 16, seed=2)
    for number, wnid in enumerate(imagenet_wnids()):
        _put(root / "train" / wnid / f"{wnid}_{number}.JPEG", next(images))
        _put(root / "val" / wnid / f"ILSVRC2012_val_{number + 1:08}.JPEG", next(images))
