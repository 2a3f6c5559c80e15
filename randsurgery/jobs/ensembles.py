"""``ensemble eval`` and ``ensemble calibrate``: members together on a dataset."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.members import members_named
from randsurgery.format.recipe import Learned, Member, MemberTensor, SliceOverlay
from randsurgery.format.specs import Calibration, DatasetSpec
from randsurgery.format.tensors import hex_float
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.holdout import fingerprint, held_out
from randsurgery.jobs.hub import local_file
from randsurgery.jobs.inputs import (
    CALIBRATED,
    HELD_OUT_SPLIT,
    DataOptions,
    Shown,
    calibration_images,
    fitted,
    look_for_file,
    open_split,
    pick_device,
    resolve_dataset,
    unfitted,
)
from randsurgery.jobs.members import in_place
from randsurgery.jobs.splits import FINGERPRINT, open_outside
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.ensembles import (
    Engine,
    Ensemble,
    check_engine,
    settled,
    temperature,
)
from randsurgery.surgery.learning import survivor_counts
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.plans import count_layers, learned_size
from randsurgery.training.data import Data, check_labelled
from randsurgery.training.evaluate import outputs
from randsurgery.training.folders import Part
from randsurgery.training.temperature import fit_temperature, mean_nll
from randsurgery.training.uncertainty import (
    EnsembleMetrics,
    EnsembleResult,
    EnsembleTally,
    Separation,
    separation,
)

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EvalPlan:
    """What an evaluation is told. members: None is all of the file. ood: a second dataset, of
    images that the members were never meant for."""

    file: str
    data: DataOptions = field(default_factory=DataOptions)
    members: tuple[str, ...] | None = None
    base: str | None = None
    ood: DataOptions | None = None
    engine: str = "auto"
    batch_size: int = 256
    workers: int = 0
    amp: bool = False
    device: str = "auto"
    split: Part = "test"


@dataclass(frozen=True)
class Scored:
    """What an evaluation found. ``left_out``: images that fitted the temperature. ``ood``: how
    well each uncertainty tells the second dataset's images apart. ``kind``, ``learned``: what the
    members learned and how many parameters together, as in the paper's Table 4."""

    shown: Shown
    metrics: EnsembleMetrics
    engine: str
    temperatures: dict[str, float]
    kind: str
    learned: int
    left_out: int = 0
    ood: dict[str, Separation] = field(default_factory=dict)
    ood_dataset: str | None = None
    ood_told: str = ""  # what was found there
    flattering: bool = False  # a temperature was fitted on all of these images

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {
            "dataset": self.shown.dataset.name,
            "split": self.shown.split,
            "kind": self.kind,
            "learned": self.learned,
            "engine": self.engine,
            "left_out": self.left_out,
            "temperatures": self.temperatures,
            **self.metrics.to_json(),
        }
        if self.ood_dataset is not None:
            scores = {name: one.to_json() for name, one in self.ood.items()}
            found["ood"] = {"dataset": self.ood_dataset, **scores}
        return found


def run_eval(plan: EvalPlan, on_batch: Callable[[int], None] | None = None) -> Scored:
    """Evaluate members together on a test split, with their recorded preprocessing.

    One member is held at a time. Raises IncompatibleError for members of several tasks, and what
    opening file and data raises.
    """
    asked = check_engine(plan.engine)
    with _opened(plan) as checkpoint:
        chosen = members_named(checkpoint, plan.members)
        ensemble = _ensemble(checkpoint, plan)
        shown = _shown(checkpoint, chosen[0], plan, plan.split)
        data = shown.data
        check_labelled(data)
        other, told = None, ""
        if plan.ood is not None:
            other, told = _other(checkpoint, chosen[0], plan.ood, plan)
        engine = _engine(ensemble, data, asked)
        used = fitted(shown, chosen, plan.data.folder)
        kept = unfitted(used)
        found = _tally(ensemble, engine, data, plan, kept, on_batch)
        apart: dict[str, Separation] = {}
        if other is not None:
            far = _tally(ensemble, engine, other, plan, None, on_batch, labelled=False)
            apart = _apart(found, far)
        learned = sum(learned_parameters(checkpoint, member) for member in chosen)
    return Scored(
        shown,
        found.metrics,
        engine,
        {member.name: temperature(member) for member in chosen},
        kind_of(chosen),
        learned,
        0 if kept is None else int(np.count_nonzero(~kept)),
        apart,
        None if plan.ood is None else plan.ood.dataset or "folder",
        told,
        bool(used.all()),
    )


KINDS = {"fc": "FC", "share": "Share-Conv", "full": "Full", "popup": "Popup", "plan": "Plan"}


def kind_of(members: Sequence[Member]) -> str:
    """What the members learned, in the paper's words, if their provenance tells."""
    told = set()
    for member in members:
        settings = member.provenance.get("settings")
        settings = settings if isinstance(settings, dict) else {}
        name = KINDS.get(str(settings.get("kind")))
        detail = settings.get("share") or (settings.get("k") and f"k={settings['k']}")
        told.add(f"{name}-{detail}" if name and detail else name or "Members")
    return told.pop() if len(told) == 1 else "Members"


def learned_parameters(checkpoint: Checkpoint, member: Member) -> int:
    """How many parameters a member learned: what its plan names, else what it says itself of the
    network's parameters; of a mask, one a weight."""
    recipe = checkpoint.recipe
    shell = meta_module(checkpoint, member.name) if recipe.model is not None else None
    if member.plan is not None and shell is not None:
        alive = survivor_counts(checkpoint, member)
        return sum(row.learned for row in count_layers(shell, member.plan, alive))
    names = set(member.tensors) if shell is None else {n for n, _ in shell.named_parameters()}
    return sum(
        learned_size(_part(own), recipe.resolved(member, name).shape)
        for name, own in member.tensors.items()
        if name in names
    )


def _part(own: MemberTensor) -> Learned:
    """The part of a tensor that a member's own words replace."""
    last = own.added[-1] if own.added else None
    if isinstance(last, SliceOverlay) and len(own.added) == 1:
        return Learned(part="slice", dim=last.dim, count=last.count)
    return Learned()


def _opened(plan: EvalPlan) -> Checkpoint:
    return open_checkpoint(local_file(plan.file), plan.base, spare_bases=True)


def _ensemble(checkpoint: Checkpoint, plan: EvalPlan) -> Ensemble:
    where = pick_device(plan.device)
    return Ensemble(checkpoint, plan.members).to(where)


def _shown(checkpoint: Checkpoint, member: Member, plan: EvalPlan, part: Part) -> Shown:
    where = pick_device(plan.device)
    return open_split(checkpoint, member, plan.data, where, plan.workers, part)


def _other(
    checkpoint: Checkpoint, member: Member, options: DataOptions, plan: EvalPlan
) -> tuple[Data, str]:
    """The second dataset's images, shown as the member expects, and what was found; their classes
    do not matter."""
    name = options.dataset or ("folder" if options.data_dir else None)
    if name is None:
        raise UsageError("--ood needs a dataset, or --ood-dir a folder of images")
    look = look_for_file(checkpoint.recipe, member, name, options)
    where = pick_device(plan.device)
    return open_outside(options.request(DatasetSpec(name=name), look, where, plan.workers, None))


def _engine(ensemble: Ensemble, data: Data, asked: Engine) -> Engine:
    """Where it is left open, both are timed on the first images."""
    engine = settled(asked, next(ensemble.backbone.parameters()).device)
    if engine != "auto":
        return engine
    if len(ensemble.members) == 1:
        return "switch"
    images, _ = next(iter(data.evaluation(min(64, len(data)))))
    # one by one, each member sees all images before the next is needed
    return "batched" if ensemble.faster(images) == "batched" else "switch"


def _tally(
    ensemble: Ensemble,
    engine: Engine,
    data: Data,
    plan: EvalPlan,
    kept: npt.NDArray[np.bool_] | None,
    on_batch: Callable[[int], None] | None,
    *,
    labelled: bool = True,
) -> EnsembleResult:
    """The figures over the images ``kept``, or all."""
    tally = EnsembleTally()
    scales = dict(zip(ensemble.members, ensemble.temperatures, strict=True))
    for name, logits, labels in _logits(ensemble, engine, data, plan, on_batch):
        shares = torch.from_numpy(logits / np.float32(scales[name])).softmax(dim=1).numpy()
        known = labels if labelled else None
        if kept is not None:
            shares, known = shares[kept], None if known is None else known[kept]
        tally.add(name, shares, known)
    return tally.result()


def _logits(
    ensemble: Ensemble,
    engine: Engine,
    data: Data,
    plan: EvalPlan,
    on_batch: Callable[[int], None] | None,
) -> Iterator[tuple[str, Logits, Labels]]:
    """(member, its logits (images, classes) before any temperature, labels), one by one."""
    options: dict[str, Any] = {"batch_size": plan.batch_size, "amp": plan.amp, "on_batch": on_batch}
    if engine == "batched":
        every, labels = outputs(ensemble.batched, data, **options)
        yield from ((name, one, labels) for name, one in zip(ensemble.members, every, strict=True))
        return
    for name in ensemble.members:
        logits, labels = outputs(ensemble.member(name), data, **options)
        yield name, logits, labels


def _apart(inside: EnsembleResult, outside: EnsembleResult) -> dict[str, Separation]:
    """How well three uncertainties tell the second dataset's images from the first's."""
    near, far = inside.images, outside.images
    found = {
        "entropy": separation(near.entropy, far.entropy),
        "confidence": separation(1 - near.confidence, 1 - far.confidence),
    }
    if len(near.member_classes) > 1:
        found["mutual_information"] = separation(near.mutual_information, far.mutual_information)
    return found


# --- temperature ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibrated:
    """What calibration found: one temperature for all members, and the NLL of their mean over the
    images it was fitted on, before and after; and over the others, which it was not fitted on."""

    path: Path
    bytes: int
    temperature: float
    split: Part
    images: int
    before: float
    after: float
    held_out: int
    held_out_before: float | None
    held_out_after: float | None


def _is_share(text: str) -> bool:
    return bool(re.fullmatch(r"0\.[0-9]{1,17}|1", text)) and float(text) > 0


def validated_alike(members: Sequence[Member], options: DataOptions) -> bool:
    """True if all members' training kept the same validation images apart, of the dataset that is
    asked for."""
    facts = set()
    for member in members:
        told = member.provenance.get("data")
        dataset, _ = resolve_dataset(options.dataset, options.data_dir, member.dataset)
        if not isinstance(told, dict) or "validation_images" not in told or not member.dataset:
            return False
        if dataset.name != member.dataset.name:
            return False
        facts.add((member.dataset.name, held_out(member), str(told.get(FINGERPRINT))))
    return len(facts) == 1


def run_calibrate(
    plan: EvalPlan,
    *,
    share: str | None = None,
    seed: int = 0,
    output: str | None = None,
    force: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Calibrated:
    """Fit one temperature for all members, and write it into the file, or into ``output``: to the
    validation images, if their training had some and all had the same; else to a share of the test
    split, which ``eval`` then leaves out. ``share``: of these images; all, or 0.2. Raises as
    ``run_eval`` does; the file is then untouched."""
    if share is not None and not _is_share(share):
        raise UsageError(f"--share must be a decimal above 0, up to 1, found {share!r}")
    target = in_place(plan.file, output, force=force)
    with _opened(plan) as checkpoint:
        chosen = members_named(checkpoint, plan.members)
        ensemble = _ensemble(checkpoint, plan)
        part: Part = "validation" if validated_alike(chosen, plan.data) else "test"
        share = share or ("1" if part == "validation" else "0.2")
        shown = _shown(checkpoint, chosen[0], plan, part)
        data, dataset = shown.data, shown.dataset
        check_labelled(data)
        used = calibration_images(len(data), share, seed)
        found = list(_logits(ensemble, "switch", data, plan, on_batch))
        every, labels = [logits for _, logits, _ in found], found[0][2]
        logits, known = [one[used] for one in every], labels[used]
        best = fit_temperature(logits, known)
        about = Calibration(
            temperature=hex_float(best),
            dataset=dataset.name,
            split=dataset.test_split if part == "test" else HELD_OUT_SPLIT,
            share=share,
            seed=seed,
        )
        recipe = checkpoint.recipe
        mark = fingerprint(data, plan.data.folder)
        for member in chosen:
            provenance = {**member.provenance, CALIBRATED: mark}
            changed = {"calibration": about, "provenance": provenance}
            recipe = recipe.with_member(member.model_copy(update=changed))
        size = write_checkpoint(
            target, replace(checkpoint, recipe=recipe), force=True, finished=True
        )
    before, after = (mean_nll(logits, known, one) for one in (1.0, best))
    rest = np.setdiff1d(np.arange(len(labels)), used)
    others = [one[rest] for one in every]
    held = [mean_nll(others, labels[rest], one) for one in (1.0, best)] if len(rest) else [None] * 2
    return Calibrated(target, size, best, part, len(used), before, after, len(rest), *held)
