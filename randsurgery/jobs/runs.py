"""What all training jobs share: resolve, check, train with a state that can be resumed, write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from randsurgery.errors import (
    DataError,
    DivergedError,
    FileFormatError,
    IncompatibleError,
    OutputError,
    UsageError,
)
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import (
    check_network,
    check_not_input,
    check_output,
    check_picture,
    clear_unfinished,
)
from randsurgery.format.specs import DatasetSpec
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.inputs import (
    DataOptions,
    describe,
    look_facts,
    look_for,
    look_for_file,
    model_arguments,
    pick_device,
    resolve_dataset,
)
from randsurgery.jobs.records import (
    SECONDS,
    Recorder,
    keep_base,
    metrics_path,
    settings_path,
    with_provenance,
    write_settings,
)
from randsurgery.jobs.settling import Wish, settle, told
from randsurgery.jobs.sources import SourceSpec, open_file, open_source, resolve_source
from randsurgery.jobs.splits import Splits, check_classes, open_for_training
from randsurgery.surgery.heads import (
    FixedKind,
    describe_head,
    head_scale,
    head_sentence,
    with_fixed_head,
    with_head,
)
from randsurgery.surgery.initialisers import Init
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.roles import has_norms
from randsurgery.training.augmentation import check_augmentation
from randsurgery.training.catalogue import recipe_name
from randsurgery.training.data import Data, Resident
from randsurgery.training.loop import Hooks, Record, check_choice, fit
from randsurgery.training.settings import TrainSettings
from randsurgery.training.state import RunState, read_state, write_state

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


@dataclass(frozen=True)
class Result:
    """What a job wrote."""

    path: Path
    bytes: int
    records: list[Record]
    metrics_path: Path


@dataclass(frozen=True)
class Technique:
    """What a job does to its module and says of itself.

    ``attach``: make the module learn. ``settings``: for provenance, and to know the run again.
    ``options``: further options of the command line, for the settings file.
    ``extra``: given the module, a function for each epoch's further figures, and one that gives and
    one that takes what it remembers. ``scores``: keep popup scores in the file.
    """

    command: str
    attach: Callable[[nn.Module], object]
    settings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    watch: Callable[[nn.Module], Hooks] | None = None
    scores: bool = False


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
    if _resumes_own(plan, name):
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
        checkpoint = stack.enter_context(open_source(replace(source, args=args)))
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
    output = check_network(name, force=plan.force)
    check_not_input(output, plan.source.inputs)
    if state_path(output).exists() and not _resumes_own(plan, output) and not plan.force:
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


def _resumes_own(plan: RunPlan, output: Path) -> bool:
    """True if the state to go on from is the one beside the output."""
    own = state_path(output)
    if plan.resume is None or not own.is_file():
        return False
    return plan.resume == "auto" or own.resolve() == Path(plan.resume).resolve()


def _default_output(plan: RunPlan, dataset: DatasetSpec, label: str) -> str:
    stem = Path(plan.source.name).stem if plan.source.is_file else plan.source.name
    data = dataset.name.replace("/", "-").removeprefix("torch-")
    return f"{stem}-{data}-{label}.safetensors"


def identity(job: Prepared, technique: Technique) -> dict[str, Any]:
    """What makes two runs the same run: the network they start from and every setting."""
    start = canonical_json(job.checkpoint.recipe.to_json())
    settings = {**technique.settings, **job.settings.to_json()}
    data = {
        "dataset": job.dataset.to_json(),
        "data_dir": job.plan.data.data_dir,
        "images": job.images.to_json(),
        "device": job.device.type,
    }
    return {"command": technique.command, "network": digest(start), **data, **settings}


def carry_out(job: Prepared, technique: Technique, hooks: Hooks | None = None) -> Result:
    """Train, then write, re-read and verify the file; the state goes when the file is there.

    Raises DivergedError on a NaN loss; the last good state is then kept.
    """
    plan, state_file = job.plan, state_path(job.output)
    run = identity(job, technique)
    hooks = hooks or Hooks()
    resumed = resumed_state(job, technique)
    if resumed is not None and (word := resumed.elsewhere()):
        hooks.on_note(word)
    for name in (job.output.name, state_file.name):
        clear_unfinished(job.output.with_name(name))
    model = build(job.checkpoint).to(job.device)
    technique.attach(model)
    watch = technique.watch(model) if technique.watch else Hooks()
    kept = resumed is not None

    def keep(state: RunState) -> None:
        nonlocal kept
        write_state(state_file, state, run)
        kept = True

    try:
        with Recorder(job.output, plan.log_to) as recorder:
            recorder.repeat(resumed.values["history"] if resumed else [])
            hooks = _joined(hooks, watch, recorder, model, resumed)
            hooks.on_state = keep
            hooks.state_every = plan.state_every
            images = job.images
            records = fit(
                model, images.train, images.test, job.settings, hooks,
                validation=images.validation, classes=_head_classes(job), resume=resumed,
            )  # fmt: skip
            model.eval()
            checkpoint = harvest(job.checkpoint, model.cpu(), scores=technique.scores)
            settings = {**technique.settings, **told(job.settings)}
            checkpoint = with_provenance(
                checkpoint, technique.command, settings, records, images.to_json()
            )
            keep_base(checkpoint, job.output)
            size = write_checkpoint(job.output, checkpoint, force=plan.force)
            given = {**settings, **options(plan), **technique.options}
            write_settings(job.output, given, job.dataset)
    except DivergedError as error:
        raise DivergedError(
            f"{error}; the last good state is {state_file}, --force begins anew over it"
            if kept
            else str(error)
        ) from None
    except KeyboardInterrupt:
        if not kept:
            raise
        raise KeyboardInterrupt(
            f"interrupted; no result was written; --resume {state_file} goes on from the last state"
        ) from None
    state_file.unlink(missing_ok=True)
    return Result(job.output, size, records, metrics_path(job.output))


def options(plan: RunPlan) -> dict[str, Any]:
    """The options of a run that are not settings of training, for the settings file."""
    data, source = plan.data, plan.source
    return {
        "model-kwargs": [f"{key}={value}" for key, value in source.args.items()] or None,
        "pretrained": source.pretrained or None,
        "checkpoint": source.checkpoint if source.origin is None else None,
        "data-dir": data.data_dir,
        "num-classes": data.num_classes,
        "img-size": data.img_size,
        "in-chans": data.in_chans,
        "crop-pct": data.crop_pct,
        "interpolation": data.interpolation,
        "any-classes": data.any_classes or None,
        "skip-bad": data.skip_bad or None,
        "recipe": plan.recipe,
    }


def _head_classes(job: Prepared) -> int | None:
    head = job.checkpoint.member().head
    return None if head is None else head.classes


def resumed_state(job: Prepared, technique: Technique) -> RunState | None:
    """The state that the job goes on from, None if it begins. Raises FileFormatError or
    IncompatibleError."""
    plan, own = job.plan, state_path(job.output)
    if plan.resume is None or (plan.resume == "auto" and not own.is_file()):
        return None
    return read_state(own if plan.resume == "auto" else plan.resume, identity(job, technique))


def _joined(
    hooks: Hooks, watch: Hooks, recorder: Recorder, model: nn.Module, resumed: RunState | None
) -> Hooks:
    """The caller's hooks, with what the technique watches and what is recorded."""
    history = resumed.values["history"] if resumed else []
    started = time.monotonic() - (history[-1][SECONDS] if history else 0.0)

    def extra() -> Record:
        scale = head_scale(model)
        return {
            **watch.extra(),
            **({} if scale is None else {"head_scale": scale}),
            SECONDS: round(time.monotonic() - started, 3),
        }

    def on_epoch(record: Record) -> None:
        recorder.write(record)
        hooks.on_epoch(record)

    def on_end(record: Record) -> None:
        recorder.write(record, curves=False)
        hooks.on_end(record)

    return replace(
        hooks, extra=extra, on_epoch=on_epoch, on_end=on_end, memory=watch.memory,
        recall=watch.recall,
    )  # fmt: skip


def weight_settings(source: SourceSpec) -> dict[str, Any]:
    """How the weights were drawn; nothing of a file, whose weights are what it says."""
    if source.is_file:
        return {}
    return {"init": source.init, "init_seed": source.seed}


def source_settings(plan: RunPlan) -> dict[str, Any]:
    """How the network came to be: its weights and, if it was fixed here, its classifier."""
    found = weight_settings(plan.source)
    if plan.head is not None:
        found |= {"head": plan.head, "head_scale": plan.head_scale}
    return found


@contextlib.contextmanager
def closing_on_error() -> Iterator[contextlib.ExitStack]:
    """A stack whose files stay open if all went well: the job's owner closes them."""
    with contextlib.ExitStack() as stack:
        yield stack
        stack.pop_all()


def facts(job: Prepared, technique_facts: dict[str, Any], technique: Technique) -> Record:
    """What a job would do, for ``--dry-run``. Raises what a state to go on from would."""
    assert job.checkpoint.recipe.model is not None
    state = resumed_state(job, technique)
    return {
        "output": str(job.output),
        "model": job.checkpoint.recipe.model.name,
        "dataset": job.dataset.name,
        **job.images.to_json(),
        **technique_facts,
        **technique.settings,
        "recipe": job.plan.recipe or recipe_name(job.dataset.name, job.images.classes),
        **told(job.settings),
        **look_facts(job.images.train.spec),
        **({} if state is None else {"resumed_after_step": state.step}),
    }
