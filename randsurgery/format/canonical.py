"""Canonical JSON, hexadecimal floats and digests: one byte string for one meaning."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
"""Digests are SHA-256 cut to its first 16 bytes, written as 32 hexadecimal digits."""


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII escapes, no NaN: equal values give equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def strict_json(text: str) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and numbers beyond float64.

    Raises ValueError with the reason.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"duplicate key {twice[:60]!r}")
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise ValueError(f"{digits[:40]} is beyond float64")
        return value

    def integer(digits: str) -> int:
        number(digits)
        return int(digits)

    try:
        return json.loads(
            text,
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=number,
            parse_int=integer,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def digest(*parts: bytes | memoryview | npt.NDArray[Any]) -> str:
    """The digest of the concatenated parts; arrays count as their bytes in C order."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return sha.hexdigest()[: 2 * DIGEST_BYTES]
