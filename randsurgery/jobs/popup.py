"""``popup``: find a subnetwork."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.masks import Mask
from randsurgery.jobs import runs
from randsurgery.jobs.runs import Prepared, Result, RunPlan, Technique
from randsurgery.surgery import popup
from randsurgery.surgery.initialisers import kept_count
from randsurgery.surgery.modules import meta_module
from randsurgery.training.loop import Hooks, Record
from randsurgery.training.settings import TrainSettings


@dataclass(frozen=True)
class PopupPlan:
    """A popup job: what every run is told, and what edge-popup is to do."""

    run: RunPlan
    popup: popup.Popup
    save_scores: bool = False


@dataclass(frozen=True)
class PreparedPopup:
    """A checked popup job."""

    run: Prepared
    plan: PopupPlan


def prepare_popup(plan: PopupPlan) -> PreparedPopup:
    """Check everything a popup job needs. Raises RandsurgeryError; writes nothing.

    The job's checkpoint is to be closed by the caller.
    """
    _ = plan.popup.share
    if plan.save_scores and plan.popup.mask != "learned":
        raise UsageError("--save-scores goes with learned masks; a random one has none worth it")
    kind = "popup" if plan.popup.mask == "learned" else "random-mask"
    label = f"{kind}-k{str(plan.popup.k).replace('/', '-')}"

    def defaults(settings: TrainSettings) -> TrainSettings:
        nothing = plan.popup.mask == "random" and not plan.popup.learn and plan.run.head is None
        # nothing is learned; one pass settles the statistics
        return replace(settings, epochs=1) if nothing else settings

    with runs.closing_on_error() as stack:
        job = runs.prepare(plan.run, stack, label, defaults=defaults)
        if job.checkpoint.recipe.model is not None:
            # attached on meta: a pattern that matches nothing is known before any weight is made
            popup.resolve(meta_module(job.checkpoint), plan.popup)
    return PreparedPopup(job, plan)


def run_popup(job: PreparedPopup, hooks: Hooks | None = None) -> Result:
    """Train the masks (or draw them), then write, re-read and verify the file."""
    return runs.carry_out(job.run, _technique(job), hooks)


def _technique(job: PreparedPopup) -> Technique:
    wanted = job.plan.popup
    return Technique(
        command="popup",
        attach=lambda model: popup.attach(model, wanted),
        settings=_settings(job),
        watch=_watch_flips if wanted.mask == "learned" else None,
        scores=job.plan.save_scores,
    )


def _watch_flips(model: nn.Module) -> Hooks:
    """The share of mask bits that flipped in each epoch. It remembers the last epoch's masks."""
    before = popup.harvest(model)

    def extra() -> Record:
        nonlocal before
        after = popup.harvest(model)
        flipped, before = popup.flipped_share(before, after), after
        return {"flipped": flipped}

    def memory() -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(mask.packed.copy()) for name, mask in before.items()}

    def recall(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal before
        before = {
            name: Mask(tensor.numpy(), before[name].size, before[name].count)
            for name, tensor in tensors.items()
        }

    return Hooks(extra=extra, memory=memory, recall=recall)


def _settings(job: PreparedPopup) -> dict[str, Any]:
    plan, source = job.plan, job.run.plan.source
    return {
        "k": str(plan.popup.k),
        **runs.source_settings(job.run.plan),
        **({} if source.is_file else {"scaled": source.scaled_for is not None}),
        "skip": list(plan.popup.skip),
        "learn": list(plan.popup.learn),
        "mask": plan.popup.mask,
    }


def popup_facts(job: PreparedPopup) -> dict[str, Any]:
    """What a popup job would do, for ``--dry-run``."""
    wanted = job.plan.popup
    targets, _ = popup.resolve(meta_module(job.run.checkpoint), wanted)
    sizes = [getattr(module, leaf).numel() for _, module, leaf in targets]
    own = {
        "masked_tensors": len(sizes),
        "masked_weights": sum(sizes),
        "kept_weights": sum(kept_count(wanted.share, size) for size in sizes),
    }
    return runs.facts(job.run, own, _technique(job))
