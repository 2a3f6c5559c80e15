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
    generators = _generators(device)
    before = [generator.get_state() for generator in generators]
    try:
        if seed is not None:
            for generator in generators:
                generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
