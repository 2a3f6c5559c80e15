"""The values of one layer in bins, for several networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from randsurgery.errors import UsageError, near
from randsurgery.inspection.moments import F64, Summary, histogram, summarise, summarise_parts
from randsurgery.inspection.weight_files import (
    FIXED,
    LEARNED,
    PARTS,
    Initial,
    Network,
    TensorSource,
)

BINS = 30


@dataclass(frozen=True)
class Histogram:
    """The values of one layer in bins of equal width. ``edges``: one more than bins; ``counts``: of
    each network, by its name and the part. ``initial``: of each network, where it is known."""

    layer: str
    edges: tuple[float, ...]
    counts: dict[str, tuple[int, ...]]
    initial: dict[str, Initial]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"layer": self.layer, "edges": list(self.edges),
                "counts": {name: list(counts) for name, counts in self.counts.items()}}  # fmt: skip


def find_layer(networks: Sequence[Network], layer: str) -> str:
    """The full name of a layer's tensor. Raises UsageError with near names."""
    names = sorted({t.name for network in networks for t in network.tensors})
    for name in (layer, f"{layer}.weight"):
        if name in names:
            return name
    known = {*names, *(name.removesuffix(".weight") for name in names)}
    raise UsageError(f"no layer {layer!r} to make a histogram of{near(layer, sorted(known))}")


def layer_histogram(networks: Sequence[Network], layer: str, bins: int = BINS) -> Histogram:
    """One layer of every network that has it, the same bins for all; learned and fixed values
    apart, masked ones left out. Raises UsageError if none has it."""
    name = find_layer(networks, layer)
    having = [(n, t) for n in networks for t in n.tensors if t.name == name and t.size]
    parts: list[tuple[str, TensorSource, int | None, Summary]] = []
    for network, tensor in having:
        fetch = tensor.open()
        if tensor.labels is None:
            end = f" ({tensor.whole})" if tensor.whole else ""
            found = summarise(tensor.dtype, tensor.shape, fetch)
            parts.append((f"{network.name}{end}", tensor, None, found))
            continue
        split = summarise_parts(
            tensor.dtype, tensor.shape, fetch, tensor.labels(), (LEARNED, FIXED)
        )
        parts += [(f"{network.name} ({PARTS[p]})", tensor, p, s) for p, s in split.items()]
    seen = [s for _, _, _, s in parts if s.min is not None]
    low = min((s.min for s in seen if s.min is not None), default=0.0)
    high = max((s.max for s in seen if s.max is not None), default=0.0)
    edges = _edges(low, high, bins)
    counts = {
        title: tuple(_counted(tensor, edges, part))
        for title, tensor, part, summary in parts
        if summary.count
    }
    initial = {n.name: t.initial for n, t in having if t.initial is not None}
    return Histogram(name, tuple(edges.tolist()), counts, initial)


def _edges(low: float, high: float, bins: int) -> F64:
    """The edges of bins of one width, as far as float64 tells them apart: never falling, from the
    lowest to the highest value. Shape (bins + 1,)."""
    if low == high:
        most, half = float(np.finfo(np.float64).max), max(abs(low), 1.0) / 2
        low, high = max(low - half, -most), min(high + half, most)
    shares = np.arange(bins + 1) / bins
    edges = low * (1 - shares) + high * shares  # high - low may be beyond float64
    found: F64 = np.maximum.accumulate(np.clip(edges, low, high))
    return found


def _counted(tensor: TensorSource, edges: F64, part: int | None) -> list[int]:
    labels = tensor.labels() if tensor.labels else None
    return histogram(tensor.dtype, tensor.size, tensor.open(), edges, labels, part)
