"""A module's tensors -> a recipe that regenerates them from a seed, or refers to a base."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from fractions import Fraction

from pydantic import ValidationError
from torch import nn

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import Container
from randsurgery.format.derivation import payload_name
from randsurgery.format.fields import SHARED
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import (
    BaseRef,
    BaseSource,
    ConstantSource,
    Entry,
    MaskOverlay,
    Member,
    RandomSource,
    Recipe,
    Source,
)
from randsurgery.format.specs import HeadSpec, ModelSpec
from randsurgery.format.tensors import RawTensor, hex_float
from randsurgery.surgery.adaptation import adapt, stem_channels
from randsurgery.surgery.architectures import (
    ArgValue,
    build_initialised,
    build_meta,
    class_count,
    classifier_name,
    classifier_names,
    spec_of,
)
from randsurgery.surgery.bases import Base
from randsurgery.surgery.checkpoints import Matched, Own, match, plain_names
from randsurgery.surgery.heads import last_layers
from randsurgery.surgery.initialisers import (
    Init,
    check_init,
    check_seed,
    embedding_source,
    parse_fraction,
    random_source,
)
from randsurgery.surgery.roles import Role, TensorRole, check_storable, tensor_roles
from randsurgery.surgery.sentences import mask_overlay, stored_entry
from randsurgery.surgery.tensors import dtype_name, from_torch, to_torch

BASE = "base"
"""The id of the only base of a file."""

# Norm-free start values: with frozen norms a zero-initialised scale would silence its branch.
CONSTANTS: dict[Role, float] = {
    "bias": 0.0,
    "norm scale": 1.0,
    "norm shift": 0.0,
    "layer scale": 1.0,
    "running mean": 0.0,
    "running var": 1.0,
    "batch count": 0.0,
}


def planned_source(role: TensorRole, init: Init, seed: int, k: Fraction | None) -> Source | None:
    """The source a random network has at that role; None if the value must be stored."""
    if role.role == "weight":
        return random_source(init, role.fan_in, role.fan_out, seed, k)
    if role.role == "embedding":
        return embedding_source(init, seed)
    if role.role in CONSTANTS:
        return ConstantSource(value=hex_float(CONSTANTS[role.role]))
    return None


def head_of(model: nn.Module) -> HeadSpec | None:
    """The classifier's name and number of classes, None if the model has none."""
    name = classifier_name(model)
    return HeadSpec(name=name, classes=class_count(model, name)) if name else None


def _checked(init: Init, seed: int, scaled_for: str | float | Fraction | None) -> Fraction | None:
    """``scaled_for`` as an exact number. Raises UsageError for it, ``init`` or ``seed``."""
    check_init(init)
    check_seed(seed)
    return None if scaled_for is None else parse_fraction(scaled_for, "scaled_for")


def make_recipe(
    model: str | nn.Module,
    init: Init = "signed-constant",
    *,
    seed: int = 0,
    scaled_for: str | float | Fraction | None = None,
    args: Mapping[str, ArgValue] | None = None,
) -> Checkpoint:
    """A random network as a recipe.

    ``model`` is a timm name, built with ``args``, or any nn.Module (its own values are not kept
    for weights, norms and biases). Weights of convolutions and linear layers become random
    sources, and so do position embeddings and tokens; norm scales and layer scales 1; norm shifts
    and biases 0; what is left (relative position biases, gates) keeps the values of the
    architecture's own initialiser, as a constant if it is one, else stored. ``scaled_for`` is k
    for the papers' scaled distributions.
    """
    scale_k = _checked(init, seed, scaled_for)
    spec = spec_of(model, dict(args or {})) if isinstance(model, str) else None
    shell = build_meta(spec) if spec is not None else model
    if not isinstance(shell, nn.Module):
        raise UsageError(f"expected a timm name or an nn.Module, found {type(shell).__name__}")
    state = shell.state_dict()
    roles = tensor_roles(shell)
    check_storable(state, roles)
    speaker = _speakers(shell, roles)
    sources = {
        name: _tied(planned_source(roles[speaker[name]], init, seed, scale_k), name, speaker)
        for name in state
    }
    if spec is not None and any(source is None for source in sources.values()):
        values = build_initialised(spec, seed).state_dict()
    else:
        values = state
    payloads = Memory()
    entries: dict[str, Entry] = {}
    for name, tensor in state.items():
        source = sources[name]
        dtype = dtype_name(tensor.dtype, name)
        if source is None:
            slot = payload_name(SHARED, name, "source")
            entries[name] = stored_entry(from_torch(values[name], name), slot, payloads)
        else:
            shape = tuple(tensor.shape)
            entries[name] = Entry(dtype=dtype, shape=shape, source=source)  # type: ignore[arg-type]
    return _assemble(spec, entries, payloads, shell)


def _speakers(model: nn.Module, roles: Mapping[str, TensorRole]) -> dict[str, str]:
    """For every tensor the name that decides its values: its own, or for a parameter with several
    names (a tied embedding, a shared layer) the first that is a weight, else the first."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, str] = {}
    for tied in names.values():
        first = next((name for name in tied if roles[name].role == "weight"), tied[0])
        found |= dict.fromkeys(tied, first)
    return found


def _tied(source: Source | None, name: str, speaker: Mapping[str, str]) -> Source | None:
    """The source drawn from the stream of the name that speaks."""
    if isinstance(source, RandomSource) and speaker[name] != name:
        return source.model_copy(update={"stream": speaker[name]})
    return source


def _assemble(
    spec: ModelSpec | None,
    entries: dict[str, Entry],
    payloads: Memory,
    shell: nn.Module,
    bases: dict[str, Base] | None = None,
) -> Checkpoint:
    refs = {key: reference(base) for key, base in (bases or {}).items()}
    recipe = Recipe(
        model=spec,
        tensors=dict(sorted(entries.items())),
        members=(Member(head=head_of(shell)),),
        bases=refs,
    )
    tensors = {key: base.tensors for key, base in (bases or {}).items()}
    opened = tuple(found for found in tensors.values() if isinstance(found, Container))
    return Checkpoint(recipe, payloads, tensors, opened=opened)


def reference(base: Base) -> BaseRef:
    """How a file refers to a base. Raises UsageError for a name by which it could not be found."""
    try:
        return BaseRef(
            identity=base.identity, file=base.file, origin=base.origin, revision=base.revision
        )
    except ValidationError:
        raise UsageError(
            f"{base.file}: a file cannot refer to that name; rename it to one without '..', colons "
            "and backslashes"
        ) from None


def make_recipe_on_base(
    name: str,
    base: Base,
    init: Init = "signed-constant",
    *,
    seed: int = 0,
    scaled_for: str | float | Fraction | None = None,
    args: Mapping[str, ArgValue] | None = None,
    notes: list[str] | None = None,
) -> Checkpoint:
    """A network whose tensors refer to a dense checkpoint, which its ``close`` closes.

    Without ``num_classes`` and ``in_chans`` in ``args`` it has as many as the base; a classifier of
    another number of classes is drawn from the seed instead, and what depends on the image's size
    or channels is adapted as timm does and stored. What was pruned is the base under a mask.
    ``notes`` gets what the user is to know. Raises IncompatibleError, both ways: a tensor of the
    architecture that the base lacks or has in another shape, a tensor of the base that the
    architecture lacks.
    """
    scale_k = _checked(init, seed, scaled_for)
    spec = as_built(spec_of(name, dict(args or {})), base)
    shell = build_meta(spec)
    state, roles = shell.state_dict(), tensor_roles(shell)
    heads = tuple(f"{name}." for name in classifier_names(shell))
    file = str(base.file or base.origin)
    matched = match(base.names, state, file, name, base.about)
    said = [*base.notes, *matched.notes]
    entries: dict[str, Entry] = {}
    payloads = Memory()
    odd: list[str] = []
    for tensor_name, tensor in state.items():
        shape = tuple(tensor.shape)
        own = matched.own.get(tensor_name)
        found = None if own is None else base_entry(base, own, tensor_name, payloads)
        if found is not None and found.shape != shape and not tensor_name.startswith(heads):
            odd.append(tensor_name)
        elif found is None or found.shape != shape:
            source = planned_source(roles[tensor_name], init, seed, scale_k)
            if source is None:
                raise IncompatibleError(
                    f"{tensor_name} cannot be drawn for another number of classes"
                )
            dtype = dtype_name(tensor.dtype, tensor_name)
            if found is not None:
                said.append(
                    f"{tensor_name} is {list(found.shape)} in {file}, {list(shape)} here, and is "
                    "drawn anew"
                )
            found = Entry(dtype=dtype, shape=shape, source=source)  # type: ignore[arg-type]
        if found is not None:
            entries[tensor_name] = found
    if odd:
        said.append(_adapt(spec, base, matched, odd, entries, payloads))
    if notes is not None:
        notes += said
    return _assemble(spec, entries, payloads, shell, {BASE: base})


def _adapt(
    spec: ModelSpec,
    base: Base,
    matched: Matched,
    names: list[str],
    entries: dict[str, Entry],
    payloads: Memory,
) -> str:
    """The tensors of a base that have another shape here, adapted and stored whole; what there is
    to say of it."""
    first = list(entries[names[0]].shape)
    for name, raw in adapt(spec, base, matched.own, names).items():
        entries[name] = stored_entry(raw, payload_name(SHARED, name, "source"), payloads)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{names[0]} is {first} in {base.file or base.origin}, {list(entries[names[0]].shape)} "
        f"here{more}: adapted as timm does, kept whole"
    )


def as_built(spec: ModelSpec, base: Base, names: Mapping[str, str] | None = None) -> ModelSpec:
    """The architecture for as many classes as the base's classifier tells apart and as many
    channels as its stem takes, unless it says their numbers. ``names``: the base's own names by the
    architecture's, if they are known."""
    missing = {"num_classes", "in_chans"} - set(spec.args)
    if not missing:
        return spec
    shell = build_meta(spec)
    if names is None:
        state = shell.state_dict()
        names = plain_names(base.names, state.__contains__).own

    def shape_of(name: str) -> tuple[int, ...] | None:
        own = names.get(name) or names.get(f"{name}_orig")
        return None if own is None else base.tensors.read(own).shape

    found: dict[str, int] = {}
    channels = stem_channels(spec, shell, shape_of) if "in_chans" in missing else None
    if channels is not None and channels != 3:
        found["in_chans"] = channels
    if "num_classes" in missing:
        with contextlib.suppress(IncompatibleError):  # a classifier without such a layer
            heads = (shape_of(f"{place}.weight") for place in last_layers(shell))
            if (shape := next((shape for shape in heads if shape is not None), None)) is not None:
                found["num_classes"] = shape[0]
    return spec.model_copy(update={"args": {**spec.args, **found}})


def base_entry(base: Base, own: Own, name: str, payloads: Memory) -> Entry:
    """A tensor of a base as a shared entry, under its mask if it was pruned, which goes to
    ``payloads``. Raises IncompatibleError for a mask that is none."""
    raw = base.tensors.read(own.tensor)
    overlays: tuple[MaskOverlay, ...] = ()
    if own.mask is not None:
        mask = pruning_mask(base.tensors.read(own.mask), own.mask, raw.shape)
        overlays = (mask_overlay(mask, SHARED, name, 0, payloads),)
    source = BaseSource(base=BASE, tensor=own.tensor)
    return Entry(dtype=raw.dtype, shape=raw.shape, source=source, overlays=overlays)  # type: ignore[arg-type]


def pruning_mask(raw: RawTensor, name: str, shape: tuple[int, ...]) -> Mask:
    """The mask that torch.nn.utils.prune saved as numbers. Raises IncompatibleError if it has
    others than 0 and 1, or another shape than its weight."""
    values = to_torch(raw)
    if raw.shape != shape or not bool(((values == 0) | (values == 1)).all()):
        found = f"has the shape {list(raw.shape)}" if raw.shape != shape else "holds other values"
        raise IncompatibleError(
            f"{name!r} is no mask, expected 0 and 1 in the shape {list(shape)}, but it {found}; "
            "torch.nn.utils.prune.remove makes the pruning permanent: save the state dict after it"
        )
    return Mask.of((values != 0).numpy())
