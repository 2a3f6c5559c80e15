"""Partial training (Rosenfeld & Tsotsos, Section 3): learn a plan's part of a network.

``attach`` makes what the plan names the module's only learned parameters. The learned slice of a
weight is a parameter of its own, beside the frozen whole. Optimiser state, weight decay and
momentum know only the slice. For plain convolutions and linear layers, the weight's gradient is
computed for the slice alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Learned, Plan
from randsurgery.surgery.heads import check_not_fixed
from randsurgery.surgery.scores import check_has_values, owners
from randsurgery.surgery.sliced_layers import PLAIN, Sliced, assembled, is_plain


def _slice_parameter(whole: torch.Tensor, dim: int, count: int) -> nn.Parameter:
    """The first ``count`` along ``dim`` as a parameter with memory of its own."""
    return nn.Parameter(whole.detach().narrow(dim, 0, count).clone())


# --- every other tensor: the whole gradient, then the part that is learned ------------------------


class SliceOf(nn.Module):
    """The parametrization of a tensor of which a slice is learned."""

    def __init__(self, tensor_name: str, whole: torch.Tensor, part: Learned) -> None:
        super().__init__()
        assert part.dim is not None
        assert part.count is not None
        self.tensor_name, self.part, self.dim = tensor_name, part, part.dim
        self.learned = _slice_parameter(whole, part.dim, part.count)

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor itself, its slice as learned; same shape."""
        return assembled(whole, self.learned, self.dim)


class Survivors(nn.Module):
    """The parametrization of a masked weight whose surviving values are learned; the rest is 0."""

    def __init__(self, tensor_name: str, whole: torch.Tensor, mask: Mask) -> None:
        super().__init__()
        self.tensor_name, self.part = tensor_name, Learned(part="survivors")
        self.size = whole.numel()
        # no buffer: averages of models would average it
        self.positions = torch.from_numpy(mask.unpack().nonzero()[0]).to(whole.device)
        self.learned = nn.Parameter(whole.detach().reshape(-1)[self.positions])

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        """Zeros with the learned values at their positions; same shape."""
        if self.positions.device != whole.device:
            self.positions = self.positions.to(whole.device)
        empty = torch.zeros(whole.numel(), dtype=whole.dtype, device=whole.device)
        return empty.index_copy(0, self.positions, self.learned).view(whole.shape)


# --- what is attached -----------------------------------------------------------------------------


def attached(model: nn.Module) -> dict[str, Learned]:
    """The part that is learned of every sliced or survivors' tensor, by its name in ``model``."""
    found: dict[str, Learned] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (SliceOf, Survivors)):
            found[place.replace("parametrizations.", "").rpartition(".")[0]] = module.part
        if isinstance(module, Sliced):
            prefix = f"{place}." if place else ""
            for leaf, _, learned, dim in module.parts():
                found[prefix + leaf] = Learned(part="slice", dim=dim, count=learned.shape[dim])
    return found


def settle(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Turn a state dict of ``model`` into one of plain names: whole tensors, learned parts in."""
    for name in attached(model):
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        prefix = f"{prefix}." if prefix else ""
        if isinstance(module, Sliced):  # whose state dict shows the slice in the whole
            state.pop(f"{prefix}learned_{leaf}", None)
            continue
        inner = f"{prefix}parametrizations.{leaf}."
        del state[inner + "original"], state[inner + "0.learned"]
        state[name] = getattr(module, leaf).detach()


def survivors(model: nn.Module) -> dict[str, Mask]:
    """The masks of the tensors whose survivors are learned."""
    found: dict[str, Mask] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Survivors):
            name = place.replace("parametrizations.", "").rpartition(".")[0]
            bits = torch.zeros(module.size, dtype=torch.bool)
            bits[module.positions.cpu()] = True
            found[name] = Mask.of(bits.numpy())
    return found


# --- attach ---------------------------------------------------------------------------------------


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, leaf = name.rpartition(".")
    try:
        holder = model.get_submodule(module)
    except AttributeError:
        raise IncompatibleError(f"the plan learns {name!r}, which the module lacks") from None
    if leaf not in holder._parameters:
        raise IncompatibleError(
            f"the plan learns {name!r}, which is no parameter of the module (or has a "
            "parametrization already)"
        )
    return holder, leaf


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    masks: Mapping[str, Mask] | None = None,
    starts: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Learn what the plan names and nothing else. In place; works on any nn.Module.

    Afterwards the parameters that require gradients are the learned slices, survivors and whole
    tensors. ``masks``: of the tensors whose survivors are learned. ``starts``: what learned parts
    hold before training, as whole tensors, where that is not the module's own value. Raises
    UsageError or IncompatibleError; the module is then unchanged.
    """
    if attached(model):
        raise UsageError("the module has a plan attached already")
    check_not_fixed(model, plan.tensors)
    check_has_values(model, "a plan")
    shared = {ident for ident, names in owners(model).items() if len(names) > 1}
    found: list[tuple[str, nn.Module, str, Learned]] = []
    for name, part in plan.tensors.items():
        module, leaf = _holder(model, name)
        if part.part != "whole" and id(module._parameters[leaf]) in shared:
            raise IncompatibleError(f"{name} is one parameter with others; learn it whole or not")
        if part.part == "survivors" and name not in (masks or {}):
            raise IncompatibleError(
                f"the survivors of {name} are to be learned, but it has no mask"
            )
        found.append((name, module, leaf, part))
    # a layer's weight before its bias, which joins the weight's fast path
    found.sort(key=lambda one: (one[2] == "bias", one[0]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module, leaf, part in found:
        whole = module._parameters[leaf]
        assert whole is not None
        if starts is not None and name in starts:
            here = ... if part.dim is None else (*[slice(None)] * part.dim, slice(part.count))
            whole.data[here] = starts[name][here].to(whole.device)
        _learn(name, module, leaf, part, (masks or {}).get(name))
    if plan.statistics == "frozen":
        _freeze_statistics(model)
    return model


def _learn(name: str, module: nn.Module, leaf: str, part: Learned, mask: Mask | None) -> None:
    whole = module._parameters[leaf]
    assert whole is not None
    if leaf == "bias" and isinstance(module, Sliced):
        count = part.count if part.count is not None else len(whole)
        module.learned_bias = _slice_parameter(whole, 0, count)
    elif part.part == "whole":
        whole.requires_grad_(True)
    elif part.part == "survivors":
        assert mask is not None
        parametrize.register_parametrization(module, leaf, Survivors(name, whole, mask))
    elif leaf == "weight" and part.dim is not None and is_plain(module, part.dim):
        assert part.count is not None
        module.__class__ = PLAIN[type(module)]
        assert isinstance(module, Sliced)
        module.dim = part.dim
        module.learned_weight = _slice_parameter(whole, part.dim, part.count)
        module.learned_bias = None
    else:
        parametrize.register_parametrization(module, leaf, SliceOf(name, whole, part))


def _freeze_statistics(model: nn.Module) -> None:
    """Running statistics are used and never updated, whatever mode the module is put in."""
    for module in model.modules():
        tracked = (getattr(module, name, None) for name in ("running_mean", "running_var"))
        if any(isinstance(tensor, torch.Tensor) for tensor in tracked):
            module.register_forward_pre_hook(_use_statistics)


def _use_statistics(module: nn.Module, _: Any) -> None:
    module.training = False
