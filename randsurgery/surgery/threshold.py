"""The exact top-k selection of edge-popup, without sorting.

Ramanujan et al., Section 3.2 and Algorithm 1: per tensor, the weights with the highest |score|
are kept. Here the lowest ``zeroed`` magnitudes are zeroed, and of equal ones the lower index goes
first, so the result is one well-defined set.

Non-negative floats order like the integers of the same bits, so magnitudes are compared as
integers. Between two steps the threshold hardly moves: one pass over the scores writes the masked
weights for a lower bound, counts what lies above it, and collects the few magnitudes inside a
narrow bracket; only these are ordered. If the bracket missed, it is widened once, then the
threshold is found by partition. Every path gives the same set.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from randsurgery.errors import DivergedError

Bools = npt.NDArray[np.bool_]

BLOCK = 1 << 18
"""Elements a step: the temporaries of one step stay in the cache."""

INFINITY_BITS = 0x7F800000
"""Bits of float32 infinity; the magnitude of a NaN is above."""

MIN_MARGIN, MAX_MARGIN = 1 << 13, 1 << 21
"""Bounds on half the bracket's width, in units of the last place of the threshold."""


@dataclass
class Bracket:
    """Where the threshold of one tensor was last seen; a guess that only changes the time."""

    threshold: int = -1  # bits of the magnitude; -1: never seen
    margin: int = 1 << 15

    def moved_to(self, threshold: int, inside: int, size: int) -> None:
        """Remember the threshold, and a margin of some times its last move."""
        if self.threshold >= 0:
            margin = max(4 * abs(threshold - self.threshold), self.margin * 3 // 4)
            if inside * 64 > size:  # ordering many costs more than a rare miss
                margin = min(margin, self.margin // 2)
            self.margin = min(max(margin, MIN_MARGIN), MAX_MARGIN)
        self.threshold = threshold


@dataclass
class _Pass:
    """What one pass over the scores found for a bracket [low, high)."""

    below: int  # magnitudes under low
    index: torch.Tensor  # positions of those inside, ascending
    bits: torch.Tensor  # their magnitudes


def select(
    scores: torch.Tensor, weight: torch.Tensor, zeroed: int, bracket: Bracket, name: str
) -> torch.Tensor:
    """``weight`` with the ``zeroed`` weights of lowest |score| set to +0.0. A new tensor.

    ``scores`` and ``weight`` have one shape. Raises DivergedError naming the tensor if a score is
    NaN (not on accelerators, where asking would stall the device; the loss shows it there).
    """
    scores = scores.detach()
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or weight.dtype != scores.dtype:
        return _select_by_sorting(scores, weight, zeroed, name)
    flat = scores.contiguous().view(-1).view(torch.int32)
    source = weight.contiguous().view(-1).view(torch.int32)
    out = torch.empty_like(source)
    _select_in_bracket(flat, source, out, zeroed, bracket, name)
    return out.view(torch.float32).view(weight.shape)


def _select_in_bracket(
    flat: torch.Tensor,
    source: torch.Tensor,
    out: torch.Tensor,
    zeroed: int,
    bracket: Bracket,
    name: str,
) -> None:
    if bracket.threshold < 0:
        bracket.threshold = low = _rank(flat, zeroed, name)
        high = low + 1
    else:
        low = max(bracket.threshold - bracket.margin, 0)
        high = bracket.threshold + bracket.margin
    found = _mask_from(flat, source, out, low, high, name)
    if not found.below <= zeroed <= found.below + found.index.numel():
        if zeroed < found.below:
            low, high = max(low - 8 * bracket.margin, 0), low
        else:
            low, high = high, high + 8 * bracket.margin
        found = _mask_from(flat, source, out, low, high, name)
    if not found.below <= zeroed <= found.below + found.index.numel():
        low = _rank(flat, zeroed, name)
        found = _mask_from(flat, source, out, low, low + 1, name)
    inside = found.index.numel()
    if not inside:
        return
    # stable, so of equal magnitudes the lower index comes, and goes, first
    bits, order = torch.sort(found.bits, stable=True)
    drop = zeroed - found.below
    out[found.index[order[:drop]]] = 0
    bracket.moved_to(int(bits[min(drop, inside - 1)]), inside, flat.numel())


def _rank(flat: torch.Tensor, rank: int, name: str) -> int:
    """The magnitude of that rank (0 the lowest), as bits."""
    magnitudes = (flat & 0x7FFFFFFF).numpy()
    if int(magnitudes.max(initial=0)) > INFINITY_BITS:
        raise DivergedError(_nan(name))
    rank = min(rank, magnitudes.size - 1)
    return int(np.partition(magnitudes, rank)[rank])


_local = threading.local()


def _scratch() -> tuple[npt.NDArray[np.int32], Bools, Bools]:
    """Temporaries of one block, made once a thread: fresh memory costs more than the arithmetic."""
    if not hasattr(_local, "scratch"):
        bools = np.zeros((2, BLOCK + 8), dtype=np.bool_)
        _local.scratch = (np.empty(BLOCK, dtype=np.int32), bools[0], bools[1])
    found: tuple[npt.NDArray[np.int32], Bools, Bools] = _local.scratch
    return found


def _mask_from(
    flat: torch.Tensor, source: torch.Tensor, out: torch.Tensor, low: int, high: int, name: str
) -> _Pass:
    """Write the weights whose magnitude is at least ``low``, +0.0 elsewhere, and collect those
    in [low, high)."""
    size = flat.numel()
    # torch's threads for what streams from memory, NumPy's loops for what stays in the cache
    magnitudes, over_low, under_high = _scratch()
    above, index, bits = 0, [], []
    for start in range(0, size, BLOCK):
        where = slice(start, start + BLOCK)
        count = flat[where].numel()
        magnitude = magnitudes[:count]
        keep = torch.from_numpy(magnitude)
        torch.bitwise_and(flat[where], 0x7FFFFFFF, out=keep)
        if int(keep.amax()) > INFINITY_BITS:
            raise DivergedError(_nan(name))
        np.greater_equal(magnitude, low, out=over_low[:count])
        np.less(magnitude, high, out=under_high[:count])
        kept = np.count_nonzero(over_low[:count])
        above += kept
        if kept - (count - np.count_nonzero(under_high[:count])):
            inside = _positions(over_low, under_high, count)
            index.append(inside + start)
            bits.append(magnitude[inside])
        # the magnitudes become all ones where kept, all zeros elsewhere
        torch.sub(low - 1, keep, out=keep)
        torch.bitwise_right_shift(keep, 31, out=keep)
        torch.bitwise_and(source[where], keep, out=out[where])
    if not index:
        return _Pass(size - above, torch.empty(0, dtype=torch.int64), torch.empty(0))
    return _Pass(
        size - above,
        torch.from_numpy(np.concatenate(index)),
        torch.from_numpy(np.concatenate(bits)),
    )


def _positions(first: Bools, second: Bools, count: int) -> npt.NDArray[np.intp]:
    """Where both are true among the first ``count``: eight at a time, then one by one.

    Both have room for a whole last word.
    """
    words = -(-count // 8)
    both = first[: words * 8] & second[: words * 8]
    both[count:] = False
    hits = np.flatnonzero(both.view(np.uint64))
    near = (hits[:, None] * 8 + np.arange(8)).reshape(-1)
    found: npt.NDArray[np.intp] = near[both[near]]
    return found


def _select_by_sorting(
    scores: torch.Tensor, weight: torch.Tensor, zeroed: int, name: str
) -> torch.Tensor:
    """The same set by one sort, without waiting for an accelerator."""
    magnitude = scores.abs().reshape(-1)
    if magnitude.device.type == "cpu" and bool(torch.isnan(magnitude).any()):
        raise DivergedError(_nan(name))
    if zeroed >= magnitude.numel():
        return torch.zeros_like(weight)
    threshold = torch.sort(magnitude).values[zeroed]
    ties = magnitude == threshold
    above = magnitude > threshold
    # the last of the equal ones stay, as many as are still wanted
    wanted = magnitude.numel() - zeroed - above.sum()
    keep = above | (ties & (ties.cumsum(0) > ties.sum() - wanted))
    zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return torch.where(keep.view(weight.shape), weight, zero)


def _nan(name: str) -> str:
    return f"{name}: a popup score is NaN; lower --lr, or --clip-grad"
