"""What all figures share: units, names that are safe to draw, and the way to a file."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from randsurgery.format.container import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def legible(name: str, limit: int = 40) -> str:
    """A name from a file with unprintable letters escaped, cut to what fits: begin and end tell
    names apart. To be drawn with ``parse_math=False``, since $ would begin a formula."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return plain if len(plain) <= limit else f"{plain[: limit - 12]}...{plain[-9:]}"


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
