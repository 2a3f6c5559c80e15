"""Derivation and payloads -> a finished tensor.

Each source makes an array, each overlay changes it in place. A tensor depends on its own entry
alone, so tensors may be rebuilt in any order and on any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from randsurgery.errors import FileFormatError, IncompatibleError
from randsurgery.format import masks
from randsurgery.format.canonical import digest
from randsurgery.format.derivation import SOURCE, Derivation, Step, payload_name
from randsurgery.format.generator import expand_signs, generate
from randsurgery.format.hadamard import hadamard_rows
from randsurgery.format.recipe import (
    BaseSource,
    ConstantSource,
    Entry,
    HadamardSource,
    MaskOverlay,
    RandomSource,
    ReplaceOverlay,
    ScaleOverlay,
    ScatterOverlay,
    SignsSource,
    SliceOverlay,
    StoredSource,
)
from randsurgery.format.tensors import (
    RANDOM_DTYPES,
    STORAGE,
    RawTensor,
    as_words,
    claimed_bytes,
    f32,
    from_f32,
    to_f32,
)


class Payloads(Protocol):
    """Where payload tensors come from: an open file or memory."""

    def read(self, name: str) -> RawTensor:
        """The payload tensor of that name. Raises KeyError if there is none."""


BaseLookup = Callable[[str, str], RawTensor]
"""(base id, tensor name) -> the base's tensor."""

_PHYSICAL = (
    os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    else 1 << 36
)


def check_affordable(total: int, what: str) -> None:
    """Refuse, before allocating, what cannot fit this machine's memory."""
    if total > _PHYSICAL:
        raise IncompatibleError(
            f"{what} asks for {total / 1e9:,.1f} GB, this machine has {_PHYSICAL / 1e9:,.1f} GB"
        )


def read_payload(
    payloads: Payloads,
    name: str,
    expected: str,
    *,
    dtype: str | None = None,
    shape: tuple[int, ...] | None = None,
) -> npt.NDArray[Any]:
    """A payload whose digest, dtype and shape (None: any) are as the recipe says.

    Raises FileFormatError.
    """
    try:
        tensor = payloads.read(name)
    except KeyError:
        raise FileFormatError(f"payload {name!r} is missing") from None
    if tensor.dtype != (dtype or tensor.dtype) or tensor.shape != (
        tensor.shape if shape is None else shape
    ):
        wanted = f"{dtype or tensor.dtype} {'[any]' if shape is None else list(shape)}"
        raise FileFormatError(
            f"payload {name!r} is {tensor.dtype} {list(tensor.shape)}, the recipe needs {wanted}"
        )
    if (found := digest(tensor.array)) != expected:
        raise FileFormatError(
            f"payload {name!r} is corrupt (digest {found}, the recipe says {expected})"
        )
    return tensor.array


def read_mask(payloads: Payloads, step: Step, size: int) -> masks.Mask:
    """The mask of a step over a tensor of ``size`` elements."""
    overlay, name = step.mask, step.payload("mask")
    assert overlay is not None
    check_affordable(size, name)  # a byte an element while it is decoded
    data = read_payload(payloads, name, overlay.digest, dtype="U8")
    if data.ndim != 1:
        raise FileFormatError(f"payload {name!r} has {data.ndim} dimensions, not 1")
    return masks.decode(data.data, overlay.encoding, size, overlay.count, name)


def _need_float(entry: Entry, name: str, what: str) -> None:
    if entry.dtype not in RANDOM_DTYPES:
        raise FileFormatError(
            f"{name}: {what} makes {', '.join(RANDOM_DTYPES)} tensors, not {entry.dtype}"
        )


def _float32_of(text: str, name: str) -> float:
    value = float.fromhex(text)
    if f32(value) != value:
        raise FileFormatError(f"{name}: {text} is not a float32 value")
    return value


def _constant(entry: Entry, source: ConstantSource, name: str) -> npt.NDArray[Any]:
    value = float.fromhex(source.value)
    if entry.dtype.startswith("F8"):
        raise FileFormatError(f"{name}: a constant source cannot make {entry.dtype}")
    storage = STORAGE[entry.dtype]
    element: Any
    if entry.dtype == "BF16":
        element = from_f32("BF16", np.array([value], dtype=np.float32))[0]
        exact = float(to_f32("BF16", np.array([element], dtype="<u2"))[0]) == value
    elif storage.kind == "f":
        element = np.array(value).astype(storage)[()]
        exact = float(element) == value
    else:  # in exact integers: processors differ in casts that overflow
        element = int(value)
        top = 1 if entry.dtype == "BOOL" else int(np.iinfo(storage).max)
        exact = element == value and int(np.iinfo(storage).min) <= element <= top
    if not exact:
        raise FileFormatError(f"{name}: {source.value} is not a value of {entry.dtype}")
    # -0.0 == 0.0, so the sign of a zero needs no check: astype keeps it
    if value == 0.0 and not np.signbit(value):
        return np.zeros(entry.shape, dtype=STORAGE[entry.dtype])  # untouched pages cost nothing
    return np.full(entry.shape, element, dtype=STORAGE[entry.dtype])


def _masked_random(
    entry: Entry,
    source: RandomSource,
    name: str,
    mask: masks.Mask | None,
    out: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """Values of a random source; with a mask, selected block by block as they are made.

    Shape (size,), in ``out`` if given. Most of a popup file's time goes here; making first and
    masking afterwards gives the same bits and moves the memory twice.
    """

    def finish(start: int, block: npt.NDArray[np.float32]) -> None:
        assert mask is not None
        masks.select(as_words(block), mask, start)

    return generate(
        source.distribution,
        entry.size,
        _float32_of(source.scale, name),
        seed=source.seed,
        stream=name if source.stream is None else source.stream,
        out=out,
        finish=finish if mask is not None else None,
    )


def _source(
    made: Derivation,
    payloads: Payloads,
    bases: BaseLookup,
    out: npt.NDArray[np.float32] | None,
) -> npt.NDArray[Any]:
    """A fresh array of the entry's storage dtype and shape."""
    entry, name, source = made.entry, made.tensor, made.source
    if isinstance(source, ConstantSource):
        return _constant(entry, source, name)
    if isinstance(source, StoredSource):
        slot = payload_name(made.owner, name, SOURCE)
        return read_payload(payloads, slot, source.digest, dtype=entry.dtype, shape=entry.shape)
    if isinstance(source, BaseSource):
        found = bases(source.base, source.tensor)
        if (found.dtype, found.shape) != (entry.dtype, entry.shape):
            raise IncompatibleError(
                f"{name}: base tensor {source.tensor!r} is {found.dtype} {list(found.shape)}, "
                f"the recipe needs {entry.dtype} {list(entry.shape)}"
            )
        return found.array
    _need_float(entry, name, f"a {source.kind} source")
    if isinstance(source, RandomSource):
        values = _masked_random(entry, source, name, None, out)
        return from_f32(entry.dtype, values).reshape(entry.shape)
    values = np.empty(entry.size, dtype=np.float32)
    scale = _float32_of(source.scale, name)
    if isinstance(source, SignsSource):
        slot, size = payload_name(made.owner, name, SOURCE), -(-entry.size // 8)
        packed = read_payload(payloads, slot, source.digest, dtype="U8", shape=(size,))
        if entry.size % 8 and packed[-1] >> (entry.size % 8):
            raise FileFormatError(f"{name}: the padding bits of the signs are not 0")
        expand_signs(packed, scale, values)
    elif isinstance(source, HadamardSource):
        if len(entry.shape) != 2:
            raise FileFormatError(f"{name}: a hadamard source makes matrices, not {entry.shape}")
        rows = hadamard_rows(*entry.shape)
        np.multiply(rows.reshape(-1), np.float32(scale), out=values)
    else:
        assert_never(source)
    return from_f32(entry.dtype, values).reshape(entry.shape)


def _scaled(
    entry: Entry, overlay: ScaleOverlay, array: npt.NDArray[Any], name: str
) -> npt.NDArray[Any]:
    _need_float(entry, name, "a scale overlay")
    factor = np.float32(_float32_of(overlay.factor, name))
    values = np.multiply(to_f32(entry.dtype, array), factor, dtype=np.float32)
    values = np.asarray(values)  # NumPy makes a scalar of a product without dimensions
    values[np.isnan(values)] = np.nan  # processors differ in a NaN's sign and payload
    return from_f32(entry.dtype, values).reshape(entry.shape)


def sliced(entry: Entry, overlay: SliceOverlay, name: str) -> tuple[slice, ...]:
    """Where a slice lies in its tensor. Raises FileFormatError if that has no such place."""
    if overlay.dim >= len(entry.shape) or overlay.count > entry.shape[overlay.dim]:
        raise FileFormatError(
            f"{name}: no slice of {overlay.count} along dim {overlay.dim} in {list(entry.shape)}"
        )
    return (*[slice(None)] * overlay.dim, slice(overlay.count))


def _writeable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array itself, or a copy if it belongs to someone else (payloads held in memory)."""
    return array if array.flags.writeable else array.copy()


def _apply(
    entry: Entry, step: Step, array: npt.NDArray[Any], payloads: Payloads
) -> npt.NDArray[Any]:
    """The array after one step; changed in place where its overlay allows it."""
    overlay, name = step.overlay, step.tensor
    if isinstance(overlay, ReplaceOverlay):
        slot = step.payload("tensor")
        return read_payload(payloads, slot, overlay.digest, dtype=entry.dtype, shape=entry.shape)
    if isinstance(overlay, ScaleOverlay):
        return _scaled(entry, overlay, array, name)
    if isinstance(overlay, SliceOverlay):
        where, slot = sliced(entry, overlay, name), step.payload("slice")
        shape = (*entry.shape[: overlay.dim], overlay.count, *entry.shape[overlay.dim + 1 :])
        part = read_payload(payloads, slot, overlay.digest, dtype=entry.dtype, shape=shape)
        array = _writeable(array)
        array[where] = part
        return array
    array = _writeable(array)
    mask = read_mask(payloads, step, entry.size)
    if isinstance(overlay, MaskOverlay):
        masks.select(as_words(array), mask)
    elif isinstance(overlay, ScatterOverlay):
        slot, expected = step.payload("values"), overlay.values_digest
        shape = (overlay.count,)
        values = read_payload(payloads, slot, expected, dtype=entry.dtype, shape=shape)
        masks.scatter(as_words(array), mask, as_words(values))
    else:
        assert_never(overlay)
    return array


def rebuild(
    made: Derivation,
    payloads: Payloads,
    bases: BaseLookup,
    out: npt.NDArray[np.float32] | None = None,
) -> RawTensor:
    """The finished tensor. ``out``, shape (size,), is room for a random source.

    Raises FileFormatError (a payload that is missing, misshapen or corrupt) or
    IncompatibleError (a base that does not fit, more memory than the machine has).
    """
    with np.errstate(all="ignore"):  # overflow to infinity is the format's meaning, not a fault
        return _rebuilt(made.needed(), payloads, bases, out)


def _rebuilt(
    made: Derivation,
    payloads: Payloads,
    bases: BaseLookup,
    out: npt.NDArray[np.float32] | None,
) -> RawTensor:
    entry, steps = made.entry, made.steps
    check_affordable(claimed_bytes(entry.dtype, entry.shape), made.tensor)
    first = steps[0].overlay if steps else None
    if isinstance(first, ReplaceOverlay):
        array: npt.NDArray[Any] = np.empty(0)  # replaced by the first step
    elif (
        entry.dtype == "F32"
        and isinstance(made.source, RandomSource)
        and (isinstance(first, MaskOverlay))
    ):
        mask = read_mask(payloads, steps[0], entry.size)
        array = _masked_random(entry, made.source, made.tensor, mask, out).reshape(entry.shape)
        steps = steps[1:]
    else:
        array = _source(made, payloads, bases, out)
    for step in steps:
        array = _apply(entry, step, array, payloads)
    return RawTensor(entry.dtype, array)


def kept(made: Derivation, payloads: Payloads) -> masks.Mask | None:
    """The positions that masks keep, scatters fill and slices overwrite; None if there is neither
    mask nor scatter.

    Scatters alone count from nothing: over zeros they are what is left of the tensor, over a base
    what differs from it. Only payloads of masks are read. Raises FileFormatError.
    """
    made = made.needed()
    if not made.masks:
        return None
    entry = made.entry
    check_affordable(entry.size, made.tensor)
    whole = any(isinstance(mask, MaskOverlay) for _, mask in made.masks) and not made.from_zero
    bits = np.full(entry.size, whole)
    for step in made.steps:
        overlay = step.overlay
        if isinstance(overlay, MaskOverlay):
            bits &= read_mask(payloads, step, entry.size).unpack()
        elif isinstance(overlay, ScatterOverlay):
            bits |= read_mask(payloads, step, entry.size).unpack()
        elif isinstance(overlay, SliceOverlay):
            bits.reshape(entry.shape)[sliced(entry, overlay, made.tensor)] = True
        elif not isinstance(overlay, (ReplaceOverlay, ScaleOverlay)):
            assert_never(overlay)
    return masks.Mask.of(bits)
