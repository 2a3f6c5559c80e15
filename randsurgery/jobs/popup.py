"""``popup``: find a subnetwork."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_not_input
from randsurgery.format.masks import Mask
from randsurgery.jobs import runs
from randsurgery.jobs.preparing import Prepared, RunPlan, closing_on_error, prepare
from randsurgery.jobs.runs import Result, Technique
from randsurgery.jobs.sources import SourceSpec, has_factors, masked_tensors, masks_of
from randsurgery.surgery import popup, scores, supermask
from randsurgery.surgery.initialisers import kept_count
from randsurgery.surgery.learning import survivor_mask
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.popup import Popup
from randsurgery.surgery.supermask import Supermask
from randsurgery.surgery.tickets import rethresholded, with_masks
from randsurgery.training.loop import Hooks, Record
from randsurgery.training.settings import TrainSettings


@dataclass(frozen=True)
class FixedMasks(scores.Scoring):
    """Masks that are there already: nothing about them is learned.

    mask_from: the file whose masks the network gets. k, k_for: or the share that is kept of the
    source's own scores.
    """

    mask_from: str | None = field(default=None, kw_only=True)
    k: str | Fraction | None = field(default=None, kw_only=True)
    k_for: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)


@dataclass(frozen=True)
class PopupPlan:
    """A popup job: what every run is told, and how masks are found."""

    run: RunPlan
    wish: Popup | Supermask | FixedMasks
    save_scores: bool = False

    @property
    def learns_masks(self) -> bool:
        """True if masks are learned, not given or drawn."""
        wish = self.wish
        return isinstance(wish, Supermask) or (isinstance(wish, Popup) and wish.mask == "learned")

    @property
    def learns(self) -> bool:
        """True if masks or anything beside them are learned."""
        return self.learns_masks or bool(self.wish.learn) or self.run.head is not None


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
    wish = plan.wish
    if isinstance(wish, Popup):
        _ = wish.share
    if plan.save_scores and not plan.learns_masks:
        raise UsageError("--save-scores goes with learned masks; others have none worth it")

    def defaults(settings: TrainSettings) -> TrainSettings:
        if isinstance(wish, Supermask):
            rate = RESCALED_LR if wish.rescale else SUPERMASK_LR
            settings = replace(settings, lr=rate, weight_decay=0.0)
        # where nothing is learned, one pass settles the statistics
        return settings if plan.learns else replace(settings, epochs=1)

    rethresholds = isinstance(wish, FixedMasks) and wish.mask_from is None
    with closing_on_error() as stack:
        run = replace(plan.run, learns="masks")
        job = prepare(run, stack, _label(wish), flat=not rethresholds, defaults=defaults)
        if isinstance(wish, FixedMasks):
            check_not_input(job.output, [wish.mask_from])
            notes = (*job.notes, *_scaling_notes(job.checkpoint, wish))
            job = replace(job, checkpoint=_masked(job, wish, plan.run.source), notes=notes)
        if not isinstance(wish, FixedMasks):
            left = scores.unmasked(meta_module(job.checkpoint), wish)
            job = replace(job, notes=(*job.notes, left)) if left else job
        sizes = _sizes(job.checkpoint, wish)
    return PreparedPopup(job, plan, sizes)


SUPERMASK_LR = 200.0
"""Ramanujan et al., Section 4.4, found by doubling; their published sampling runs decay nothing."""

RESCALED_LR = 50.0
"""Rescaled weights are twice as large, and so is every gradient; docs/log.md, "Supermasks"."""


def _label(wish: Popup | Supermask | FixedMasks) -> str:
    if isinstance(wish, Supermask):
        return "supermask"
    if isinstance(wish, FixedMasks) and wish.mask_from is not None:
        return "ticket"
    kind = "random-mask" if isinstance(wish, Popup) and wish.mask == "random" else "popup"
    return f"{kind}-k{str(wish.k).replace('/', '-')}"


def _masked(job: Prepared, wish: FixedMasks, source: SourceSpec) -> Checkpoint:
    """The job's network under its fixed masks."""
    if wish.mask_from is not None:
        return with_masks(job.checkpoint, masks_of(wish.mask_from))
    assert wish.k is not None
    if not source.is_file:
        raise UsageError("--rethreshold goes with a file that popup --save-scores wrote")
    return rethresholded(job.checkpoint, Popup(wish.k, k_for=wish.k_for))


def _scaling_notes(checkpoint: Checkpoint, wish: FixedMasks) -> list[str]:
    """What masks do not carry from one network to another."""
    if wish.mask_from is not None:
        factors = has_factors(wish.mask_from)
        return [f"{Path(wish.mask_from).name} multiplies what it keeps; its masks alone are taken"
                ] if factors else []  # fmt: skip
    settings = checkpoint.member().provenance.get("settings")
    scaled = isinstance(settings, dict) and settings.get("scaled")
    return (
        ["the weights are scaled for the k they were trained with, and stay so"] if scaled else []
    )


def _sizes(
    checkpoint: Checkpoint, wish: Popup | Supermask | FixedMasks
) -> dict[str, tuple[int, int | None]]:
    """Attached on meta: a pattern that matches nothing is known before any weight is made."""
    who = checkpoint.member()
    if isinstance(wish, FixedMasks):
        scores.select_learned(meta_module(checkpoint), wish)
        masks = {
            name: survivor_mask(checkpoint, who, name)
            for name in masked_tensors(checkpoint.recipe, who)
        }
        return {name: (mask.size, mask.count) for name, mask in masks.items()}
    shell = meta_module(checkpoint)
    targets, _ = scores.resolve(shell, wish)
    names = {scores.tensor_name(at, leaf): getattr(m, leaf).numel() for at, m, leaf in targets}
    if isinstance(wish, Supermask):
        return {name: (size, None) for name, size in names.items()}
    shares = popup.shares(shell, wish)
    return {name: (size, kept_count(shares[name], size)) for name, size in names.items()}


def run_popup(job: PreparedPopup, hooks: Hooks | None = None) -> Result:
    """Train the masks (or draw them), then write, re-read and verify the file."""
    return runs.carry_out(job.run, _technique(job), hooks)


def _technique(job: PreparedPopup) -> Technique:
    wish = job.plan.wish

    def attach(model: nn.Module) -> object:
        if isinstance(wish, Supermask):
            return supermask.attach(model, wish)
        if isinstance(wish, Popup):
            return popup.attach(model, wish)
        return scores.learn_beside(model, wish)

    return Technique(
        command="popup",
        attach=attach,
        settings=_settings(job),
        options={
            "mask-from": wish.mask_from if isinstance(wish, FixedMasks) else None,
            "save-scores": job.plan.save_scores or None,
        },
        watch=_watch if job.plan.learns_masks else None,
        scores=job.plan.save_scores,
    )


def _watch(model: nn.Module) -> Hooks:
    """The share of mask bits that flipped in each epoch and, where it is not chosen, the share of
    weights that is kept. It remembers the last epoch's masks."""
    found = any(isinstance(s, supermask.SupermaskScores) for s in scores.attached(model).values())
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
    plan, source = job.plan, job.run.plan.source
    found = {
        **_mask_settings(plan.wish),
        **runs.source_settings(job.run.plan),
        "learn": list(plan.wish.learn),
    }
    if isinstance(plan.wish, FixedMasks):
        return found
    scaled = {} if source.is_file else {"scaled": source.scaled_for is not None}
    return {**found, **scaled, "skip": list(plan.wish.skip)}


def _mask_settings(wish: Popup | Supermask | FixedMasks) -> dict[str, Any]:
    if isinstance(wish, Supermask):
        return {"algorithm": "supermask", "rescale": wish.rescale, "final": wish.final}
    k_for = {"k_for": [f"{pattern}={k}" for pattern, k in wish.k_for]} if wish.k_for else {}
    if isinstance(wish, FixedMasks):
        donor = wish.mask_from and Path(wish.mask_from).name  # no paths in provenance
        return {"mask_from": donor, "rethreshold": wish.k and str(wish.k), **k_for}
    return {"algorithm": "edge-popup", "k": str(wish.k), **k_for, "mask": wish.mask}


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
