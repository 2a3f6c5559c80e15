"""What the tests of ensembles share: the command line, and what of a member may never change."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import format_helpers as slow
import numpy as np
import torch
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.members import renamed
from randsurgery.format.writing import finish

Json = dict[str, Any]

TINY = ("--width", "0.1", "--img-size", "8")
QUICK = (*TINY, "--epochs", "1", "-b", "256")
"""A network of 8,000 weights that trains on digits within a moment."""

# --- the command line -----------------------------------------------------------------------------


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Networks of a few thousand weights lose by more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def said(*arguments: object) -> Json:
    """The JSON object that a command prints."""
    found: Json = json.loads(succeed(*arguments, "--json", "-q").stdout)
    return found


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path within."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fails(code: int, *arguments: object) -> str:
    """The one line of a command that ends with that code, prints nothing, and leaves the working
    folder as it was, to the last byte."""
    before = folder_bytes(Path())
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    assert folder_bytes(Path()) == before
    return result.stderr


# --- what a member is, read by the naive reader ---------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Finished tensors by name; payloads by what follows the member's name; the member's words but
    its name."""

    tensors: dict[str, slow.Raw]
    payloads: dict[str, slow.Raw]
    words: Json


def kept(
    path: Path | str, bases: dict[str, dict[str, slow.Raw]] | None = None, *, rebuild: bool = True
) -> dict[str, Kept]:
    """Every member of a file, by name, read element by element. ``bases``: by identity.
    ``rebuild`` false leaves the tensors out, for networks too large for that."""
    metadata, payloads = slow.read_file(Path(path))
    recipe = json.loads(metadata["randsurgery"])
    known = {key: (bases or {})[ref["identity"]] for key, ref in recipe.get("bases", {}).items()}
    found = {}
    for member in recipe["members"]:
        name = member.get("name", "main")
        names = {*recipe["tensors"], *member.get("tensors", {})} if rebuild else set()
        found[name] = Kept(
            {n: slow.naive_tensor(recipe, payloads, name, n, known) for n in sorted(names)},
            {n.partition("/")[2]: raw for n, raw in payloads.items() if n.startswith(f"{name}/")},
            {key: value for key, value in member.items() if key != "name"},
        )
    return found


def shared_part(path: Path | str) -> Json:
    """What a file says beside its members, and its shared payloads."""
    metadata, payloads = slow.read_file(Path(path))
    recipe = json.loads(metadata["randsurgery"])
    del recipe["members"]
    return {**recipe, "payloads": {n: p for n, p in payloads.items() if n.startswith("shared/")}}


def states(path: Path | str, names: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """The state dict of each member, by ``load``."""
    return {name: rs.load(path, member=name).state_dict() for name in names}


def flip(path: Path | str, payload: str, at: int = 0) -> None:
    """Flip a bit of a payload's byte ``at``."""
    file = Path(path)
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8:start])[payload]["data_offsets"]
    assert offsets[0] + at < offsets[1]
    data[start + offsets[0] + at] ^= 1
    file.write_bytes(data)


# --- members without training ---------------------------------------------------------------------


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The module with other values in whatever it learns. In place."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def with_statistics(model: nn.Module, seed: int) -> nn.Module:
    """The module with other running statistics, as training leaves them. In place."""
    draw = np.random.default_rng(seed)
    for name, tensor in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(seed + 1)
        elif name.rpartition(".")[2] in ("running_mean", "running_var"):
            values = draw.uniform(0.5, 1.5, tuple(tensor.shape)).astype(np.float32)
            tensor.copy_(torch.from_numpy(values))
    return model


def named(checkpoint: Checkpoint, name: str, **about: Any) -> Checkpoint:
    """What a file of one member holds, the member renamed and described."""
    who = checkpoint.member().model_copy(update=about)
    described = replace(checkpoint, recipe=checkpoint.recipe.with_member(who))
    return renamed(finish(described), {who.name: name})


def learned(
    start: Checkpoint, what: Any, name: str, seed: int, *, model: nn.Module | None = None,
    statistics: bool = False, **about: Any,
) -> Checkpoint:  # fmt: skip
    """A member that learned ``what`` (a plan's wish, a popup, or the start's own plan)."""
    if isinstance(what, rs.Freeze):
        start = what = rs.freeze(start, what, model=model)
    module = rs.attach(rs.build(start, model=model), start if what is None else what)
    drawn(module, seed)
    if statistics:
        with_statistics(module, seed)
    return named(rs.harvest(start, module), name, **about)
