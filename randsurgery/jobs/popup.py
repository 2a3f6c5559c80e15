"""``popup``: find a subnetwork."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randsurgery.errors import DataError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_output
from randsurgery.format.recipe import DatasetSpec
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
from randsurgery.jobs.records import keep_base, metrics_file, metrics_path, with_provenance
from randsurgery.jobs.sources import SourceSpec, open_source, resolve_source
from randsurgery.surgery import popup
from randsurgery.surgery.architectures import build_meta
from randsurgery.surgery.initialisers import kept_count
from randsurgery.surgery.modules import build, harvest, with_head
from randsurgery.training.data import Data
from randsurgery.training.loop import Hooks, Record, check_settings, fit
from randsurgery.training.settings import TrainSettings, defaults_for

FELL_BACK = "no dataset given: using digits (scikit-learn's 8x8 scans, shown at 32x32)"


@dataclass(frozen=True)
class PopupPlan:
    """A popup job, resolved."""

    source: SourceSpec
    popup: popup.Popup
    data: DataOptions
    overrides: dict[str, Any]
    output: str | None = None
    device: str = "auto"
    save_scores: bool = False
    force: bool = False


@dataclass(frozen=True)
class Prepared:
    """A checked job, ready to train: nothing has been trained or written."""

    plan: PopupPlan
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


def prepare_popup(plan: PopupPlan) -> Prepared:
    """Check everything a popup job needs. Raises RandsurgeryError; writes nothing.

    The job's checkpoint is to be closed by the caller.
    """
    with contextlib.ExitStack() as stack:
        job = _prepare(plan, stack)
        stack.pop_all()
    return job


def _prepare(plan: PopupPlan, stack: contextlib.ExitStack) -> Prepared:
    _ = plan.popup.share
    if plan.save_scores and plan.popup.mask != "learned":
        raise UsageError("--save-scores goes with learned masks; a random one has none worth it")
    source = resolve_source(plan.source, plan.popup.seed)
    plan = replace(plan, source=source)
    recorded: Checkpoint | None = None
    if source.is_file:
        recorded = stack.enter_context(open_source(source))
    member = recorded.member() if recorded else None
    dataset, fell_back = resolve_dataset(
        plan.data.dataset, plan.data.data_dir, member.dataset if member else None
    )
    output = check_output(plan.output or _default_output(plan, dataset), force=plan.force)
    check_output(metrics_path(output), force=plan.force)
    device = pick_device(plan.device)
    settings = _settings(plan, dataset)
    check_settings(settings)
    if recorded is not None:
        look = look_for_file(recorded.recipe, dataset.name, plan.data)
    else:
        look = look_for(source, dataset.name, plan.data)
    open_split = opener(dataset, look, plan.data, device, settings.workers)
    train = open_split("train", None)
    test = open_split("test", train.classes)
    classes = plan.data.num_classes or len(train.classes)
    if classes == 0:
        raise DataError(f"{dataset.name} does not say its classes; pass --num-classes")
    if classes < len(train.classes):
        raise IncompatibleError(
            f"--num-classes {classes} is too few: {dataset.name} has {len(train.classes)}"
        )
    notes = [FELL_BACK] if fell_back else []
    if recorded is not None:
        checkpoint = with_head(recorded, classes)
        if checkpoint is not recorded:
            notes.append(f"the classifier is drawn anew for the dataset's {classes} classes")
    else:
        args = model_arguments(source, look, classes)
        checkpoint = stack.enter_context(open_source(replace(source, args=args)))
    checkpoint = describe(checkpoint, look, dataset, train.classes, classes)
    _check_patterns(checkpoint, plan.popup)
    return Prepared(plan, checkpoint, dataset, tuple(notes), train, test, settings, device, output)


def _settings(plan: PopupPlan, dataset: DatasetSpec) -> TrainSettings:
    settings = defaults_for(dataset.name)
    if plan.popup.mask == "random" and not plan.popup.learn:
        settings = replace(settings, epochs=1)  # nothing is learned; one pass settles statistics
    return settings.updated(**{"seed": plan.popup.seed, **plan.overrides})


def _default_output(plan: PopupPlan, dataset: DatasetSpec) -> str:
    stem = Path(plan.source.name).stem if plan.source.is_file else plan.source.name
    data = dataset.name.replace("/", "-").removeprefix("torch-")
    kind = "popup" if plan.popup.mask == "learned" else "random-mask"
    k = str(plan.popup.k).replace("/", "-")
    return f"{stem}-{data}-{kind}-k{k}.safetensors"


def _check_patterns(checkpoint: Checkpoint, wanted: popup.Popup) -> None:
    """Attach on meta: a pattern that matches nothing is known before any weight is made."""
    if checkpoint.recipe.model is not None:
        popup.resolve(build_meta(checkpoint.recipe.model), wanted)


def run_popup(job: Prepared, hooks: Hooks | None = None) -> Result:
    """Train the masks (or draw them), then write, re-read and verify the file."""
    plan = job.plan
    model = build(job.checkpoint).to(job.device)
    popup.attach(model, plan.popup)
    with metrics_file(job.output) as write:
        hooks = _with_flips(hooks or Hooks(), model, write, plan.popup.mask == "learned")
        records = fit(model, job.train, job.test, job.settings, hooks)
        model.eval()
        checkpoint = harvest(job.checkpoint, model.cpu(), scores=plan.save_scores)
        checkpoint = with_provenance(checkpoint, "popup", _popup_settings(job), records)
        keep_base(checkpoint, job.output)
        size = write_checkpoint(job.output, checkpoint, force=plan.force)
    return Result(job.output, size, records, metrics_path(job.output))


def _with_flips(
    hooks: Hooks, model: nn.Module, write: Callable[[Record], None], flips: bool
) -> Hooks:
    before = popup.harvest(model)
    started = time.monotonic()

    def extra() -> Record:
        nonlocal before
        after = popup.harvest(model)
        flipped, before = popup.flipped_share(before, after), after
        return {"flipped": flipped}

    def on_epoch(record: Record) -> None:
        write({**record, "seconds": round(time.monotonic() - started, 3)})
        hooks.on_epoch(record)

    return replace(hooks, extra=extra if flips else hooks.extra, on_epoch=on_epoch)


def _popup_settings(job: Prepared) -> dict[str, Any]:
    plan = job.plan
    weights: dict[str, Any] = {
        "init": plan.source.init,
        "init_seed": plan.source.seed,
        "scaled": plan.source.scaled_for is not None,
    }
    return {
        "k": str(plan.popup.k),
        **({} if plan.source.is_file else weights),  # a file's weights are what it says
        "skip": list(plan.popup.skip),
        "learn": list(plan.popup.learn),
        "mask": plan.popup.mask,
        **job.settings.to_json(),
    }


def popup_facts(job: Prepared) -> dict[str, Any]:
    """What a popup job would do, for ``--dry-run``."""
    assert job.checkpoint.recipe.model is not None
    targets, _ = popup.resolve(build_meta(job.checkpoint.recipe.model), job.plan.popup)
    sizes = [getattr(module, leaf).numel() for _, module, leaf in targets]
    return {
        "output": str(job.output),
        "model": job.checkpoint.recipe.model.name,
        "dataset": job.dataset.name,
        "train_images": len(job.train),
        "test_images": len(job.test),
        "masked_tensors": len(sizes),
        "masked_weights": sum(sizes),
        "kept_weights": sum(kept_count(job.plan.popup.share, size) for size in sizes),
        **_popup_settings(job),
    }
