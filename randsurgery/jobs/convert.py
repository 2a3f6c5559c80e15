"""``convert``: checkpoints of other programs as files of this format."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randsurgery.errors import FileFormatError, UsageError
from randsurgery.format.checkpoint import Checkpoint, finished_bytes, is_safetensors
from randsurgery.format.container import Container, check_network
from randsurgery.format.derivation import payload_names
from randsurgery.format.shards import bytes_behind, check_not_input
from randsurgery.format.tensors import RawTensor
from randsurgery.format.writing import write_checkpoint
from randsurgery.jobs.hub import holds_checkpoint
from randsurgery.jobs.records import with_provenance
from randsurgery.surgery.architectures import ArgValue
from randsurgery.surgery.bases import Base, read_base
from randsurgery.surgery.differences import alone, on_base
from randsurgery.surgery.foreign import Foreign, check_arch, fit
from randsurgery.surgery.hidden_networks import (
    Masks,
    Reading,
    k_of_folder,
    make_checkpoint,
    meant,
    read_masks,
    recorded_k,
    unscored,
)
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.surgery.modules import check_fit


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion. ``arch``: the architecture of the weights; ``args``: its arguments, the classes
    left out. ``base``: dense weights to refer to. ``ema``: the average of the weights, where the
    file has both. ``reading``: how scores are read, if there are
    any."""

    file: str
    arch: str | None = None
    base: str | None = None
    ema: bool = False
    args: dict[str, ArgValue] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    output: str | None = None
    force: bool = False


@dataclass(frozen=True)
class PreparedConvert:
    """A conversion done in memory and verified, but not yet written."""

    plan: ConvertPlan
    checkpoint: Checkpoint
    output: Path
    facts: dict[str, Any]  # plain values about it
    notes: tuple[str, ...]  # what the user is to know

    @property
    def input_bytes(self) -> int:
        """The size of the file that is converted."""
        return int(self.facts["input_bytes"])


def prepare_convert(plan: ConvertPlan) -> PreparedConvert:
    """Convert in memory, and compare every tensor bit for bit. Raises RandsurgeryError; writes
    nothing.

    The job's checkpoint is to be closed by the caller.
    """
    plan.reading.check()
    stem = Path(plan.file).stem
    output = check_network(plan.output or f"{stem}-converted.safetensors", force=plan.force)
    check_not_input(output, (plan.file, plan.base))
    return converted(plan, output)


def converted(plan: ConvertPlan, output: Path) -> PreparedConvert:
    """The conversion itself, in memory; ``output`` is where it is meant to go."""
    path = Path(plan.file)
    with contextlib.ExitStack() as stack:
        source = _opened(path, stack, ema=plan.ema)
        found = fit(source, check_arch(plan.arch, source.about), plan.args)
        if found.scores:
            made, expected, facts, notes = _with_scores(plan, found, source)
        else:
            made, expected, facts, notes = _dense(plan, found, output)
        stack.enter_context(made)
        check_fit(made.recipe, made.member(), found.shell, found.spec.name)
        _verify(made, expected)
        facts = {**_facts(path, found, made), **facts}
        described = with_provenance(made, "convert", _settings(facts), [])
        if isinstance(source.tensors, Container):
            source.tensors.__exit__()  # its tensors have been copied
        stack.pop_all()
    return PreparedConvert(plan, described, output, facts, (*found.notes, *notes))


def run_convert(job: PreparedConvert) -> int:
    """Write the file; returns its bytes. Raises OutputError if it exists already."""
    return write_checkpoint(job.output, job.checkpoint, force=job.plan.force)


def _opened(path: Path, stack: contextlib.ExitStack, *, ema: bool) -> Base:
    if is_safetensors(path) and path.is_file() and holds_checkpoint(str(path)):
        raise FileFormatError(f"{path.name}: a randsurgery file already, nothing to convert")
    source = read_base(path, ema=ema)
    if isinstance(source.tensors, Container):
        stack.enter_context(source.tensors)
    return source


Made = tuple[Checkpoint, Iterable[tuple[str, RawTensor]], dict[str, Any], list[str]]
"""A checkpoint, the tensors it must give, and what there is to say about it."""


def _with_scores(plan: ConvertPlan, found: Foreign, source: Base) -> Made:
    """A checkpoint of hidden-networks."""
    wish = plan.reading
    if plan.base is not None:
        raise UsageError(f"--base goes with dense checkpoints, but {found.file} has scores")
    recorded = recorded_k(source.about)
    k = recorded if wish.k is None else float(parse_fraction(wish.k, "--k"))
    named = k_of_folder(Path(plan.file))
    hint = f"; the folder is named prune_rate={named}, so try --k {named}" if named else ""
    masks = read_masks(found, wish, k, hint)
    made = make_checkpoint(found, masks, wish)
    facts = {
        "kind": "hidden-networks",
        "algorithm": "fixed mask" if masks.fixed else wish.algorithm,
        "k": masks.k,
        "masked_tensors": len(masks.masks),
        "masked_weights": sum(mask.size for mask in masks.masks.values()),
        "kept_weights": sum(mask.count for mask in masks.masks.values()),
        "weights": _weight_kinds(made, masks),
        "save_scores": wish.save_scores,
    }
    notes = _notes(facts, masks, wish, recorded)
    if bare := unscored(found):
        notes.append(f"without scores, kept dense and frozen: {', '.join(bare)}")
    return made, meant(found, masks.masks), facts, notes


def _weight_kinds(made: Checkpoint, masks: Masks) -> dict[str, int]:
    """How many masked weights are signs, stored and so on."""
    recipe, own = made.recipe, made.recipe.members[0].tensors
    return dict(
        Counter(
            "survivors" if own[name].entry is not None else recipe.tensors[name].source.kind
            for name in masks.masks
        )
    )


def _notes(
    facts: Mapping[str, Any], masks: Masks, wish: Reading, recorded: float | None
) -> list[str]:
    notes = []
    if masks.k is not None and recorded not in (None, masks.k):
        notes.append(f"the file records prune_rate {recorded:g}; --k {masks.k:g} was given")
    if wish.k is None and masks.k is not None:
        notes.append(f"k is {masks.k:g}, as the file records it (prune_rate)")
    if masks.fixed:
        notes.append("the scores are 0 and 1: the mask itself (FixedSubnetConv)")
    if facts["weights"].get("survivors") and wish.weights == "auto":
        notes.append(
            f"of {facts['weights']['survivors']} tensors the kept weights alone are stored; "
            "--weights stored keeps those under the mask, too"
        )
    if facts["algorithm"] == "supermask":
        notes.append(
            "the mask keeps the positive scores, the most probable of those that SampleSubnetConv "
            "draws in each pass: its logits vary, those of this file do not"
        )
    if masks.tied:
        notes.append(
            f"equal |scores| at the cut in {len(masks.tied)} of {len(masks.masks)} layers: of "
            "these the lower index is dropped first (hidden-networks leaves it to torch's sort)"
        )
    stored = facts["weights"].get("stored")
    if stored and wish.weights == "auto":
        notes.append(
            f"{stored} of {len(masks.masks)} masked weights hold several magnitudes and are "
            "stored whole; --weights survivors stores what the masks keep"
        )
    return notes


def _dense(plan: ConvertPlan, found: Foreign, output: Path) -> Made:
    """A checkpoint without scores: as differences from a base, or on its own."""
    given = {
        "--k": plan.reading.k is not None,
        "--algorithm": plan.reading.algorithm != "edge-popup",
        "--weights": plan.reading.weights != "auto",
        "--save-scores": plan.reading.save_scores,
    }
    if idle := [option for option, value in given.items() if value]:
        raise UsageError(
            f"{idle[0]} goes with checkpoints of hidden-networks, but {found.file} has no scores"
        )
    if plan.base is None:
        return alone(found), found.tensors.items(), {"kind": "dense"}, []
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        base = read_base(plan.base)
        if isinstance(base.tensors, Container):
            stack.enter_context(base.tensors)
        made = on_base(found, base, notes)
        stack.pop_all()
    if Path(plan.base).resolve().parent != output.resolve().parent:
        notes.append(
            f"the file refers to {base.file}, which does not lie beside it: put it there, or pass "
            "--base to the commands that read the file"
        )
    size = bytes_behind(plan.base)
    return (
        made,
        found.tensors.items(),
        {"kind": "dense", "base": base.file, "base_bytes": size},
        notes,
    )


def _verify(made: Checkpoint, expected: Iterable[tuple[str, RawTensor]]) -> None:
    """Every tensor, rebuilt, against what it is to be. Raises FileFormatError."""
    rebuilt = made.tensors()
    for name, raw in expected:
        if not rebuilt[name].same_bits(raw):
            raise FileFormatError(f"{name}: converted, it differs from the original")


def _facts(path: Path, found: Foreign, made: Checkpoint) -> dict[str, Any]:
    recipe, who = made.recipe, made.recipe.members[0]
    return {
        "file": path.name,
        "model": found.spec.name,
        "model_args": dict(found.spec.args),
        "tensors": len(recipe.tensor_names(who)),
        "filled": len(found.filled),
        "input_bytes": bytes_behind(path),
        "dense_bytes": finished_bytes(recipe, who),
        "payload_bytes": sum(made.payloads.read(name).nbytes for name in payload_names(recipe)),
    }


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of the facts the file remembers: how it was read, no names of files."""
    kept = ("kind", "algorithm", "k")
    return {key: facts[key] for key in kept if facts.get(key) is not None}
