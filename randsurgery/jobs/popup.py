"""``popup``: find a subnetwork."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.masks import Mask
from randsurgery.format.shards import check_not_input
from randsurgery.jobs import runs
from randsurgery.jobs.preparing import Prepared, RunPlan, closing_on_error, prepare
from randsurgery.jobs.runs import Result, Technique
from randsurgery.surgery import scores
from randsurgery.surgery.method import Method, Scoring
from randsurgery.surgery.modules import meta_module
from randsurgery.training.loop import Hooks, Record
from randsurgery.training.settings import TrainSettings


@dataclass(frozen=True)
class PopupPlan:
    """A popup job: what every run is told, and how masks are found."""

    run: RunPlan
    method: Method
    save_scores: bool = False

    @property
    def learns(self) -> bool:
        """True if masks or anything beside them are learned."""
        return self.method.learns or bool(self.method.learn) or self.run.head is not None


@dataclass(frozen=True)
class PreparedPopup:
    """A checked popup job. ``sizes``: weights of each masked tensor, and how many of them are
    kept, None where that is found in training."""

    run: Prepared
    plan: PopupPlan
    sizes: Mapping[str, tuple[int, int | None]]


def prepare_popup(plan: PopupPlan) -> PreparedPopup:
    """Check everything a popup job needs. Raises RandsurgeryError; writes nothing.

    The job's checkpoint is to be closed by the caller.
    """
    method = plan.method
    method.check()
    if plan.save_scores and not method.learns:
        raise UsageError("--save-scores goes with learned masks; others have none worth it")

    def defaults(settings: TrainSettings) -> TrainSettings:
        settings = replace(settings, **method.defaults)
        # where nothing is learned, one pass settles the statistics
        return settings if plan.learns else replace(settings, epochs=1)

    with closing_on_error() as stack:
        run = replace(plan.run, learns="masks")
        flat = not method.reads_scores
        job = prepare(run, stack, method.label, flat=flat, defaults=defaults)
        check_not_input(job.output, method.inputs)
        placed, notes = method.place(job.checkpoint, from_file=plan.run.source.is_file)
        notes = [*job.notes, *notes]
        if isinstance(method, Scoring) and (left := scores.unmasked(meta_module(placed), method)):
            notes.append(left)
        job = replace(job, checkpoint=placed, notes=tuple(notes))
        # attached on meta: a pattern that matches nothing is known before any weight is made
        sizes = method.sizes(placed)
    return PreparedPopup(job, plan, sizes)


def run_popup(job: PreparedPopup, hooks: Hooks | None = None) -> Result:
    """Train the masks (or draw them), then write, re-read and verify the file."""
    return runs.carry_out(job.run, _technique(job), hooks)


def _technique(job: PreparedPopup) -> Technique:
    method = job.plan.method
    return Technique(
        command="popup",
        attach=method.attach,
        settings=_settings(job),
        options={**method.given(), "save-scores": job.plan.save_scores or None},
        watch=_watch if method.learns else None,
        scores=job.plan.save_scores,
    )


def _watch(model: nn.Module) -> Hooks:
    """The share of mask bits that flipped in each epoch and, where it is not chosen, the share of
    weights that is kept. It remembers the last epoch's masks."""
    found = any(layer.finds_density for layer in scores.attached(model).values())
    before = scores.harvest(model)

    def extra() -> Record:
        nonlocal before
        after = scores.harvest(model)
        record = {"flipped": scores.flipped_share(before, after)}
        if found:
            kept = sum(mask.count for mask in after.values())
            record["kept"] = kept / sum(mask.size for mask in after.values())
        before = after
        return record

    def memory() -> dict[str, torch.Tensor]:
        packed = {name: torch.from_numpy(mask.packed.copy()) for name, mask in before.items()}
        counts = [before[name].count for name in sorted(before)]
        return {**packed, COUNTS: torch.tensor(counts, dtype=torch.int64)}

    def recall(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal before
        counts = dict(zip(sorted(before), tensors[COUNTS].tolist(), strict=True))
        before = {
            name: Mask(tensors[name].numpy(), mask.size, counts[name])
            for name, mask in before.items()
        }

    return Hooks(extra=extra, memory=memory, recall=recall)


COUNTS = "counts"
"""Among the remembered masks, whose names have a dot: how many weights each keeps."""


def _settings(job: PreparedPopup) -> dict[str, Any]:
    method, source = job.plan.method, job.run.plan.source
    found = {
        **method.settings(),
        **runs.source_settings(job.run.plan),
        "learn": list(method.learn),
    }
    if not isinstance(method, Scoring):
        return found
    scaled = {} if source.is_file else {"scaled": source.scaled_for is not None}
    return {**found, **scaled, "skip": list(method.skip)}


def popup_facts(job: PreparedPopup) -> dict[str, Any]:
    """What a popup job would do, for ``--dry-run``."""
    kept = [count for _, count in job.sizes.values()]
    own: dict[str, Any] = {
        "masked_tensors": len(job.sizes),
        "masked_weights": sum(size for size, _ in job.sizes.values()),
    }
    if None not in kept:
        own["kept_weights"] = sum(count or 0 for count in kept)
    return runs.facts(job.run, own, _technique(job))
