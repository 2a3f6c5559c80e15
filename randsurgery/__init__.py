"""randsurgery: a network is a seed plus a few bits.

The library in one breath::

    import randsurgery as rs

    recipe = rs.make_recipe("conv4", seed=7, args={"num_classes": 10})
    model = rs.build(recipe)
    rs.attach(model, rs.Popup(k="0.5")).train()
    ...                                      # any training loop
    rs.save("conv4.safetensors", recipe, model)
    model = rs.load("conv4.safetensors")     # a plain nn.Module, bit for bit

Importing this package imports neither torch nor numpy; the first use of a name does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from randsurgery._version import __version__

if TYPE_CHECKING:
    from randsurgery.api import (
        Checkpoint,
        DataError,
        DivergedError,
        Ensemble,
        FileFormatError,
        Freeze,
        IncompatibleError,
        OutputError,
        Popup,
        RandsurgeryError,
        RandsurgeryWarning,
        Recipe,
        Supermask,
        UsageError,
        attach,
        build,
        fix_head,
        freeze,
        harvest,
        load,
        load_ensemble,
        make_recipe,
        read_checkpoint,
        read_recipe,
        save,
    )

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
    "__version__",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'randsurgery' has no attribute {name!r}")
    return getattr(importlib.import_module("randsurgery.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
