"""``init``: a network as a seed."""

from __future__ import annotations

from pathlib import Path

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_network
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.records import keep_base, with_provenance
from randsurgery.jobs.sources import SourceSpec, open_source, resolve_source

__all__ = ["open_source", "resolve_init", "run_init"]


def resolve_init(spec: SourceSpec, output: str | None, *, force: bool) -> tuple[SourceSpec, Path]:
    """The source, and where ``init`` writes, checked. The network has seen no image, so that it
    records no preprocessing."""
    name = spec.name.rpartition("/")[2].partition("@")[0]
    path = check_network(output or f"{name}-init-{spec.seed}.safetensors", force=force)
    spec = resolve_source(spec)
    if spec.is_file:
        raise UsageError("init makes a network of an architecture; the source is a file already")
    return spec, path


def run_init(spec: SourceSpec, checkpoint: Checkpoint, output: Path, *, force: bool) -> int:
    """Write an ``init`` job's file; returns its bytes."""
    keep_base(checkpoint, output)
    scaled_for = None if spec.scaled_for is None else str(spec.scaled_for)
    settings = {"init": spec.init, "init_seed": spec.seed, "scaled_for": scaled_for}
    described = with_provenance(checkpoint, "init", settings, [])
    return write_checkpoint(output, described, force=force)
