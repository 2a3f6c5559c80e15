"""The public names of the package; ``import randsurgery`` fetches them from here when asked."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from randsurgery.errors import (
    DataError,
    DivergedError,
    FileFormatError,
    IncompatibleError,
    OutputError,
    RandsurgeryError,
    RandsurgeryWarning,
    UsageError,
)
from randsurgery.format import checkpoint as files
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.recipe import Recipe
from randsurgery.format.writing import write_checkpoint
from randsurgery.surgery.arguments import as_checkpoint, check_module
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.ensembles import Engine, Ensemble
from randsurgery.surgery.heads import FixedKind, check_fixed_kind, with_fixed_head
from randsurgery.surgery.initialisers import check_seed
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.method import Method, Scoring
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import Freeze, make_plan, with_plan, zero_filled
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.scores import unmasked
from randsurgery.surgery.supermask import Supermask

__all__ = [
    "Checkpoint",
    "DataError",
    "DivergedError",
    "Ensemble",
    "FileFormatError",
    "Freeze",
    "IncompatibleError",
    "OutputError",
    "Popup",
    "RandsurgeryError",
    "RandsurgeryWarning",
    "Recipe",
    "Supermask",
    "UsageError",
    "attach",
    "build",
    "fix_head",
    "freeze",
    "harvest",
    "load",
    "load_ensemble",
    "make_recipe",
    "read_checkpoint",
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
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """The network in a file: a plain nn.Module on the CPU, in evaluation mode.

    ``dtype``: of its floating tensors, whatever they are in the file; None: as in the file.
    ``model``: your own module to fill, needed if the file names no architecture. ``member``: which
    network, if the file has several. ``base``: the base checkpoint, if the file builds on one that
    does not lie beside it. Raises FileFormatError or IncompatibleError.
    """
    with open_checkpoint(path, base, spare_bases=True) as checkpoint:
        return build(checkpoint, member, model=model, dtype=dtype)


def load_ensemble(
    path: Path,
    *,
    members: Sequence[str] | None = None,
    model: nn.Module | None = None,
    base: Path | None = None,
    engine: Engine = "auto",
) -> Ensemble:
    """The members of a file, or some of them, as one nn.Module on the CPU, in evaluation mode.

    Called with images (B, channels, H, W) it gives the mean of the members' probabilities, (B, C);
    ``predict`` adds entropy, mutual information and disagreement. The file stays open until
    ``close``, or the end of a ``with``. ``engine``: see ``Ensemble``. ``model``, ``base``: as for
    ``load``. Raises FileFormatError, UsageError for an unknown member, IncompatibleError for
    members of several tasks.
    """
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_checkpoint(path, base, spare_bases=True))
        found = Ensemble(checkpoint, members, model=model, engine=engine)
        stack.pop_all()
    return found


def read_recipe(path: Path) -> Recipe:
    """What a file says about itself, from its header alone. Raises FileFormatError."""
    with files.read_checkpoint(path, need_bases=False) as checkpoint:
        return checkpoint.recipe


def read_checkpoint(path: Path, *, base: Path | None = None) -> Checkpoint:
    """A file's recipe with its payloads, in memory: what ``build``, ``attach``, ``freeze`` and
    ``save`` go on from. ``base``: as for ``load``. Raises FileFormatError or IncompatibleError."""
    with open_checkpoint(path, base) as checkpoint:
        return checkpoint.in_memory()


def freeze(
    recipe: Checkpoint | Recipe, wish: Freeze, *, model: nn.Module | None = None, zero: bool = False
) -> Checkpoint:
    """The recipe with a plan: what of the network is learned (Rosenfeld & Tsotsos, Section 3).

    ``model``: your own module, needed if the recipe names no architecture. ``zero``: what slices
    leave out is zero instead of its own value. Raises UsageError for a wish that cannot be met.
    """
    checkpoint = as_checkpoint(recipe)
    if not isinstance(wish, Freeze):
        raise UsageError(f"expected a Freeze, found {type(wish).__name__}")
    if model is not None:
        check_module(model)
    plan = make_plan(meta_module(checkpoint) if model is None else model, wish)
    return zero_filled(checkpoint, plan) if zero else with_plan(checkpoint, plan)


def fix_head(
    recipe: Checkpoint | Recipe, kind: FixedKind, *, seed: int = 0, scale: float | None = None
) -> Checkpoint:
    """The recipe with its classifier fixed, "orthonormal" or "hadamard" (Hoffer et al.): features
    on the sphere, fixed unit rows, a learned bias, and a learned scale unless one is given."""
    fixed = check_fixed_kind(kind)
    return with_fixed_head(as_checkpoint(recipe), fixed, seed=check_seed(seed), scale=scale)


def attach(model: nn.Module, what: Method | Checkpoint | Recipe) -> nn.Module:
    """Make a module learn one part of itself and nothing else. In place; any nn.Module will do.

    A ``Popup`` or a ``Supermask`` gives every convolution and linear weight a score, which is
    learned in its place.
    A recipe makes the module learn the plan it has, or everything if it has none. The parameters
    that require gradients are then what an optimiser is to have. Warns (RandsurgeryWarning) of
    weights that scores leave as they are: recurrent layers, embeddings, parameters of your own.
    Raises UsageError or IncompatibleError.
    """
    check_module(model)
    if not isinstance(what, Method):
        return learn_plan(model, as_checkpoint(what))
    left = unmasked(model, what) if isinstance(what, Scoring) else None
    found = what.attach(model)
    if left:
        warnings.warn(left, RandsurgeryWarning, stacklevel=2)
    return found


def save(
    path: Path,
    recipe: Checkpoint | Recipe,
    module: nn.Module | None = None,
    *,
    scores: bool = False,
    force: bool = False,
) -> int:
    """Write a recipe, with what changed in ``module`` since it was built from it.

    The file is re-read and verified before it takes its name. ``scores`` keeps popup scores.
    ``recipe``: of ``make_recipe`` or ``read_checkpoint``; what ``read_recipe`` gives will do where
    it speaks of no payload. Returns the file's size in bytes. Raises OutputError if the file exists
    and ``force`` is false.
    """
    if not force and os.path.exists(path):
        raise OutputError(f"{path}: exists already; choose another path or pass force=True")
    checkpoint = as_checkpoint(recipe)
    if module is not None:
        checkpoint = harvest(checkpoint, module, scores=scores)
    return write_checkpoint(path, checkpoint, force=force)
