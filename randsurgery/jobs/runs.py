"""What all training jobs share: resolve, check, train with a state that can be resumed, write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    look_for,
    look_for_file,
    model_arguments,
    opener,
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
from randsurgery.jobs.sources import SourceSpec, open_file, open_source, resolve_source
from randsurgery.surgery.heads import (
    FixedKind,
    describe_head,
    head_scale,
    head_sentence,
    with_fixed_head,
    with_head,
)
from randsurgery.surgery.modules import build, harvest
from randsurgery.training.data import Data
from randsurgery.training.loop import Hooks, Record, check_settings, fit
from randsurgery.training.settings import TrainSettings, defaults_for
from randsurgery.training.state import RunState, read_state, write_state

FELL_BACK = "no dataset given: using digits (scikit-learn's 8x8 scans, shown at 32x32)"


@dataclass(frozen=True)
class RunPlan:
    """What every training job is told.

    ``overrides``: training settings that were given. ``head``: a fixed classifier to put in, with
    ``head_scale`` if that is given and not learned. ``resume``: a state's path, or "auto" for the
    job's own if it is there. ``state_every``: steps between states besides each epoch's end, 0 for
    none. ``log_to``: further records ("tensorboard").
    """

    source: SourceSpec
    data: DataOptions = field(default_factory=DataOptions)
    overrides: dict[str, Any] = field(default_factory=dict)
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
    train: Data
    test: Data
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
    source = resolve_source(plan.source, plan.seed)
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
    settings = defaults(defaults_for(dataset.name)).updated(**{"seed": plan.seed, **plan.overrides})
    check_settings(settings)
    if recorded is not None:
        look = look_for_file(recorded.recipe, recorded.member(), dataset.name, plan.data)
    else:
        look = look_for(source, dataset.name, plan.data)
    open_split = opener(dataset, look, plan.data, device, settings.workers)
    train = open_split("train", None)
    test = open_split("test", train.classes)
    classes = _classes(plan.data.num_classes, dataset, train)
    notes = [FELL_BACK] if fell_back else []
    if recorded is not None:
        checkpoint = with_head(recorded, classes)
        if checkpoint is not recorded:
            notes.append(f"the classifier is drawn anew for the dataset's {classes} classes")
    else:
        args = model_arguments(source, look, classes)
        checkpoint = stack.enter_context(open_source(replace(source, args=args)))
    if plan.head is not None:
        seed = plan.seed if source.seed is None else source.seed
        checkpoint = with_fixed_head(checkpoint, plan.head, seed=seed, scale=plan.head_scale)
        about = describe_head(checkpoint)
        assert about is not None
        notes.append(head_sentence(about))
    checkpoint = describe(checkpoint, look, dataset, train.classes, classes)
    return Prepared(plan, checkpoint, dataset, tuple(notes), train, test, settings, device, output)


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
        "images": [len(job.train), len(job.test)],
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
            records = fit(model, job.train, job.test, job.settings, hooks, resume=resumed)
            model.eval()
            checkpoint = harvest(job.checkpoint, model.cpu(), scores=technique.scores)
            settings = {**technique.settings, **job.settings.to_json()}
            checkpoint = with_provenance(checkpoint, technique.command, settings, records)
            keep_base(checkpoint, job.output)
            size = write_checkpoint(job.output, checkpoint, force=plan.force)
            told = {**settings, **options(plan), **technique.options}
            write_settings(job.output, told, job.dataset)
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
    }


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

    return replace(hooks, extra=extra, on_epoch=on_epoch, memory=watch.memory, recall=watch.recall)


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
        "train_images": len(job.train),
        "test_images": len(job.test),
        **technique_facts,
        **technique.settings,
        **job.settings.to_json(),
        **({} if state is None else {"resumed_after_step": state.step}),
    }
