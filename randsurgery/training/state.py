"""The whole state of a run as one object: what must be known to go on as if never stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class RunState:
    """Tensors by name and plain values; both can be written without pickle.

    ``tensors``: the module's state dict (scores among it) under ``model/``, the optimiser's under
    ``optimizer/INDEX/NAME``. ``values``: epoch and step reached, the optimiser's numbers and
    groups. Order, augmentation and schedule follow from seed, epoch and step, so no generator is
    in it.
    """

    epoch: int = 0  # epochs completed
    step: int = 0  # optimiser steps completed
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def capture(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, epoch: int, step: int
    ) -> RunState:
        """A copy of the run's state."""
        tensors = {f"model/{n}": t.detach().clone() for n, t in model.state_dict().items()}
        values: dict[str, Any] = {}
        if optimizer is not None:
            state = optimizer.state_dict()
            values["groups"] = state["param_groups"]
            numbers: dict[str, dict[str, Any]] = {}
            for index, part in state["state"].items():
                for name, value in part.items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"optimizer/{index}/{name}"] = value.detach().clone()
                    else:
                        numbers.setdefault(str(index), {})[name] = value
            values["numbers"] = numbers
        return cls(epoch, step, tensors, values)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Put the state back into a run set up alike."""
        own = {
            name.removeprefix("model/"): tensor
            for name, tensor in self.tensors.items()
            if name.startswith("model/")
        }
        model.load_state_dict(own, strict=True)
        if optimizer is None:
            return
        state: dict[int, dict[str, Any]] = {
            int(index): dict(part) for index, part in self.values["numbers"].items()
        }
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/", 2)
                state.setdefault(int(index), {})[key] = tensor.clone()
        optimizer.load_state_dict({"state": state, "param_groups": self.values["groups"]})
