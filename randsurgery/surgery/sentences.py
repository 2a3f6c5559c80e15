"""Values -> sources and overlays, with their payloads: the words that a recipe has for them."""

from __future__ import annotations

import numpy as np

from randsurgery.format import masks
from randsurgery.format.canonical import digest
from randsurgery.format.checkpoint import Memory
from randsurgery.format.derivation import payload_name
from randsurgery.format.recipe import (
    ConstantSource,
    Entry,
    MaskOverlay,
    ScatterOverlay,
    SignsSource,
    SliceOverlay,
    Source,
    StoredSource,
)
from randsurgery.format.tensors import RANDOM_DTYPES, RawTensor, as_words, hex_float, to_f32


def constant_source(raw: RawTensor) -> ConstantSource | None:
    """A constant source if the tensor repeats one value it can stand for, else None."""
    words = as_words(raw.array)
    if not words.size or raw.dtype in ("F8_E4M3", "F8_E5M2") or (words != words[0]).any():
        return None
    first = raw.array.reshape(-1)[:1]
    value = float(to_f32("BF16", first)[0]) if raw.dtype == "BF16" else float(first[0])
    if not np.isfinite(value) or (raw.dtype[0] in "IU" and int(first[0]) != int(value)):
        return None
    return ConstantSource(value=hex_float(value))


def stored_entry(raw: RawTensor, slot: str, payloads: Memory) -> Entry:
    """An entry that holds a copy of the tensor: a constant if it is one, else payload ``slot``."""
    source: Source | None = constant_source(raw)
    if source is None:
        payloads[slot] = RawTensor(raw.dtype, raw.array.copy())
        source = StoredSource(digest=digest(raw.array))
    return Entry(dtype=raw.dtype, shape=raw.shape, source=source)  # type: ignore[arg-type]


def magnitudes(raw: RawTensor, limit: int = 2) -> list[float]:
    """The first ``limit`` different magnitudes of a tensor, those of zeros left out.

    A negative zero counts: no sign bit and scale give it.
    """
    words = as_words(raw.array)
    top = words.dtype.type(1 << (8 * words.dtype.itemsize - 1))
    left = words[words != 0] & ~top
    found: list[float] = []
    while left.size and len(found) < limit:
        value = left[:1].view(raw.array.dtype)
        found.append(float(to_f32(raw.dtype, value)[0]))
        left = left[left != left[0]]
    return found


def compact_entry(raw: RawTensor, owner: str, name: str, payloads: Memory) -> Entry:
    """The shortest entry for a tensor: a constant, the signs of one magnitude, else stored.

    Beside the magnitude the tensor may hold zeros (+0.0), which a mask then makes.
    """
    slot = payload_name(owner, name, "source")
    if raw.dtype not in RANDOM_DTYPES or constant_source(raw) is not None:
        return stored_entry(raw, slot, payloads)
    found = magnitudes(raw)
    if len(found) != 1 or not np.isfinite(found[0]) or found[0] == 0:
        return stored_entry(raw, slot, payloads)
    words = as_words(raw.array)
    top = words.dtype.type(1 << (8 * words.dtype.itemsize - 1))
    alive = words != 0
    bits = RawTensor("U8", masks.Mask.of(alive & (words & top == 0)).packed)
    payloads[slot] = bits
    source = SignsSource(scale=hex_float(found[0]), digest=digest(bits.array))
    overlays: tuple[MaskOverlay, ...] = ()
    if not alive.all():
        overlays = (mask_overlay(masks.Mask.of(alive), owner, name, 0, payloads),)
    return Entry(dtype=raw.dtype, shape=raw.shape, source=source, overlays=overlays)  # type: ignore[arg-type]


def mask_overlay(
    mask: masks.Mask, owner: str, name: str, index: int, payloads: Memory
) -> MaskOverlay:
    """A mask as overlay number ``index`` of its owner."""
    encoding, payload = masks.encode(mask)
    raw = RawTensor("U8", np.frombuffer(payload, dtype=np.uint8))
    payloads[payload_name(owner, name, f"{index}.mask")] = raw
    return MaskOverlay(encoding=encoding, count=mask.count, digest=digest(raw.array))


def scatter_overlay(
    raw: RawTensor, mask: masks.Mask, owner: str, name: str, index: int, payloads: Memory
) -> ScatterOverlay:
    """The tensor's values where the mask is 1, as overlay number ``index`` of its owner."""
    bits = mask_overlay(mask, owner, name, index, payloads)
    values = RawTensor(raw.dtype, raw.array.reshape(-1)[mask.unpack()])
    payloads[payload_name(owner, name, f"{index}.values")] = values
    return ScatterOverlay(
        encoding=bits.encoding,
        count=bits.count,
        digest=bits.digest,
        values_digest=digest(values.array),
    )


def leading(dim: int, count: int) -> tuple[slice, ...]:
    """The index of the first ``count`` along ``dim``."""
    return (*[slice(None)] * dim, slice(count))


def slice_overlay(
    raw: RawTensor, dim: int, count: int, owner: str, name: str, index: int, payloads: Memory
) -> SliceOverlay:
    """The tensor's first ``count`` along ``dim`` as overlay number ``index`` of its owner."""
    values = RawTensor(raw.dtype, np.ascontiguousarray(raw.array[leading(dim, count)]))
    payloads[payload_name(owner, name, f"{index}.slice")] = values
    return SliceOverlay(dim=dim, count=count, digest=digest(values.array))
