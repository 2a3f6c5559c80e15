"""Raw tensors: a safetensors dtype name and the little-endian array that stores it.

NumPy has no bfloat16 and no 8-bit floats, so those travel as unsigned integers of the same
width; the dtype name says what the bits mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from randsurgery.format.canonical import canonical_json, digest

DType = Literal[
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2",
    "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL",
]  # fmt: skip
DTYPES: tuple[str, ...] = get_args(DType)

STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}

FOREIGN_BITS = {
    "C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip
"""Bits an element of the dtypes that files of other programs have and ours never do: their sizes
are told, their values not read."""
KNOWN_DTYPES = frozenset((*DTYPES, *FOREIGN_BITS))

RANDOM_DTYPES = ("F32", "F16", "BF16")
"""What a random, signs or hadamard source may be rounded to."""


@dataclass(frozen=True)
class RawTensor:
    """A finished tensor. ``array`` is C-contiguous with the dtype ``STORAGE[dtype]``."""

    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape; () for a scalar."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements."""
        return self.array.nbytes

    def digest(self) -> str:
        """Digest of the canonical JSON array [dtype, shape], a zero byte, and the bytes."""
        return digest(canonical_json([self.dtype, list(self.shape)]), b"\0", self.array)

    def same_bits(self, other: RawTensor) -> bool:
        """True if dtype, shape and every byte agree (so -0.0 differs from +0.0)."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return np.array_equal(as_words(self.array), as_words(other.array))

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> RawTensor:
        """Wrap a NumPy array of a native dtype (not bfloat16, which NumPy lacks)."""
        kinds = {
            "f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16",
            "i1": "I8", "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL",
        }  # fmt: skip
        dtype = kinds[array.dtype.str[1:]]
        return cls(dtype, np.ascontiguousarray(array).view(STORAGE[dtype]).reshape(array.shape))


def element_count(shape: tuple[int, ...] | list[int]) -> int:
    """The number of elements, as an exact Python integer (1 for a scalar)."""
    return math.prod(shape)


def byte_count(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """Bytes of a tensor of this dtype and shape."""
    bits = FOREIGN_BITS[dtype] if dtype in FOREIGN_BITS else 8 * STORAGE[dtype].itemsize
    return -(-element_count(shape) * bits // 8)


def claimed_bytes(dtype: str, shape: tuple[int, ...] | list[int]) -> int:
    """As ``byte_count``, but a dimension of 0 counts as 1, so that it hides no absurd neighbour."""
    return byte_count(dtype, [max(dim, 1) for dim in shape])


def as_words(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as flat unsigned integers of the element's width."""
    return array.reshape(-1).view(np.dtype(f"<u{array.dtype.itemsize}"))


def to_f32(dtype: str, array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The float32 values of an F32, F16 or BF16 array; exact, and a copy unless F32."""
    if dtype == "BF16":
        wide: npt.NDArray[np.uint32] = array.astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)


def from_f32(dtype: str, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Round finite float32 values to F32, F16 or BF16, ties to even."""
    if dtype == "BF16":
        bits: npt.NDArray[np.uint32] = values.view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return (rounded >> np.uint32(16)).astype(np.uint16)  # type: ignore[no-any-return]
    return values.astype(STORAGE[dtype], copy=False)


def hex_float(value: float) -> str:
    """A float as canonical hexadecimal text, such as ``0x1.8000000000000p-3``."""
    return float(value).hex()


def f32(value: float) -> float:
    """The float32 nearest to ``value``, as a Python float; infinite beyond float32's range."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))
