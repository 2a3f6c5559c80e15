"""The scores of edge-popup (Ramanujan et al., Section 3.2): their masks and their gradient."""

from __future__ import annotations

import torch

from randsurgery.format.masks import Mask
from randsurgery.surgery.masking import Scores
from randsurgery.surgery.tensors import transformed
from randsurgery.surgery.threshold import Bracket, select

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
