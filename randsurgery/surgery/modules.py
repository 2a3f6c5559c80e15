"""Recipe -> module and back: ``build`` makes the network, ``harvest`` writes down what changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format import masks
from randsurgery.format.canonical import digest
from randsurgery.format.checkpoint import Checkpoint, Memory, finished_bytes
from randsurgery.format.derivation import payload_name, payload_names
from randsurgery.format.rebuild import check_affordable
from randsurgery.format.recipe import (
    Algorithm,
    ConstantSource,
    Entry,
    Learned,
    Member,
    MemberTensor,
    Overlay,
    Recipe,
    ReplaceOverlay,
    ScaleOverlay,
)
from randsurgery.format.tensors import RawTensor, hex_float
from randsurgery.surgery import scores as scoring
from randsurgery.surgery import slices
from randsurgery.surgery.architectures import (
    build_initialised,
    build_meta,
    fill_hidden,
    hidden_names,
)
from randsurgery.surgery.arguments import as_checkpoint, check_module
from randsurgery.surgery.dtypes import in_files_dtype, scores_to_store
from randsurgery.surgery.heads import install
from randsurgery.surgery.sentences import (
    leading,
    mask_overlay,
    scatter_overlay,
    slice_overlay,
    stored_entry,
)
from randsurgery.surgery.tensors import dtype_name, from_torch, same_values, to_torch


def check_fit(
    recipe: Recipe, member: Member, model: nn.Module, what: str, *, exact: bool = False
) -> None:
    """Names both ways, shapes and kinds of dtype of a member against a module; ``exact`` asks for
    the same dtypes, so that values can be copied without loss. Raises IncompatibleError."""
    state = plain_state(model)
    names = set(recipe.tensor_names(member))
    if (missing := sorted(set(state) - names)) and (inner := _wrapped(model, missing)):
        raise IncompatibleError(
            f"{what} is a {type(model).__name__} around another module; pass its .{inner}"
        )
    if missing:
        raise IncompatibleError(f"{what} needs {missing[0]!r}, which the file lacks")
    if strange := sorted(names - set(state)):
        raise IncompatibleError(
            f"the file has {strange[0]!r}, which {what} lacks" + near(strange[0], state)
        )
    for name, tensor in state.items():
        entry = recipe.resolved(member, name)
        if tuple(tensor.shape) != entry.shape:
            raise IncompatibleError(
                f"{name} is {list(entry.shape)} in the file, {list(tensor.shape)} in {what}"
            )
        if entry.dtype.startswith(("F", "BF")) != tensor.is_floating_point():
            raise IncompatibleError(
                f"{name} is {entry.dtype} in the file, {tensor.dtype} in {what}"
            )
        if exact and entry.dtype != dtype_name(tensor.dtype, name):
            raise IncompatibleError(
                f"{name} is {entry.dtype} in the file, {tensor.dtype} in {what}; load into a "
                "module of the file's dtypes and convert that"
            )


def _wrapped(model: nn.Module, names: list[str]) -> str | None:
    """Where DataParallel, AveragedModel, torch.compile and the like hold the module itself."""
    for leaf in ("module", "_orig_mod"):
        held = isinstance(getattr(model, leaf, None), nn.Module)
        if held and any(name.startswith(f"{leaf}.") for name in names):
            return leaf
    return None


def build(
    checkpoint: Checkpoint,
    member: str | None = None,
    *,
    model: nn.Module | None = None,
    threads: int | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """The network of one member: a plain module in evaluation mode, no parametrization left.

    Without ``model`` the recipe's architecture is built; its size is checked on meta before
    anything is allocated. Its floating tensors get ``dtype``, in which it computes, whatever those
    of the file are (half precision fits into float32 exactly, double is rounded); None: those of
    the file. With ``model`` (for recipes of any nn.Module) the values are copied into it;
    what of it is on meta gets memory on the CPU. Raises IncompatibleError if names, shapes or
    classes do not fit, UsageError if ``model`` has popup scores.
    """
    checkpoint = as_checkpoint(checkpoint)
    who = checkpoint.member(member)
    recipe = checkpoint.recipe
    check_affordable(finished_bytes(recipe, who), "the checkpoint")
    if model is not None:
        check_module(model)
        if scoring.attached(model) or slices.attached(model):
            raise UsageError("the given module has scores or a plan; pass one without")
        check_fit(recipe, who, model, "the given module", exact=True)
        raw = checkpoint.tensors(who.name, threads)
        _check_ties(model, raw)
        _copy_into(model, raw)
        return model.eval()
    shell, spec = meta_module(checkpoint, member), recipe.model_of(who)
    assert spec is not None
    check_fit(recipe, who, shell, spec.name)
    raw = checkpoint.tensors(who.name, threads)
    _move_into(shell, raw, dtype)
    if not fill_hidden(shell):
        # some hidden buffer only the constructor can fill
        whole = _with_head_of(who, build_initialised(spec, 0))
        _move_into(whole, raw, dtype)
        return whole.eval()
    return shell.eval()


def meta_module(checkpoint: Checkpoint, member: str | None = None) -> nn.Module:
    """The member's network on meta: its layers, names and shapes without memory. Raises
    IncompatibleError if the file names no architecture."""
    who = checkpoint.member(member)
    spec = checkpoint.recipe.model_of(who)
    if spec is None:
        raise IncompatibleError("the recipe names no architecture; pass your own module as model=")
    return _with_head_of(who, build_meta(spec))


def _with_head_of(member: Member, model: nn.Module) -> nn.Module:
    if member.head is not None and member.head.kind != "linear":
        install(model, scale_learned=member.head.scale == "learned")
    return model


def _move_into(shell: nn.Module, raw: Mapping[str, RawTensor], dtype: torch.dtype | None) -> None:
    """Make the tensors those of a module on meta, without a copy where they have the dtype.
    ``check_fit`` has compared names and shapes, so that nothing of load_state_dict's work is left
    but this."""
    owners: dict[str, Any] = dict(shell.named_modules(remove_duplicate=False))
    for name, tensor in raw.items():
        prefix, _, leaf = name.rpartition(".")
        old, new = getattr(owners[prefix], leaf), to_torch(tensor)
        if dtype is not None and new.is_floating_point():
            new = new.to(dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(owners[prefix], leaf, new)


def _check_ties(model: nn.Module, raw: Mapping[str, RawTensor]) -> None:
    """One parameter under several names can hold one value only."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name and not raw[known].same_bits(raw[name]):
            raise IncompatibleError(
                f"{known} and {name} are one parameter in the given module, two in the file; "
                "untie them"
            )


def _copy_into(model: nn.Module, raw: Mapping[str, RawTensor]) -> None:
    state = model.state_dict(keep_vars=True)
    hidden = _hidden_on_meta(model)
    made: dict[int, nn.Parameter] = {}  # a parameter with several names stays one
    with torch.no_grad():
        for name, tensor in raw.items():
            if not state[name].is_meta:
                state[name].copy_(to_torch(tensor))
                continue
            prefix, _, leaf = name.rpartition(".")
            old, new = state[name], to_torch(tensor)
            if isinstance(old, nn.Parameter):
                new = made.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
            setattr(model.get_submodule(prefix), leaf, new)
    if hidden:
        fill_hidden(model)


def _hidden_on_meta(model: nn.Module) -> list[str]:
    """Buffers on meta that no file holds. Raises IncompatibleError if the module cannot make
    them."""
    found = [name for name in hidden_names(model) if model.get_buffer(name).is_meta]
    for name in found:
        owner = model.get_submodule(name.rpartition(".")[0])
        if not hasattr(owner, "init_non_persistent_buffers"):
            raise IncompatibleError(
                f"the given module is on meta, and its buffer {name} is in no file; build the "
                "module on the CPU"
            )
    return found


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under plain names: masked weights appear unmasked, scores not at all."""
    state = dict(model.state_dict())
    for name in scoring.attached(model):
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.parametrizations.{leaf}." if module else f"parametrizations.{leaf}."
        state[name] = state.pop(inner + "original")
        del state[inner + "0.scores"]
    slices.settle(model, state)
    return state


def harvest(
    checkpoint: Checkpoint, model: nn.Module, *, member: str | None = None, scores: bool = False
) -> Checkpoint:
    """What the module now is, as the checkpoint's shared entries and new overlays of one member.

    A tensor with popup scores becomes its mask, one with a learned slice that slice, one whose
    survivors are learned their values. Any other tensor that still equals, bit for bit,
    what the member or the shared entry made is not stored again; a changed one is a constant if
    it repeats one value, else a replacement. ``scores`` keeps the popup scores as payloads too.
    Other members keep their overlays and payload bytes. A module that was cast to another dtype is
    stored in the file's (dtypes.py). Raises IncompatibleError if the module's tensors are not those
    of the checkpoint, or if casting it has left what the file cannot say.
    """
    checkpoint = as_checkpoint(checkpoint)
    check_module(model)
    scoring.check_has_values(model, "a file")
    check_fit(checkpoint.recipe, checkpoint.member(member), model, "the module")
    layers = scoring.attached(model)
    kept = layers if scores else {}
    return record(
        checkpoint,
        _raw_state(checkpoint, model, member, {n for n, one in layers.items() if one.rescales}),
        chosen=scoring.harvest(model),
        factors={name: layer.factor for name, layer in layers.items()},
        alive=slices.survivors(model),
        parts=slices.attached(model),
        scores={n: scores_to_store(layer.scores, n) for n, layer in kept.items()},
        algorithm=next((layer.algorithm for layer in kept.values()), "edge-popup"),
        rescaled=any(layer.rescales for layer in kept.values()),
        member=member,
    )


def _raw_state(
    checkpoint: Checkpoint, model: nn.Module, member: str | None, rescaled: set[str]
) -> dict[str, RawTensor]:
    """The module's tensors under plain names, in the dtypes of the file."""
    who, found = checkpoint.member(member), dict[str, RawTensor]()
    for name, tensor in plain_state(model).items():
        raw = from_torch(tensor, name)
        if raw.dtype != checkpoint.recipe.resolved(who, name).dtype:
            if name in rescaled and raw.dtype != "F32":
                raise IncompatibleError(
                    f"the rescaled weights of {name} are {raw.dtype} in the module, which rounds "
                    "them other than the file does; call .float() on the module before it is saved"
                )
            if name not in rescaled:  # what a factor multiplies is kept in single precision
                raw = in_files_dtype(raw, checkpoint.rebuild(who, name), name)
        found[name] = raw
    return found


def record(
    checkpoint: Checkpoint,
    state: Mapping[str, RawTensor],
    *,
    chosen: Mapping[str, masks.Mask],
    factors: Mapping[str, float] | None = None,
    alive: Mapping[str, masks.Mask] | None = None,
    parts: Mapping[str, Learned] | None = None,
    scores: Mapping[str, RawTensor] | None = None,
    algorithm: Algorithm = "edge-popup",
    rescaled: bool = False,
    member: str | None = None,
) -> Checkpoint:
    """The checkpoint whose member's finished tensors are ``state``, as ``harvest`` describes.

    ``chosen``: masks over the tensors, which stand in ``state`` unmasked, and ``factors`` of what
    they keep; ``alive``: positions that were learned, all else being zero; ``parts``: learned
    slices; ``scores``: F32, to be kept, of ``algorithm``, which ``rescaled`` or not.
    """
    who = checkpoint.member(member)
    alive, parts = alive or {}, parts or {}
    payloads = Memory({n: checkpoint.payloads.read(n) for n in _kept_payloads(checkpoint, who)})
    tensors: dict[str, MemberTensor] = {}
    for name in sorted(state):
        raw = state[name]
        change: MemberTensor | None
        if name in alive:
            change = MemberTensor(entry=_scattered(who, name, raw, alive[name], payloads))
        else:
            factor = (factors or {}).get(name, 1.0)
            mask = (chosen[name], factor) if name in chosen else None
            change = _change(checkpoint, who, name, raw, mask, parts.get(name), payloads)
        if change is not None:
            tensors[name] = change
    digests: dict[str, str] = {}
    for name, raw in (scores or {}).items():
        payloads[payload_name(who.name, name, "scores")] = raw
        digests[name] = digest(raw.array)
    update = {"tensors": tensors, "scores": digests, "algorithm": algorithm, "rescaled": rescaled}
    recipe = checkpoint.recipe.with_member(who.model_copy(update=update))
    return Checkpoint(recipe, payloads, checkpoint.bases)


Chosen = tuple[masks.Mask, float]
"""A mask, and the factor of the weights under it."""


def _kept_payloads(checkpoint: Checkpoint, member: Member) -> list[str]:
    own = set(payload_names(checkpoint.recipe, member.name))
    return [name for name in payload_names(checkpoint.recipe) if name not in own]


def _change(
    checkpoint: Checkpoint,
    member: Member,
    name: str,
    raw: RawTensor,
    mask: Chosen | None,
    part: Learned | None,
    payloads: Memory,
) -> MemberTensor | None:
    """What the member must say of one tensor; None if the shared entry says it all."""
    if mask is None and name in member.tensors:
        before = checkpoint.tensor(name, member.name)
        if same_values(before, raw):
            return _keep(checkpoint, member, name, payloads)
    overlays: list[Overlay] = []
    known = name in checkpoint.recipe.tensors
    shared = checkpoint.rebuild(Member(), name) if known else None
    # what a mask's factor multiplies is rounded in the entry's dtype
    exact = mask is not None and mask[1] != 1.0
    if shared is None or not (shared.same_bits(raw) if exact else same_values(shared, raw)):
        fits = shared is not None and (shared.dtype, shared.shape) == (raw.dtype, raw.shape)
        if fits and shared is not None and part is not None and _only_slice(shared, raw, part):
            assert part.dim is not None
            assert part.count is not None
            overlay = slice_overlay(raw, part.dim, part.count, member.name, name, 0, payloads)
            return MemberTensor(overlays=(overlay,))
        slot = payload_name(member.name, name, "0.tensor" if fits else "source")
        entry = stored_entry(raw, slot if not fits else "", payloads)
        if not fits or entry.source.kind == "constant":
            return MemberTensor(entry=_masked_entry(entry, member, name, mask, payloads))
        payloads[slot] = payloads.pop("")
        overlays.append(ReplaceOverlay(digest=digest(raw.array)))
    if mask is not None:
        overlays += _mask_overlays(mask, member.name, name, len(overlays), payloads)
    return MemberTensor(overlays=tuple(overlays)) if overlays else None


def _only_slice(shared: RawTensor, raw: RawTensor, part: Learned) -> bool:
    """True if the two differ within the slice at most."""
    assert part.dim is not None
    assert part.count is not None
    where = leading(part.dim, part.count)
    expected = shared.array.copy()
    expected[where] = raw.array[where]
    return RawTensor(raw.dtype, expected).same_bits(raw)


def _scattered(
    member: Member, name: str, raw: RawTensor, mask: masks.Mask, payloads: Memory
) -> Entry:
    """Zeros with the survivors' values: the drawn values under them leave no trace, so the
    sentence starts from a constant and the mask is stored once."""
    overlay = scatter_overlay(raw, mask, member.name, name, 0, payloads)
    source = ConstantSource(value=hex_float(0.0))
    return Entry(dtype=raw.dtype, shape=raw.shape, source=source, overlays=(overlay,))  # type: ignore[arg-type]


def _masked_entry(
    entry: Entry, member: Member, name: str, mask: Chosen | None, payloads: Memory
) -> Entry:
    if mask is None:
        return entry
    overlays = _mask_overlays(mask, member.name, name, 0, payloads)
    return entry.model_copy(update={"overlays": tuple(overlays)})


def _mask_overlays(
    chosen: Chosen, owner: str, name: str, index: int, payloads: Memory
) -> list[Overlay]:
    """A mask, and what the weights under it are multiplied by."""
    mask, factor = chosen
    found: list[Overlay] = [mask_overlay(mask, owner, name, index, payloads)]
    if factor != 1.0:
        found.append(ScaleOverlay(factor=hex_float(factor)))
    return found


def _keep(checkpoint: Checkpoint, member: Member, name: str, payloads: Memory) -> MemberTensor:
    """The member's own words about an unchanged tensor, its payload bytes untouched."""
    made = checkpoint.derivation(member, name)
    for payload, _ in made.owned_by(member.name):
        payloads[payload] = checkpoint.payloads.read(payload)
    return member.tensors[name]
