"""Tensors and layers as a header shows them.

What a header cannot tell is read from names: a layer is what a tensor's name has before its last
dot, and running statistics and the like are buffers by what they are called.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from typing_extensions import assert_never

from randsurgery.format.container import TensorInfo
from randsurgery.format.derivation import derivation, entry_derivation
from randsurgery.format.recipe import (
    Entry,
    Learned,
    MaskOverlay,
    Member,
    Overlay,
    Recipe,
    ReplaceOverlay,
    ScaleOverlay,
    ScatterOverlay,
    SliceOverlay,
)
from randsurgery.format.tensors import element_count

_BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids"
    r"|relative_(position|coords)_\w+|attn_mask)$"
)
_INTEGERS = ("I64", "I32", "U64", "U32", "BOOL")  # indices and counts; 8 bits may be weights


@dataclass(frozen=True)
class OverlayShare:
    """An overlay: ``count`` of ``size`` elements are kept by it (a mask) or brought by it."""

    kind: str
    count: int
    size: int


@dataclass(frozen=True)
class TensorView:
    """One tensor. ``learned``: how many elements are, by its member's plan, else by what the member
    says of it, a mask counting one a weight; None if only the masks' bits could tell. ``part``:
    "whole", "slice", "survivors", "mask", or "" if nothing is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    buffer: bool
    source: str
    overlays: tuple[OverlayShare, ...] = ()
    learned: int | None = 0
    part: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer, or the layers of a block together. ``shape``: of its largest parameter, or of the
    largest tensor where there is none; ``sources``: the largest first."""

    name: str
    layers: int
    tensors: int
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    parameters: int
    buffers: int  # elements
    learned: int | None
    masked: int  # of those learned, weights that a mask was learned for
    sources: tuple[str, ...]
    overlays: tuple[OverlayShare, ...]


def foreign_tensors(infos: Mapping[str, TensorInfo]) -> Iterable[TensorView]:
    """The tensors of a file of others."""
    for name, info in infos.items():
        size = element_count(info.shape)
        yield TensorView(name, info.dtype, info.shape, size, _is_buffer(name, info.dtype), "stored")


def _is_buffer(name: str, dtype: str) -> bool:
    return dtype in _INTEGERS or _BUFFERS.search(name) is not None


def tensor_view(recipe: Recipe, member: Member, name: str, learner: Member | None) -> TensorView:
    """One tensor of a member; what is learned of it, if ``learner`` is one."""
    made = derivation(recipe, member, name)
    entry = made.entry
    buffer = _is_buffer(name, entry.dtype)
    whole = recipe.resolved(member, name)
    learned, part = (0, "") if buffer or learner is None else _learned(whole, learner, name)
    return TensorView(
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        size=entry.size,
        buffer=buffer,
        source=entry.source.kind,
        overlays=tuple(_share(overlay, entry) for overlay in made.needed().overlays),
        learned=learned,
        part=part,
    )


def _share(overlay: Overlay, entry: Entry) -> OverlayShare:
    if isinstance(overlay, (MaskOverlay, ScatterOverlay)):
        return OverlayShare(overlay.kind, overlay.count, entry.size)
    if isinstance(overlay, SliceOverlay):
        count = _slice_size(entry.shape, overlay.dim, overlay.count)
        return OverlayShare(overlay.kind, count, entry.size)
    if isinstance(overlay, (ReplaceOverlay, ScaleOverlay)):
        return OverlayShare(overlay.kind, entry.size, entry.size)
    assert_never(overlay)


def _slice_size(shape: tuple[int, ...], dim: int, count: int) -> int:
    if dim >= len(shape):  # verify and load refuse such a file
        return 0
    return math.prod((*shape[:dim], min(count, shape[dim]), *shape[dim + 1 :]))


def _learned(entry: Entry, member: Member, name: str) -> tuple[int | None, str]:
    """(elements, part): by the plan if there is one, else by the member's own words."""
    if member.plan is not None:
        planned = member.plan.tensors.get(name)
        return (0, "") if planned is None else _planned(entry, planned)
    own = member.tensors.get(name)
    if own is None:
        return 0, ""
    kinds = {overlay.kind for overlay in own.added}
    last = own.added[-1] if own.added else None
    if own.entry is None and "mask" in kinds and kinds <= {"mask", "scale"}:
        return entry.size, "mask"
    if isinstance(last, SliceOverlay) and len(own.added) == 1:
        return _slice_size(entry.shape, last.dim, last.count), "slice"
    return entry.size, "whole"


def _planned(entry: Entry, part: Learned) -> tuple[int | None, str]:
    if part.part == "slice":
        return _slice_size(entry.shape, part.dim or 0, part.count or 0), "slice"
    if part.part == "whole":
        return entry.size, "whole"
    made = entry_derivation("", "", entry).needed()
    counts = [mask.count for _, mask in made.masks]
    return counts[0] if len(counts) == 1 else None, "survivors"


# --- layers --------------------------------------------------------------------------------------


def layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to; a tensor without one is its own."""
    return tensor.rpartition(".")[0] or tensor


def layer_from(name: str, tensors: list[TensorView]) -> Layer:
    """Tensors of a layer or a block, put together."""
    own = [tensor for tensor in tensors if not tensor.buffer] or tensors
    largest = max(own, key=lambda tensor: (tensor.size, len(tensor.shape)))
    sources: dict[str, int] = {}
    overlays: dict[str, tuple[int, int]] = {}
    for tensor in own:
        sources[tensor.source] = sources.get(tensor.source, 0) + tensor.size
        for overlay in tensor.overlays:
            count, size = overlays.get(overlay.kind, (0, 0))
            overlays[overlay.kind] = count + overlay.count, size + overlay.size
    return Layer(
        name=name,
        layers=len({layer_of(tensor.name) for tensor in tensors}),
        tensors=len(tensors),
        shape=largest.shape,
        dtypes=tuple(dict.fromkeys(tensor.dtype for tensor in own)),
        parameters=sum(tensor.size for tensor in tensors if not tensor.buffer),
        buffers=sum(tensor.size for tensor in tensors if tensor.buffer),
        learned=total(tensor.learned for tensor in tensors),
        masked=masked(tensors),
        sources=tuple(sorted(sources, key=lambda kind: (-sources[kind], kind))),
        overlays=tuple(OverlayShare(kind, *found) for kind, found in overlays.items()),
    )


def total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None if one is not known."""
    found = 0
    for count in counts:
        if count is None:
            return None
        found += count
    return found


def masked(tensors: Iterable[TensorView]) -> int:
    """How many weights a mask was learned for."""
    return sum(tensor.learned or 0 for tensor in tensors if tensor.part == "mask")
