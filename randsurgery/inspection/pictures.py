"""What all figures share: units, names that are safe to draw, and the way to a file."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from randsurgery.format.container import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def legible(name: str, limit: int = 40) -> str:
    """A name from a file with unprintable letters escaped, cut to what fits: begin and end tell
    names apart. To be drawn with ``parse_math=False``, since $ would begin a formula."""
    plain = _printable(name)
    return plain if len(plain) <= limit else f"{plain[: limit - 12]}...{plain[-9:]}"


def _printable(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def told_apart(names: Sequence[str], limit: int = 40) -> list[str]:
    """``legible`` names that differ once they are cut, too: those that would be the same begin
    shortly before the first letter in which they differ; what is the same even so is numbered."""
    whole, cut = [_printable(name) for name in names], [legible(name, limit) for name in names]
    for twins in _alike(cut):
        start = _common([whole[i] for i in twins]) - 8
        for i in twins:
            if start > 0 and len(whole[i]) > limit:
                cut[i] = f"...{legible(whole[i][start:], limit - 3)}"
    for twins in _alike(cut):
        for number, i in enumerate(twins, 1):
            cut[i] += f" ({number})"
    return cut


def _alike(labels: Sequence[str]) -> list[list[int]]:
    """The places of labels that are the same, for each that occurs twice or more."""
    places: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    return [twins for twins in places.values() if len(twins) > 1]


def common_parts(names: Sequence[str]) -> str:
    """The parts, each with its dot, that all of several dotted names begin with; every name has a
    part more. Empty for a name alone."""
    if len(names) < 2:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    return "".join(f"{part}." for part in parts[0][: _common(parts)])


def _common(found: Sequence[Sequence[str]]) -> int:
    """How many letters of strings, or parts of lists, all begin with."""
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*found, strict=False))
    return sum(1 for _ in alike)


def byte_unit(most: float) -> tuple[str, float]:
    """The unit in which that many bytes are below 1000, and its bytes."""
    for unit, scale in (("bytes", 1.0), ("kB", 1e3), ("MB", 1e6)):
        if most < 999.5 * scale:
            return unit, scale
    return "GB", 1e9


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """A figure to a .png, .svg or .pdf file, whole or not at all. Raises OutputError."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: a box stands for them
        figure.savefig(picture, format=Path(path).suffix.lower().removeprefix("."), dpi=150)
    write_atomically(path, iter([picture.getvalue()]))
