"""Two masks of one tensor against each other, and against chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from randsurgery.format.masks import Mask, popcount


def share(part: float | None, whole: float) -> float | None:
    """``part / whole``; None where either is missing."""
    return None if part is None or not whole else part / whole


@dataclass(frozen=True)
class LayerOverlap:
    """Two masks of one tensor: what each keeps, and both."""

    name: str
    size: int
    first: int
    second: int
    both: int


@dataclass(frozen=True)
class Overlap:
    """The masks of two networks against each other, over the tensors that both have masked and in
    one shape. ``left_out``: those that only one has, or in another shape."""

    first: str
    second: str
    layers: tuple[LayerOverlap, ...]
    left_out: int

    @property
    def jaccard(self) -> float | None:
        """What both keep over what either keeps; None if that is nothing."""
        return jaccard(self.layers)

    @property
    def chance(self) -> float | None:
        """The same of independent masks of these densities."""
        return chance(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``jaccard`` and ``chance`` in all and of each tensor."""
        layers = [
            {**asdict(row), "jaccard": jaccard([row]), "chance": chance([row])}
            for row in self.layers
        ]
        return {
            "first": self.first, "second": self.second, "left_out": self.left_out,
            "jaccard": self.jaccard, "chance": self.chance, "layers": layers,
        }  # fmt: skip


def jaccard(layers: Iterable[LayerOverlap]) -> float | None:
    """Of masks added up: kept by both over kept by either."""
    rows = list(layers)
    both = sum(row.both for row in rows)
    return share(both, sum(row.first + row.second for row in rows) - both)


def chance(layers: Iterable[LayerOverlap]) -> float | None:
    """The expected ``both`` of independent masks, first * second / size, in ``jaccard``."""
    rows = list(layers)
    both = math.fsum(row.first * row.second / row.size for row in rows if row.size)
    return share(both, sum(row.first + row.second for row in rows) - both)


def overlap(name: str, first: Mask, second: Mask) -> LayerOverlap:
    """Two masks of one size."""
    both = popcount(first.packed & second.packed)
    return LayerOverlap(name, first.size, first.count, second.count, both)
