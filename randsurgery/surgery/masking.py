"""The parametrization that masks a weight by its scores: when it is computed, and its gradients."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Algorithm
from randsurgery.surgery.tensors import equal_bits


class _Masked(torch.autograd.Function):
    """The masked weight, and what its kept elements are multiplied by. Backward takes the mask
    for a function of the scores that a subclass of ``Scores`` chooses (straight through)."""

    @staticmethod
    def forward(
        scores: torch.Tensor, weight: torch.Tensor, layer: Scores
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # torch.func hands plain tensors in here, whatever it wraps them in outside
        return layer.value(scores, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        scores, weight, ctx.layer = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(scores, weight, output[1])
        ctx.save_for_forward(scores, weight, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
        scores, weight, factor = ctx.saved_tensors
        return ctx.layer.gradient(gradient, weight, scores, factor), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, None]:
        scores, weight, factor = ctx.saved_tensors
        if tangent is None:
            return torch.zeros_like(weight), None
        return ctx.layer.gradient(tangent, weight, scores, factor), None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], scores: torch.Tensor, weight: torch.Tensor, layer: Any
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
        parts = [
            [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
            for tensor, dim in zip((scores, weight), in_dims, strict=False)
        ]
        found = [_Masked.apply(one, other, layer) for one, other in zip(*parts, strict=True)]
        return (torch.stack([v for v, _ in found]), torch.stack([f for _, f in found])), (0, 0)


@dataclass(frozen=True)
class _Settled:
    """What a mask was chosen from, and the masked weight."""

    scores: torch.Tensor
    weight: torch.Tensor
    found: tuple[torch.Tensor, torch.Tensor]
    version: int

    def holds(self, scores: torch.Tensor, weight: torch.Tensor) -> bool:
        """True if these are the same, bit for bit, and nobody wrote into the masked weight."""
        return (
            self.found[0]._version == self.version
            and equal_bits(self.scores, scores)
            and equal_bits(self.weight, weight)
        )


class Scores(nn.Module):
    """The parametrization of one weight. A subclass says what scores mean.

    The masked weight is computed whenever the weight is read, from what the scores then are;
    reads within one call of the layer that holds it share one. In evaluation mode it is kept, with
    copies of scores and weight, and taken again as long as both are the same to the bit: comparing
    costs less than choosing, and no write to them can go unseen.
    """

    def __init__(self, tensor_name: str, scores: torch.Tensor) -> None:
        super().__init__()
        self.tensor_name = tensor_name
        self.scores = nn.Parameter(scores)
        self._settled: _Settled | None = None
        self._shared: dict[Any, tuple[Any, ...]] | None = None  # while the layer is called

    algorithm: ClassVar[Algorithm]
    finds_density: ClassVar[bool] = False  # how many weights are kept is found in training

    def choose(
        self, scores: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight under its mask, a new tensor, and the factor in it (0-dimensional). Both
        arguments are plain tensors."""
        raise NotImplementedError

    def gradient(
        self,
        gradient: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        factor: torch.Tensor,
    ) -> torch.Tensor:
        """The scores' gradient from the masked weight's. Differentiable where gradients are
        enabled."""
        raise NotImplementedError

    def mask(self) -> Mask:
        """The mask that the scores choose now."""
        raise NotImplementedError

    rescales: bool = False  # ``factor`` is all / kept weights

    @property
    def factor(self) -> float:
        """What the masked weight is multiplied by, a float32 value."""
        return 1.0

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its masked elements zeroed; same shape."""
        shared = self._shared
        if shared is None:
            return self._masked(weight)
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), self.training
        found = shared.get(mode)
        if found is None or found[0] is not self.scores or found[1] is not weight:
            found = shared[mode] = self.scores, weight, self._masked(weight)
        masked: torch.Tensor = found[2]
        return masked

    def _masked(self, weight: torch.Tensor) -> torch.Tensor:
        found: tuple[torch.Tensor, torch.Tensor] = _Masked.apply(self.scores, weight, self)
        return found[0]

    def value(
        self, scores: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``choose``; in evaluation mode the mask is chosen once."""
        if self.training or scores.is_meta:
            return self.choose(scores, weight)
        settled = self._settled
        if settled is None or not settled.holds(scores, weight):
            # not as inference tensors, which no later backward pass could use
            with torch.inference_mode(False):
                found = self.choose(scores, weight)
                copies = scores.detach().clone(), weight.detach().clone()
                settled = self._settled = _Settled(*copies, found, found[0]._version)
        masked, factor = settled.found
        return masked.detach(), factor.detach()

    def train(self, mode: bool = True) -> Scores:
        """As of any module. Training keeps no copies."""
        if mode:
            self._settled = None
        return super().train(mode)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Let all reads of the weight have one masked weight, for a call of the layer."""
        self._shared = {}
        try:
            yield
        finally:
            self._shared = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_settled": None, "_shared": None}


def share_within_calls(layer: nn.Module) -> None:
    """Let a layer that reads its weight several times a call, as attention does, have it masked
    once. Nothing outlives the call. The layer's class is its own, made by torch for it alone."""
    own = type(layer)
    if "forward" in vars(own):
        return
    whole = own.forward

    @functools.wraps(whole)
    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for steps in self.parametrizations.children():  # type: ignore[union-attr]
                for step in steps.children():
                    if isinstance(step, Scores):
                        stack.enter_context(step.shared())
            return whole(self, *args, **options)

    own.forward = forward
