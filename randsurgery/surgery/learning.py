"""Plans on modules: what a file's plan says, attached to the network that was built from it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from randsurgery.errors import IncompatibleError, near
from randsurgery.format import masks
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.rebuild import kept
from randsurgery.format.recipe import (
    Entry,
    Learned,
    Member,
    RandomSource,
    Recipe,
    Source,
)
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery import slices
from randsurgery.surgery.plans import everything
from randsurgery.surgery.tensors import to_torch


def learn_plan(
    model: nn.Module, checkpoint: Checkpoint, member: str | None = None, *, seed: int | None = None
) -> nn.Module:
    """Attach the member's own plan to its module; without one, everything is learned. In place.

    ``seed``: learned slices and whole tensors that were drawn at random begin as that seed draws
    them.
    """
    who = checkpoint.member(member)
    plan = who.plan or everything(model)
    names = set(checkpoint.recipe.tensor_names(who))
    if strange := sorted(set(plan.tensors) - names):
        raise IncompatibleError(
            f"the plan learns {strange[0]!r}, which the recipe lacks" + near(strange[0], names)
        )
    alive = {n: survivor_mask(checkpoint, who, n)
             for n, p in plan.tensors.items() if p.part == "survivors"}  # fmt: skip
    starts = {n: to_torch(_drawn(checkpoint, who, n, source)) for n, p in plan.tensors.items()
              if (source := _start(checkpoint, who, n, p, seed)) is not None}  # fmt: skip
    return slices.attach(model, plan, masks=alive, starts=starts)


def _start(
    checkpoint: Checkpoint, who: Member, name: str, part: Learned, seed: int | None
) -> Source | None:
    """What a learned part begins from, where that is not the tensor's own value. What the member
    has learned before is its own."""
    start = None if name in who.tensors else part.start
    source = start or checkpoint.recipe.resolved(who, name).source
    if seed is not None and isinstance(source, RandomSource) and part.part != "survivors":
        return source.model_copy(update={"seed": seed})
    return start


def _drawn(checkpoint: Checkpoint, who: Member, name: str, source: Source) -> RawTensor:
    """The whole tensor as that source makes it."""
    entry = checkpoint.recipe.resolved(who, name)
    drawn = Entry(dtype=entry.dtype, shape=entry.shape, source=source)
    recipe = Recipe(tensors={name: drawn}, bases=checkpoint.recipe.bases)
    return replace(checkpoint, recipe=recipe).rebuild(Member(), name)


def survivor_counts(checkpoint: Checkpoint, member: Member) -> dict[str, int]:
    """How many survivors there are of each tensor of which the member's plan learns them."""
    parts = member.plan.tensors if member.plan else {}
    return {
        name: survivor_mask(checkpoint, member, name).count
        for name, part in parts.items()
        if part.part == "survivors"
    }


def survivor_mask(checkpoint: Checkpoint, member: Member, name: str) -> masks.Mask:
    """The positions that a tensor's masks keep and its scatters fill. Raises IncompatibleError if
    the tensor has neither."""
    found = kept(checkpoint.derivation(member, name), checkpoint.payloads)
    if found is None:
        raise IncompatibleError(f"{name} has no mask, so it has no survivors")
    return found
