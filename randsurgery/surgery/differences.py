"""A dense checkpoint against a base: what is equal is referenced, what differs is stored shortest.

The shared entries are the base's tensors and depend on base and architecture alone, so that files
made on one base have one ``backbone_id``; what differs belongs to the member.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from randsurgery.errors import IncompatibleError
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import Container
from randsurgery.format.derivation import payload_name
from randsurgery.format.fields import SHARED
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import (
    ConstantSource,
    Entry,
    Member,
    MemberTensor,
    Recipe,
    ReplaceOverlay,
)
from randsurgery.format.tensors import RawTensor, as_words, hex_float
from randsurgery.surgery.bases import Base
from randsurgery.surgery.checkpoints import Matched, Own, match
from randsurgery.surgery.foreign import Foreign
from randsurgery.surgery.recipes import BASE, base_entry, head_of, pruning_mask, reference
from randsurgery.surgery.sentences import (
    compact_entry,
    mask_overlay,
    scatter_overlay,
    slice_overlay,
)

_LINE = 70
"""Bytes that a payload takes in a file's header beside its name."""


def alone(found: Foreign) -> Checkpoint:
    """The network without a base: constants, signs of one magnitude, of pruned tensors the values
    that the mask keeps, else stored tensors."""
    payloads = Memory()
    entries = {
        name: _kept(raw, found.masks[name], name, payloads)
        if name in found.masks
        else compact_entry(raw, SHARED, name, payloads)
        for name, raw in sorted(found.tensors.items())
    }
    member = Member(head=head_of(found.shell))
    return Checkpoint(Recipe(model=found.spec, tensors=entries, members=(member,)), payloads)


def _kept(raw: RawTensor, mask: Mask, name: str, payloads: Memory) -> Entry:
    """Zeros with the values that a mask keeps scattered in."""
    zero = ConstantSource(value=hex_float(0.0))
    scattered = scatter_overlay(raw, mask, SHARED, name, 0, payloads)
    return Entry(dtype=raw.dtype, shape=raw.shape, source=zero, overlays=(scattered,))  # type: ignore[arg-type]


def on_base(found: Foreign, base: Base, notes: list[str] | None = None) -> Checkpoint:
    """The network as differences from a base, which the checkpoint's ``close`` closes. ``notes``
    gets what the user is to know of the base.

    Raises IncompatibleError if the base has a tensor that the architecture lacks, or none that is
    of use.
    """
    matched = match(
        base.names, found.tensors, str(base.file), found.spec.name, base.about, partly=True
    )
    if notes is not None:
        notes += [f"base: {line}" for line in (*base.notes, *matched.notes)]
    entries: dict[str, Entry] = {}
    changed: dict[str, MemberTensor] = {}
    payloads = Memory()
    used = 0
    member = Member(head=head_of(found.shell))
    for name, raw in sorted(found.tensors.items()):
        before = None
        if name in matched.own:
            entries[name] = base_entry(base, matched.own[name], name, payloads)
            before = _pruned(base, matched.own[name], entries[name].shape)
        change = difference(before, raw, member.name, name, payloads)
        if change is not None:
            changed[name] = change
        used += before is not None and (
            change is None or any(o.kind != "replace" for o in change.overlays)
        )
    if not used:
        raise IncompatibleError(_useless(found, base, matched))
    recipe = Recipe(
        model=found.spec,
        tensors=entries,
        members=(member.model_copy(update={"tensors": changed}),),
        bases={BASE: reference(base)},
    )
    opened = (base.tensors,) if isinstance(base.tensors, Container) else ()
    return Checkpoint(recipe, payloads, {BASE: base.tensors}, opened=opened)


def _pruned(base: Base, own: Own, shape: tuple[int, ...]) -> RawTensor:
    """A base's tensor, with zeros where its mask is 0 if it was pruned."""
    raw = base.tensors.read(own.tensor)
    if own.mask is None:
        return raw
    array = raw.array.copy().reshape(-1)
    array[~pruning_mask(base.tensors.read(own.mask), own.mask, shape).unpack()] = 0
    return RawTensor(raw.dtype, array.reshape(shape))


def _useless(found: Foreign, base: Base, matched: Matched) -> str:
    dtypes = {raw.dtype for raw in found.tensors.values()}
    others = {base.tensors.read(own.tensor).dtype for own in matched.own.values()}
    how = f" ({', '.join(sorted(dtypes))} and {', '.join(sorted(others))})" * (dtypes != others)
    return f"{found.file} has nothing in common with {base.file}{how}; leave --base out"


def difference(
    before: RawTensor | None, after: RawTensor, owner: str, name: str, payloads: Memory
) -> MemberTensor | None:
    """What ``owner`` must say of a tensor for which the shared entry gives ``before``; None if
    that is it. The shortest of all candidates, header text included.

    A tensor of another dtype or shape becomes an entry of the owner's own.
    """
    if before is not None and before.same_bits(after):
        return None
    if before is None or (before.dtype, before.shape) != (after.dtype, after.shape):
        return MemberTensor(entry=compact_entry(after, owner, name, payloads))
    best = min(_candidates(before, after, owner, name), key=lambda one: _cost(*one))
    payloads.update(best[1])
    return best[0]


def _cost(part: MemberTensor, payloads: Memory) -> int:
    """Bytes in a file."""
    text = len(canonical_json(part.to_json()))
    return text + sum(raw.nbytes + len(name) + _LINE for name, raw in payloads.items())


def _candidates(
    before: RawTensor, after: RawTensor, owner: str, name: str
) -> Iterator[tuple[MemberTensor, Memory]]:
    """Every way to say the difference, with its payloads; the simplest first."""
    entry = compact_entry(after, owner, name, into := Memory())
    if entry.source.kind != "stored":
        yield MemberTensor(entry=entry), into
    changed = as_words(before.array) != as_words(after.array)
    if not as_words(after.array)[changed].any():
        zeroed = mask_overlay(Mask.of(~changed), owner, name, 0, into := Memory())
        yield MemberTensor(overlays=(zeroed,)), into
    if (part := _slice_of(changed.reshape(after.shape))) is not None:
        sliced = slice_overlay(after, *part, owner, name, 0, into := Memory())
        yield MemberTensor(overlays=(sliced,)), into
    if not changed.all():
        scattered = scatter_overlay(after, Mask.of(changed), owner, name, 0, into := Memory())
        yield MemberTensor(overlays=(scattered,)), into
    slot = payload_name(owner, name, "0.tensor")
    whole = Memory({slot: RawTensor(after.dtype, after.array.copy())})
    yield MemberTensor(overlays=(ReplaceOverlay(digest=digest(after.array)),)), whole


def _slice_of(changed: npt.NDArray[np.bool_]) -> tuple[int, int] | None:
    """(dim, count) of the smallest leading slice that holds every change; None if that is all."""
    best: tuple[int, int] | None = None
    for dim, length in enumerate(changed.shape):
        others = tuple(axis for axis in range(changed.ndim) if axis != dim)
        count = int(np.flatnonzero(changed.any(axis=others))[-1]) + 1
        if count < length and (best is None or count / length < best[1] / changed.shape[best[0]]):
            best = dim, count
    return best
