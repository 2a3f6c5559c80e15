"""edge-popup (Ramanujan et al., Section 3.2, Algorithm 1): learn which weights to keep.

``attach`` gives every convolution and linear weight a popup score as a parametrization and
freezes all else; any training loop then learns the scores. ``harvest`` reads the masks off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import nn

from randsurgery.errors import UsageError
from randsurgery.format.generator import Role
from randsurgery.format.masks import Mask
from randsurgery.surgery.initialisers import kept_count, parse_fraction
from randsurgery.surgery.masking import Scores
from randsurgery.surgery.roles import select_modules
from randsurgery.surgery.scores import (
    Scoring,
    initial_scores,
    put_scores,
    resolve,
    tensor_name,
)
from randsurgery.surgery.tensors import transformed
from randsurgery.surgery.threshold import Bracket, select

MaskKind = Literal["learned", "random"]


@dataclass(frozen=True)
class Popup(Scoring):
    """What edge-popup is to do. All fields but ``k`` have the paper's defaults.

    k: share of weights kept in each tensor, (0, 1]; parsed as a decimal, so 0.9 is exact.
    k_for: (pattern, share) pairs for layers that keep another share; of several patterns that match
    a layer the last decides.
    mask: "learned", or "random" for the baseline in which nothing about the mask is learned;
    ``seed`` is then that of the mask.
    """

    k: str | float | Fraction
    k_for: tuple[tuple[str, str | float | Fraction], ...] = field(default=(), kw_only=True)
    mask: MaskKind = field(default="learned", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask_kind(self.mask)

    @property
    def share(self) -> Fraction:
        """``k`` as an exact number. Raises UsageError outside (0, 1]."""
        return parse_fraction(self.k, "k")


def check_mask_kind(name: str) -> MaskKind:
    """``learned`` or ``random``. Raises UsageError."""
    for kind in get_args(MaskKind):
        if kind == name:
            checked: MaskKind = kind
            return checked
    raise UsageError(f"unknown --mask {name!r}, expected learned or random")


BLOCK = 1 << 17


def score_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """gradient * weight * sign(score), elementwise and of one shape (Ramanujan et al., Eq. 5).

    The straight-through step sits after the absolute value, so the gradient carries sign(score).
    """
    # a backward pass that is to be differentiated, or batched by torch.func, runs with gradients
    if torch.is_grad_enabled() or gradient.device.type != "cpu" or transformed():
        return gradient * weight * scores.sign()
    # block by block, so that the signs never leave the cache
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    flat, g = out.view(-1), gradient.contiguous().view(-1)
    w, s = weight.contiguous().view(-1), scores.contiguous().view(-1)
    signs = torch.empty(min(BLOCK, s.numel()), dtype=scores.dtype)
    for start in range(0, s.numel(), BLOCK):
        part = s[start : start + BLOCK]
        torch.mul(
            g[start : start + BLOCK], w[start : start + BLOCK], out=flat[start : start + BLOCK]
        )
        torch.sign(part, out=signs[: part.numel()])
        flat[start : start + BLOCK].mul_(signs[: part.numel()])
    return out


class PopupScores(Scores):
    """Scores of edge-popup: all but the ``zeroed`` lowest magnitudes keep their weight."""

    algorithm = "edge-popup"

    def __init__(self, tensor_name: str, scores: torch.Tensor, zeroed: int) -> None:
        super().__init__(tensor_name, scores)
        self.zeroed = zeroed
        self.bracket = Bracket()

    def choose(
        self, scores: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight with its lowest-scored elements zeroed, and 1."""
        masked = select(scores, weight, self.zeroed, self.bracket, self.tensor_name)
        return masked, torch.ones(())

    def gradient(
        self,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """weight * h(|score|), h the top-k indicator, with h taken for the identity (Eq. 4, 5)."""
        return score_gradient(gradient, weight, scores)

    def mask(self) -> Mask:
        """The mask that the scores choose now."""
        return top_k(self.scores, self.zeroed, self.tensor_name, self.bracket)


def top_k(scores: torch.Tensor, zeroed: int, name: str, bracket: Bracket | None = None) -> Mask:
    """The mask of all but the ``zeroed`` lowest |scores| of a tensor."""
    kept = select(scores, torch.ones_like(scores), zeroed, bracket or Bracket(), name)
    return Mask.of((kept != 0).cpu().numpy())


def shares(model: nn.Module, popup: Popup) -> dict[str, Fraction]:
    """The share that each tensor to be masked keeps, by tensor name. A module on meta will do.
    Raises UsageError or IncompatibleError as ``attach`` does."""
    targets, _ = resolve(model, popup)
    found = layer_shares(model, popup, {place for place, _, _ in targets})
    return {tensor_name(place, leaf): found[place] for place, _, leaf in targets}


def layer_shares(model: nn.Module, popup: Popup, layers: Collection[str]) -> dict[str, Fraction]:
    """The share that each of the layers keeps. Raises UsageError for a pattern of ``k_for`` that
    matches none of them."""
    found = dict.fromkeys(layers, popup.share)
    for pattern, k in popup.k_for:
        share = parse_fraction(k, f"k of {pattern}")
        hits = select_modules(model, (pattern,)) & found.keys()
        if not hits:
            raise UsageError(f"--k-for {pattern} matches no layer that is masked")
        found |= dict.fromkeys(hits, share)
    return found


def attach(model: nn.Module, popup: Popup) -> nn.Module:
    """Give every convolution and linear weight a score; freeze everything else. In place.

    Afterwards ``model.parameters()`` that require gradients are the scores, what ``popup.learn``
    names, and scale and bias of a fixed classifier. Works on any nn.Module. Raises UsageError (a
    pattern that matches nothing, k outside (0, 1], nothing to mask) or IncompatibleError (a tied
    weight, a weight-standardised convolution, a weight under another parametrization).
    """
    keep = shares(model, popup)
    learned = popup.mask == "learned"

    def make(name: str, weight: torch.Tensor, fan_in: int) -> Scores:
        role: Role = "score" if learned else "mask"
        scores = initial_scores(name, weight, fan_in, popup.seed, role)
        zeroed = weight.numel() - kept_count(keep[name], weight.numel())
        layer = PopupScores(name, scores, zeroed)
        layer.scores.requires_grad_(learned)
        return layer

    return put_scores(model, popup, make)
