"""edge-popup (Ramanujan et al., Section 3.2, Algorithm 1): learn which weights to keep.

``attach`` gives every convolution and linear weight a popup score as a parametrization and
freezes all else; any training loop then learns the scores. ``harvest`` reads the masks off.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.generator import generate
from randsurgery.format.masks import Mask, popcount
from randsurgery.format.tensors import f32
from randsurgery.surgery.heads import fixed_heads
from randsurgery.surgery.initialisers import check_seed, kept_count, parse_fraction
from randsurgery.surgery.roles import (
    STANDARDISED,
    masked_weights,
    select_modules,
    tensor_roles,
)
from randsurgery.surgery.threshold import Bracket, select

MaskKind = Literal["learned", "random"]


@dataclass(frozen=True)
class Popup:
    """What edge-popup is to do. All fields but ``k`` have the paper's defaults.

    k: share of weights kept in each tensor, (0, 1]; parsed as a decimal, so 0.9 is exact.
    seed: of the initial scores, or of the mask itself if ``mask`` is "random".
    skip: patterns of layers left dense and frozen.
    learn: patterns (``@norm``, ``@head``) of layers learned beside the mask, not masked.
    mask: "learned", or "random" for the baseline in which nothing about the mask is learned.
    """

    k: str | float | Fraction
    seed: int = 0
    skip: tuple[str, ...] = ()
    learn: tuple[str, ...] = ()
    mask: MaskKind = "learned"

    def __post_init__(self) -> None:
        check_mask_kind(self.mask)
        for field in ("skip", "learn"):
            patterns: object = getattr(self, field)
            if isinstance(patterns, str) or not all(isinstance(p, str) for p in patterns):  # type: ignore[attr-defined]
                raise UsageError(f"{field} must be a sequence of patterns, found {patterns!r}")
        check_seed(self.seed)

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


class _StraightThrough(torch.autograd.Function):
    """weight * h(|score|), h the top-k indicator; backward takes h for the identity (Eq. 4, 5).

    The straight-through step sits after the absolute value, so the gradient carries sign(score).
    """

    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, weight: torch.Tensor, layer: PopupScores
    ) -> torch.Tensor:
        # kept as attributes, not as saved tensors: one masked weight may serve several backwards
        ctx.scores, ctx.weight = scores, weight
        return select(scores, weight, layer.zeroed, layer.bracket, layer.tensor_name)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return score_gradient(gradient, ctx.weight, ctx.scores), None, None


BLOCK = 1 << 17


def score_gradient(
    gradient: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """gradient * weight * sign(score), elementwise and of one shape (Ramanujan et al., Eq. 5)."""
    if gradient.device.type != "cpu":
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


class PopupScores(nn.Module):
    """The parametrization of one weight: its scores, and how many weights are zeroed.

    The masked weight is computed once for each state of the scores, however often it is read.
    """

    def __init__(self, tensor_name: str, scores: torch.Tensor, zeroed: int) -> None:
        super().__init__()
        self.tensor_name = tensor_name
        self.zeroed = zeroed
        self.scores = nn.Parameter(scores)
        self.bracket = Bracket()
        self._cache: tuple[Any, torch.Tensor] | None = None

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its lowest-scored elements zeroed; same shape."""
        state = (
            self.scores._version,
            self.scores.data_ptr(),
            weight._version,
            weight.data_ptr(),
            torch.is_grad_enabled(),
            self.scores.requires_grad,
        )
        if self._cache is None or self._cache[0] != state:
            masked: torch.Tensor = _StraightThrough.apply(self.scores, weight, self)
            self._cache = (state, masked)
        return self._cache[1]

    def forget(self) -> None:
        """Drop the masked weight, as after a change of the scores that torch does not count."""
        self._cache = None

    def mask(self) -> Mask:
        """The mask that the scores choose now."""
        ones = torch.ones_like(self.scores)
        kept = select(self.scores, ones, self.zeroed, self.bracket, self.tensor_name)
        return Mask.of(kept.cpu().numpy() != 0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # a masked weight can be neither copied nor saved


def attached(model: nn.Module) -> dict[str, PopupScores]:
    """The popup scores of a module by tensor name (``layer1.0.conv1.weight``).

    The name is the place in ``model``: a shared layer appears under each of its names, scores
    attached to a part under the whole's.
    """
    return {
        place.replace("parametrizations.", "").rpartition(".")[0]: layer
        for place, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, PopupScores)
    }


Target = tuple[str, nn.Module, str]


def resolve(model: nn.Module, popup: Popup) -> tuple[list[Target], set[str]]:
    """What ``attach`` will mask, as (module name, module, parameter), and the modules that are
    learned beside. Touches nothing, so a module on meta will do. Raises as ``attach`` does."""
    _ = popup.share
    if attached(model):
        raise UsageError("the module has popup scores already")
    left_out = select_modules(model, (*popup.skip, *popup.learn))
    learned = select_modules(model, popup.learn)
    targets = [t for t in masked_weights(model) if t[0] not in left_out]
    if not targets:
        raise UsageError("no convolution or linear layer is left to mask")
    holders = owners(model)
    for name, module, leaf in targets:
        tied = holders.get(id(module._parameters.get(leaf)), [])
        if len(tied) > 1:
            raise IncompatibleError(
                f"{' and '.join(tied)} are one parameter, which cannot be masked in one place "
                "only; untie them, or --skip the layers"
            )
        if leaf not in module._parameters:
            raise IncompatibleError(
                f"{name}.{leaf} has a parametrization already; remove it first, or --skip the layer"
            )
        if isinstance(module, STANDARDISED):
            raise IncompatibleError(
                f"{name} standardises its weight ({type(module).__name__}), which leaves no zeros "
                "of a mask; choose another architecture, or --skip such layers"
            )
    return targets, learned


def owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, one for each module that holds it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return found


def attach(model: nn.Module, popup: Popup) -> nn.Module:
    """Give every convolution and linear weight a score; freeze everything else. In place.

    Afterwards ``model.parameters()`` that require gradients are the scores, what ``popup.learn``
    names, and scale and bias of a fixed classifier. Scores start uniform in ±1/sqrt(fan_in), as
    Kaiming uniform with a = sqrt(5) draws them. Works on any nn.Module. Raises UsageError (a
    pattern that matches nothing, k outside (0, 1], nothing to mask) or IncompatibleError (a tied
    weight, a weight-standardised convolution, a weight under another parametrization).
    """
    share = popup.share
    targets, learned = resolve(model, popup)
    roles = tensor_roles(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in learned:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(True)
    for head in fixed_heads(model).values():
        for _, parameter in head.learned_parameters():
            parameter.requires_grad_(True)
    for name, module, leaf in targets:
        full = f"{name}.{leaf}" if name else leaf
        weight: torch.Tensor = getattr(module, leaf)
        scores = _initial_scores(full, weight, roles[full].fan_in, popup)
        zeroed = weight.numel() - kept_count(share, weight.numel())
        layer = PopupScores(full, scores, zeroed)
        layer.scores.requires_grad_(popup.mask == "learned")
        parametrize.register_parametrization(module, leaf, layer)
    model.register_forward_pre_hook(_forget_all)
    return model


def _forget_all(model: nn.Module, _: Any) -> None:
    """Before each forward pass of the whole: compute every mask anew, once."""
    for layer in model.modules():
        if isinstance(layer, PopupScores):
            layer.forget()


def _initial_scores(name: str, weight: torch.Tensor, fan_in: int, popup: Popup) -> torch.Tensor:
    values = generate(
        "uniform",
        weight.numel(),
        f32(max(fan_in, 1) ** -0.5),
        seed=popup.seed,
        stream=name,
        role="score" if popup.mask == "learned" else "mask",
    )
    return torch.from_numpy(values.reshape(tuple(weight.shape))).to(weight.device)


def harvest(model: nn.Module) -> dict[str, Mask]:
    """The mask of every scored tensor by name. Leaves the module as it is."""
    for name, layer in attached(model).items():
        if not bool(torch.isfinite(layer.scores).all()):
            raise IncompatibleError(f"{name}: its popup scores are not finite")
    return {name: layer.mask() for name, layer in attached(model).items()}


def flipped_share(before: dict[str, Mask], after: dict[str, Mask]) -> float:
    """The share of mask bits that differ between two harvests of one module."""
    flips = sum(popcount(before[name].packed ^ after[name].packed) for name in after)
    return flips / max(1, sum(mask.size for mask in after.values()))
