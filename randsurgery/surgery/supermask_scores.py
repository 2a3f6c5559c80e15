"""The scores of supermasks (Zhou et al.): the masks they draw, and samples from a file's."""

from __future__ import annotations

import torch
from torch import nn

from randsurgery.errors import IncompatibleError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.derivation import Step
from randsurgery.format.generator import generate
from randsurgery.format.masks import Mask
from randsurgery.format.tensors import f32
from randsurgery.surgery.masking import Scores
from randsurgery.surgery.tensors import to_torch


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
    finds_density = True

    def __init__(
        self, tensor_name: str, scores: torch.Tensor, *, seed: int, rescale: bool, sampled: bool
    ) -> None:
        super().__init__(tensor_name, scores)
        self.seed, self.rescales, self.sampled = seed, rescale, sampled

    def bits(self, scores: torch.Tensor | None = None) -> torch.Tensor:
        """The fixed mask, of the scores' shape."""
        values = (self.scores if scores is None else scores).detach()
        if self.sampled:
            return sampled_bits(values, self.tensor_name, self.seed)
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
        return rescaling(bits) if self.rescales else 1.0

    @property
    def factor(self) -> float:
        """What the fixed mask's weights are multiplied by."""
        return self._factor(self.bits())

    def mask(self) -> Mask:
        """The fixed mask."""
        return Mask.of(self.bits().cpu().numpy())


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
