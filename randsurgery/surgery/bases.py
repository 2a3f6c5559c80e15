"""Dense checkpoints to build on, opened: safetensors, torch.save's, sharded ones, folders."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError, reason
from randsurgery.format.checkpoint import (
    Checkpoint,
    Memory,
    identity,
    is_checkpoint,
    is_safetensors,
    read_checkpoint,
)
from randsurgery.format.container import Container
from randsurgery.format.rebuild import Payloads, check_affordable
from randsurgery.format.recognise import recognise
from randsurgery.format.shards import (
    CONFIG,
    beside,
    check_part,
    is_index,
    located,
    part_paths,
    pickled_parts,
    read_shards,
    weight_map,
    weights_in,
)
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.checkpoints import State, state_of
from randsurgery.surgery.pickles import read_pickle
from randsurgery.surgery.randomness import borrowed
from randsurgery.surgery.tensors import NAMES, from_torch


@dataclass(frozen=True)
class Base:
    """A dense checkpoint: its tensors by name, their identity, and where it came from.

    ``about``: what a training program saved beside the weights (epoch, architecture, optimiser).
    ``notes``: what the user is to know of how it was read.
    """

    tensors: Payloads
    names: tuple[str, ...]
    identity: str
    file: str | None
    origin: str | None = None
    revision: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_base(path: str | os.PathLike[str], *, ema: bool = False) -> Base:
    """Open a dense checkpoint: a safetensors file, one of torch.save, the index of a sharded one,
    or a folder with one of these under the names that Hugging Face's libraries give them.

    ``ema``: the moving average of the weights, where a training program saved both. Raises
    FileFormatError; UsageError for an average that is not there, or is all that is there.
    """
    if not Path(path).is_dir():
        return _opened(Path(path), ema)
    name = Path(path).resolve().name
    file, others = weights_in(path)
    found = _opened(file, ema)
    said = tuple(f"{name}: {file.name} is read, not {other}" for other in others)
    about = {"arch": read_config(path).architecture, **found.about}
    return replace(found, file=name, about=about, notes=(*said, *found.notes))


def _opened(file: Path, ema: bool) -> Base:
    kind = recognise(file)
    if kind == "torch.save":
        if is_safetensors(file):  # later commands would take it for what its name says
            raise FileFormatError(
                f"{file.name}: written by torch.save, no safetensors file; rename it to .pth"
            )
        return _in_memory(file, state_of(read_pickle(file), file.name, ema=ema))
    if kind == "json":
        found = _sharded(file)
    elif kind == "safetensors" or is_safetensors(file):
        found = _in_safetensors(file)
    else:
        raise FileFormatError(f"{file.name}: not a checkpoint of torch.save")
    if ema:
        if isinstance(found.tensors, Container):
            found.tensors.__exit__()
        raise UsageError(f"--ema: {file.name} holds no averaged weights; leave the option out")
    return found


def _in_memory(file: Path, state: State) -> Base:
    odd = [name for name in state.skipped if not name.endswith("_extra_state")]
    if odd:
        raise FileFormatError(
            f"{file.name}: {odd[0]!r} is a {state.skipped[odd[0]]}, where a tensor is needed; save "
            "plain tensors"
        )
    # a tensor may repeat a few bytes without end
    check_affordable(sum(v.numel() * v.element_size() for v in state.tensors.values()), file.name)
    memory = Memory({k: from_torch(v, k) for k, v in state.tensors.items()})
    names = tuple(sorted(memory))
    made = Base(memory, names, identity(names, memory), file.name)
    return replace(made, about=state.about, notes=state.notes)


def _in_safetensors(file: Path) -> Base:
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(Container(file))
        if is_checkpoint(container):
            raise FileFormatError(
                f"{file.name}: a randsurgery file, not dense weights; pass it as the source, or "
                "export it first"
            )
        names = tuple(sorted(container.infos))
        if not names:
            raise FileFormatError(f"{file.name}: holds no tensor")
        found = Base(container, names, identity(names, container), file.name)
        stack.pop_all()
    return found


def _sharded(index: Path) -> Base:
    """The tensors of all parts that an index names; those of torch.save in memory."""
    places = weight_map(index)
    if not pickled_parts(places):
        shards = read_shards(index)
        names = tuple(sorted(shards))
        return Base(shards, names, identity(names, shards), index.name)
    state = State({})
    for part in part_paths(index, places):
        here = state_of(read_pickle(part), part.name).tensors
        check_part(index, places, part.name, set(state.tensors), set(here))
        state.tensors.update(here)
    return _in_memory(index, state)


def given_base(
    path: str | os.PathLike[str] | None, wanted: Collection[str] = ()
) -> Payloads | str | os.PathLike[str] | None:
    """What ``read_checkpoint`` takes as a base: the path of a safetensors file, else the tensors.

    ``wanted``: identities, by which weights are told from their average where a file has both.
    """
    if path is None or (is_safetensors(path) and not Path(path).is_dir()):
        return path
    file = located(path)
    kind = recognise(file)
    if kind != "torch.save":
        return file if kind == "safetensors" else read_base(path).tensors
    found: list[Base] = []
    for ema in (False, True):
        with contextlib.suppress(UsageError):  # it has the one or the other
            found.append(read_base(path, ema=ema))
    fitting = [base for base in found if base.identity in wanted]
    return (fitting or found)[0].tensors


def open_checkpoint(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    spare_bases: bool = False,
) -> Checkpoint:
    """``read_checkpoint`` that finds bases of all kinds: the one given, or one beside the file."""
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(read_checkpoint(path, need_bases=False))
        refs = found.recipe.bases.values()
        wanted = {ref.identity for ref in refs}
        if not refs and base is None:
            stack.pop_all()
            return found
    if base is None:
        base = beside(path, [ref.file for ref in refs if ref.file is not None])
    return read_checkpoint(path, base=given_base(base, wanted), spare_bases=spare_bases)


# --- what a folder says of its weights ------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """What a ``config.json`` says. ``architecture``: timm's name, None in those of other libraries;
    ``args``: model arguments; ``look``: timm's ``pretrained_cfg``, with the preprocessing."""

    architecture: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    look: dict[str, Any] = field(default_factory=dict)


def read_config(path: str | os.PathLike[str]) -> Config:
    """What timm's ``config.json`` says, in a folder or by its own path; nothing if there is none or
    it is no JSON object."""
    file = Path(path) / CONFIG if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Config()
    if not isinstance(found, dict) or not isinstance(found.get("architecture"), str):
        return Config()
    args, look = found.get("model_args"), found.get("pretrained_cfg")
    return Config(
        found["architecture"],
        args if isinstance(args, dict) else {},
        _look(look) if isinstance(look, dict) else {},
    )


def _look(found: dict[str, Any]) -> dict[str, Any]:
    """What of a ``pretrained_cfg`` is about preprocessing, as far as it is what it must be."""

    def numbers(value: Any, count: int) -> bool:
        return (
            isinstance(value, list)
            and len(value) == count
            and all(isinstance(one, (int, float)) for one in value)
        )

    right = {
        "mean": numbers(found.get("mean"), 3),
        "std": numbers(found.get("std"), 3),
        "input_size": numbers(found.get("input_size"), 3),
        "crop_pct": isinstance(found.get("crop_pct"), (int, float)),
        "crop_mode": isinstance(found.get("crop_mode"), str),
        "interpolation": isinstance(found.get("interpolation"), str),
    }
    return {key: found[key] for key, fits in right.items() if fits}


# --- weights from elsewhere -----------------------------------------------------------------------


def fetched_base(base: Base, origin: str, revision: str | None) -> Base:
    """A base that came from elsewhere: in memory, under a telling file name, its origin noted."""
    memory = Memory({name: base.tensors.read(name) for name in base.names})
    if isinstance(base.tensors, Container):
        base.tensors.__exit__()
    file = f"{origin.rpartition('/')[2]}.base.safetensors"
    return Base(memory, base.names, base.identity, file, origin, revision)


def pretrained_base(name: str) -> Base:
    """timm's pretrained weights, downloaded through timm and kept in memory.

    ``name`` may carry timm's tag (``resnet18.a1_in1k``). Raises IncompatibleError if there are no
    weights or they cannot be fetched.
    """
    try:
        with borrowed():
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # network, hub, unknown tag
        raise IncompatibleError(
            f"{name}: pretrained weights cannot be had ({reason(error)})"
        ) from None
    cfg = model.pretrained_cfg
    tensors = Memory({k: from_torch(v, k) for k, v in model.state_dict().items()})
    names = tuple(sorted(tensors))
    stem = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    origin = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or name
    file = f"{stem or name}.base.safetensors"
    return Base(tensors, names, identity(names, tensors), file, origin)


# --- for reports ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class MappedState:
    """The tensors of a checkpoint of torch.save in its own order, each by a call; ``about``: their
    dtypes and shapes; ``skipped``: those that have no plain elements, with the reason; ``notes``:
    what the user is to know of how it was read."""

    tensors: Mapping[str, Callable[[], RawTensor]]
    about: Mapping[str, tuple[str, tuple[int, ...]]]
    skipped: Mapping[str, str]
    notes: tuple[str, ...] = ()


def map_state(path: str | os.PathLike[str], *, ema: bool = False) -> MappedState:
    """The state dict of a .pth or of a sharded one's index, whose values stay in the file until
    they are asked for (older formats than torch 1.6 are read at once). Raises FileFormatError,
    IncompatibleError, or UsageError for ``ema`` as ``read_base`` does."""
    file = Path(path)
    parts = part_paths(file, weight_map(file)) if is_index(file) else [file]
    tensors: dict[str, Callable[[], RawTensor]] = {}
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    skipped: dict[str, str] = {}
    notes: list[str] = []
    for part in parts:
        state = state_of(read_pickle(part, mapped=_is_archive(part)), part.name, ema=ema)
        skipped |= state.skipped
        notes += state.notes
        for name, tensor in state.tensors.items():
            if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
                what = tensor.layout if tensor.layout != torch.strided else tensor.dtype
                told = str(what).removeprefix("torch.")
                skipped[name] = "without values" if tensor.is_meta else told
                continue
            check_affordable(tensor.numel() * tensor.element_size(), part.name)
            about[name] = NAMES[tensor.dtype], tuple(tensor.shape)
            tensors[name] = functools.partial(from_torch, tensor, name)
    return MappedState(tensors, about, skipped, tuple(notes))


def _is_archive(file: Path) -> bool:
    """True for the format that torch writes since 1.6, which can be mapped."""
    if not file.is_file():
        return False
    with file.open("rb") as start:
        return start.read(4) == b"PK\x03\x04"
