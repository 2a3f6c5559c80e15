"""Names of tensors: in the order of a network, by block, selected by pattern. So that 300 tensors
become 20 rows."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from randsurgery.errors import UsageError, near

T = TypeVar("T")
ROWS, FEW, MOST = 40, 8, 60
"""Rows that a table has at most unless a depth is named; those that are too few to say much; and
those that it has at most where a smaller depth would leave so few."""

_WRAPPERS = r"^((module|_orig_mod|model|backbone)\.)*"
_FIRST = re.compile(
    _WRAPPERS + r"(conv1|conv_?stem|stem|features|patch_embed|cls_token|pos_embed|embed\w*|wte)\b"
)
_LAST = re.compile(_WRAPPERS + r"(head\w*|fc|classifier|lm_head|last_linear|output)\b")

_NUMBER = re.compile("([0-9]{1,18})")

Natural = list[tuple[bool, int, str]]


def natural(name: str) -> Natural:
    """A key that sorts numbers in names as numbers: ``blocks.2`` before ``blocks.10``."""
    parts = _NUMBER.split(name)  # every second one is a number
    return [(i % 2 == 0, int(part) if i % 2 else 0, part) for i, part in enumerate(parts) if part]


def place(name: str, head: str | None = None) -> tuple[int, Natural]:
    """A key that sorts from a network's first to its last layer, as far as names can tell: stems
    first and classifiers last by their usual names, ``head`` behind all. Files forget the order."""
    if head and (name == head or name.startswith(f"{head}.")):
        return 3, natural(name)
    return 0 if _FIRST.match(name) else 2 if _LAST.match(name) else 1, natural(name)


def block(name: str, depth: int) -> str:
    """The first ``depth`` parts of a name: ``layer1.0`` of depth 2; all of it for depth 0."""
    return ".".join(name.split(".")[:depth]) if depth else name


def fitting_depth(names: Iterable[str], rows: int = ROWS) -> int:
    """How deep to look at a glance: 0, every name, if all fit or if names have no blocks to speak
    of; else the greatest depth of at most ``rows`` blocks, or the next one where these are fewer
    than ``FEW`` and those no more than ``MOST``."""
    known = set(names)
    if len(known) <= rows:
        return 0
    depths = range(1, max(name.count(".") for name in known) + 1)
    blocks = {depth: len({block(name, depth) for name in known}) for depth in depths}
    some = int(bool(depths) and blocks[1] < len(known))
    found = max((depth for depth in depths if blocks[depth] <= rows), default=some)
    if found and blocks[found] < FEW and blocks.get(found + 1, len(known)) <= MOST:
        found = (found + 1) % (depths[-1] + 1)  # behind the last depth: every name
    return found


def grouped(
    rows: Sequence[T],
    name_of: Callable[[T], str],
    depth: int | None = None,
    head: str | None = None,
) -> dict[str, list[T]]:
    """The rows of each block, in the network's order; without a depth, the one that fits."""
    depth = fitting_depth(map(name_of, rows)) if depth is None else depth
    found: dict[str, list[T]] = {}
    for row in sorted(rows, key=lambda row: place(name_of(row), head)):
        found.setdefault(block(name_of(row), depth), []).append(row)
    return found


def matches(pattern: str, name: str) -> bool:
    """True if the pattern is the tensor's name, its layer's or its block's; ``*`` as in a shell."""
    layer = name.rpartition(".")[0]
    return name.startswith(f"{pattern}.") or any(
        fnmatch.fnmatchcase(text, pattern) for text in (name, layer)
    )


def hits(names: Iterable[str], pattern: str) -> set[str]:
    """The names that the pattern matches. Raises UsageError if there are none."""
    known = list(names)
    found = {name for name in known if matches(pattern, name)}
    if not found:
        blocks = {block(name, depth) for name in known for depth in range(5)}
        hint = near(pattern, sorted(blocks)) or f"; there are {', '.join(sorted(known)[:3])}"
        raise UsageError(f"--filter {pattern!r} matches no tensor{hint}")
    return found


def selected(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns matches; without patterns, all. Raises UsageError for a
    pattern that matches none."""
    known = list(names)
    if not patterns:
        return known
    kept = set[str]().union(*(hits(known, pattern) for pattern in patterns))
    return [name for name in known if name in kept]
