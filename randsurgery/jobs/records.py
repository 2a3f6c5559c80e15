"""What is written beside the weights: provenance, metrics, downloaded bases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from randsurgery._version import __version__
from randsurgery.errors import OutputError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import pack, write_atomically
from randsurgery.format.specs import DatasetSpec
from randsurgery.training.loop import Record

SECONDS = "seconds"
"""The figure of a record that differs from run to run, and so stays out of files."""


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    return {
        "randsurgery": __version__,
        **{name: version(name) for name in ("torch", "timm", "numpy")},
    }


def with_provenance(
    checkpoint: Checkpoint,
    command: str,
    settings: dict[str, Any],
    records: list[Record],
    data: dict[str, Any] | None = None,
) -> Checkpoint:
    """Record resolved settings, the images of each split, versions and the metrics of what was
    kept. No argv, no paths, no times."""
    provenance: dict[str, Any] = {
        "command": command,
        "settings": settings,
        "versions": versions(),
        **({"data": data} if data else {}),
    }
    if records:
        provenance["metrics"] = {k: v for k, v in records[-1].items() if k != SECONDS}
    member = checkpoint.member().model_copy(update={"provenance": provenance})
    return replace(checkpoint, recipe=checkpoint.recipe.with_member(member))


def metrics_path(output: Path) -> Path:
    """Where a job's metrics go: beside the output, one JSON object a line."""
    return output.with_name(f"{output.stem}.metrics.jsonl")


def settings_path(output: Path) -> Path:
    """Where a job's resolved settings go: beside the output, as ``-c`` reads them."""
    return output.with_name(f"{output.stem}.settings.yaml")


def write_settings(output: Path, settings: dict[str, Any], dataset: DatasetSpec) -> None:
    """The resolved settings under the command line's names, less what was not given."""
    import yaml

    named = {key.replace("_", "-"): value for key, value in settings.items() if value is not None}
    named.pop("val-seed", None)  # it is the seed
    if dataset.name != "folder":
        named["dataset"] = dataset.name
    text = yaml.safe_dump({key: named[key] for key in sorted(named)})
    write_atomically(settings_path(output), iter([text.encode()]))


class Recorder:
    """Writes each epoch's record. Metric lines go to ``NAME.metrics.jsonl.part``, renamed when the
    job is done, so that a job that fails leaves an older result whole."""

    def __init__(self, output: Path, log_to: tuple[str, ...] = ()) -> None:
        self.final = metrics_path(output)
        self.part = self.final.with_name(self.final.name + ".part")
        self.board = _tensorboard(output) if "tensorboard" in log_to else None

    def __enter__(self) -> Recorder:
        with _disk(self.final):
            self.part.write_text("")
        return self

    def write(self, record: Record, *, curves: bool = True) -> None:
        """One line, and one point of every curve."""
        with _disk(self.final), self.part.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None and curves:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("epoch", "step"):
                    self.board.add_scalar(key, value, record["epoch"])

    def repeat(self, history: list[Record]) -> None:
        """The records of the epochs before a run was resumed."""
        for record in history:
            self.write(record)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.board is not None:
            self.board.close()
        try:
            if error is None:
                with _disk(self.final):
                    self.part.replace(self.final)
        finally:
            self.part.unlink(missing_ok=True)


def _tensorboard(output: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--log-to tensorboard needs the tensorboard package: pip install tensorboard"
        ) from None
    # purge_step: what a stopped run wrote there is not shown twice
    return SummaryWriter(str(output.with_name(f"{output.stem}.tensorboard")), purge_step=0)


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
