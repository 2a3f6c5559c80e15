"""torch's own generators, borrowed: seeded for a while, then given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CPU = torch.device("cpu")


def _generators(device: torch.device) -> list[torch.Generator]:
    """The generators that draw for modules on ``device``: the CPU's always, else its own too."""
    found = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    if device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    return found


@contextmanager
def borrowed(seed: int | None = None, device: torch.device = CPU) -> Iterator[None]:
    """Give the generators of the CPU and of one device their old state back afterwards.

    With ``seed`` they start there. ``torch.manual_seed`` would reseed every device for good.
    """
    before = generator_states(device)
    try:
        if seed is not None:
            for generator in _generators(device):
                generator.manual_seed(seed)
        yield
    finally:
        set_generator_states(before, device)


def generator_states(device: torch.device = CPU) -> list[torch.Tensor]:
    """Where the generators of the CPU and of one device stand."""
    return [generator.get_state() for generator in _generators(device)]


def set_generator_states(states: list[torch.Tensor], device: torch.device = CPU) -> None:
    """Go on where they stood. To be used while they are borrowed."""
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_state(state)
