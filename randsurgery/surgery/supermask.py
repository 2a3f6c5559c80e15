"""Supermasks (Zhou et al., "Deconstructing Lottery Tickets"; Ramanujan et al., Section 4.4).

Every weight is kept with probability sigmoid(score). In training each forward pass samples a mask
and the gradient passes straight through it; how many weights stay is not chosen but found. In
evaluation, and in a file, the mask is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.derivation import Step
from randsurgery.format.generator import generate
from randsurgery.format.masks import Mask
from randsurgery.format.tensors import f32
from randsurgery.surgery.masking import Scores
from randsurgery.surgery.scores import Scoring, initial_scores, put_scores
from randsurgery.surgery.tensors import to_torch

Final = Literal["threshold", "sample"]


@dataclass(frozen=True)
class Supermask(Scoring):
    """What a supermask is to be.

    rescale: masked weights are multiplied by (weights / kept weights) of their tensor, anew for
    each mask (Zhou et al.'s dynamic weight rescaling).
    final: the fixed mask keeps what is kept with probability above a half ("threshold"), or is one
    sample from ``seed`` ("sample").
    """

    rescale: bool = field(default=False, kw_only=True)
    final: Final = field(default="threshold", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_final(self.final)


def check_final(name: str) -> Final:
    """``threshold`` or ``sample``. Raises UsageError."""
    for kind in get_args(Final):
        if kind == name:
            checked: Final = kind
            return checked
    raise UsageError(f"unknown --final {name!r}, expected threshold or sample")


def apply_mask(weight: torch.Tensor, bits: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """The weight where the bit is true and +0.0 elsewhere, times the factor; same shape."""
    kept = torch.where(bits, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    return kept if factor == 1.0 else kept * factor


def rescaling(bits: torch.Tensor) -> float:
    """weights / kept weights as a float32 value; 1 for a mask that keeps nothing."""
    kept = int(bits.sum())
    return f32(bits.numel() / kept) if kept else 1.0


def sampled_bits(scores: torch.Tensor, name: str, seed: int) -> torch.Tensor:
    """One mask, true with probability sigmoid(score), from our generator: a uniform u in [-1, 1)
    lies below 2 sigmoid(s) - 1 = tanh(s / 2)."""
    drawn = generate("uniform", scores.numel(), 1.0, seed=seed, stream=name, role="mask")
    u = torch.from_numpy(drawn).view(scores.shape)
    return u.to(scores.device) < torch.tanh(scores / 2)


class SupermaskScores(Scores):
    """Scores whose sigmoid is the probability that a weight is kept."""

    algorithm = "supermask"

    def __init__(self, tensor_name: str, scores: torch.Tensor, wish: Supermask) -> None:
        super().__init__(tensor_name, scores)
        self.wish, self.rescales = wish, wish.rescale

    def bits(self, scores: torch.Tensor | None = None) -> torch.Tensor:
        """The fixed mask, of the scores' shape."""
        values = (self.scores if scores is None else scores).detach()
        if self.wish.final == "sample":
            return sampled_bits(values, self.tensor_name, self.wish.seed)
        return values > 0

    def choose(
        self, scores: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight under a sampled mask in training, under the fixed one in evaluation. Samples
        come from torch's generator, whose state ``torch.utils.checkpoint`` brings back."""
        sample = self.training
        bits = torch.rand_like(scores) < scores.sigmoid() if sample else self.bits(scores)
        factor = self._factor(bits)
        return apply_mask(weight.detach(), bits, factor), torch.tensor(factor)

    def gradient(
        self,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """weight * bits * factor, with the bits taken for their probability."""
        p = scores.sigmoid()
        return gradient * weight * factor * p * (1 - p)

    def _factor(self, bits: torch.Tensor) -> float:
        return rescaling(bits) if self.wish.rescale else 1.0

    @property
    def factor(self) -> float:
        """What the fixed mask's weights are multiplied by."""
        return self._factor(self.bits())

    def mask(self) -> Mask:
        """The fixed mask."""
        return Mask.of(self.bits().cpu().numpy())


def attach(model: nn.Module, wish: Supermask) -> nn.Module:
    """Give every convolution and linear weight a score; freeze everything else. In place; works on
    any nn.Module. In training mode masks are drawn from torch's generator, one for each forward
    pass. Raises as ``put_scores`` does."""

    def make(name: str, weight: torch.Tensor, fan_in: int) -> Scores:
        return SupermaskScores(name, initial_scores(name, weight, fan_in, wish.seed), wish)

    return put_scores(model, wish, make)


class Sampler:
    """Sampled masks on a network that was built from a file with a supermask's scores.

    The weights under the masks and the scores are held beside the network: two float32 values for
    each masked weight.
    """

    def __init__(self, checkpoint: Checkpoint, member: str | None = None) -> None:
        """Raises IncompatibleError if the file has no scores, or edge-popup's."""
        who = checkpoint.member(member)
        if not who.scores or who.algorithm != "supermask":
            found = f"scores of {who.algorithm}" if who.scores else "no scores"
            raise IncompatibleError(
                f"the file holds {found}; masks are sampled from those that "
                "popup --algorithm supermask --save-scores keeps"
            )
        self.scores = {
            name: torch.from_numpy(checkpoint.scores(name, who.name).copy()) for name in who.scores
        }
        self.rescaled = who.rescaled

        def masks(step: Step) -> bool:
            """Its masks, and what they multiply by."""
            return step.owner == who.name and step.overlay.kind in ("mask", "scale")

        self.weights = {
            name: to_torch(checkpoint.made(checkpoint.derivation(who, name).without(masks)))
            for name in who.scores
        }

    @torch.no_grad()
    def put(self, model: nn.Module, seed: int) -> None:
        """Put the masks of one sample on the network, in place."""
        for name, scores in self.scores.items():
            bits = sampled_bits(scores, name, seed)
            factor = rescaling(bits) if self.rescaled else 1.0
            model.get_parameter(name).copy_(apply_mask(self.weights[name], bits, factor))
