"""What callers of the library pass: taken for what it is, or refused in one line."""

from __future__ import annotations

from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.derivation import payload_names
from randsurgery.format.recipe import Recipe


def as_checkpoint(given: object) -> Checkpoint:
    """A recipe with its payloads. One that read_recipe gave will do if it needs none. Raises
    UsageError."""
    if isinstance(given, Checkpoint):
        return given
    if not isinstance(given, Recipe):
        raise UsageError(
            "expected a recipe as make_recipe and read_checkpoint give it, found "
            f"{type(given).__name__}"
        )
    if given.bases or any(True for _ in payload_names(given)):
        raise UsageError(
            "read_recipe gives a file's header alone, and this one speaks of payloads or a base; "
            "take read_checkpoint(FILE) instead"
        )
    return Checkpoint(given, Memory())


def check_module(given: object) -> None:
    """Raises UsageError for what is no module."""
    if not isinstance(given, nn.Module):
        raise UsageError(f"expected an nn.Module, found {type(given).__name__}")
