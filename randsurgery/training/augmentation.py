"""Augmentation: crops and flips, timm's policies, random erasing, mixup and cutmix.

What is done to an image is drawn by (seed, epoch, image), what mixes a batch by (seed, epoch,
step): nothing depends on batches, workers or a global generator. timm and torchvision draw from
the global ones, which are seeded for as long as they draw and given back as they were.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from randsurgery.errors import UsageError, near
from randsurgery.format.generator import integers, torch_seed
from randsurgery.format.specs import InputSpec
from randsurgery.surgery.randomness import CPU, borrowed
from randsurgery.training.images import image_mode
from randsurgery.training.settings import TrainSettings

Transform = Callable[[Image.Image], torch.Tensor]
"""A picture -> bytes (C, H, W)."""


@contextmanager
def seeded(drawn: int, device: torch.device = CPU) -> Iterator[None]:
    """Python's, NumPy's and torch's generators, those of one device too, start from one number of
    63 bits; afterwards they stand where they stood."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with borrowed(drawn, device):
            random.seed(drawn)
            np.random.seed(drawn & 0xFFFFFFFF)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def plain(settings: TrainSettings) -> bool:
    """True if images in memory can be augmented a batch at a time, by ``moves`` and ``augment``;
    False if they have to go through ``training_transform`` as pictures."""
    return settings.aa is None and settings.crop_padding is not None


def mixes(settings: TrainSettings) -> bool:
    """True if batches go through ``mix``."""
    return settings.mixup > 0 or settings.cutmix > 0


# --- a batch at a time ---------------------------------------------------------------------------


def moves(size: int, settings: TrainSettings, epoch: int) -> torch.Tensor:
    """Crops and flips of an epoch's ``size`` images, for ``plain`` settings.

    Returns (N, 3) integers: row and column offset of the crop, and 1 for a flip.
    """
    assert settings.crop_padding is not None
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


def erase(
    images: torch.Tensor, indices: Sequence[int], settings: TrainSettings, epoch: int
) -> torch.Tensor:
    """Random erasing (Zhong et al., 2017) by timm: with probability ``settings.reprob`` a
    rectangle of an image becomes noise, a normal value a pixel.

    ``images`` (B, C, H, W), normalised; ``indices``: the images' numbers in the split, by which
    they are drawn. Returns (B, C, H, W); without erasing the same tensor, else a new one.
    """
    if not settings.reprob:
        return images
    from timm.data.random_erasing import RandomErasing

    # noise made on the CPU is the same on every device
    erasing = RandomErasing(1.0, mode="pixel", device="cpu")
    images = images.clone()
    for image, index in zip(images, indices, strict=True):
        drawn = torch_seed(settings.seed, f"epoch-{epoch}-erase-{index}")
        if drawn < settings.reprob * 2**63:  # seeding costs more than to know that it is not needed
            with seeded(drawn):
                erasing(image)
    return images


def mix(
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: TrainSettings,
    epoch: int,
    step: int,
    classes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al., 2018) or cutmix (Yun et al., 2019) by timm, one of the two at random if
    both are on: the first image of a batch with the last, the second with the last but one, ...

    ``images`` (B, C, H, W), ``labels`` (B,) classes; ``mixes(settings)`` holds. Returns new images
    (B, C, H, W) and targets (B, ``classes``), float32, with ``settings.smoothing`` in them. Raises
    UsageError for an odd number of images.
    """
    from timm.data import Mixup

    _check_pairs(len(images))
    mixing = Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=settings.smoothing,
        num_classes=classes,
    )
    with seeded(torch_seed(settings.seed, f"epoch-{epoch}-mix-{step}")):
        mixed, targets = mixing(images.clone(), labels)
    return mixed, targets


# --- picture by picture --------------------------------------------------------------------------


def training_transform(look: InputSpec, settings: TrainSettings) -> Transform:
    """What is done to a picture in training, as timm does it: a crop, a flip, a policy.

    The crop is a random resized one, or with ``settings.crop_padding`` a random window of the
    evaluated picture, padded with zeros. Draws from the global generators: to be called while they
    are ``seeded``. Very long pictures are for ``images.Bounded`` to refuse. Raises UsageError for
    an unknown policy, IncompatibleError for neither 1 nor 3 channels.
    """
    from timm.data import create_transform
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    if settings.aa is not None:
        check_policy(settings.aa)
    if settings.crop_padding is None:
        resized = RandomResizedCropAndInterpolation(
            look.size, settings.scale, settings.ratio, look.interpolation
        )
        crop = [_RandomResizedCrop(resized)]
    else:
        crop = [*_evaluated(look), transforms.RandomCrop(look.size, padding=settings.crop_padding)]
    flip = [transforms.RandomHorizontalFlip(0.5)] if settings.hflip else []
    _, policy, last = create_transform(
        (look.channels, *look.size),
        is_training=True,
        separate=True,
        use_prefetcher=True,  # bytes out; normalisation happens on the device
        color_jitter=None,
        auto_augment=settings.aa,
        interpolation=look.interpolation,
        mean=_mean(look),  # fills what a rotation or translation leaves
    )
    for operation in _operations(policy):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    steps: Transform = transforms.Compose([_As(image_mode(look)), *crop, *flip, policy, last])
    return steps


def evaluation_transform(look: InputSpec) -> Transform:
    """What is done to a picture in evaluation, as timm does it: resized and cropped. Errors and
    very long pictures as in ``training_transform``."""
    from timm.data.transforms import MaybePILToTensor
    from torchvision import transforms

    steps = [_As(image_mode(look)), *_evaluated(look), MaybePILToTensor()]
    shown: Transform = transforms.Compose(steps)
    return shown


def _evaluated(look: InputSpec) -> list[Any]:
    """timm's steps from a picture to one of ``look.size``."""
    from timm.data import create_transform

    steps = create_transform(
        (look.channels, *look.size),
        use_prefetcher=True,
        interpolation=look.interpolation,
        crop_pct=float.fromhex(look.crop),
        crop_mode=look.crop_mode,
        mean=_mean(look),  # fills the border of crop mode "border"
    ).transforms
    return list(steps[:-1])  # the last makes bytes of it


def _mean(look: InputSpec) -> tuple[float, ...]:
    return tuple(float.fromhex(value) for value in look.mean)


@dataclass(frozen=True)
class _As:
    """A picture in a mode of Pillow's."""

    mode: str

    def __call__(self, image: Image.Image) -> Image.Image:
        return image if image.mode == self.mode else image.convert(self.mode)


@dataclass(frozen=True)
class _RandomResizedCrop:
    """timm's, but of one pixel at least: of very small pictures it may cut a window without any,
    which is shown black."""

    crop: Any

    def __call__(self, image: Image.Image) -> Image.Image:
        from torchvision.transforms.functional import resized_crop

        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        height, width = max(height, 1), max(width, 1)
        top, left = min(top, image.height - height), min(left, image.width - width)
        shown: Image.Image = resized_crop(
            image, top, left, height, width, crop.size, crop.interpolation
        )
        return shown


def _operations(policy: Any) -> Iterator[Any]:
    """The operations that timm's policies choose from."""
    for step in policy.transforms:
        yield from step.ops if hasattr(step, "ops") else itertools.chain(*step.policy)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, black where no bit is kept, as its policies mean it: Pillow 13 refuses 0 bits."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


# --- what can be asked for -----------------------------------------------------------------------


class _Range(NamedTuple):
    """The numbers that a part of a policy takes."""

    low: float
    high: float
    whole: bool = True

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}"


# timm's grammar (timm/data/auto_augment.py). Its own reading passes over parts that hold no number,
# takes an unknown set of operations for the usual one, and mmax0 or d0 for nothing given. The upper
# bounds are ours, far above what anyone uses; below 0.1, augmix's weights can become NaN.
_MAGNITUDE, _COUNT, _SWITCH = _Range(0, 100), _Range(1, 100), _Range(0, 1)
_NOISE, _ALPHA, _SHARE = _Range(0, 1000, False), _Range(0.1, 100, False), _Range(0, 1, False)
_PARTS: dict[str, dict[str, _Range]] = {
    "rand": {
        "m": _MAGNITUDE, "n": _COUNT, "p": _SHARE, "mstd": _NOISE, "mmax": _COUNT, "inc": _SWITCH,
    },
    "augmix": {
        "m": _MAGNITUDE, "w": _COUNT, "d": _COUNT, "a": _ALPHA, "b": _SWITCH, "mstd": _NOISE,
    },
    **{name: {"mstd": _NOISE} for name in ("v0", "v0r", "original", "originalr", "3a")},
}  # fmt: skip
_SETS = ("tweights", "t3a", "t3aw")  # of RandAugment's operations

AA_POLICIES = tuple(_PARTS)
"""What a policy's name begins with: RandAugment (Cubuk et al., 2020), AugMix (Hendrycks et al.,
2020), AutoAugment (Cubuk et al., 2019), 3-Augment (Touvron et al., 2022). Parts follow: "-m9"."""


def check_policy(aa: str) -> None:
    """Raises UsageError for the name of a policy that timm would refuse, or read as another."""
    family, *parts = aa.split("-")
    if family not in _PARTS:
        raise UsageError(
            f"unknown --aa policy {aa!r}, expected {', '.join(AA_POLICIES)}, with parts such as "
            "rand-m9-mstd0.5-inc1" + near(family, AA_POLICIES)
        )
    found: dict[str, float] = {}
    for part in parts:
        key, value = _read_part(aa, family, part)
        if key in found:
            raise UsageError(f"--aa {aa!r}: {key} is given twice; give it once")
        found[key] = value
    if family == "rand" and "t" in found:
        _check_set(aa, next(part for part in parts if part in _SETS), found)


def _read_part(aa: str, family: str, part: str) -> tuple[str, float]:
    """A part's letters and number; of a set of operations ("t", 0)."""
    sets = _SETS if family == "rand" else ()
    if part in sets:
        return "t", 0
    read = re.fullmatch(r"([a-z]+)(.*)", part, re.DOTALL)
    taken = _PARTS[family].get(read[1]) if read else None
    if read is None or taken is None:
        expected = ", ".join(_PARTS[family]) + "".join(f", or {name}" for name in sets)
        raise UsageError(f"--aa {aa!r}: unknown part {part!r}, expected a number after {expected}")
    form = r"[0-9]+" if taken.whole else r"[0-9]+(\.[0-9]+)?"
    if not re.fullmatch(form, read[2]) or not taken.low <= float(read[2]) <= taken.high:
        raise UsageError(f"--aa {aa!r}: {read[1]} takes {taken}, found {part!r}")
    return read[1], float(read[2])


def _check_set(aa: str, name: str, found: dict[str, float]) -> None:
    """What a set of operations makes of the other parts."""
    from timm.data.auto_augment import rand_augment_choices

    if found.get("inc") == 0:  # timm passes over it
        raise UsageError(f"--aa {aa!r}: the operations of {name} are increasing; leave inc0 out")
    operations = rand_augment_choices(name[1:])
    # weighted operations are chosen without replacement
    if isinstance(operations, dict) and found.get("n", 2) > len(operations):
        raise UsageError(f"--aa {aa!r}: {name} has {len(operations)} operations; give a smaller n")


def check_augmentation(
    settings: TrainSettings, look: InputSpec, *, resident: bool, size: int | None = None
) -> None:
    """Raises UsageError for augmentation that cannot be done, or that would be another one, and
    IncompatibleError for pictures of neither 1 nor 3 channels.

    ``resident``: the images are in memory as bytes, of any number of channels, and no pictures;
    ``size``: how many there are in training, if that is known.
    """
    if settings.aa is not None:
        check_policy(settings.aa)
    if not resident:
        image_mode(look)
    if look.channels not in (1, 3) and not plain(settings):
        wish, remedy = f"--aa {settings.aa}", "leave it out"
        if settings.aa is None:
            wish, remedy = "a random resized crop", "give --crop-padding"
        raise UsageError(
            f"{wish} takes images of 1 or 3 channels, the network sees {look.channels}; {remedy}"
        )
    _check_crop(settings, look)
    if not 0 <= settings.reprob <= 1:
        raise UsageError(f"--reprob must lie in [0, 1], found {settings.reprob}")
    for name, alpha in (("--mixup", settings.mixup), ("--cutmix", settings.cutmix)):
        if not (math.isfinite(alpha) and alpha >= 0):
            raise UsageError(f"{name} must be a number from 0 on, found {alpha}")
    if mixes(settings):
        _check_pairs(min(settings.batch_size, size or settings.batch_size))


def _check_pairs(count: int) -> None:
    if count % 2:
        raise UsageError(
            "--mixup and --cutmix mix pairs and need an even number of images a batch, found "
            f"{count}; change --batch-size"
        )


def _check_crop(settings: TrainSettings, look: InputSpec) -> None:
    if settings.crop_padding is not None:
        if not 0 <= settings.crop_padding <= min(look.size):
            raise UsageError(
                f"--crop-padding must lie in [0, {min(look.size)}], at most an image's size, "
                f"found {settings.crop_padding}"
            )
        return
    for name, (low, high), most in (
        ("--scale", settings.scale, 1),
        ("--ratio", settings.ratio, 100),
    ):
        if not 0 < low <= high <= most:
            raise UsageError(
                f"{name} must be two numbers, 0 < low <= high <= {most}, found {low} and {high}"
            )
