"""The public names of the package; ``import randsurgery`` fetches them from here when asked."""

from __future__ import annotations

import os

from torch import nn

from randsurgery.errors import (
    DataError,
    DivergedError,
    FileFormatError,
    IncompatibleError,
    OutputError,
    RandsurgeryError,
    UsageError,
)
from randsurgery.format.checkpoint import (
    Checkpoint,
    read_checkpoint,
)
from randsurgery.format.recipe import Recipe
from randsurgery.format.writing import write_checkpoint
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.modules import build, harvest
from randsurgery.surgery.popup import Popup, attach
from randsurgery.surgery.recipes import make_recipe

__all__ = [
    "Checkpoint",
    "DataError",
    "DivergedError",
    "FileFormatError",
    "IncompatibleError",
    "OutputError",
    "Popup",
    "RandsurgeryError",
    "Recipe",
    "UsageError",
    "attach",
    "build",
    "harvest",
    "load",
    "make_recipe",
    "read_recipe",
    "save",
]

Path = str | os.PathLike[str]


def load(
    path: Path,
    *,
    model: nn.Module | None = None,
    member: str | None = None,
    base: Path | None = None,
) -> nn.Module:
    """The network in a file: a plain nn.Module on the CPU, in evaluation mode.

    ``model``: your own module to fill, needed if the file names no architecture. ``member``: which
    network, if the file has several. ``base``: the base checkpoint, if the file builds on one that
    does not lie beside it. Raises FileFormatError or IncompatibleError.
    """
    with open_checkpoint(path, base) as checkpoint:
        return build(checkpoint, member, model=model)


def read_recipe(path: Path) -> Recipe:
    """What a file says about itself, from its header alone. Raises FileFormatError."""
    with read_checkpoint(path, need_bases=False) as checkpoint:
        return checkpoint.recipe


def save(
    path: Path,
    recipe: Checkpoint,
    module: nn.Module | None = None,
    *,
    scores: bool = False,
    force: bool = False,
) -> int:
    """Write a recipe, with what changed in ``module`` since it was built from it.

    The file is re-read and verified before it takes its name. ``scores`` keeps popup scores.
    Returns its size in bytes. Raises OutputError if the file exists and ``force`` is false.
    """
    checkpoint = recipe if module is None else harvest(recipe, module, scores=scores)
    return write_checkpoint(path, checkpoint, force=force)
