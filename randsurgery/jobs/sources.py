"""Where a network comes from: an architecture, dense weights, or a file of this format."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import timm

from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory, finished_bytes, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.fields import SHARED
from randsurgery.format.masks import Mask
from randsurgery.format.rebuild import check_affordable
from randsurgery.format.recipe import (
    MaskOverlay,
    Member,
    RandomSource,
    Recipe,
    ScatterOverlay,
)
from randsurgery.format.shards import CONFIG, weights_in
from randsurgery.jobs.hub import (
    PREFIX,
    config_of,
    holds_checkpoint,
    local_file,
    parse_address,
)
from randsurgery.surgery.architectures import ArgValue, check_name
from randsurgery.surgery.bases import (
    fetched_base,
    open_checkpoint,
    pretrained_base,
    read_base,
    read_config,
)
from randsurgery.surgery.initialisers import Init
from randsurgery.surgery.learning import survivor_mask
from randsurgery.surgery.recipes import make_recipe, make_recipe_on_base


@dataclass(frozen=True)
class SourceSpec:
    """Where a network comes from.

    ``name``: a timm architecture (with ``pretrained`` or ``checkpoint`` for dense weights), a file
    of this format, or a folder or a Hub address that ``resolve_source`` turns into one of these.
    ``args``: model arguments. ``init``, ``seed``: None is the default of what is done, and all that
    a file takes. ``scaled_for``: k for scaled distributions. ``ema``: the average of
    ``checkpoint``'s weights. ``look``: the preprocessing of dense weights as timm's
    ``pretrained_cfg`` has it, {} for the architecture's. ``origin``, ``revision``: where
    ``checkpoint`` was fetched from, if it was. ``chosen``: ``init`` was given, not a default.
    """

    name: str
    init: Init | None = None
    seed: int | None = None
    scaled_for: Fraction | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    ema: bool = False
    base: str | None = None
    look: dict[str, Any] = field(default_factory=dict)
    origin: str | None = None
    revision: str | None = None
    args: dict[str, ArgValue] = field(default_factory=dict)
    chosen: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """The paths that are read, as far as they are given."""
        own = self.name if self.is_file or self.is_folder else None
        return tuple(path for path in (own, self.checkpoint, self.base) if path is not None)

    @property
    def is_file(self) -> bool:
        """True if ``name`` means a file."""
        return self.name.endswith(".safetensors") or os.sep in self.name

    @property
    def is_folder(self) -> bool:
        """True if ``name`` is a folder and no architecture; ./NAME is a folder in any case."""
        return os.path.isdir(self.name) and (
            os.sep in self.name or not timm.is_model(self.name.partition(".")[0])
        )


def resolve_source(spec: SourceSpec, seed: int = 0, init: Init = "signed-constant") -> SourceSpec:
    """The same source with a Hub address fetched or a folder looked into: a file, or an
    architecture and dense weights. An architecture gets the defaults of what was not given:
    ``init`` and ``seed``. Raises FileFormatError or UsageError."""
    if spec.name.startswith(PREFIX):
        spec = _fetched(spec)
    elif spec.is_folder:
        spec = _in_folder(spec)
    if spec.is_file:
        return spec
    drawn = {"init": spec.init or init, "seed": seed if spec.seed is None else spec.seed}
    return replace(spec, chosen=spec.chosen or spec.init is not None, **drawn)  # type: ignore[arg-type]


def _fetched(spec: SourceSpec) -> SourceSpec:
    address, path = parse_address(spec.name), local_file(spec.name)
    if holds_checkpoint(path):
        return replace(spec, name=path)
    config = config_of(address)
    return replace(
        spec,
        name=str(config.architecture),
        checkpoint=path,
        args={**config.args, **spec.args},
        look=config.look,
        origin=str(address),
        revision=address.revision,
    )


def _in_folder(spec: SourceSpec) -> SourceSpec:
    """A folder of weights as timm's ``push_to_hf_hub`` and ``save_for_hf`` write them."""
    if spec.pretrained or spec.checkpoint:
        raise UsageError(f"{spec.name} is a folder of weights; leave --pretrained and --checkpoint "
                         "out")  # fmt: skip
    file, _ = weights_in(spec.name)
    if file.suffix == ".safetensors" and holds_checkpoint(str(file)):
        return replace(spec, name=str(file))
    config = read_config(spec.name)
    if config.architecture is None:
        raise FileFormatError(
            f"{spec.name}: no {CONFIG} that names an architecture of timm; pass that as the source "
            f"and the folder as --checkpoint"
        )
    args = {**config.args, **spec.args}
    return replace(
        spec, name=config.architecture, checkpoint=spec.name, args=args, look=config.look
    )


def open_source(spec: SourceSpec, notes: list[str] | None = None) -> Checkpoint:
    """The network of a resolved source, in memory, all in shared entries. Raises RandsurgeryError.

    Only a base may still lie in a file, which the checkpoint's ``close`` closes. ``notes`` gets
    what the user is to know of how dense weights were read.
    """
    if spec.pretrained and spec.checkpoint:
        raise UsageError("--pretrained and --checkpoint exclude each other")
    if spec.ema and not spec.checkpoint:
        raise UsageError("--ema goes with --checkpoint: the average of its weights")
    if spec.is_file:
        with contextlib.ExitStack() as stack:
            flat = in_memory(stack.enter_context(open_file(spec)))
            stack.pop_all()
        return flat
    if spec.base is not None:
        raise UsageError("--base goes with a file that builds on one; for weights: --checkpoint")
    if spec.pretrained or spec.checkpoint:
        return _open_dense(spec, notes)
    assert spec.init is not None
    assert spec.seed is not None
    made = make_recipe(
        spec.name, spec.init, seed=spec.seed, scaled_for=spec.scaled_for, args=spec.args
    )
    check_affordable(finished_bytes(made.recipe, made.member()), spec.name)
    return made


def open_file(
    spec: SourceSpec, *, need_bases: bool = True, spare_bases: bool = False
) -> Checkpoint:
    """The network in a file, its members as they are. Raises RandsurgeryError, also for options
    that go with an architecture. ``need_bases`` false: for what its masks alone say;
    ``spare_bases``: for a network that is used as it is."""
    given = {
        "--init": spec.init,
        "a seed of the weights": spec.seed is not None,
        "--pretrained": spec.pretrained,
        "--checkpoint": spec.checkpoint,
        "--ema": spec.ema,
        "scaling for k": spec.scaled_for,
        **{f"the model argument {key}": True for key in spec.args},
    }
    for option, value in given.items():
        if value:
            raise UsageError(
                f"{option} goes with an architecture; {spec.name} has its weights already"
            )
    if not need_bases:
        return read_checkpoint(local_file(spec.name), need_bases=False)
    return open_checkpoint(spec.name, spec.base, spare_bases=spare_bases)


def masked_tensors(recipe: Recipe, member: Member) -> set[str]:
    """The tensors of which a mask or a scatter says what is alive."""
    return {
        name
        for name in recipe.tensor_names(member)
        for overlay in recipe.resolved(member, name).overlays
        if isinstance(overlay, (MaskOverlay, ScatterOverlay))
    }


def _open_dense(spec: SourceSpec, notes: list[str] | None) -> Checkpoint:
    assert spec.init is not None
    assert spec.seed is not None
    arch = check_name(spec.name.partition(".")[0])
    if spec.checkpoint:
        base = read_base(spec.checkpoint, ema=spec.ema)
    else:
        base = pretrained_base(spec.name)
    if spec.origin is not None:
        base = fetched_base(base, spec.origin, spec.revision)
    with contextlib.ExitStack() as stack:
        if isinstance(base.tensors, Container):
            stack.enter_context(base.tensors)
        made = make_recipe_on_base(
            arch, base, spec.init, seed=spec.seed, scaled_for=spec.scaled_for, args=spec.args,
            notes=notes,
        )  # fmt: skip
        stack.pop_all()
    drawn = any(isinstance(e.source, RandomSource) for e in made.recipe.tensors.values())
    if spec.chosen and not drawn and notes is not None:
        notes.append(f"--init {spec.init} draws nothing: all weights are the checkpoint's")
    return made


def in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """The same network flattened, and its file closed; its bases may still lie in theirs."""
    found = flatten(checkpoint)
    if isinstance(checkpoint.payloads, Container):
        checkpoint.payloads.__exit__()  # its payloads have been copied
    return found


def flatten(checkpoint: Checkpoint, member: str | None = None) -> Checkpoint:
    """The same tensors with one member's overlays moved into the shared entries.

    Payload bytes move as they are. What a learner adds next becomes the member's own again.
    """
    who = checkpoint.member(member)
    for name, part in (who.plan.tensors if who.plan else {}).items():
        if part.start is not None and name not in who.tensors:
            raise IncompatibleError(
                f"the file is a plan with --fill zero that was not trained: {name} is zero yet; "
                "train it first, or start from what it was made of"
            )
    payloads, entries = Memory(), {}
    for name in checkpoint.recipe.tensor_names(who):
        made = checkpoint.derivation(who, name).needed()
        moved = made.moved(SHARED)
        for (before, _), (after, _) in zip(made.payloads, moved.payloads, strict=True):
            payloads[after] = checkpoint.payloads.read(before)
        entries[name] = moved.entry
    fresh = Member(head=who.head, classes=who.classes, dataset=who.dataset)
    recipe = checkpoint.recipe.seen_by(who).model_copy(
        update={"tensors": entries, "members": (fresh,), "backbone_id": None}
    )
    return Checkpoint(recipe, payloads, checkpoint.bases, opened=checkpoint.opened)


def architecture_name(recipe: Recipe) -> str:
    if recipe.model is None:
        raise IncompatibleError("the file names no architecture, so it cannot be trained here")
    return recipe.model.name


def has_factors(path: str) -> bool:
    """True if a file multiplies what its masks keep."""
    with open_file(SourceSpec(path), need_bases=False) as donor:
        who = donor.member()
        return any(
            overlay.kind == "scale"
            for name in donor.recipe.tensor_names(who)
            for overlay in donor.recipe.resolved(who, name).overlays
        )


def masks_of(path: str) -> dict[str, Mask]:
    """The masks of a file by tensor name. Raises IncompatibleError if it has none."""
    with contextlib.ExitStack() as stack:
        donor = stack.enter_context(open_file(SourceSpec(path), need_bases=False))
        who = donor.member()
        found = {n: survivor_mask(donor, who, n) for n in sorted(masked_tensors(donor.recipe, who))}
    if not found:
        raise IncompatibleError(f"{path} has no masks")
    return found
