"""What makes one tensor of one member: a source, then one step for each overlay.

    tensor = overlay_n( ... overlay_1( source ) )

A derivation says which payloads that takes and where they lie, without reading any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from typing_extensions import assert_never

from randsurgery.format.fields import SHARED
from randsurgery.format.recipe import (
    BaseSource,
    ConstantSource,
    Entry,
    HadamardSource,
    MaskOverlay,
    Member,
    Overlay,
    RandomSource,
    Recipe,
    ReplaceOverlay,
    ScaleOverlay,
    ScatterOverlay,
    SignsSource,
    SliceOverlay,
    Source,
    StoredSource,
)

SOURCE, SCORES = "source", "scores"
"""Slots of a source's payload and of popup scores."""

Payload = tuple[str, str]
"""The name of a payload, and its digest."""


def payload_name(owner: str, tensor: str, slot: str) -> str:
    """The safetensors name of a payload."""
    return f"{owner}/{tensor}/{slot}"


def split_payload_name(name: str) -> tuple[str, str, str]:
    """(owner, tensor, slot); a tensor's name may hold slashes, the other two may not."""
    owner, _, rest = name.partition("/")
    tensor, _, slot = rest.rpartition("/")
    return owner, tensor, slot


@dataclass(frozen=True)
class Step:
    """One overlay, and whose it is: number ``index`` of ``owner``'s own overlays of a tensor."""

    owner: str
    tensor: str
    index: int
    overlay: Overlay

    def payload(self, leaf: str) -> str:
        """The name of one of its payloads: ``mask``, ``values``, ``slice`` or ``tensor``."""
        return payload_name(self.owner, self.tensor, f"{self.index}.{leaf}")

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """All of its payloads."""
        overlay = self.overlay
        if isinstance(overlay, MaskOverlay):
            return ((self.payload("mask"), overlay.digest),)
        if isinstance(overlay, ScatterOverlay):
            mask, values = self.payload("mask"), self.payload("values")
            return (mask, overlay.digest), (values, overlay.values_digest)
        if isinstance(overlay, SliceOverlay):
            return ((self.payload("slice"), overlay.digest),)
        if isinstance(overlay, ReplaceOverlay):
            return ((self.payload("tensor"), overlay.digest),)
        if isinstance(overlay, ScaleOverlay):
            return ()
        assert_never(overlay)

    @property
    def mask(self) -> MaskOverlay | ScatterOverlay | None:
        """The overlay, if it has a mask of positions."""
        return self.overlay if isinstance(self.overlay, (MaskOverlay, ScatterOverlay)) else None


def steps_of(owner: str, tensor: str, overlays: Iterable[Overlay]) -> tuple[Step, ...]:
    """One owner's overlays of a tensor as steps."""
    return tuple(Step(owner, tensor, index, one) for index, one in enumerate(overlays))


@dataclass(frozen=True)
class Derivation:
    """What makes one tensor.

    ``owner``: whose the source is, "shared" or a member's name. ``entry``: the owner's entry, for
    dtype, shape and source; its overlays are the first of ``steps``.
    """

    tensor: str
    owner: str
    entry: Entry
    steps: tuple[Step, ...]

    @property
    def source(self) -> Source:
        """Where the values come from before the first step."""
        return self.entry.source

    @property
    def overlays(self) -> tuple[Overlay, ...]:
        """The steps' overlays."""
        return tuple(step.overlay for step in self.steps)

    @property
    def source_payloads(self) -> tuple[Payload, ...]:
        """The source's payload, if it has one."""
        source = self.source
        if isinstance(source, (StoredSource, SignsSource)):
            return ((payload_name(self.owner, self.tensor, SOURCE), source.digest),)
        if isinstance(source, (RandomSource, ConstantSource, HadamardSource, BaseSource)):
            return ()
        assert_never(source)

    @property
    def payloads(self) -> tuple[Payload, ...]:
        """All payloads, those that leave no trace in the tensor included."""
        return (*self.source_payloads, *(one for step in self.steps for one in step.payloads))

    def owned_by(self, owner: str) -> tuple[Payload, ...]:
        """The payloads that one owner brings."""
        source = self.source_payloads if self.owner == owner else ()
        steps = (step for step in self.steps if step.owner == owner)
        return (*source, *(one for step in steps for one in step.payloads))

    @property
    def masks(self) -> tuple[tuple[Step, MaskOverlay | ScatterOverlay], ...]:
        """The steps that have a mask of positions."""
        return tuple((step, step.mask) for step in self.steps if step.mask is not None)

    def needed(self) -> Derivation:
        """The same from the last replacement on: what comes before it leaves no trace."""
        kinds = [isinstance(step.overlay, ReplaceOverlay) for step in self.steps]
        last = max((at for at, replaces in enumerate(kinds) if replaces), default=0)
        return replace(self, steps=self.steps[last:])

    @property
    def replaced(self) -> bool:
        """True if a step replaces the tensor, so that nothing of the source is left."""
        return any(isinstance(step.overlay, ReplaceOverlay) for step in self.steps)

    @property
    def from_zero(self) -> bool:
        """True if the steps start from zeros."""
        source = self.source
        zero = isinstance(source, ConstantSource) and float.fromhex(source.value) == 0
        return zero and not self.replaced

    def before(self, step: Step) -> Derivation:
        """What the tensor is before that step."""
        return replace(self, steps=self.steps[: self.steps.index(step)])

    def without(self, drop: Callable[[Step], bool]) -> Derivation:
        """The same without some of its steps. The others keep their payloads."""
        return replace(self, steps=tuple(step for step in self.steps if not drop(step)))

    def moved(self, owner: str) -> Derivation:
        """The same as an entry of ``owner``'s own, its steps counted anew. Its payloads are in the
        same order."""
        steps = steps_of(owner, self.tensor, self.overlays)
        update = {"overlays": self.overlays, "digest": None}
        return Derivation(self.tensor, owner, self.entry.model_copy(update=update), steps)


def derivation(recipe: Recipe, member: Member, tensor: str) -> Derivation:
    """What makes one tensor of one member: the shared entry and the member's overlays, or the
    member's own entry. Raises KeyError for an unknown tensor."""
    own = member.tensors.get(tensor)
    if own is not None and own.entry is not None:
        owner, entry = member.name, own.entry
    else:
        owner, entry = SHARED, recipe.tensors[tensor]
    steps = steps_of(owner, tensor, entry.overlays)
    if own is not None:
        steps += steps_of(member.name, tensor, own.overlays)
    return Derivation(tensor, owner, entry, steps)


def entry_derivation(owner: str, tensor: str, entry: Entry) -> Derivation:
    """What makes the tensor of an entry alone."""
    return Derivation(tensor, owner, entry, steps_of(owner, tensor, entry.overlays))


def needed_bases(recipe: Recipe) -> set[str]:
    """The ids of the bases that some member has a value from, or is to learn from. A base of which
    all was replaced is none."""
    found: set[str] = set()
    for member in recipe.members:
        made = (derivation(recipe, member, name) for name in recipe.tensor_names(member))
        starts = (part.start for part in (member.plan.tensors if member.plan else {}).values())
        sources = (*(one.source for one in made if not one.replaced), *starts)
        found |= {source.base for source in sources if isinstance(source, BaseSource)}
    return found


# --- which payloads a recipe needs ---------------------------------------------------------------


def payload_digests(recipe: Recipe, owner: str | None = None) -> Iterator[Payload]:
    """(name, digest) of all payloads, or of those that ``owner`` ("shared" or a member) brings."""
    for who, name, entry in recipe.entries():
        if owner in (None, who):
            yield from entry_derivation(who, name, entry).payloads
    for member in recipe.members:
        if owner not in (None, member.name):
            continue
        for name, own in member.tensors.items():
            for step in steps_of(member.name, name, own.overlays):
                yield from step.payloads
        for name, expected in member.scores.items():
            yield payload_name(member.name, name, SCORES), expected


def payload_names(recipe: Recipe, owner: str | None = None) -> Iterator[str]:
    """The names of all payloads, or of those that ``owner`` ("shared" or a member) brings."""
    return (name for name, _ in payload_digests(recipe, owner))
