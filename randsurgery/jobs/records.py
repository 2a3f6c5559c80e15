"""What is written beside the weights: provenance, metrics, downloaded bases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from randsurgery._version import __version__
from randsurgery.errors import OutputError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import pack, write_atomically
from randsurgery.training.loop import Record


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {
        "randsurgery": __version__,
        **{name: version(name) for name in ("torch", "timm", "numpy")},
    }


def with_provenance(
    checkpoint: Checkpoint, command: str, settings: dict[str, Any], records: list[Record]
) -> Checkpoint:
    """Record resolved settings, versions and the last metrics. No argv, no paths, no times."""
    provenance: dict[str, Any] = {
        "command": command,
        "settings": settings,
        "versions": versions(),
    }
    if records:
        provenance["metrics"] = records[-1]
    member = checkpoint.member().model_copy(update={"provenance": provenance})
    return replace(checkpoint, recipe=checkpoint.recipe.with_member(member))


def metrics_path(output: Path) -> Path:
    """Where a job's metrics go: beside the output, one JSON object a line."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


@contextmanager
def metrics_file(output: Path) -> Iterator[Callable[[Record], None]]:
    """A writer of metric lines. Lines go to ``NAME.part``, renamed when the job is done, so that
    a job that fails leaves an older result whole."""
    final = metrics_path(output)
    part = final.with_name(final.name + ".part")

    def write(record: Record) -> None:
        with _disk(final), part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    try:
        with _disk(final):
            part.write_text("")
        yield write
        with _disk(final):
            part.replace(final)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from None


def keep_base(checkpoint: Checkpoint, output: Path) -> None:
    """Keep downloaded weights beside the result, which refers to them by file name."""
    for key, ref in checkpoint.recipe.bases.items():
        tensors = checkpoint.bases[key]
        if ref.origin is None or ref.file is None or not isinstance(tensors, Memory):
            continue
        target = output.parent / ref.file
        if not target.exists():
            write_atomically(target, pack(tensors, {"format": "pt"}))
