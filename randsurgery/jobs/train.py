"""``train``: learn a plan, the survivors of a mask, or everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from randsurgery.jobs import runs
from randsurgery.jobs.preparing import Prepared, RunPlan, closing_on_error, prepare
from randsurgery.jobs.runs import Result, Technique
from randsurgery.jobs.sources import masked_tensors
from randsurgery.surgery.learning import learn_plan, survivor_counts
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.plans import count_layers, survivors
from randsurgery.training.loop import Hooks


def prepare_train(plan: RunPlan) -> Prepared:
    """Check everything a training job needs, and settle its plan. Raises RandsurgeryError; writes
    nothing. The job's checkpoint is to be closed by the caller."""
    with closing_on_error() as stack:
        job = prepare(plan, stack, "trained", flat=False)
        return replace(job, checkpoint=_planned(job))


def _planned(job: Prepared) -> Any:
    """The checkpoint with a plan: its own, else the survivors of its masks, else everything."""
    checkpoint, who = job.checkpoint, job.checkpoint.member()
    model = meta_module(checkpoint)
    own = who.plan or survivors(model, masked_tensors(checkpoint.recipe, who))
    recipe = checkpoint.recipe.with_member(who.model_copy(update={"plan": own}))
    return replace(checkpoint, recipe=recipe)


def run_train(job: Prepared, hooks: Hooks | None = None) -> Result:
    """Learn the plan, then write, re-read and verify the file."""
    return runs.carry_out(job, _technique(job), hooks)


def _technique(job: Prepared) -> Technique:
    return Technique(
        command="train",
        attach=lambda model: learn_plan(model, job.checkpoint),
        settings=runs.source_settings(job.plan),
    )


def train_facts(job: Prepared) -> dict[str, Any]:
    """What a training job would do, for ``--dry-run``."""
    who = job.checkpoint.member()
    assert who.plan is not None
    alive = survivor_counts(job.checkpoint, who)
    rows = count_layers(meta_module(job.checkpoint), who.plan, alive)
    own = {"learned": sum(row.learned for row in rows), "total": sum(row.total for row in rows)}
    return runs.facts(job, own, _technique(job))
