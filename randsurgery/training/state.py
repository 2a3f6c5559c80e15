"""The whole state of a run as one object: what must be known to go on as if never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randsurgery.errors import FileFormatError, IncompatibleError, reason
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.tensors import NAMES, TORCH, from_torch, to_torch

STATE_KEY = "randsurgery_state"
DIGEST_KEY = "randsurgery_state_digest"
VERSION = 1


@dataclass
class RunState:
    """Tensors by name and plain values; both are written without pickle.

    ``tensors``: what may change of the module (learned parameters and buffers) under ``model/``,
    the optimiser's state under ``optimizer/INDEX/NAME``, torch's generators under ``generator/N``
    if the run stopped within an epoch, and what the caller remembers under ``memory/``.
    ``values``: epoch and step reached, the optimiser's numbers and groups, sums over the epoch,
    the records of past epochs. Order, augmentation and schedule follow from seed, epoch and step.
    """

    epoch: int = 0  # epochs completed
    step: int = 0  # optimiser steps completed
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, epoch: int, step: int
    ) -> RunState:
        """A copy of what a run changes."""
        tensors = {f"model/{n}": t.detach().clone() for n, t in changing(model).items()}
        values: dict[str, Any] = {}
        if optimizer is not None:
            state = optimizer.state_dict()
            values["groups"] = [_plain(group) for group in state["param_groups"]]
            numbers: dict[str, dict[str, Any]] = {}
            for index, part in state["state"].items():
                for name, value in part.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer/{index}/{name}"] = value.detach().clone()
                    else:
                        numbers.setdefault(str(index), {})[name] = value
            values["numbers"] = numbers
        return cls(epoch, step, tensors, {**values, "made_with": here_with()})

    def elsewhere(self) -> str | None:
        """A word if the state was written where a step gives other bits; None if not."""
        written, here = self.values.get("made_with", here_with()), here_with()
        if written == here:
            return None
        told = ", ".join(f"{key} {written.get(key)}, here {here[key]}" for key in here)
        return f"the state was written with {told}: the result may differ in its last bits"

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under a prefix, by the rest of their names."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the state back into a run set up alike. Raises IncompatibleError if it is not."""
        own, there = self.part("model/"), changing(model)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in there.items()}
        if {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()} != shapes:
            raise IncompatibleError("the state is of a run that learns other tensors")
        with torch.no_grad():
            for name, tensor in own.items():
                there[name].copy_(tensor)
        if optimizer is None:
            return
        state: dict[int, dict[str, Any]] = {
            int(index): dict(part) for index, part in self.values["numbers"].items()
        }
        for name, tensor in self.part("optimizer/").items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = tensor.clone()
        fresh = optimizer.state_dict()["param_groups"]
        try:
            groups = [_group(*pair) for pair in zip(self.values["groups"], fresh, strict=True)]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        except (KeyError, ValueError) as error:
            raise IncompatibleError(
                f"the state's optimiser is another one than here ({reason(error)}); resume with "
                "the versions of torch and timm that it was written with"
            ) from None


def here_with() -> dict[str, Any]:
    """What the bits of a step depend on beside the run itself."""
    return {"torch": torch.__version__.split("+")[0], "threads": torch.get_num_threads()}


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group as JSON has it: tensors as their values, dtypes left to the optimiser."""
    return {
        key: {"values": value.tolist(), "dtype": NAMES[value.dtype]}
        if isinstance(value, torch.Tensor)
        else value
        for key, value in group.items()
        if not isinstance(value, torch.dtype)
    }


def _group(saved: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """A parameter group of the optimiser with the saved values."""
    found = {
        key: torch.tensor(value["values"], dtype=TORCH[value["dtype"]])
        if isinstance(value, dict) and set(value) == {"values", "dtype"}
        else value
        for key, value in saved.items()
    }
    return {**fresh, **found}


def changing(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training may change: learned parameters and the buffers of the state dict."""
    state = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in state.items()
        if not isinstance(tensor, nn.Parameter) or tensor.requires_grad
    }


def write_state(path: Path, state: RunState, run: dict[str, Any]) -> None:
    """Write a state and what tells its run from others, atomically: safetensors with JSON in the
    header, no pickle. Raises OutputError; an older state is then whole."""
    text = json.dumps(
        {"version": VERSION, "run": run, "epoch": state.epoch, "step": state.step,
         "values": state.values},
        sort_keys=True, allow_nan=False,
    )  # fmt: skip
    tensors = {name: from_torch(tensor, name) for name, tensor in state.tensors.items()}
    metadata = {"format": "pt", STATE_KEY: text, DIGEST_KEY: _digest(text, tensors)}
    write_atomically(path, pack(tensors, metadata))


def _digest(text: str, tensors: Mapping[str, RawTensor]) -> str:
    """Of the JSON text and every tensor."""
    parts = {name: digest(tensor.array) for name, tensor in tensors.items()}
    return digest(canonical_json([text, parts]))


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """How what tells one run from another first differs, for people; None if it does not."""
    for key in sorted({*ours, *theirs}):
        if ours.get(key) != theirs.get(key):
            here = str(ours.get(key))[:80]
            return f"its {key} is {str(theirs.get(key))[:80]}, here it is {here}"
    return None


def read_state(path: str | os.PathLike[str], run: dict[str, Any]) -> RunState:
    """The state in a file. Raises FileFormatError, or IncompatibleError naming the first
    difference if it belongs to another run."""
    with Container(path) as file:
        try:
            found = json.loads(file.metadata[STATE_KEY])
            version, theirs = found["version"], found["run"]
            state = RunState(int(found["epoch"]), int(found["step"]), {}, dict(found["values"]))
            _ = state.values["sums"], state.values["history"]
        except (KeyError, TypeError, ValueError):
            raise FileFormatError(f"{path}: is no state of a run") from None
        if version != VERSION:
            raise FileFormatError(f"{path}: state version {version}, this program reads {VERSION}")
        # through JSON, as the state's own description went
        ours = json.loads(json.dumps(run))
        if (word := first_difference(ours, theirs)) is not None:
            raise IncompatibleError(f"{path}: is the state of another run: {word}")
        raw = {name: file.read(name) for name in file.infos}
        if file.metadata.get(DIGEST_KEY) != _digest(file.metadata[STATE_KEY], raw):
            raise FileFormatError(
                f"{path}: is damaged, its digest does not agree; begin anew with --force"
            )
        state.tensors = {name: to_torch(tensor) for name, tensor in raw.items()}
    return state
