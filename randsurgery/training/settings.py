"""What a training run is: every number resolved before it starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Keep = Literal["last", "best"]


@dataclass(frozen=True)
class TrainSettings:
    """A run. Names are timm's; ``batch_size`` in images, ``lr`` per step, ``clip_grad`` a norm.

    ``decay_milestones``: the epochs, counted from 0, from which a step schedule's rate is lower by
    ``decay_rate``. ``crop_padding``: pixels of zeros around an image of which a random window is
    cut, 0 for none; None for random resized crops of ``scale`` (share of the area) and ``ratio``
    (width / height). ``val_split``: the share of the training images that is held out, as it was
    written; ``val_seed``: of the draw. ``patience``: epochs without a better validation accuracy
    after which a run ends.
    """

    epochs: int = 100
    batch_size: int = 128
    opt: str = "momentum"  # timm's name for classical momentum; its "sgd" is Nesterov's
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    sched: str = "cosine"
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = 0.1
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5  # where the warm-up begins; timm's default
    smoothing: float = 0.0
    clip_grad: float | None = None
    class_weights: str | None = None  # "balanced": of the loss, images / (classes x class's images)
    crop_padding: int | None = 4
    scale: tuple[float, float] = (0.08, 1.0)  # timm's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: bool = True  # random horizontal flip
    aa: str | None = None  # timm's AutoAugment, RandAugment, ... policy
    reprob: float = 0.0  # of random erasing, an image
    mixup: float = 0.0  # alpha
    cutmix: float = 0.0  # alpha
    model_ema: bool = False  # an exponential moving average of what is learned
    model_ema_decay: float = 0.9998  # timm's
    val_split: str | None = None
    val_seed: int = 0
    keep: Keep = "last"
    patience: int | None = None
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False
    seed: int = 0
    workers: int = 0

    @property
    def steps_down(self) -> bool:
        """True if the rate falls at ``decay_milestones``."""
        return self.sched in ("step", "multistep")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for provenance. What changes no bit (``workers``) or means nothing beside
        the others (a step schedule's numbers with cosine) is left out."""
        values = asdict(self)
        idle = {"workers"}
        if not self.steps_down:
            idle |= {"decay_milestones"} | ({"decay_rate"} if self.sched != "poly" else set())
        if self.sched in ("step", "multistep", "constant", "none"):
            idle |= {"min_lr"}
        if not self.warmup_epochs:
            idle |= {"warmup_lr"}
        idle |= {"crop_padding"} if self.crop_padding is None else {"scale", "ratio"}
        if not self.model_ema:
            idle |= {"model_ema", "model_ema_decay"}
        if self.val_split is None:
            idle |= {"val_seed"}
        idle |= {key for key in ("aa", "class_weights", "val_split", "patience") if not values[key]}
        idle |= {key for key in ("reprob", "mixup", "cutmix") if not values[key]}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
            if key not in idle
        }

    def updated(self, **given: Any) -> TrainSettings:
        """A copy with the values that are not None."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})
