"""Statistics of one tensor: float64 sums over blocks, few enough that Python hardly counts.

NaN and infinity are counted, and left out of everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from randsurgery.inspection.floats import numbers

F64 = npt.NDArray[np.float64]
Fetch = Callable[[int, int], npt.NDArray[Any]]
"""(start, stop) -> these elements of a tensor, flat, as its dtype stores them. Shape (n,)."""

BLOCK = 1 << 19
"""Elements at a time."""


@dataclass(frozen=True)
class Summary:
    """Values of a tensor, or of a part of it.

    ``count``: all of them; ``finite``: those that the rest speaks of, which is None without any.
    ``variance`` is numpy's (about the mean, over n). ``norms``: the Euclidean norm of each index of
    the first dimension (a filter); None for tensors of fewer than two dimensions.
    """

    count: int
    nan: int = 0
    infinite: int = 0
    zeros: int = 0
    mean: float | None = None
    mean_abs: float | None = None
    variance: float | None = None
    min: float | None = None
    max: float | None = None
    norms: tuple[float, ...] | None = None

    @property
    def finite(self) -> int:
        """How many are neither NaN nor infinite."""
        return self.count - self.nan - self.infinite

    @property
    def std(self) -> float | None:
        """The square root of the variance."""
        return None if self.variance is None else math.sqrt(self.variance)

    @property
    def norm(self) -> float | None:
        """The filters' mean norm."""
        return math.fsum(self.norms) / len(self.norms) if self.norms else None


class _Sums:
    """The sums behind a Summary, one block after another."""

    def __init__(self) -> None:
        self.count = self.nan = self.infinite = self.zeros = self.finite = 0
        self.mean = self.squares = self.magnitude = 0.0  # squares: about the mean
        self.low, self.high = math.inf, -math.inf

    def add(self, values: F64, stored: npt.NDArray[Any], total: float) -> None:
        """Values, all finite, which are overwritten; ``stored``: the same in the dtype they came
        in, whose extremes are found sooner; ``total`` is the sum of their squares."""
        size = values.size
        if size == 0:
            return
        mean = _sum(values) / size
        about = total - size * mean * mean
        if not about > 0.1 * total:  # digits were lost in the difference
            rest = values - mean
            about = _sum(np.square(rest, out=rest))
        self.low = min(self.low, float(stored.min()))
        self.high = max(self.high, float(stored.max()))
        np.abs(values, out=values)
        self.magnitude += _sum(values)
        if float(values.min()) == 0:
            self.zeros += size - int(np.count_nonzero(values))
        self.count += size
        self._join(size, mean, about)

    def _join(self, size: int, mean: float, about: float) -> None:
        """Chan et al.'s rule for the moments of two sets taken together."""
        apart, before = mean - self.mean, self.finite
        self.finite += size
        self.mean += apart * size / self.finite
        self.squares += about + apart * apart * before * size / self.finite

    def summary(self, norms: F64 | None) -> Summary:
        """What has been found; ``norms``: sums of squares, one a filter."""
        lengths = None if norms is None else tuple(np.sqrt(norms).tolist())
        if not self.finite:
            return Summary(self.count, self.nan, self.infinite, norms=lengths)
        return Summary(
            self.count, self.nan, self.infinite, self.zeros, self.mean,
            self.magnitude / self.finite, self.squares / self.finite, self.low, self.high, lengths,
        )  # fmt: skip


_quiet = np.errstate(all="ignore")
"""Sums beyond float64 are infinite, and what comes of them NaN."""


@_quiet
def summarise(dtype: str, shape: tuple[int, ...], fetch: Fetch) -> Summary:
    """The statistics of a whole tensor."""
    sums, norms = _Sums(), _no_norms(shape)
    room = np.empty(min(BLOCK, math.prod(shape)))
    for row, start, stop, width in _blocks(shape):
        stored, values = numbers(dtype, fetch(start, stop)), room[: stop - start]
        np.copyto(values, stored)
        rows = _add(sums, values.reshape(-1, width), stored.reshape(-1, width))
        if norms is not None:
            norms[row : row + rows.size] += rows
    return sums.summary(norms)


@_quiet
def summarise_parts(
    dtype: str,
    shape: tuple[int, ...],
    fetch: Fetch,
    labels: npt.NDArray[np.uint8],
    parts: Iterable[int],
) -> dict[int, Summary]:
    """The statistics of each part of a tensor: the elements that bear its label, of those that
    ``parts`` asks for. ``labels`` has shape (size,). A filter's norm is of its elements there;
    filters without any are left out."""
    found = {part: (_Sums(), _no_norms(shape), _no_norms(shape)) for part in parts}
    for row, start, stop, width in _blocks(shape):
        values = as_f64(dtype, fetch(start, stop))
        for part, (sums, norms, members) in found.items():
            here = labels[start:stop] == part
            part_of_it = values[here][None]
            _add(sums, part_of_it, part_of_it)
            if norms is not None and members is not None:
                kept = np.where(here & np.isfinite(values), values, 0.0).reshape(-1, width)
                norms[row : row + len(kept)] += _squares(kept)
                members[row : row + len(kept)] += here.reshape(-1, width).sum(axis=1)
    return {
        part: sums.summary(None if norms is None or members is None else norms[members > 0])
        for part, (sums, norms, members) in found.items()
    }


def _no_norms(shape: tuple[int, ...]) -> F64 | None:
    return np.zeros(shape[0]) if len(shape) > 1 else None


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(first filter, start, stop, elements a row) of blocks: whole filters, or a piece of one."""
    size = math.prod(shape)
    if size == 0:
        return
    filters = shape[0] if len(shape) > 1 else 1
    width = size // filters
    if width > BLOCK:
        for row in range(filters):
            for start in range(row * width, (row + 1) * width, BLOCK):
                stop = min(start + BLOCK, (row + 1) * width)
                yield row, start, stop, stop - start
        return
    step = BLOCK // width
    for row in range(0, filters, step):
        yield row, row * width, min(row + step, filters) * width, width


def _add(sums: _Sums, values: F64, stored: npt.NDArray[Any]) -> F64:
    """Add a block, which is overwritten; ``stored`` has the same values in their own dtype. Returns
    the sums of squares by row. Shape (rows,)."""
    rows = _squares(values)
    total = float(rows.sum())
    if not math.isfinite(total):  # else all values are finite
        finite = np.isfinite(values)
        nan = int(np.isnan(values).sum())
        lost = values.size - int(finite.sum())
        sums.nan += nan
        sums.infinite += lost - nan
        sums.count += lost
        if lost:
            kept = np.where(finite, values, 0.0)
            rows = _squares(kept)
            total, values, stored = float(rows.sum()), values[finite], stored[finite]
    sums.add(values, stored, total)
    return rows


def _sum(values: F64) -> float:
    """The sum: a third sooner than NumPy's pairwise one, which float64 does not need here."""
    return float(np.einsum("i->", values.reshape(-1)))


def _squares(rows: F64) -> F64:
    """The sum of squares of each row. Shape (rows,)."""
    if hasattr(np, "vecdot") and rows.shape[1] <= 8192:  # longer ones would wake BLAS's threads
        found: F64 = np.vecdot(rows, rows)
        return found
    summed: F64 = np.einsum("ij,ij->i", rows, rows)
    return summed


def joined(parts: Iterable[Summary]) -> Summary:
    """The statistics of several tensors taken together, the norms of all their filters."""
    sums, norms, count = _Sums(), list[float](), 0
    for part in parts:
        count += part.count
        sums.nan += part.nan
        sums.infinite += part.infinite
        sums.zeros += part.zeros
        norms += part.norms or ()
        if part.mean is None or part.mean_abs is None or part.variance is None:
            continue
        assert part.min is not None
        assert part.max is not None
        sums.low, sums.high = min(sums.low, part.min), max(sums.high, part.max)
        sums.magnitude += part.mean_abs * part.finite
        sums._join(part.finite, part.mean, part.variance * part.finite)
    sums.count = count
    return sums.summary(np.square(norms) if norms else None)


@_quiet
def histogram(
    dtype: str,
    size: int,
    fetch: Fetch,
    edges: F64,
    labels: npt.NDArray[np.uint8] | None = None,
    part: int | None = None,
) -> list[int]:
    """How many finite values of a tensor, or of one part of it, lie between each two ``edges``;
    the last bin holds its upper edge."""
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        values = as_f64(dtype, fetch(start, stop))
        if labels is not None and part is not None:
            values = values[labels[start:stop] == part]
        counts += np.histogram(values[np.isfinite(values)], edges)[0]
    found: list[int] = counts.tolist()
    return found


# --- numbers -------------------------------------------------------------------------------------


@np.errstate(invalid="ignore")  # a signalling NaN becomes a quiet one
def as_f64(dtype: str, elements: npt.NDArray[Any]) -> F64:
    """The values of stored elements, flat. Exact, but for integers beyond 2^53. Shape (n,)."""
    return numbers(dtype, elements).astype(np.float64)
