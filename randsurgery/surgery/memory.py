"""Memory that is taken again: fresh pages cost as much as the arithmetic that fills them."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64  # bytes, as torch's own


class Reused:
    """Room for one float32 result after another, of one size.

    The same memory is given out again once nobody holds the last result, neither the caller nor
    autograd nor a parameter's gradient; until then new memory is. A tensor made of a NumPy array
    holds a reference to it as long as any view of its memory lives, so the array's own count tells.
    """

    def __init__(self) -> None:
        self._array: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None
        self._unheld = 0

    def take(self, size: int) -> torch.Tensor:
        """``size`` float32 values on the CPU, whatever they are. Shape (size,)."""
        if (
            self._array is None
            or self._array.size != size
            or sys.getrefcount(self._array) > self._unheld
        ):
            raw = np.empty(size + ALIGNMENT // 4, dtype=np.float32)
            first = -raw.ctypes.data % ALIGNMENT // 4
            self._array = raw[first : first + size]
            self._unheld = sys.getrefcount(self._array)
        return torch.from_numpy(self._array)

    def __getstate__(self) -> dict[str, Any]:
        return {"_array": None, "_unheld": 0}  # a copy of its owner makes its own
