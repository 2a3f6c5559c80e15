"""The public names of the package: this list, each with a docstring."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import randsurgery as rs
from randsurgery import api

pytestmark = pytest.mark.slow

PUBLIC = [
    "Checkpoint", "DataError", "DivergedError", "Ensemble", "FileFormatError", "Freeze",
    "IncompatibleError", "OutputError", "Popup", "RandsurgeryError", "RandsurgeryWarning", "Recipe",
    "Supermask", "UsageError", "__version__", "attach", "build", "fix_head", "freeze", "harvest",
    "load", "load_ensemble", "make_recipe", "read_checkpoint", "read_recipe", "save",
]  # fmt: skip


def test_the_list_of_public_names() -> None:
    assert sorted(rs.__all__) == rs.__all__ == PUBLIC
    assert sorted([*api.__all__, "__version__"]) == PUBLIC
    assert dir(rs) == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    thing = getattr(rs, name)
    assert thing is getattr(api, name)
    documented = inspect.getdoc(thing)
    assert documented
    assert len(documented) > 20
    if inspect.isfunction(thing):
        hints = inspect.signature(thing)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in hints.parameters.values())


@pytest.mark.parametrize("kind", [rs.Checkpoint, rs.Popup, rs.Recipe])
def test_public_methods_are_documented(kind: type) -> None:
    for name, member in vars(kind).items():
        if not name.startswith("_") and callable(member):
            assert inspect.getdoc(member), f"{kind.__name__}.{name}"


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rs.nothing  # noqa: B018


def test_star_imports_everything() -> None:
    code = "from randsurgery import *; print(sorted(n for n in dir() if n in " + repr(PUBLIC) + "))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(PUBLIC)
