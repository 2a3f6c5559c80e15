"""``init``: a network as a seed."""

from __future__ import annotations

from pathlib import Path

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_network
from randsurgery.format.shards import check_not_input
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.inputs import without_idle_size
from randsurgery.jobs.records import keep_base, with_provenance
from randsurgery.jobs.sources import SourceSpec, masks_of, open_source, resolve_source
from randsurgery.surgery.tickets import with_masks


def resolve_init(
    spec: SourceSpec, output: str | None, *, mask_from: str | None = None, force: bool
) -> tuple[SourceSpec, Path]:
    """The source, and where ``init`` writes, checked. The network has seen no image, so that it
    records no preprocessing."""
    name = Path(spec.name).name.partition("@")[0]
    path = check_network(output or f"{name}-init-{spec.seed}.safetensors", force=force)
    check_not_input(path, (*spec.inputs, mask_from))
    spec = without_idle_size(resolve_source(spec))
    if spec.is_file:
        raise UsageError("init makes a network of an architecture; the source is a file already")
    return spec, path


def open_init(
    spec: SourceSpec, mask_from: str | None = None, notes: list[str] | None = None
) -> Checkpoint:
    """The network that ``init`` writes, under the masks of another file if one is given. ``notes``
    gets what the user is to know. Raises RandsurgeryError."""
    made = open_source(spec, notes)
    return made if mask_from is None else with_masks(made, masks_of(mask_from))


def run_init(
    spec: SourceSpec,
    checkpoint: Checkpoint,
    output: Path,
    *,
    mask_from: str | None = None,
    force: bool,
) -> int:
    """Write an ``init`` job's file; returns its bytes."""
    keep_base(checkpoint, output)
    scaled_for = None if spec.scaled_for is None else str(spec.scaled_for)
    settings = {"init": spec.init, "init_seed": spec.seed, "scaled_for": scaled_for}
    if mask_from is not None:
        settings["mask_from"] = Path(mask_from).name
    described = with_provenance(checkpoint, "init", settings, [])
    return write_checkpoint(output, described, force=force)
