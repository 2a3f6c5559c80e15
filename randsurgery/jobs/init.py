"""``init``: a network as a seed."""

from __future__ import annotations

from pathlib import Path

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import (
    Checkpoint,
    write_checkpoint,
)
from randsurgery.format.container import check_output
from randsurgery.jobs.inputs import DataOptions, describe, look_for
from randsurgery.jobs.records import keep_base, with_provenance
from randsurgery.jobs.sources import SourceSpec, open_source
from randsurgery.surgery.architectures import ArgValue


def init_output(spec: SourceSpec, output: str | None, *, force: bool) -> Path:
    """Where ``init`` writes, checked."""
    return check_output(output or f"{spec.name}-init-{spec.seed}.safetensors", force=force)


def prepare_init(spec: SourceSpec) -> Checkpoint:
    """The network of an ``init`` job, described for its architecture's own input."""
    if spec.is_file:
        raise UsageError("init makes a network of an architecture; the source is a file already")
    size, channels = spec.args.get("img_size"), spec.args.get("in_chans")
    options = DataOptions(img_size=_int(size), in_chans=_int(channels))
    checkpoint = open_source(spec)
    head = checkpoint.member().head
    look = look_for(spec, "", options)
    return describe(checkpoint, look, None, (), head.classes if head else 0)


def _int(value: ArgValue) -> int | None:
    return value if isinstance(value, int) else None


def run_init(checkpoint: Checkpoint, output: Path, *, force: bool) -> int:
    """Write an ``init`` job's file; returns its bytes."""
    keep_base(checkpoint, output)
    return write_checkpoint(output, with_provenance(checkpoint, "init", {}, []), force=force)
