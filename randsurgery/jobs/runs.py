"""What all training jobs share: train, with a state to resume from; write; say what was done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from randsurgery.errors import (
    DivergedError,
)
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.container import (
    clear_unfinished,
)
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.inputs import (
    look_facts,
)
from randsurgery.jobs.preparing import Prepared, RunPlan, state_path
from randsurgery.jobs.records import (
    SECONDS,
    Recorder,
    keep_base,
    metrics_path,
    with_provenance,
    write_settings,
)
from randsurgery.jobs.settling import told
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.heads import (
    head_scale,
)
from randsurgery.surgery.modules import build, harvest
from randsurgery.training.catalogue import recipe_name
from randsurgery.training.loop import Hooks, Record, fit
from randsurgery.training.state import RunState, read_state, write_state


@dataclass(frozen=True)
class Result:
    """What a job wrote."""

    path: Path
    bytes: int
    records: list[Record]
    metrics_path: Path
    settings: dict[str, Any]


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
    settings = {**technique.settings, **told(job.settings)}
    return Result(job.output, size, records, metrics_path(job.output), settings)


def options(plan: RunPlan) -> dict[str, Any]:
    """The options of a run that are not settings of training, for the settings file."""
    data, source = plan.data, plan.source
    return {
        "source": source.origin or source.name,
        "model-kwargs": [f"{key}={value}" for key, value in source.args.items()] or None,
        "pretrained": source.pretrained or None,
        "checkpoint": source.checkpoint if source.origin is None else None,
        "ema": source.ema or None,
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
