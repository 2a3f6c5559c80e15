"""What a module learned, aside: copies of it, and its exponential moving average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from randsurgery.training.state import changing

Values = Mapping[str, torch.Tensor]


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of what training may change, by name."""
    return {name: tensor.detach().clone() for name, tensor in changing(model).items()}


def put(values: Values, model: nn.Module) -> None:
    """Give a module the values of a copy."""
    with torch.no_grad():
        for name, tensor in changing(model).items():
            tensor.copy_(values[name])


def decay_at(step: int, decay: float) -> float:
    """The average's decay after ``step`` steps: timm's, with its warm-up, 1 - step^(-2/3) up to
    ``decay``. Without it a short run would end near its start."""
    warm = 1 - math.pow(max(1, step), -2 / 3)
    return min(decay, warm)


class Average:
    """An exponential moving average, as timm's ModelEmaV3 forms it, of what is learned alone: that
    one copies the whole module, frozen weights and masks' memory included."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.values = decay, copied(model)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the values after so many steps. Whole numbers are copied."""
        decay = decay_at(step, self.decay)
        for name, tensor in changing(model).items():
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.values[name].copy_(tensor)

    @torch.no_grad()
    def restore(self, values: Values) -> None:
        """Go on from saved values, wherever they lie."""
        for name, tensor in self.values.items():
            tensor.copy_(values[name])

    @contextlib.contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """The module with averaged values, for a while."""
        own = copied(model)
        put(self.values, model)
        try:
            yield
        finally:
            put(own, model)
