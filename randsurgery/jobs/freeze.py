"""``freeze``: decide what is learned, and write it down as a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_network
from randsurgery.format.shards import check_not_input
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs import runs
from randsurgery.jobs.inputs import without_idle_size
from randsurgery.jobs.preparing import closing_on_error
from randsurgery.jobs.records import keep_base, with_provenance
from randsurgery.jobs.sources import SourceSpec, masked_tensors, open_source, resolve_source
from randsurgery.surgery.heads import (
    FixedKind,
    describe_head,
    head_sentence,
    with_fixed_head,
    with_head,
)
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.plans import (
    Freeze,
    LayerCount,
    count_layers,
    make_plan,
    with_plan,
    zero_filled,
)


@dataclass(frozen=True)
class FreezePlan:
    """A freeze job. ``zero``: what slices leave out is zero instead of its own value."""

    source: SourceSpec
    wish: Freeze
    head: FixedKind | None = None
    head_scale: float | None = None
    zero: bool = False
    output: str | None = None
    force: bool = False


@dataclass(frozen=True)
class PreparedFreeze:
    """A checked freeze job: the network with its plan, and the counts."""

    plan: FreezePlan
    checkpoint: Checkpoint
    layers: tuple[LayerCount, ...]
    output: Path
    head: dict[str, Any] | None = None  # of a fixed classifier
    notes: tuple[str, ...] = ()  # what the user is to know

    @property
    def learned(self) -> int:
        """Learned parameters."""
        return sum(row.learned for row in self.layers)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(row.total for row in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``learned``, ``total``, ``layers``."""
        layers = [asdict(row) for row in self.layers]
        found = {"learned": self.learned, "total": self.total, "layers": layers}
        return {**found, "head": self.head} if self.head else found


def prepare_freeze(plan: FreezePlan) -> PreparedFreeze:
    """Choose what is learned. Raises RandsurgeryError; writes nothing.

    The job's checkpoint is to be closed by the caller.
    """
    plan.wish.check()
    if plan.zero and not plan.wish.slices:
        raise UsageError("--fill zero goes with --fraction or --count")
    source = resolve_source(plan.source, init="kaiming-normal")
    source = without_idle_size(source)
    seed = source.seed or 0
    if source.is_file and plan.head is not None:
        source = replace(source, seed=None)  # it is that of the classifier's rows alone
    plan = replace(plan, source=source)
    stem = Path(source.name).stem if source.is_file else source.name
    output = Path(plan.output or f"{stem}-plan.safetensors")
    said: list[str] = []
    with closing_on_error() as stack:
        made = stack.enter_context(_opened(source, said))
        revived = masked_tensors(made.recipe, made.member()) if plan.wish.slices else set()
        if plan.head is not None:
            made = with_fixed_head(made, plan.head, seed=seed, scale=plan.head_scale)
        elif plan.wish.head == "learned" and (fixed := describe_head(made)):
            raise UsageError(
                f"--head learned: the classifier is fixed ({fixed['kind']}), its rows cannot be "
                "learned; leave the option out to learn its scale and bias"
            )
        model = meta_module(made)
        chosen = make_plan(model, plan.wish)
        layers = tuple(count_layers(model, chosen))
        made = zero_filled(made, chosen) if plan.zero else with_plan(made, chosen)
        head = describe_head(made)
        revived &= {name for name, part in chosen.tensors.items() if part.part == "slice"}
    return PreparedFreeze(plan, made, layers, output, head, (*said, *_notes(head, revived)))


def _opened(source: SourceSpec, notes: list[str]) -> Checkpoint:
    """The network; a file's for as many classes as were asked for."""
    classes = source.args.get("num_classes")
    if not source.is_file or not isinstance(classes, int):
        return open_source(source, notes)
    others = {key: value for key, value in source.args.items() if key != "num_classes"}
    return with_head(open_source(replace(source, args=others)), classes)


def _notes(head: dict[str, Any] | None, revived: set[str]) -> tuple[str, ...]:
    notes = [] if head is None else [head_sentence(head)]
    if revived:
        notes.append(
            f"{len(revived)} of the sliced tensors are masked: within their slices the masked "
            "weights are learned, too (train the file itself to learn the survivors alone)"
        )
    return tuple(notes)


def run_freeze(job: PreparedFreeze) -> int:
    """Write the plan; returns the file's bytes. Raises OutputError if the file exists already."""
    check_network(job.output, force=job.plan.force)
    check_not_input(job.output, job.plan.source.inputs)
    keep_base(job.checkpoint, job.output)
    settings = {
        key: str(value) if key == "fraction" and value is not None else value
        for key, value in asdict(job.plan.wish).items()
    }
    settings |= {"fill": "zero" if job.plan.zero else "own", "fixed_head": job.plan.head}
    settings |= runs.weight_settings(job.plan.source)
    described = with_provenance(job.checkpoint, "freeze", settings, [])
    return write_checkpoint(job.output, described, force=job.plan.force)
