"""Supermasks (Zhou et al., "Deconstructing Lottery Tickets"; Ramanujan et al., Section 4.4).

Every weight is kept with probability sigmoid(score). In training each forward pass samples a mask
and the gradient passes straight through it; how many weights stay is not chosen but found. In
evaluation, and in a file, the mask is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from randsurgery.surgery.method import Scoring, about, check_choice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from randsurgery.format.checkpoint import Checkpoint
    from randsurgery.surgery.masking import Scores

Final = Literal["threshold", "sample"]

LR = 200.0
"""Ramanujan et al., Section 4.4, found by doubling; their published sampling runs decay nothing."""

RESCALED_LR = 50.0
"""Rescaled weights are twice as large, and so is every gradient; docs/log.md, "Supermasks"."""


@dataclass(frozen=True)
class Supermask(Scoring):
    """What a supermask is to be.

    rescale: masked weights are multiplied by (weights / kept weights) of their tensor, anew for
    each mask (Zhou et al.'s dynamic weight rescaling).
    final: the fixed mask keeps what is kept with probability above a half ("threshold"), or is one
    sample from ``seed`` ("sample").
    """

    name: ClassVar[str] = "supermask"
    paper: ClassVar[str] = "Zhou et al.; --lr 200, with --rescale 50, and --wd 0 unless given"

    rescale: bool = field(
        default=False, kw_only=True, metadata=about("supermask: weights times all / kept.")
    )
    final: Final = field(
        default="threshold",
        kw_only=True,
        metadata=about("supermask: the mask at the end, by threshold or one sample."),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--final", self.final, get_args(Final))

    @property
    def learns(self) -> bool:
        """Always."""
        return True

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The paper's rate, lower where weights are rescaled, and no weight decay."""
        return {"lr": RESCALED_LR if self.rescale else LR, "weight_decay": 0.0}

    def settings(self) -> dict[str, Any]:
        """As of any method."""
        return {"algorithm": self.name, "rescale": self.rescale, "final": self.final}

    def sizes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, int | None]]:
        """As of any method; how many are kept is found in training."""
        from randsurgery.surgery.modules import meta_module
        from randsurgery.surgery.scores import target_sizes

        sizes = target_sizes(meta_module(checkpoint), self)
        return {name: (size, None) for name, size in sizes.items()}

    def attach(self, model: nn.Module) -> nn.Module:
        """Give every convolution and linear weight a score; freeze everything else. In place; works
        on any nn.Module. In training mode masks are drawn from torch's generator, one for each
        forward pass. Raises as edge-popup's does."""
        from randsurgery.surgery.scores import initial_scores, put_scores
        from randsurgery.surgery.supermask_scores import SupermaskScores

        def make(name: str, weight: torch.Tensor, fan_in: int) -> Scores:
            scores = initial_scores(name, weight, fan_in, self.seed)
            return SupermaskScores(
                name, scores, seed=self.seed, rescale=self.rescale, sampled=self.final == "sample"
            )

        return put_scores(model, self, make)
