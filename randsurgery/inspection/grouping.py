"""Tensors by block: the first parts of their names, so that 300 tensors become 20 rows."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from randsurgery.errors import UsageError, near

T = TypeVar("T")
ROWS = 40
"""Rows that a table has at most, unless a depth is named."""


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts ``blocks.2`` before ``blocks.10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), part) if part[0] in "0123456789" else (1, 0, part) for part in parts]


def block(name: str, depth: int) -> str:
    """The first ``depth`` parts of a tensor's name: ``layer1.0`` of depth 2."""
    return ".".join(name.split(".")[:depth])


def fitting_depth(names: Iterable[str], rows: int = ROWS) -> int:
    """The greatest depth that makes at most ``rows`` blocks, 1 at least."""
    split = [name.split(".") for name in names]
    deepest = max((len(parts) for parts in split), default=1)
    fitting = (depth for depth in range(deepest, 1, -1)
               if len({tuple(parts[:depth]) for parts in split}) <= rows)  # fmt: skip
    return next(fitting, 1)


def grouped(
    rows: Sequence[T], name_of: Callable[[T], str], depth: int | None = None
) -> dict[str, list[T]]:
    """The rows of each block, blocks in natural order; without a depth, the one that fits."""
    depth = fitting_depth(map(name_of, rows)) if depth is None else depth
    found: dict[str, list[T]] = {}
    for row in sorted(rows, key=lambda row: natural(name_of(row))):
        found.setdefault(block(name_of(row), depth), []).append(row)
    return found


def selected(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The tensors that one of the patterns matches, by its own name or its layer's; without
    patterns, all. Raises UsageError for a pattern that matches none."""
    known = list(names)
    if not patterns:
        return known
    kept: set[str] = set()
    for pattern in patterns:
        hits = {name for name in known if _matches(name, pattern)}
        if not hits:
            hint = near(pattern, known) or f"; there are {', '.join(known[:3])}"
            raise UsageError(f"--filter {pattern!r} matches nothing{hint}")
        kept |= hits
    return [name for name in known if name in kept]


def _matches(name: str, pattern: str) -> bool:
    layer = name.rpartition(".")[0]
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(layer, pattern)
