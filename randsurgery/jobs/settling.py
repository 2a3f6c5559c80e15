"""The settings of a training job: defaults for what it learns of what, under what was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from randsurgery.errors import UsageError
from randsurgery.training.catalogue import WITHOUT_NORMS_LR, recipe, recipe_name
from randsurgery.training.optimisation import check_settings, idle_options, resolve_milestones
from randsurgery.training.settings import TrainSettings


@dataclass(frozen=True)
class Wish:
    """What decides the settings.

    ``overrides``: settings that were given, None for those that were not, and ``decay_epochs`` and
    ``decay_milestones`` as they were. ``recipe``: a row of defaults, if not the dataset's.
    ``weights``: weights are learned, not masks. ``adapted`` may change the defaults.
    """

    dataset: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    recipe: str | None = None
    weights: bool = True
    adapted: Callable[[TrainSettings], TrainSettings] = lambda settings: settings


def settle(
    wish: Wish, classes: Sequence[str] = (), *, norms: bool = True
) -> tuple[TrainSettings, list[str]]:
    """The settings for a dataset of these classes and a network with ``norms`` or without, and what
    was decided for the user. Raises UsageError."""
    given = {key: value for key, value in wish.overrides.items() if value is not None}
    drops = {key: tuple(given.pop(key, ())) for key in ("decay_epochs", "decay_milestones")}
    own, notes = recipe_name(wish.dataset, classes), []
    if wish.recipe is None and own != recipe_name(wish.dataset):
        notes.append(f"the folder has the classes of ImageNet: using --recipe {own}")
    found = recipe(wish.recipe or own)
    if wish.weights and not norms:
        found = replace(found, lr=min(found.lr, WITHOUT_NORMS_LR))
    found = wish.adapted(found).updated(seed=wish.seed, val_seed=wish.seed)
    defaults = found
    found = _cropped(found, given).updated(**given)
    if "warmup_epochs" not in given:  # a short run has a short one
        found = replace(found, warmup_epochs=min(found.warmup_epochs, found.epochs // 2))
    if found.steps_down:
        milestones = resolve_milestones(found.epochs, *drops.values())
        found = replace(found, decay_milestones=milestones)
    if "model_ema_decay" in given and not found.model_ema:
        raise UsageError("--model-ema-decay goes with --model-ema")
    # a settings file has every number: what it says as the defaults do, nobody asked for
    asked = {key for key, value in given.items() if value != getattr(defaults, key)}
    asked |= {key for key, value in drops.items() if value}
    if idle := idle_options(found, asked):
        hints = {"--decay": "pass --sched step, or ", "--warmup-lr": "pass --warmup-epochs, or "}
        drop = next((hint for name, hint in hints.items() if idle[0].startswith(name)), "")
        raise UsageError(
            f"{idle[0]} would do nothing with --opt {found.opt} and --sched {found.sched}; "
            f"{drop}leave it out"
        )
    check_settings(found)
    return found, notes


def _cropped(settings: TrainSettings, given: Mapping[str, Any]) -> TrainSettings:
    """Crops of one kind: windows of a padded image, or random resized ones."""
    resized = [name for name in ("scale", "ratio") if name in given]
    if resized and "crop_padding" in given:
        raise UsageError(
            f"--{resized[0]} is of random resized crops, --crop-padding of windows of a padded "
            "image; give one of them"
        )
    return replace(settings, crop_padding=None) if resized else settings


def told(settings: TrainSettings) -> dict[str, Any]:
    """The settings that mean something, as provenance and the settings file have them: Adam knows
    no momentum."""
    found = settings.to_json()
    idle = {option[2:].replace("-", "_") for option in idle_options(settings, found)}
    return {key: value for key, value in found.items() if key not in idle}
