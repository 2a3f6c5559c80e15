"""Tensors of any dtype as numbers that NumPy can compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from randsurgery.format.tensors import to_f32


def numbers(dtype: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values of a raw tensor's array, exact, in a dtype of NumPy's own; of the same shape."""
    if dtype in ("BF16", "F16"):
        return to_f32(dtype, array)
    if dtype == "F8_E5M2":  # the upper half of a float16
        half: npt.NDArray[np.uint16] = array.astype("<u2") << np.uint16(8)
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return half.view("<f2").astype(np.float32)
    if dtype == "F8_E4M3":
        return np.take(_E4M3, array)
    if dtype == "BOOL":
        return array.astype(np.bool_)
    return array


def _e4m3() -> npt.NDArray[np.float32]:
    """The values of the 256 bytes: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity,
    NaN where all seven are 1 (Micikevicius et al., 2022)."""
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    tiny = np.ldexp(mantissa / 8, -6)
    values = np.where(exponent == 0, tiny, np.ldexp(1 + mantissa / 8, exponent - 7))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


_E4M3 = _e4m3()


def nonfinite(values: npt.NDArray[Any]) -> tuple[int, int]:
    """(NaN, infinities of either sign) among the values."""
    if values.dtype.kind != "f":
        return 0, 0
    strange = values[~np.isfinite(values)]
    nan = int(np.count_nonzero(np.isnan(strange)))
    return nan, strange.size - nan
