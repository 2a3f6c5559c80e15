"""The random generator: NumPy's Philox4x64-10 bit stream, and nothing else of NumPy's.

NumPy guarantees the raw stream of its ``Philox`` bit generator for ever, but not its
distributions. So only ``random_raw`` is used here; signs, normals and uniforms are made from the
raw bits by table lookup and single IEEE operations, which every machine rounds alike.
docs/format.md section 3 is the normative text.

A stream is named by (seed, stream key, role) and depends on nothing else: not on the order in
which tensors are made, not on neighbours, not on a global generator.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from randsurgery.format.canonical import canonical_json

Distribution = Literal["sign", "normal", "uniform"]
Role = Literal["weight", "score", "mask", "order", "augment", "torch", "head"]
F32Array = npt.NDArray[np.float32]

GENERATOR_ID = "randsurgery.philox.1"

BLOCK = 1 << 16
"""Elements made at a time: the working set stays in a core's own cache."""

NORMAL_TABLE_SHA256 = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"


class GeneratorError(RuntimeError):
    """This platform does not reproduce the golden vectors; no tensor may be made on it."""


def stream_key(seed: int, stream: str, role: Role) -> tuple[int, int]:
    """The Philox key: the first 16 bytes of SHA-256 over the canonical JSON array
    ``[generator id, seed, stream, role]``, as two little-endian 64-bit words."""
    digest = hashlib.sha256(canonical_json([GENERATOR_ID, seed, stream, role])).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


class BitStream:
    """Raw bits of one stream, read front to back in whole 64-bit words.

    NumPy increments the counter before it produces a block, so with counter 0 the first block
    is Philox4x64-10 of counter 1.
    """

    def __init__(self, seed: int, stream: str, role: Role) -> None:
        key = np.array(stream_key(seed, stream, role), dtype=np.uint64)
        self._philox = np.random.Philox(key=key, counter=0)

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The next ``count`` 64-bit words, in little-endian byte order. Shape (count,)."""
        return self._philox.random_raw(count).astype("<u8", copy=False)

    def bytes(self, count: int) -> npt.NDArray[np.uint8]:
        """The next ``ceil(count / 8)`` words as bytes, cut to ``count``. Shape (count,)."""
        return self.words(-(-count // 8)).view(np.uint8)[:count]


@functools.cache
def normal_table() -> F32Array:
    """The float32 nearest to the inverse normal CDF at (i + 1/2) / 65536. Shape (65536,).

    The upper half is the negated lower half, so the table is exactly antisymmetric.
    """
    inverse = statistics.NormalDist().inv_cdf
    lower = np.array([inverse((i + 0.5) / 65536) for i in range(32768)], dtype=np.float32)
    table = np.concatenate([lower, -lower[::-1]])
    found = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    if found != NORMAL_TABLE_SHA256:
        raise GeneratorError(f"the normal table has digest {found}, not {NORMAL_TABLE_SHA256}")
    table.setflags(write=False)
    return table


@functools.lru_cache(maxsize=64)
def _sign_table(scale: bytes) -> F32Array:
    """Row b holds the eight signed values that byte b stands for, lowest bit first.

    ``scale`` is the float32's bytes: as numbers, +0.0 and -0.0 would share one table.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    value = np.frombuffer(scale, dtype=np.float32)[0]
    table: F32Array = np.where(bits == 1, value, -value).astype(np.float32)
    return table


def expand_signs(packed: npt.NDArray[np.uint8], scale: float, out: F32Array) -> None:
    """Bit i of ``packed`` (lowest first) becomes ``out[i]``: +scale for 1, -scale for 0.

    ``packed`` has shape (ceil(n / 8),), ``out`` shape (n,).
    """
    table, whole = _sign_table(np.float32(scale).tobytes()), out.size // 8
    np.take(table, packed[:whole], axis=0, out=out[: whole * 8].reshape(whole, 8), mode="clip")
    if whole * 8 < out.size:
        out[whole * 8 :] = table[packed[whole]][: out.size - whole * 8]


BlockFiller = Callable[[BitStream, F32Array], None]


def _signs(scale: float) -> BlockFiller:
    def fill(bits: BitStream, block: F32Array) -> None:
        expand_signs(bits.bytes(-(-block.size // 8)), scale, block)

    return fill


def _normals(scale: float) -> BlockFiller:
    table = normal_table() * np.float32(scale)

    def fill(bits: BitStream, block: F32Array) -> None:
        np.take(table, bits.bytes(2 * block.size).view("<u2"), out=block, mode="clip")

    return fill


def _uniforms(scale: float) -> BlockFiller:
    def fill(bits: BitStream, block: F32Array) -> None:
        integers = (bits.bytes(4 * block.size).view("<u4") >> np.uint32(8)).astype(np.int32)
        integers -= 1 << 23
        np.multiply(integers, np.float32(2.0**-23), out=block, casting="same_kind", dtype="f4")
        np.multiply(block, np.float32(scale), out=block)

    return fill


_FILLERS: dict[Distribution, Callable[[float], BlockFiller]] = {
    "sign": _signs,
    "normal": _normals,
    "uniform": _uniforms,
}


def _fill(
    distribution: Distribution,
    bits: BitStream,
    scale: float,
    out: F32Array,
    finish: Callable[[int, F32Array], None] | None = None,
) -> None:
    fill = _FILLERS[distribution](scale)
    for start in range(0, out.size, BLOCK):
        block = out[start : start + BLOCK]
        fill(bits, block)
        if finish is not None:
            finish(start, block)


def generate(
    distribution: Distribution,
    size: int,
    scale: float,
    *,
    seed: int,
    stream: str,
    role: Role = "weight",
    out: F32Array | None = None,
    finish: Callable[[int, F32Array], None] | None = None,
) -> F32Array:
    """``size`` float32 values of one stream. Shape (size,).

    ``scale`` must be a float32 value: the magnitude of ``sign``, the standard deviation of
    ``normal``, the half-width b of ``uniform`` on [-b, b). ``finish(start, block)`` may change
    each block while it is still in the cache.
    """
    self_test()
    if out is None:
        out = np.empty(size, dtype=np.float32)
    _fill(distribution, BitStream(seed, stream, role), scale, out, finish)
    return out


def permutation(size: int, *, seed: int, stream: str, role: Role = "order") -> npt.NDArray[np.intp]:
    """A random order of ``range(size)``: the stable sort order of one 64-bit word each."""
    return np.argsort(BitStream(seed, stream, role).words(size), kind="stable")


def integers(
    size: int, high: int, *, seed: int, stream: str, role: Role = "augment"
) -> npt.NDArray[np.int64]:
    """``size`` integers in [0, high), each ``(u32 * high) >> 32``; ``high`` at most 2**31."""
    words = BitStream(seed, stream, role).bytes(4 * size).view("<u4").astype(np.uint64)
    scaled: npt.NDArray[np.int64] = ((words * np.uint64(high)) >> np.uint64(32)).astype(np.int64)
    return scaled


def torch_seed(seed: int, stream: str) -> int:
    """A 63-bit seed for library code that can only be seeded through torch, inside a fork."""
    return int(BitStream(seed, stream, "torch").words(1)[0]) >> 1


# Golden vectors: stream (seed 7, key "golden", role "weight"); the same stand in docs/format.md.
GOLDEN_KEY = (0x952BA880B6606DEE, 0xB06120F7231D121D)
GOLDEN_WORDS = (0xB2C89F693D537F16, 0xE997E9D7FE2E81FE)
GOLDEN_SHA256: dict[Distribution, str] = {
    "sign": "4704833f6db95b7c8965589da804cbe73e18dbf3af2a3b059c5775729d4120b8",
    "normal": "629ad2f780d985ff53e59f463f4a799b6edcbe4cbd5513f7f6ce05fd88fd79e0",
    "uniform": "e128ccce56d7f42383760c5e8cf2def4067beee9c16c293e0ff5240c1bba0cc8",
}


@functools.cache
def self_test() -> None:
    """Compare this platform with the golden vectors, once a process. Raises GeneratorError."""
    if stream_key(7, "golden", "weight") != GOLDEN_KEY:
        raise GeneratorError("the stream key differs from the golden vector")
    words = BitStream(7, "golden", "weight").words(2)
    if tuple(int(w) for w in words) != GOLDEN_WORDS:
        raise GeneratorError("the Philox stream differs from the golden vector")
    for name, expected in GOLDEN_SHA256.items():
        values = np.empty(1003, dtype=np.float32)
        _fill(name, BitStream(7, "golden", "weight"), 0.5, values)
        found = hashlib.sha256(values.astype("<f4", copy=False).tobytes()).hexdigest()
        if found != expected:
            raise GeneratorError(f"{name} values differ from the golden vector ({found})")
