"""A module's tensors -> a recipe that regenerates them from a seed, or refers to a base."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from torch import nn

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import Container
from randsurgery.format.fields import SHARED
from randsurgery.format.rebuild import payload_name
from randsurgery.format.recipe import (
    BaseRef,
    BaseSource,
    ConstantSource,
    Entry,
    Member,
    RandomSource,
    Recipe,
    Source,
)
from randsurgery.format.specs import HeadSpec, ModelSpec
from randsurgery.format.tensors import hex_float
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
from randsurgery.surgery.initialisers import (
    Init,
    check_init,
    check_seed,
    embedding_source,
    parse_fraction,
    random_source,
)
from randsurgery.surgery.roles import Role, TensorRole, check_storable, tensor_roles
from randsurgery.surgery.sentences import stored_entry
from randsurgery.surgery.tensors import dtype_name, from_torch

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
    refs = {
        key: BaseRef(identity=b.identity, file=b.file, origin=b.origin, revision=b.revision)
        for key, b in (bases or {}).items()
    }
    recipe = Recipe(
        model=spec,
        tensors=dict(sorted(entries.items())),
        members=(Member(head=head_of(shell)),),
        bases=refs,
    )
    tensors = {key: base.tensors for key, base in (bases or {}).items()}
    opened = tuple(found for found in tensors.values() if isinstance(found, Container))
    return Checkpoint(recipe, payloads, tensors, opened=opened)


def make_recipe_on_base(
    name: str,
    base: Base,
    init: Init = "signed-constant",
    *,
    seed: int = 0,
    scaled_for: str | float | Fraction | None = None,
    args: Mapping[str, ArgValue] | None = None,
) -> Checkpoint:
    """A network whose tensors refer to a dense checkpoint, which its ``close`` closes.

    A classifier of another number of classes is drawn from the seed instead. Raises
    IncompatibleError, both ways: a tensor of the architecture that the base lacks or has in
    another shape, a tensor of the base that the architecture lacks.
    """
    scale_k = _checked(init, seed, scaled_for)
    spec = spec_of(name, dict(args or {}))
    shell = build_meta(spec)
    state, roles = shell.state_dict(), tensor_roles(shell)
    heads = tuple(f"{name}." for name in classifier_names(shell))
    prefix = "module." if all(n.startswith("module.") for n in base.names) else ""
    unused = {n.removeprefix(prefix) for n in base.names} - set(state)
    if unused:
        first = min(unused)
        raise IncompatibleError(
            f"{base.file or base.origin}: tensor {first!r} is not one of {name}"
            + near(first, state)
        )
    entries: dict[str, Entry] = {}
    for tensor_name, tensor in state.items():
        shape = tuple(tensor.shape)
        dtype = dtype_name(tensor.dtype, tensor_name)
        source: Source | None = BaseSource(base="base", tensor=prefix + tensor_name)
        if prefix + tensor_name not in base.names:
            raise IncompatibleError(f"{base.file or base.origin}: lacks {tensor_name!r} of {name}")
        found = base.tensors.read(prefix + tensor_name)
        if found.shape != shape and tensor_name.startswith(heads):
            source = planned_source(roles[tensor_name], init, seed, scale_k)
        elif found.shape != shape:
            raise IncompatibleError(
                f"{base.file or base.origin}: {tensor_name!r} is {list(found.shape)}, "
                f"{name} needs {list(shape)}"
            )
        else:
            dtype = found.dtype
        if source is None:
            raise IncompatibleError(f"{tensor_name} cannot be drawn for another number of classes")
        entries[tensor_name] = Entry(dtype=dtype, shape=shape, source=source)  # type: ignore[arg-type]
    return _assemble(spec, entries, Memory(), shell, {"base": base})
