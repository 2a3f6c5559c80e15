"""One network in memory that becomes each of a file's members in turn: only what two members say
is written, and of a slice only the slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from randsurgery.format.checkpoint import Checkpoint, in_threads
from randsurgery.format.derivation import payload_name
from randsurgery.format.rebuild import read_payload
from randsurgery.format.recipe import Member, MemberTensor, SliceOverlay
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.architectures import classifier_names
from randsurgery.surgery.modules import build, check_fit, meta_module
from randsurgery.surgery.sentences import leading
from randsurgery.surgery.tensors import to_torch

Region = tuple[int, int]
"""(dim, count): a tensor differs from the shared one within this slice at most."""


class Resident:
    """One network in memory that becomes each of a file's members in turn."""

    def __init__(
        self, checkpoint: Checkpoint, member: str | None = None, model: nn.Module | None = None
    ) -> None:
        """``model``: the user's own module, for files that name no architecture. The checkpoint
        stays in use, so its file must stay open."""
        self.checkpoint = checkpoint
        first = checkpoint.member(member)
        with torch.inference_mode(False):  # or its tensors could never be written elsewhere
            self.model = build(checkpoint, first.name, model=model).requires_grad_(False)
        self.member: str | None = first.name
        self.head = head_kind(first)
        self.changed = _regions(first)  # what differs from the shared tensors, and where
        self.fitting = {first.name}  # members whose tensors are known to be the network's

    def switch(self, name: str) -> nn.Module:
        """The network, now that member: every tensor has the bits that ``build`` would give it.

        Raises FileFormatError if a payload fails its digest, IncompatibleError if a tensor does not
        fit; the network is then no member's, and the next switch writes all of it.
        """
        after = self.checkpoint.member(name)
        if self.member == after.name:
            return self.model
        self.member = None
        with torch.inference_mode(False):
            fresh = self._exchange_head(after)
        state = self.model.state_dict(keep_vars=True)
        before = {n: r for n, r in {**self.changed, **fresh}.items() if n in state}
        self.changed = dict.fromkeys(state)  # until all is written
        if after.name not in self.fitting:
            check_fit(self.checkpoint.recipe, after, self.model, "the network")
            self.fitting.add(after.name)

        def write(one: str) -> None:
            own, target = after.tensors.get(one), state[one].detach()
            if own is not None and _within(before, one, _region(own), target):
                self._write_slices(target, after.name, one, own)
            else:
                target.copy_(to_torch(self.checkpoint.rebuild(after, one)))

        for _ in in_threads(write, sorted({*before, *after.tensors})):
            pass
        self.member, self.changed = after.name, _regions(after)
        return self.model

    def _write_slices(self, target: torch.Tensor, owner: str, name: str, own: MemberTensor) -> None:
        """Only what the member's slices hold: all else is as the shared entry has it already."""
        for index, overlay in enumerate(own.overlays):
            assert isinstance(overlay, SliceOverlay)
            here = leading(overlay.dim, overlay.count)
            slot, part = payload_name(owner, name, f"{index}.slice"), target[here]
            dtype = self.checkpoint.recipe.tensors[name].dtype
            array = read_payload(
                self.checkpoint.payloads, slot, overlay.digest, dtype=dtype, shape=tuple(part.shape)
            )
            part.copy_(to_torch(RawTensor(dtype, array)))

    def _exchange_head(self, after: Member) -> dict[str, Region | None]:
        """Another member's classifier in the place of this one, if it is another module, still
        empty; the names of its tensors."""
        if head_kind(after) == self.head:
            return {}
        like = next(self.model.parameters())
        shell, fresh = meta_module(self.checkpoint, after.name), dict[str, Region | None]()
        for place in classifier_names(shell):
            head = shell.get_submodule(place).to_empty(device=like.device).to(like.dtype)
            self.model.set_submodule(place, head.eval().requires_grad_(False))
            fresh |= {f"{place}.{leaf}": None for leaf in head.state_dict()}
        if hasattr(shell, "num_classes"):
            self.model.num_classes = shell.num_classes
        self.head = head_kind(after)
        return fresh


def head_kind(member: Member) -> Any:
    """What makes one classifier another module."""
    head = member.head
    return None if head is None else (head.kind, head.classes)


def _region(own: MemberTensor) -> Region | None:
    """Where a member changes a tensor; None if it may be anywhere."""
    slices = [overlay for overlay in own.overlays if isinstance(overlay, SliceOverlay)]
    dims = {overlay.dim for overlay in slices}
    if len(slices) < len(own.overlays) or len(dims) != 1:
        return None
    return dims.pop(), max(overlay.count for overlay in slices)


def _regions(member: Member) -> dict[str, Region | None]:
    return {name: _region(own) for name, own in member.tensors.items()}


def _within(
    before: Mapping[str, Region | None], name: str, after: Region | None, target: torch.Tensor
) -> bool:
    """True if nothing beyond the slice that comes next, which the tensor has, is to be undone."""
    if after is None or after[0] >= target.dim() or after[1] > target.shape[after[0]]:
        return False
    if name not in before:
        return True
    now = before[name]
    return now is not None and now[0] == after[0] and now[1] <= after[1]
