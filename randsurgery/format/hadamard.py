"""The hadamard source: a matrix of signs with orthogonal rows, from its shape alone.

Hoffer et al., "Fix your classifier", section on Hadamard matrices. docs/format.md section 4 is
normative. Orders come from Sylvester's doubling, Paley's two constructions over a prime field,
and Kronecker products of these.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from randsurgery.errors import IncompatibleError
from randsurgery.format.generator import BitStream

I8Array = npt.NDArray[np.int8]
MAX_ORDER = 1 << 13
"""As wide as the widest classifiers in use; a matrix of this order takes 64 MiB."""


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % p for p in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> I8Array:
    """Q[i, j] = +1 if i - j is a non-zero square modulo the prime q, 0 if i = j, else -1."""
    character = np.full(q, -1, dtype=np.int8)
    character[np.arange(1, q, dtype=np.int64) ** 2 % q] = 1
    character[0] = 0
    # row i is the window of length q that starts at q - 1 - i: no q x q table of indices
    backwards = np.concatenate([character, character])[::-1]
    return np.lib.stride_tricks.sliding_window_view(backwards, q)[:q][::-1]


def _paley_one(q: int) -> I8Array:
    """Order q + 1 for a prime q = 3 mod 4: I + S, S skew with first row +1, first column -1."""
    skew = np.zeros((q + 1, q + 1), dtype=np.int8)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=np.int8)


def _paley_two(q: int) -> I8Array:
    """Order 2(q + 1) for a prime q = 1 mod 4, from the symmetric conference matrix C."""
    conference = np.zeros((q + 1, q + 1), dtype=np.int8)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, _jacobsthal(q)
    eye = np.eye(q + 1, dtype=np.int8)
    plus, minus = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(conference, plus) + np.kron(eye, minus)


Plan = tuple[Literal["given", "paley 1", "paley 2", "kron"], int]


@functools.cache
def _plan(n: int) -> Plan | None:
    """How order n is made, found without making it; None where the constructions do not reach."""
    if n in (1, 2):
        return ("given", n)
    if n % 4:
        return None
    if n & (n - 1):  # powers of two are left to Sylvester's doubling, a Kronecker product
        if _is_prime(n - 1):  # n - 1 = 3 mod 4
            return ("paley 1", n - 1)
        if n % 8 == 4 and _is_prime(n // 2 - 1):  # n / 2 - 1 = 1 mod 4
            return ("paley 2", n // 2 - 1)
    for factor in (2, *range(4, math.isqrt(n) + 1, 4)):
        if n % factor == 0 and _plan(n // factor) is not None and _plan(factor) is not None:
            return ("kron", factor)
    return None


@functools.lru_cache(maxsize=2)
def _matrix(n: int) -> I8Array:
    """The Hadamard matrix of an order that ``_plan`` reaches."""
    plan = _plan(n)
    assert plan is not None
    kind, number = plan
    if kind == "paley 1":
        return _paley_one(number)
    if kind == "paley 2":
        return _paley_two(number)
    if kind == "kron":
        return np.kron(_matrix(number), _matrix(n // number))
    return np.array([[1]] if n == 1 else [[1, 1], [1, -1]], dtype=np.int8)


def order_for(width: int) -> int:
    """The smallest order that the constructions reach and that is at least ``width``."""
    if not 1 <= width <= MAX_ORDER:
        raise IncompatibleError(f"a hadamard source has 1 to {MAX_ORDER} columns, not {width}")
    # every power of two is reached, so the search ends at MAX_ORDER at the latest
    return next(n for n in range(width, MAX_ORDER + 1) if _plan(n) is not None)


def hadamard_rows(rows: int, columns: int) -> I8Array:
    """``rows`` distinct sign vectors, values ±1. Shape (rows, columns).

    The first ``order_for(columns)`` are rows of one Hadamard matrix cut to ``columns``, hence
    exactly orthogonal if that is the order. Further rows are the same matrix with its columns
    sign-flipped by the stream (seed 0, key "hadamard-t", role "head") for t = 1, 2, ...; a row
    that occurred before is left out.
    """
    base = _matrix(order_for(columns))[:, :columns]
    if rows == 0:
        return np.empty((0, columns), dtype=np.int8)
    found: dict[bytes, I8Array] = {}
    # columns < 64 keeps the power small; wider rows never run out
    possible = columns >= 64 or rows <= 2**columns
    for turn in range(4 + 4 * rows // base.shape[0] if possible else 0):
        flips = np.ones(columns, dtype=np.int8)
        if turn:
            packed = BitStream(0, f"hadamard-{turn}", "head").bytes(-(-columns // 8))
            flips -= 2 * np.unpackbits(packed, count=columns, bitorder="little").view(np.int8)
        for row in base * flips:
            found.setdefault(row.tobytes(), row)
            if len(found) == rows:
                return np.stack(list(found.values()))
    raise IncompatibleError(f"there are no {rows} distinct hadamard rows of {columns} columns")
