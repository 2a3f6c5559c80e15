"""The datasets that are known by name, one row each: their defaults, and how their images look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from randsurgery.errors import UsageError, near
from randsurgery.format.specs import CropMode, InputSpec, Interpolation
from randsurgery.training.settings import TrainSettings

# "cifar": Ramanujan et al., Section 4.1, CIFAR-10; crop and flip are of their code,
# hidden-networks. "imagenet": 100 epochs of cosine are the section's, the other numbers those of
# NVIDIA's ResNet-50 v1.5, which it refers to; the five epochs of warm-up are hidden-networks',
# NVIDIA warms up for larger batches only. The others are ours: few, small images; flipping a digit
# makes another sign, the scans of digits are centred, so that cropping only slows learning, and at
# 0.1 a resnet50's loss jumps.
_CIFAR = TrainSettings()
RECIPES: dict[str, TrainSettings] = {
    "cifar": _CIFAR,
    "imagenet": replace(
        _CIFAR, batch_size=256, lr=0.256, weight_decay=2.0**-15, momentum=0.875, warmup_epochs=5,
        smoothing=0.1, crop_padding=None,
    ),
    "digits": replace(_CIFAR, epochs=10, batch_size=32, lr=0.05, crop_padding=0, hflip=False),
    "mnist": replace(_CIFAR, epochs=20, crop_padding=2, hflip=False),
    "fashion": replace(_CIFAR, epochs=20, crop_padding=2),
    "folder": replace(_CIFAR, crop_padding=None),
}  # fmt: skip
"""Rows of defaults by name (``--recipe``)."""

WITHOUT_NORMS_LR = 0.01
"""Of learned weights in a network without norms: at 0.1 a conv2's loss stays at ln C."""


@dataclass(frozen=True)
class Look:
    """A dataset's native image size in pixels, and mean and deviation of its channels."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Known:
    """A dataset: the name of its defaults, its images' look if they share one, and whether it is
    small enough to live on the device."""

    recipe: str
    look: Look | None = None
    resident: bool = False


def _grey(size: int, mean: float, std: float) -> Look:
    """Grey sets are shown as three equal channels."""
    return Look(size, (mean,) * 3, (std,) * 3)


# Channel statistics of the training splits, for values in [0, 1]: the field's customary figures;
# those of digits are ours. QMNIST's are MNIST's: its training images are reconstructions of those,
# a few grey levels away.
DATASETS: dict[str, Known] = {
    "digits": Known("digits", _grey(32, 0.305, 0.376), True),
    "torch/mnist": Known("mnist", _grey(28, 0.1307, 0.3081), True),
    "torch/fashion_mnist": Known("fashion", _grey(28, 0.2860, 0.3530), True),
    "torch/kmnist": Known("mnist", _grey(28, 0.1918, 0.3483), True),
    "torch/qmnist": Known("mnist", _grey(28, 0.1307, 0.3081), True),
    "torch/cifar10": Known(
        "cifar", Look(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), True
    ),
    "torch/cifar100": Known(
        "cifar", Look(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), True
    ),
    "torch/imagenet": Known("imagenet"),
    "torch/places365": Known("folder"),
    "torch/inaturalist": Known("folder"),
}
UNKNOWN = Known("folder")
"""A folder, or a set of the Hub."""


def known(dataset: str) -> Known:
    """The row of a dataset; that of folders for one not in the table."""
    return DATASETS.get(dataset.lower(), UNKNOWN)


def recipe_name(dataset: str, classes: Sequence[str] = ()) -> str:
    """The defaults of a dataset by name; of a folder of ImageNet's 1,000 classes, ImageNet's."""
    return "imagenet" if dataset == "folder" and is_imagenet(classes) else known(dataset).recipe


def recipe(name: str) -> TrainSettings:
    """A row of defaults. Raises UsageError for an unknown name."""
    if name not in RECIPES:
        raise UsageError(
            f"unknown --recipe {name!r}, expected {', '.join(RECIPES)}" + near(name, RECIPES)
        )
    return RECIPES[name]


def is_imagenet(classes: Sequence[str]) -> bool:
    """True for the 1,000 classes of ImageNet (ILSVRC 2012), as folders name them."""
    if len(classes) != 1000:
        return False
    from timm.data import ImageNetInfo

    return set(classes) == set(ImageNetInfo().label_names())


def input_for(
    dataset: str,
    model_cfg: dict[str, Any],
    img_size: int | None = None,
    in_chans: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> InputSpec:
    """Preprocessing: the option, else the dataset's native look, else the model's own.

    Raises UsageError for values out of range.
    """
    look = known(dataset).look
    channels = in_chans or 3
    native = model_cfg.get("input_size", (3, 224, 224))[-1]
    size = img_size or (look.size if look else native)
    mean = look.mean if look else tuple(model_cfg.get("mean", (0.485, 0.456, 0.406)))
    std = look.std if look else tuple(model_cfg.get("std", (0.229, 0.224, 0.225)))
    if channels != len(mean):
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    crop = 1.0 if look else float(model_cfg.get("crop_pct", 0.875))
    modes: dict[Any, CropMode] = {"squash": "squash", "border": "border"}
    mode = modes.get(None if look else model_cfg.get("crop_mode"), "center")
    own = model_cfg.get("interpolation", "bicubic")
    made = InputSpec(
        size=(size, size),
        channels=channels,
        mean=tuple(m.hex() for m in mean),
        std=tuple(s.hex() for s in std),
        interpolation=own if own in ("bilinear", "bicubic") else "bicubic",
        crop=crop.hex(),
        crop_mode=mode,
    )
    return shown_as(made, crop_pct=crop_pct, interpolation=interpolation)


def shown_as(
    look: InputSpec,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> InputSpec:
    """The same preprocessing with the options that were given. Raises UsageError."""
    changed: dict[str, Any] = {}
    if img_size is not None:
        changed["size"] = (img_size, img_size)
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise UsageError(f"--crop-pct must lie in (0, 1], found {crop_pct}")
        changed["crop"] = float(crop_pct).hex()
    if interpolation is not None:
        if interpolation not in get_args(Interpolation):
            raise UsageError(
                f"unknown --interpolation {interpolation!r}, expected "
                f"{', '.join(get_args(Interpolation))}"
            )
        changed["interpolation"] = interpolation
    return look.model_copy(update=changed)
