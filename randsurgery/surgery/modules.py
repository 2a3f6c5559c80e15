"""Recipe -> module and back: ``build`` makes the network, ``harvest`` writes down what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format import masks
from randsurgery.format.canonical import digest
from randsurgery.format.checkpoint import (
    Checkpoint,
    Memory,
    entry_slots,
    finished_bytes,
    overlay_slots,
    payload_names,
)
from randsurgery.format.rebuild import check_affordable, payload_name
from randsurgery.format.recipe import (
    Entry,
    MaskOverlay,
    Member,
    MemberTensor,
    Overlay,
    Recipe,
    ReplaceOverlay,
)
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery import popup
from randsurgery.surgery.architectures import build_initialised, build_meta, fill_hidden
from randsurgery.surgery.recipes import stored_entry
from randsurgery.surgery.tensors import dtype_name, from_torch, to_torch


def check_fit(
    recipe: Recipe, member: Member, model: nn.Module, what: str, *, exact: bool = False
) -> None:
    """Names both ways, shapes and kinds of dtype of a member against a module; ``exact`` asks for
    the same dtypes, so that values can be copied without loss. Raises IncompatibleError."""
    state = plain_state(model)
    names = set(recipe.tensor_names(member))
    if missing := sorted(set(state) - names):
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


def build(
    checkpoint: Checkpoint,
    member: str | None = None,
    *,
    model: nn.Module | None = None,
    threads: int | None = None,
) -> nn.Module:
    """The network of one member: a plain module in evaluation mode, no parametrization left.

    Without ``model`` the recipe's architecture is built; its size is checked on meta before
    anything is allocated. With ``model`` (for recipes of any nn.Module) the values are copied into
    it. Raises IncompatibleError if names, shapes or classes do not fit, UsageError if ``model`` has
    popup scores.
    """
    who = checkpoint.member(member)
    recipe = checkpoint.recipe
    check_affordable(finished_bytes(recipe, who), "the checkpoint")
    if model is not None:
        if popup.attached(model):
            raise UsageError("the given module has popup scores; pass one without")
        check_fit(recipe, who, model, "the given module", exact=True)
        raw = checkpoint.tensors(who.name, threads)
        _check_ties(model, raw)
        _copy_into(model, raw)
        return model.eval()
    if recipe.model is None:
        raise IncompatibleError("the file names no architecture; pass your own: load(path, model=)")
    shell = build_meta(recipe.model)
    check_fit(recipe, who, shell, recipe.model.name)
    raw = checkpoint.tensors(who.name, threads)
    _move_into(shell, raw)
    if not fill_hidden(shell):
        # some hidden buffer only the constructor can fill
        whole = build_initialised(recipe.model, 0)
        _copy_into(whole, raw)
        return whole.eval()
    return shell.eval()


def _move_into(shell: nn.Module, raw: Mapping[str, RawTensor]) -> None:
    """Make the tensors those of a module on meta, without a copy. ``check_fit`` has compared
    names and shapes, so that nothing of load_state_dict's work is left but this."""
    owners: dict[str, Any] = dict(shell.named_modules(remove_duplicate=False))
    for name, tensor in raw.items():
        prefix, _, leaf = name.rpartition(".")
        old, new = getattr(owners[prefix], leaf), to_torch(tensor)
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
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in raw.items():
            state[name].copy_(to_torch(tensor))


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under plain names: masked weights appear unmasked, scores not at all."""
    state = dict(model.state_dict())
    for name in popup.attached(model):
        module, _, leaf = name.rpartition(".")
        inner = f"{module}.parametrizations.{leaf}." if module else f"parametrizations.{leaf}."
        state[name] = state.pop(inner + "original")
        del state[inner + "0.scores"]
    return state


def harvest(
    checkpoint: Checkpoint, model: nn.Module, *, member: str | None = None, scores: bool = False
) -> Checkpoint:
    """What the module now is, as the checkpoint's shared entries and new overlays of one member.

    A tensor with popup scores becomes its mask. Any other tensor that still equals, bit for bit,
    what the member or the shared entry made is not stored again; a changed one is a constant if
    it repeats one value, else a replacement. ``scores`` keeps the popup scores as payloads too.
    Other members keep their overlays and payload bytes. Raises IncompatibleError if the module's
    tensors are not those of the checkpoint.
    """
    who = checkpoint.member(member)
    state = plain_state(model)
    check_fit(checkpoint.recipe, who, model, "the module")
    payloads = Memory({n: checkpoint.payloads.read(n) for n in _kept_payloads(checkpoint, who)})
    chosen = popup.harvest(model)
    tensors: dict[str, MemberTensor] = {}
    for name in sorted(state):
        raw = from_torch(state[name], name)
        change = _change(checkpoint, who, name, raw, chosen.get(name), payloads)
        if change is not None:
            tensors[name] = change
    update: dict[str, object] = {"tensors": tensors, "scores": {}}
    if scores:
        update["scores"] = _store_scores(model, who.name, payloads)
    recipe = checkpoint.recipe.with_member(who.model_copy(update=update))
    return Checkpoint(recipe, payloads, checkpoint.bases)


def _kept_payloads(checkpoint: Checkpoint, member: Member) -> list[str]:
    own = set(payload_names(checkpoint.recipe, member.name))
    return [name for name in payload_names(checkpoint.recipe) if name not in own]


def _change(
    checkpoint: Checkpoint,
    member: Member,
    name: str,
    raw: RawTensor,
    mask: masks.Mask | None,
    payloads: Memory,
) -> MemberTensor | None:
    """What the member must say of one tensor; None if the shared entry says it all."""
    if mask is None and name in member.tensors:
        before = checkpoint.tensor(name, member.name)
        if before.same_bits(raw):
            return _keep(checkpoint, member, name, payloads)
    overlays: list[Overlay] = []
    known = name in checkpoint.recipe.tensors
    shared = checkpoint.rebuild(Member(), name) if known else None
    if shared is None or not shared.same_bits(raw):
        fits = shared is not None and (shared.dtype, shared.shape) == (raw.dtype, raw.shape)
        slot = payload_name(member.name, name, "0.tensor" if fits else "source")
        entry = stored_entry(raw, slot if not fits else "", payloads)
        if not fits or entry.source.kind == "constant":
            return MemberTensor(entry=_masked_entry(entry, member, name, mask, payloads))
        payloads[slot] = payloads.pop("")
        overlays.append(ReplaceOverlay(digest=digest(raw.array)))
    if mask is not None:
        overlays.append(_mask_overlay(mask, member.name, name, len(overlays), payloads))
    return MemberTensor(overlays=tuple(overlays)) if overlays else None


def _masked_entry(
    entry: Entry, member: Member, name: str, mask: masks.Mask | None, payloads: Memory
) -> Entry:
    if mask is None:
        return entry
    overlay = _mask_overlay(mask, member.name, name, 0, payloads)
    return entry.model_copy(update={"overlays": (overlay,)})


def _mask_overlay(
    mask: masks.Mask, owner: str, name: str, index: int, payloads: Memory
) -> MaskOverlay:
    encoding, payload = masks.encode(mask)
    raw = RawTensor("U8", np.frombuffer(payload, dtype=np.uint8))
    payloads[payload_name(owner, name, f"{index}.mask")] = raw
    return MaskOverlay(encoding=encoding, count=mask.count, digest=digest(raw.array))


def _keep(checkpoint: Checkpoint, member: Member, name: str, payloads: Memory) -> MemberTensor:
    """The member's own words about an unchanged tensor, its payload bytes untouched."""
    own = member.tensors[name]
    slots = overlay_slots(own.overlays) if own.entry is None else entry_slots(own.entry)
    for slot, _ in slots:
        payload = payload_name(member.name, name, slot)
        payloads[payload] = checkpoint.payloads.read(payload)
    return own


def _store_scores(model: nn.Module, owner: str, payloads: Memory) -> dict[str, str]:
    digests: dict[str, str] = {}
    for name, layer in popup.attached(model).items():
        raw = from_torch(layer.scores.detach().clone(), name)
        payloads[payload_name(owner, name, "scores")] = raw
        digests[name] = digest(raw.array)
    return digests


def with_head(checkpoint: Checkpoint, classes: int) -> Checkpoint:
    """The same architecture for another number of classes, its classifier drawn anew.

    The tensors whose shape depends on the classes are found on meta. Only such as hold nothing
    learned can be redrawn. Raises IncompatibleError naming ``--num-classes`` if one does, or if
    there is no classifier.
    """
    recipe, member = checkpoint.recipe, checkpoint.member()
    head, spec = member.head, recipe.model
    if head is None or spec is None:
        raise IncompatibleError("the network has no classifier to give other classes")
    if head.classes == classes:
        return checkpoint
    spec = spec.model_copy(update={"args": {**spec.args, "num_classes": classes}})
    tensors = dict(recipe.tensors)
    for name, wanted in build_meta(spec).state_dict().items():
        entry, shape = recipe.resolved(member, name), tuple(wanted.shape)
        if entry.shape == shape:
            continue
        drawn = entry.source.kind in ("random", "constant", "hadamard")
        if not drawn or entry.overlays or name in member.tensors:
            raise IncompatibleError(
                f"the classifier is learned for {head.classes} classes, {classes} are wanted; "
                f"pass --num-classes {head.classes} or start from another file"
            )
        tensors[name] = entry.model_copy(update={"shape": shape, "digest": None})
    fresh = member.model_copy(
        update={"head": head.model_copy(update={"classes": classes}), "classes": None}
    )
    changed = recipe.model_copy(update={"tensors": tensors, "model": spec, "members": (fresh,)})
    return replace(checkpoint, recipe=changed)
