"""Figures to files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from randsurgery.format.container import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """A figure to a .png, .svg or .pdf file, whole or not at all. Raises OutputError."""
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.lower().removeprefix("."), dpi=150)
    write_atomically(path, iter([picture.getvalue()]))
