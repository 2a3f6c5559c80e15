"""Bit masks: packed, counted, and stored at their entropy.

A mask over n elements is ceil(n / 8) bytes, element i in bit (i mod 8) of byte (i div 8), padding
bits 0. Two encodings are tried and the smaller wins; docs/format.md section 5 is normative.

    bits    the packed bytes
    gaps    run lengths between the rarer symbols, as bytes with 255 as escape

Either is raw deflate with Huffman codes only: masks found by training have next to no repeated
strings, and without the search for them a 25 M mask costs milliseconds. For independent bits
both reach the entropy within about one percent (benchmarks/masks.py).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from randsurgery.errors import FileFormatError

Encoding = Literal["bits", "gaps"]
U8Array = npt.NDArray[np.uint8]

ESCAPE = 255


@dataclass(frozen=True)
class Mask:
    """``size`` bits, ``count`` of them 1. ``packed`` has shape (ceil(size / 8),)."""

    packed: U8Array
    size: int
    count: int

    @classmethod
    def of(cls, bits: npt.NDArray[np.bool_]) -> Mask:
        """Pack a boolean array of any shape, in C order."""
        flat = bits.reshape(-1)
        return cls(np.packbits(flat, bitorder="little"), flat.size, int(np.count_nonzero(flat)))

    def unpack(self) -> npt.NDArray[np.bool_]:
        """The bits as booleans. Shape (size,)."""
        return np.unpackbits(self.packed, count=self.size, bitorder="little").view(np.bool_)


def entropy_bytes(size: int, count: int) -> float:
    """Shannon's bound in bytes for ``size`` independent bits with ``count`` ones."""
    if count in (0, size):
        return 0.0
    p = count / size
    return size * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def _deflate(data: U8Array) -> bytes:
    """One compress call a payload: the bytes depend on the data and zlib's version alone."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(data.data) + compressor.flush()


def _inflate(payload: bytes | memoryview, limit: int, name: str) -> U8Array:
    """The inflated bytes, never more than ``limit``; nothing may follow the stream's end."""
    stream = zlib.decompressobj(-15)
    try:
        data = stream.decompress(payload, limit + 1)
    except zlib.error as error:
        raise FileFormatError(f"{name}: the mask does not inflate ({error})") from None
    if len(data) > limit:
        raise FileFormatError(f"{name}: the mask inflates to more than {limit} bytes")
    if not stream.eof or stream.unused_data or stream.unconsumed_tail:
        raise FileFormatError(f"{name}: the mask's deflate stream does not end with its payload")
    return np.frombuffer(data, dtype=np.uint8)


def _to_gaps(mask: Mask) -> U8Array:
    """Runs before each rarer symbol: 255 per full 255, then the rest (0..254)."""
    marked = np.flatnonzero(mask.unpack() == (2 * mask.count <= mask.size))
    gaps = np.diff(marked, prepend=-1) - 1
    escapes, rest = np.divmod(gaps, ESCAPE)
    ends = np.cumsum(escapes + 1)
    out = np.full(int(ends[-1]) if ends.size else 0, ESCAPE, dtype=np.uint8)
    out[ends - 1] = rest
    return out


def _from_gaps(data: U8Array, size: int, count: int, name: str) -> U8Array:
    """The packed bits, after checking that the runs mark exactly what was promised."""
    of_ones = 2 * count <= size
    # hostile runs may reach far beyond size; their sum must not wrap around
    steps = data.astype(np.int64 if ESCAPE * data.size >= 2**31 else np.int32)
    steps += data != ESCAPE
    np.cumsum(steps, out=steps)
    marked = steps[data != ESCAPE] - 1
    expected = count if of_ones else size - count
    if marked.size != expected or (data.size and data[-1] == ESCAPE):
        raise FileFormatError(f"{name}: the mask marks {marked.size} elements, not {expected}")
    if marked.size and marked[-1] >= size:
        raise FileFormatError(f"{name}: the mask reaches beyond its {size} elements")
    bits = np.zeros(size, dtype=np.bool_) if of_ones else np.ones(size, dtype=np.bool_)
    bits[marked] = of_ones
    return np.packbits(bits, bitorder="little")


def encode(mask: Mask) -> tuple[Encoding, bytes]:
    """The smaller encoding and its payload; ``bits`` if they tie."""
    as_bits, as_gaps = _deflate(mask.packed), _deflate(_to_gaps(mask))
    return ("gaps", as_gaps) if len(as_gaps) < len(as_bits) else ("bits", as_bits)


def decode(
    payload: bytes | memoryview, encoding: Encoding, size: int, count: int, name: str = "mask"
) -> Mask:
    """The mask that ``encode`` was given. Output memory is bounded by ``size``.

    Raises FileFormatError if the payload holds anything but ``count`` ones in ``size`` bits.
    """
    if not 0 <= count <= size:
        raise FileFormatError(f"{name}: a mask of {size} elements cannot keep {count}")
    if encoding == "gaps":
        limit = min(count, size - count) + size // ESCAPE
        packed = _from_gaps(_inflate(payload, limit, name), size, count, name)
        return Mask(packed, size, count)
    packed = _inflate(payload, -(-size // 8), name)
    if packed.size != -(-size // 8):
        raise FileFormatError(f"{name}: the mask has {packed.size} bytes, not {-(-size // 8)}")
    if size % 8 and packed[-1] >> (size % 8):
        raise FileFormatError(f"{name}: the mask's padding bits are not 0")
    if (found := popcount(packed)) != count:
        raise FileFormatError(f"{name}: the mask keeps {found} elements, not {count}")
    return Mask(packed, size, count)


def popcount(packed: U8Array) -> int:
    """The number of ones in packed bits."""
    if not hasattr(np, "bitwise_count"):  # NumPy 1
        return int.from_bytes(packed.tobytes(), "little").bit_count()
    whole = packed.size // 8 * 8
    total = int(np.bitwise_count(packed[:whole].view(np.uint64)).sum(dtype=np.int64))
    return total + int(np.bitwise_count(packed[whole:]).sum(dtype=np.int64))


def _word_table(width: int) -> npt.NDArray[Any]:
    """Row b: eight words of ``width`` bytes, all ones where bit i of b is 1, else 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, -1, 0).astype(f"<i{width}").view(f"<u{width}")


_WORDS = {width: _word_table(width) for width in (1, 2, 4, 8)}
_BLOCK = 1 << 13
"""Packed bytes a step; the expanded words of one step stay in a core's own cache."""


def select(words: npt.NDArray[Any], mask: Mask, start: int = 0) -> None:
    """Set every word whose bit is 0 to all-zero bits (+0.0), in place.

    ``words`` has an unsigned dtype and shape (size,), or is the part of it that begins at
    ``start``, a multiple of 8. A selection, not a product: -1.5 x 0 is -0.0.
    """
    packed = mask.packed[start // 8 :]
    table = _WORDS[words.dtype.itemsize]
    whole = words.size // 8
    buffer = np.empty((min(_BLOCK, whole), 8), dtype=table.dtype)
    for first in range(0, whole, _BLOCK):
        part = packed[first : min(first + _BLOCK, whole)]
        lanes = np.take(table, part, axis=0, out=buffer[: part.size], mode="clip")
        block = words[first * 8 : (first + part.size) * 8].reshape(-1, 8)
        np.bitwise_and(block, lanes, out=block)
    if whole * 8 < words.size:
        words[whole * 8 :] &= table[packed[whole]][: words.size - whole * 8]


def scatter(words: npt.NDArray[Any], mask: Mask, values: npt.NDArray[Any]) -> None:
    """Write ``values``, shape (count,), in order to the words whose bit is 1, in place."""
    words[mask.unpack()] = values
