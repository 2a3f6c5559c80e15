"""What a training run is: every number resolved before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from randsurgery.format.specs import CropMode, InputSpec


@dataclass(frozen=True)
class TrainSettings:
    """A run. Names are timm's; ``batch_size`` in images, ``lr`` per step, ``clip_grad`` a norm."""

    epochs: int = 100
    batch_size: int = 128
    opt: str = "momentum"  # timm's name for classical momentum; its "sgd" is Nesterov's
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    sched: str = "cosine"
    warmup_epochs: int = 0
    smoothing: float = 0.0
    clip_grad: float | None = None
    crop_padding: int = 4  # pixels of random crop, 0 for none
    hflip: bool = True  # random horizontal flip
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    seed: int = 0
    workers: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for provenance. ``workers`` changes no bit and is left out."""
        values = asdict(self)
        del values["workers"]
        return values

    def updated(self, **given: Any) -> TrainSettings:
        """A copy with the values that are not None."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})


# Ramanujan et al., Section 4.1: CIFAR-10 with weight decay 1e-4, momentum 0.9, batch 128, cosine,
# 100 epochs. ImageNet follows the NVIDIA ResNet-50 v1.5 recipe that the section names. digits and
# the 28-pixel sets are ours: few, small images; flipping a digit makes another sign, the scans of
# digits are centred, so that cropping only slows learning, and at 0.1 a resnet50's loss jumps.
DEFAULTS: dict[str, TrainSettings] = {
    "digits": TrainSettings(epochs=10, batch_size=32, lr=0.05, crop_padding=0, hflip=False),
    "torch/mnist": TrainSettings(epochs=20, crop_padding=2, hflip=False),
    "torch/kmnist": TrainSettings(epochs=20, crop_padding=2, hflip=False),
    "torch/qmnist": TrainSettings(epochs=20, crop_padding=2, hflip=False),
    "torch/fashion_mnist": TrainSettings(epochs=20, crop_padding=2),
    "torch/cifar10": TrainSettings(),
    "torch/cifar100": TrainSettings(),
    "torch/imagenet": TrainSettings(
        batch_size=256,
        lr=0.256,
        weight_decay=2.0**-15,
        momentum=0.875,
        warmup_epochs=5,
        smoothing=0.1,
    ),
}
OTHERWISE = TrainSettings()


def defaults_for(dataset: str) -> TrainSettings:
    """The defaults of a dataset; the papers' CIFAR-10 values for one not in the table."""
    return DEFAULTS.get(dataset.lower(), OTHERWISE)


@dataclass(frozen=True)
class Look:
    """A dataset's native image size in pixels, and mean and deviation of its channels."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


# Channel statistics of the training splits, for values in [0, 1]; grey sets are shown as three
# equal channels. CIFAR's and ImageNet's are the field's customary figures.
LOOKS: dict[str, Look] = {
    "digits": Look(32, (0.305,) * 3, (0.376,) * 3),
    "torch/mnist": Look(28, (0.1307,) * 3, (0.3081,) * 3),
    "torch/fashion_mnist": Look(28, (0.2860,) * 3, (0.3530,) * 3),
    "torch/cifar10": Look(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "torch/cifar100": Look(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def input_for(
    dataset: str,
    model_cfg: dict[str, Any],
    img_size: int | None = None,
    in_chans: int | None = None,
) -> InputSpec:
    """Preprocessing: the option, else the dataset's native look, else the model's own."""
    look = LOOKS.get(dataset.lower())
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
    interpolation = model_cfg.get("interpolation", "bicubic")
    return InputSpec(
        size=(size, size),
        channels=channels,
        mean=tuple(m.hex() for m in mean),
        std=tuple(s.hex() for s in std),
        interpolation=interpolation if interpolation in ("bilinear", "bicubic") else "bicubic",
        crop=crop.hex(),
        crop_mode=mode,
    )
