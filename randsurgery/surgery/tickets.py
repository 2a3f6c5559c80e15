"""Lottery tickets: masks of one network put on another's weights, or chosen anew from scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

import torch

from randsurgery.errors import IncompatibleError, near
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.derivation import payload_names
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import MaskOverlay, Member, MemberTensor, Recipe
from randsurgery.surgery.edge_popup import layer_shares
from randsurgery.surgery.initialisers import kept_count
from randsurgery.surgery.modules import meta_module
from randsurgery.surgery.popup_scores import top_k
from randsurgery.surgery.sentences import mask_overlay


def with_masks(checkpoint: Checkpoint, masks: Mapping[str, Mask]) -> Checkpoint:
    """The network with masks of another, by tensor name, as its member's overlays: on another seed
    that is the re-initialised ticket (Frankle & Carbin). Raises IncompatibleError for a tensor
    that is not there, of another size, or masked already."""
    recipe, who = checkpoint.recipe, checkpoint.member()
    names, payloads = set(recipe.tensor_names(who)), _payloads(checkpoint)
    tensors = dict(who.tensors)
    for name, mask in masks.items():
        if name not in names:
            raise IncompatibleError(
                f"a mask is of {name!r}, which the network lacks{near(name, names)}"
            )
        entry = recipe.resolved(who, name)
        if entry.size != mask.size:
            raise IncompatibleError(
                f"the mask of {name} is for {mask.size:,} weights, the network has "
                f"{list(entry.shape)}; the two must be of one architecture and number of classes"
            )
        if any(isinstance(overlay, MaskOverlay) for overlay in entry.overlays):
            raise IncompatibleError(f"{name} is masked already; start from a network that is not")
        tensors[name] = _with_mask(who, name, mask, payloads)
    fresh = who.model_copy(update={"tensors": dict(sorted(tensors.items()))})
    return _changed(checkpoint, recipe.with_member(fresh), payloads)


def _with_mask(who: Member, name: str, mask: Mask, payloads: Memory) -> MemberTensor:
    own = who.tensors.get(name)
    before = own.added if own is not None else ()
    overlays = (*before, mask_overlay(mask, who.name, name, len(before), payloads))
    return MemberTensor(overlays=overlays) if own is None else own.with_added(overlays)


def rethresholded(
    checkpoint: Checkpoint,
    share: Fraction,
    k_for: tuple[tuple[str, str | float | Fraction], ...] = (),
) -> Checkpoint:
    """The same network with masks chosen anew from its popup scores, ``share`` of each tensor.

    The scores leave the file. Raises IncompatibleError if it has none of edge-popup, UsageError for
    a pattern of ``k_for`` that matches no scored layer.
    """
    who = checkpoint.member()
    if not who.scores:
        raise IncompatibleError("the file holds no scores; they are kept by popup --save-scores")
    if who.algorithm != "edge-popup":
        raise IncompatibleError(
            f"the scores are of a {who.algorithm}, whose density is not chosen; only those of "
            "edge-popup can be thresholded anew"
        )
    layers = {name: name.rpartition(".")[0] for name in who.scores}
    shares = (
        layer_shares(meta_module(checkpoint), share, k_for, set(layers.values()))
        if k_for
        else dict.fromkeys(layers.values(), share)
    )
    payloads, tensors = _payloads(checkpoint), dict(who.tensors)
    for name, layer in layers.items():
        if not any(isinstance(overlay, MaskOverlay) for overlay in tensors[name].added):
            raise IncompatibleError(
                f"{name} holds its surviving weights alone; those under the mask are not in the "
                "file, so no other mask can be chosen"
            )
        scores = torch.from_numpy(checkpoint.scores(name, who.name).copy())
        zeroed = scores.numel() - kept_count(shares[layer], scores.numel())
        mask = top_k(scores, zeroed, name)
        overlays = tuple(
            mask_overlay(mask, who.name, name, index, payloads)
            if isinstance(overlay, MaskOverlay)
            else overlay
            for index, overlay in enumerate(tensors[name].added)
        )
        tensors[name] = tensors[name].with_added(overlays)
    fresh = who.model_copy(update={"tensors": tensors, "scores": {}})
    recipe = checkpoint.recipe.with_member(fresh)
    wanted = set(payload_names(recipe))
    kept = Memory({name: payloads[name] for name in payloads if name in wanted})
    return _changed(checkpoint, recipe, kept)


def _changed(checkpoint: Checkpoint, recipe: Recipe, payloads: Memory) -> Checkpoint:
    """With another recipe and payloads in memory; who closes it closes its file, too."""
    return replace(checkpoint, recipe=recipe, payloads=payloads, opened=checkpoint.files)


def _payloads(checkpoint: Checkpoint) -> Memory:
    names = payload_names(checkpoint.recipe)
    return Memory({name: checkpoint.payloads.read(name) for name in names})
