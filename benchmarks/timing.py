"""Measure several callables in turn, and report as one JSON object."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

Action = Callable[[], object]


class Timings:
    """Wall times in seconds of each contender, one a round."""

    def __init__(self, seconds: Mapping[str, list[float]]) -> None:
        self.seconds = dict(seconds)

    def median(self, name: str) -> float:
        """The median of one contender's rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> float:
        """Median over median."""
        return self.median(name) / self.median(reference)

    def medians(self) -> dict[str, float]:
        """The median of every contender."""
        return {name: self.median(name) for name in self.seconds}

    def spread(self) -> dict[str, list[float]]:
        """[fastest, slowest] round of every contender."""
        return {name: [min(times), max(times)] for name, times in self.seconds.items()}


def in_turn(
    actions: Mapping[str, Action],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time A B C A B C ...: ``warm_up`` rounds that do not count, then ``rounds`` that do.

    What an action returns is dropped, and garbage collected, outside the time measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            gc.collect()
            start = clock()
            result = action()
            spent = clock() - start
            del result
            if turn >= warm_up:
                seconds[name].append(spent)
        note(f"round {turn + 1} of {warm_up + rounds}")
    return Timings(seconds)


def parser_for(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's own description."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def note(text: str) -> None:
    """Say on stderr what is going on."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def rounded(value: Any) -> Any:
    """Floats to four significant digits, in any nesting of dicts and lists."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def report(
    timings: Timings | None = None, ratios: Mapping[str, float] | None = None, **more: Any
) -> None:
    """Print the one JSON object: ``machine``, ``seconds``, ``spread``, ``ratios``, ``more``."""
    found: dict[str, Any] = {"machine": machine()}
    if timings is not None:
        found |= {"seconds": timings.medians(), "spread": timings.spread()}
    if ratios is not None:
        found["ratios"] = dict(ratios)
    print(json.dumps(rounded({**found, **more}), indent=2))
