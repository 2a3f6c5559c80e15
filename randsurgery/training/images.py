"""Image files, read one way in training, evaluation and prediction.

timm's readers say where images lie and its transforms show them; opening them is done here, since
timm's own dataset shows the next image in the place of one that cannot be read.
"""

from __future__ import annotations

import functools
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from randsurgery.errors import DataError, IncompatibleError, reason
from randsurgery.format.specs import InputSpec

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is read: the formats that Pillow decodes itself. (For EPS it would start Ghostscript.)"""

MAX_PIXELS = 1 << 28
"""Pixels of a resized image, before it is cropped: a very long one would take all memory."""


CHECKED_AT_ONCE = 10_000
"""Images that wait for a thread."""


@dataclass(frozen=True)
class Failure:
    """An image without a result: its index in the split, and why."""

    index: int
    reason: str


class Part(NamedTuple):
    """A batch with what it lacks: ``images`` (B, C, H, W), ``labels`` (B,), -1 where there is
    none, and their ``indices`` in the split; ``failures`` of the others."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: list[int]
    failures: list[Failure]


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes by which an image is known in a folder: ``.png``, ``.jpg``, ..."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in _formats())


def image_mode(look: InputSpec) -> str:
    """Pillow's mode for what the network sees. Raises IncompatibleError for neither 1 nor 3
    channels."""
    if look.channels not in (1, 3):
        raise IncompatibleError(
            f"the network sees images of {look.channels} channels, image files are read with 1 "
            "(grey) or 3 (colours)"
        )
    return "L" if look.channels == 1 else "RGB"


def decode(file: BinaryIO, mode: str) -> Image.Image:
    """The image in a file, as mode "RGB" or "L": the first of several frames, transparency
    dropped, not turned as EXIF may say (timm's way), 16-bit greys scaled to 8.

    Raises whatever Pillow does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, lost transparency, odd EXIF data
        return _decode(file, mode)


def _decode(file: BinaryIO, mode: str, *, coarse: bool = False) -> Image.Image:
    image = Image.open(file, formats=_formats())
    if coarse:
        image.draft(mode, (1, 1))  # a JPEG is read whole, and shown at an eighth of its size
    if image.mode == "F":
        raise ValueError("pixels of floating point, whose range is unknown; save 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow would cut off at 255: nearly all would be white
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert(mode)
    return image.convert(mode)


def unreadable(paths: Sequence[str], look: InputSpec, *, cropped: bool = False) -> list[Failure]:
    """The image files that cannot be shown, in order; each is decoded, JPEGs coarsely, on as many
    threads as there are cores. ``cropped``: only a part of each will be resized."""
    mode, side = image_mode(look), 0.0 if cropped else resized_side(look)
    found: list[Failure] = []

    def fault(index: int) -> Failure | None:
        try:
            with open_image(paths[index]) as file:
                image = Image.open(file, formats=_formats())
                check_length(image.size, side)
                file.seek(0)
                _decode(file, mode, coarse=True)
        except Exception as error:  # Pillow raises all kinds
            return Failure(index, _reason(error))
        return None

    with warnings.catch_warnings():  # here, since threads may not change filters
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(paths), CHECKED_AT_ONCE):  # the pool keeps what is to be done
                here = range(start, min(start + CHECKED_AT_ONCE, len(paths)))
                found += [one for one in pool.map(fault, here) if one is not None]
    return found


def open_image(path: str) -> BinaryIO:
    """The file, which must be one: opening a pipe would wait for its writer. Raises ValueError or
    OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    return open(path, "rb")


class Paths:
    """Image files by path, with labels or without, as one of timm's readers."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int] | None = None) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        return open_image(self.paths[index]), None if self.labels is None else self.labels[index]


class Pictures(torch.utils.data.Dataset[Any]):
    """The images of one of timm's readers: (transformed image, label)."""

    def __init__(self, reader: Any, mode: str) -> None:
        self.reader, self.mode = reader, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            image = decode(file, self.mode)
        return self.transform(image), -1 if label is None else label


def resized_side(look: InputSpec) -> float:
    """The shorter side, in pixels, that an image is resized to before it is cropped."""
    return max(look.size) / (float.fromhex(look.crop) or 1.0)


def check_length(size: tuple[int, int], side: float) -> None:
    """Raises ValueError for an image (width, height) too long to be resized by its shorter side."""
    width, height = size
    if side**2 * max(width, height) / min(width, height) > MAX_PIXELS:
        raise ValueError(f"too long to be resized: {width} x {height} pixels")


class Bounded:
    """A transform that first refuses images too long to be resized by their shorter side."""

    def __init__(self, transform: Any, look: InputSpec) -> None:
        self.transform = transform
        self.side = resized_side(look)

    def __call__(self, image: Image.Image) -> Any:
        check_length(image.size, self.side)
        return self.transform(image)


class Caught(torch.utils.data.Dataset[Any]):
    """A dataset that gives a Failure, as a value, for what it cannot read: an error would not
    come out of a loader's process as it went in, and would end the batch."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any, int] | Failure:
        try:
            image, label = self.dataset[index]
        except Exception as error:  # Pillow and torchvision raise all kinds
            return Failure(index, _reason(error))
        return index, image, label


def _reason(error: Exception) -> str:
    """Why an image cannot be read, without the path and address that some messages hold."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return reason(error)


def collate(items: list[tuple[int, Any, int] | Failure]) -> Part:
    """What a loader makes of a batch."""
    failures = [item for item in items if isinstance(item, Failure)]
    shown = [item for item in items if not isinstance(item, Failure)]
    images = [torch.as_tensor(np.asarray(image)) for _, image, _ in shown]
    labels = torch.tensor([label for _, _, label in shown])
    indices = [index for index, _, _ in shown]
    return Part(torch.stack(images) if images else torch.empty(0), labels, indices, failures)


NAMED = 10
"""How many images an error names."""


def refuse(failures: Sequence[Failure], paths: Sequence[str]) -> None:
    """Raises DataError for images that cannot be read: how many, and the first ten with the reason;
    ``paths``, by index, names them if they are files of their own."""
    if not failures:
        return
    named = [
        f"{paths[one.index] if paths else f'image {one.index}'} ({one.reason})"
        for one in failures[:NAMED]
    ]
    more = f" and {len(failures) - NAMED:,} more" if len(failures) > NAMED else ""
    what = "1 image" if len(failures) == 1 else f"{len(failures):,} images"
    raise DataError(
        f"{what} cannot be read: {', '.join(named)}{more}; remove or replace "
        f"{'it' if len(failures) == 1 else 'them'}, or pass --skip-bad"
    )


# --- finding images ------------------------------------------------------------------------------


def find_images(inputs: Sequence[str]) -> list[str]:
    """The paths of images: files as they are, folders with all below, by suffix and sorted. Each
    file once, under the first of the paths that lead to it.

    Raises DataError for a path that is not there and a folder without images.
    """
    found: dict[str, str] = {}
    real = functools.cache(os.path.realpath)
    for path in inputs:
        if os.path.isdir(path):
            inside = _images_below(path)
        elif os.path.lexists(path):
            inside = [path]
        else:
            raise DataError(f"{path}: no such file or folder")
        for name in inside:
            folder, base = os.path.split(name)
            # links to one image are several images, two ways to one folder are not
            found.setdefault(os.path.join(real(folder), base), name)
    return list(found.values())


def _images_below(folder: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be searched ({error.strerror})")

    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        folders.sort()
        if (real := os.path.realpath(root)) in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        found += [
            os.path.join(root, name)
            for name in files
            if os.path.splitext(name)[1].lower() in suffixes()
        ]
    if not found:
        raise DataError(f"{folder}: no images in this folder, expected {', '.join(_formats())}")
    return sorted(found)
