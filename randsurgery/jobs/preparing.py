"""What a training job is told, and the check of all that it needs; nothing is trained yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from randsurgery.errors import (
    DataError,
    FileFormatError,
    IncompatibleError,
    OutputError,
    UsageError,
)
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_network, check_output, check_picture
from randsurgery.format.shards import check_not_input
from randsurgery.format.specs import DatasetSpec
from randsurgery.format.writing import check_not_base
from randsurgery.jobs.inputs import (
    DataOptions,
    describe,
    look_for,
    look_for_file,
    model_arguments,
    pick_device,
    resolve_dataset,
)
from randsurgery.jobs.records import (
    metrics_path,
    settings_path,
)
from randsurgery.jobs.settling import Wish, settle
from randsurgery.jobs.sources import SourceSpec, open_file, open_source, resolve_source
from randsurgery.jobs.splits import Splits, check_classes, open_for_training
from randsurgery.surgery.heads import (
    FixedKind,
    describe_head,
    head_sentence,
    with_fixed_head,
    with_head,
)
from randsurgery.surgery.initialisers import Init
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.roles import has_norms
from randsurgery.training.augmentation import check_augmentation
from randsurgery.training.data import Data, Resident
from randsurgery.training.loop import check_choice
from randsurgery.training.settings import TrainSettings

FELL_BACK = "no dataset given: using digits (scikit-learn's 8x8 scans, shown at 32x32)"


@dataclass(frozen=True)
class RunPlan:
    """What every training job is told.

    ``overrides``: training settings that were given, and ``decay_epochs`` and ``decay_milestones``
    as they were. ``recipe``: the row of defaults, if not the dataset's. ``learns``: masks over
    weights that stay as they were drawn, or weights; defaults depend on it. ``head``: a fixed
    classifier to put in, with ``head_scale`` if that is given and not learned. ``resume``: a
    state's path, or "auto" for the job's own if it is there. ``state_every``: steps between states
    besides each epoch's end, 0 for none. ``log_to``: further records ("tensorboard").
    """

    source: SourceSpec
    data: DataOptions = field(default_factory=DataOptions)
    overrides: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    learns: Literal["masks", "weights"] = "weights"
    seed: int = 0
    head: FixedKind | None = None
    head_scale: float | None = None
    output: str | None = None
    device: str = "auto"
    force: bool = False
    resume: str | None = None
    state_every: int = 0
    log_to: tuple[str, ...] = ()
    plot: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A checked job, ready to train: nothing has been trained or written."""

    plan: RunPlan
    checkpoint: Checkpoint
    dataset: DatasetSpec
    notes: tuple[str, ...]  # what was decided for the user
    images: Splits
    settings: TrainSettings
    device: torch.device
    output: Path


def state_path(output: Path) -> Path:
    """Where a job's state lies while it runs: beside the output."""
    return output.with_name(f"{output.stem}.state.safetensors")


def prepare(
    plan: RunPlan,
    stack: contextlib.ExitStack,
    label: str,
    *,
    flat: bool = True,
    defaults: Callable[[TrainSettings], TrainSettings] = lambda settings: settings,
) -> Prepared:
    """Check everything a training job needs. Raises RandsurgeryError; writes nothing.

    ``label`` names the default output. ``flat``: a file's own overlays are moved into the shared
    entries, so that what is learned next is the member's. ``defaults`` may change those of the
    dataset. What is opened is closed by ``stack``.
    """
    init: Init = "signed-constant" if plan.learns == "masks" else "kaiming-normal"
    source = resolve_source(plan.source, plan.seed, init)
    plan = replace(plan, source=source)
    recorded: Checkpoint | None = None
    if source.is_file:
        recorded = stack.enter_context(open_source(source) if flat else open_file(source))
    member = recorded.member() if recorded else None
    dataset, fell_back = resolve_dataset(
        plan.data.dataset, plan.data.data_dir, member.dataset if member else None
    )
    name = Path(plan.output or _default_output(plan, dataset, label))
    if resumes_own(plan, name):
        # this run was let write there when it began; it may have been stopped after it had
        plan = replace(plan, force=True)
    output = _outputs(plan, name)
    device = pick_device(plan.device)
    wish = Wish(
        dataset.name, plan.overrides, plan.seed, plan.recipe, plan.learns == "weights", defaults
    )
    settings, _ = settle(wish)  # what is wrong is told before any image is read
    look = (
        look_for(source, dataset.name, plan.data)
        if recorded is None
        else look_for_file(recorded.recipe, recorded.member(), dataset.name, plan.data)
    )
    known = member.classes if member else None
    asked = plan.data.request(dataset, look, device, settings.workers, known)
    asked = replace(asked, val_split=settings.val_split, val_seed=settings.val_seed)
    images = open_for_training(asked)
    check_choice(settings, validated=images.validation is not None)
    classes = _classes(plan.data.num_classes, dataset, images.train)
    notes = [FELL_BACK] if fell_back else []
    notes += images.notes
    if recorded is not None:
        checkpoint = with_head(recorded, classes)
        if checkpoint is not recorded:
            notes.append(f"the classifier is drawn anew for the dataset's {classes} classes")
        else:
            check_classes(images.classes, asked)
    else:
        args = model_arguments(source, look, classes)
        checkpoint = stack.enter_context(open_source(replace(source, args=args), notes))
    if plan.head is not None:
        seed = plan.seed if source.seed is None else source.seed
        checkpoint = with_fixed_head(checkpoint, plan.head, seed=seed, scale=plan.head_scale)
        about = describe_head(checkpoint)
        assert about is not None
        notes.append(head_sentence(about))
    settings, decided = settle(wish, images.classes, norms=has_norms(meta_module(checkpoint)))
    notes += decided
    resident = isinstance(images.train, Resident)
    check_augmentation(settings, look, resident=resident, size=len(images.train))
    check_not_base(output, checkpoint.recipe)
    checkpoint = describe(checkpoint, look, images.dataset, images.classes, classes)
    return Prepared(
        plan, checkpoint, images.dataset, tuple(notes), images, settings, device, output
    )


def _classes(given: int | None, dataset: DatasetSpec, train: Data) -> int:
    classes = given or len(train.classes)
    if classes == 0:
        raise DataError(f"{dataset.name} does not say its classes; pass --num-classes")
    if classes < len(train.classes):
        raise IncompatibleError(
            f"--num-classes {classes} is too few: {dataset.name} has {len(train.classes)}"
        )
    return classes


def _outputs(plan: RunPlan, name: Path) -> Path:
    """The output's path; it and all that is written beside it are checked."""
    if plan.resume is not None and name.exists() and not (resumes_own(plan, name) or plan.force):
        raise OutputError(
            f"{name}: is finished, and its state is gone; to go on from its weights, pass it as "
            "the source of train; --force begins anew"
        )
    output = check_network(name, force=plan.force)
    check_not_input(output, plan.source.inputs)
    if state_path(output).exists() and not resumes_own(plan, output) and not plan.force:
        raise OutputError(
            f"{state_path(output)}: is the state of a run that was stopped; --resume auto goes on "
            "with it, --force begins anew"
        )
    for beside in (metrics_path(output), settings_path(output)):
        check_output(beside, force=plan.force)
    if plan.plot is not None:
        check_picture(plan.plot, force=plan.force)
    if plan.resume not in (None, "auto") and not Path(str(plan.resume)).is_file():
        raise FileFormatError(
            f"--resume {plan.resume}: no such file; pass auto to start without one"
        )
    if unknown := [name for name in plan.log_to if name != "tensorboard"]:
        raise UsageError(f"unknown --log-to {unknown[0]!r}, expected tensorboard")
    return output


def resumes_own(plan: RunPlan, output: Path) -> bool:
    """True if the state to go on from is the one beside the output."""
    own = state_path(output)
    if plan.resume is None or not own.is_file():
        return False
    return plan.resume == "auto" or own.resolve() == Path(plan.resume).resolve()


def _default_output(plan: RunPlan, dataset: DatasetSpec, label: str) -> str:
    stem = Path(plan.source.name).stem if plan.source.is_file else plan.source.name
    data = dataset.name.replace("/", "-").removeprefix("torch-")
    return f"{stem}-{data}-{label}.safetensors"


@contextlib.contextmanager
def closing_on_error() -> Iterator[contextlib.ExitStack]:
    """A stack whose files stay open if all went well: the job's owner closes them."""
    with contextlib.ExitStack() as stack:
        yield stack
        stack.pop_all()
