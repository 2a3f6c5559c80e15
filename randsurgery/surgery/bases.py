"""Dense checkpoints to build on: .safetensors, and .pth with tensors and plain values only."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from randsurgery.errors import FileFormatError, IncompatibleError, reason
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
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.randomness import borrowed
from randsurgery.surgery.tensors import NAMES, from_torch

_STATE_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
"""Where training programs put the weights, averaged ones first, as timm looks for them."""


@dataclass(frozen=True)
class Base:
    """A dense checkpoint: its tensors by name, their identity, and where it came from.

    ``about``: what a training program saved beside the weights (epoch, architecture, optimiser).
    """

    tensors: Payloads
    names: tuple[str, ...]
    identity: str
    file: str | None
    origin: str | None = None
    revision: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def read_base(path: str | os.PathLike[str]) -> Base:
    """Open a dense checkpoint. Raises FileFormatError."""
    file = Path(path)
    if not is_safetensors(file):
        state, about = _read_pickle(file)
        # a tensor may repeat a few bytes without end
        check_affordable(sum(v.numel() * v.element_size() for v in state.values()), file.name)
        memory = Memory({k: from_torch(v, k) for k, v in state.items()})
        names = tuple(sorted(memory))
        return Base(memory, names, identity(names, memory), file.name, about=about)
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


def given_base(path: str | os.PathLike[str] | None) -> Payloads | str | os.PathLike[str] | None:
    """What ``read_checkpoint`` takes as a base: a safetensors path as it is, else the tensors."""
    if path is None or is_safetensors(path):
        return path
    return read_base(path).tensors


def open_checkpoint(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> Checkpoint:
    """``read_checkpoint`` that finds .pth bases too: the one given, or one beside the file."""
    if base is not None:
        return read_checkpoint(path, base=given_base(base))
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(read_checkpoint(path, need_bases=False))
        files = {ref.file for ref in found.recipe.bases.values() if ref.file is not None}
        if not found.recipe.bases:
            stack.pop_all()
            return found
    pickled = [Path(path).parent / name for name in sorted(files) if not is_safetensors(name)]
    beside = next((file for file in pickled if file.is_file()), None)
    return read_checkpoint(path, base=given_base(beside))


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


class _Inert:
    """Stands for a NumPy dtype in a pickle, and keeps nothing of it."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _no_scalar(*_: object) -> None:
    """Stands for a NumPy scalar in a pickle."""


# Schedules that compute with NumPy leave its scalars in the optimiser's part of a checkpoint, which
# torch then refuses. They are read as None, without running NumPy's code on a file's word.
_NUMPY_SCALARS: list[Any] = [
    (_Inert, "numpy.dtype"),
    (_no_scalar, "numpy.core.multiarray.scalar"),
    (_no_scalar, "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class MappedState:
    """The tensors of a .pth in its own order, each by a call; ``about``: their dtypes and shapes;
    ``skipped``: those that have no plain elements, with the reason."""

    tensors: Mapping[str, Callable[[], RawTensor]]
    about: Mapping[str, tuple[str, tuple[int, ...]]]
    skipped: Mapping[str, str]


def map_state(path: str | os.PathLike[str]) -> MappedState:
    """The state dict of a .pth, whose values stay in the file until they are asked for (older
    formats than torch 1.6 are read at once). Raises FileFormatError or IncompatibleError."""
    file, archive = Path(path), False
    if file.is_file():
        with file.open("rb") as start:
            archive = start.read(4) == b"PK\x03\x04"
    tensors: dict[str, Callable[[], RawTensor]] = {}
    about: dict[str, tuple[str, tuple[int, ...]]] = {}
    skipped: dict[str, str] = {}
    for name, tensor in _read_pickle(file, mapped=archive)[0].items():
        if tensor.dtype not in NAMES or tensor.layout != torch.strided or tensor.is_meta:
            what = tensor.layout if tensor.layout != torch.strided else tensor.dtype
            skipped[name] = "without values" if tensor.is_meta else str(what).removeprefix("torch.")
            continue
        check_affordable(tensor.numel() * tensor.element_size(), file.name)
        about[name] = NAMES[tensor.dtype], tuple(tensor.shape)
        tensors[name] = functools.partial(from_torch, tensor, name)
    return MappedState(tensors, about, skipped)


def _read_pickle(
    path: Path, *, mapped: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict, and what lies beside it."""
    if path.is_dir():
        raise FileFormatError(f"{path}: is a folder, a checkpoint file is needed")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # an archive, or a pickle as torch once wrote
                raise FileFormatError(f"{path.name}: not a checkpoint of torch.save")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of formats that are old or seldom
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise FileFormatError(
            f"{path.name}: holds more than tensors and plain values, so it is not opened; "
            "save its state dict alone: torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # truncated archives, foreign files
        why = reason(error).split(":")[0]
        told = f" ({why})" if any(c.isalpha() for c in why) and "EOF" not in why else ""
        raise FileFormatError(
            f"{path.name}: damaged, or not a checkpoint of torch.save{told}"
        ) from None
    about: dict[str, Any] = {}
    if isinstance(found, dict):
        for key in _STATE_KEYS:
            if isinstance(found.get(key), dict):
                about = {str(k): v for k, v in found.items() if k not in _STATE_KEYS}
                found = found[key]
                break
    tensors = (
        {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor)}
        if isinstance(found, dict)
        else {}
    )
    if not tensors:
        raise FileFormatError(f"{path.name}: holds no state dict, expected names with tensors")
    return tensors, about
