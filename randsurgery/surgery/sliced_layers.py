"""Plain convolutions and linear layers of which a slice is learned: the slice's gradient alone.

The learned slice is a parameter with memory of its own. What a layer computes with is put together
anew for each call, so that no copy, average, optimiser or write can part slice and whole. The
backward pass computes the gradients of the input and of the slice, and nothing of the weight's
rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from randsurgery.surgery.tensors import equal_bits, transformed


def assembled(whole: torch.Tensor, learned: torch.Tensor, dim: int) -> torch.Tensor:
    """The whole tensor with ``learned`` as its first indices along ``dim``; new memory. Gradients
    reach what is learned."""
    return torch.slice_scatter(whole, learned, dim, 0, learned.shape[dim])


@torch.no_grad()
def write_slice(whole: torch.Tensor, learned: torch.Tensor, dim: int) -> None:
    """Let the whole tensor have the learned values too, for those who read it by itself."""
    part = whole.detach().narrow(dim, 0, learned.shape[dim])
    if not whole.is_meta and not equal_bits(part, learned):
        part.copy_(learned)


def _under_autocast(*tensors: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """The tensors as autocast would hand them to a convolution; unchanged outside of it."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        yield from tensors
        return
    dtype = torch.get_autocast_dtype(device)
    for tensor in tensors:
        cast = tensor is not None and tensor.dtype == torch.float32
        yield tensor.to(dtype) if cast and tensor is not None else tensor


def _remember(
    ctx: Any,
    x: torch.Tensor,
    slice_: torch.Tensor,
    bias_slice: torch.Tensor | None,
    weight: torch.Tensor,
    layer: Sliced,
) -> None:
    """What both backward passes need."""
    ctx.save_for_backward(x, slice_, weight)
    ctx.dim, ctx.count = layer.dim, slice_.shape[layer.dim]
    ctx.dtypes = slice_.dtype, None if bias_slice is None else bias_slice.dtype
    ctx.bias_count = 0 if bias_slice is None else len(bias_slice)


def _remembered(ctx: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and weight. Where the backward pass is to be differentiated itself, the weight depends
    on its slice."""
    x, slice_, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        weight = assembled(weight, slice_.to(weight.dtype), ctx.dim)
    return x, weight


class _ConvSlice(torch.autograd.Function):
    """conv2d(x, weight, bias); backward gives the gradients of x, of the slice, which is the first
    indices of the weight along ``dim``, and of the first elements of the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        slice_: torch.Tensor,
        bias_slice: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: SlicedConv2d,
    ) -> torch.Tensor:
        _remember(ctx, x, slice_, bias_slice, weight, layer)
        ctx.where = (layer.stride, layer.padding, layer.dilation)
        return torch.conv2d(x, weight, bias, *ctx.where)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = _remembered(ctx)
        where, shape = ctx.where, x.shape
        stepped = weight.shape[2:] == (1, 1) and where[1] == (0, 0) and where[0] != (1, 1)
        if stepped:  # a pointwise convolution sees only these pixels; libraries are slow to see it
            stride, where = where[0], ((1, 1), (0, 0), (1, 1))
            x = x[:, :, :: stride[0], :: stride[1]]
        n = ctx.count
        for_x = for_slice = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = _conv_backward(gradient, x, weight, where, of_weight=False)
            if stepped:
                seen, for_x = for_x, gradient.new_zeros(shape)
                for_x[:, :, :: stride[0], :: stride[1]] = seen
        if ctx.needs_input_grad[1]:
            if ctx.dim == 0:
                parts = gradient.narrow(1, 0, n), x, weight.narrow(0, 0, n)
            else:
                parts = gradient, x.narrow(1, 0, n), weight.narrow(1, 0, n)
            for_slice = _weight_gradient(*parts, where).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            for_bias = gradient.narrow(1, 0, ctx.bias_count).sum((0, 2, 3)).to(ctx.dtypes[1])
        return for_x, for_slice, for_bias, None, None, None


def _conv_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, where: Any, *, of_weight: bool
) -> torch.Tensor:
    """The gradient of the weight, or of the input, of a convolution."""
    stride, padding, dilation = where
    which = [not of_weight, of_weight, False]
    found: torch.Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, (0, 0), 1, which
    )[int(of_weight)]
    return found


FEW_PIXELS = 32
"""Below, a matrix product an image costs more than the library's convolution."""
MANY_PRODUCTS = 1 << 22
"""Elements of all images' products; above, the library's convolution is no slower and takes less
memory."""


def _weight_gradient(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, where: Any
) -> torch.Tensor:
    """The weight's gradient. That of a pointwise convolution is one matrix product an image, which
    for a few rows takes half the time of a convolution's backward pass."""
    pointwise = weight.shape[2:] == (1, 1) and where[:2] == ((1, 1), (0, 0))
    plain = gradient.dtype in (torch.float32, torch.float64) and gradient.device.type == "cpu"
    laid_out = not x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous()
    few = gradient.shape[2:].numel() < FEW_PIXELS or len(x) * weight.numel() > MANY_PRODUCTS
    if few or not (pointwise and plain and laid_out):
        return _conv_backward(gradient, x, weight, where, of_weight=True)
    product = gradient.flatten(2) @ x.flatten(2).transpose(1, 2)
    return product.sum(0).view(weight.shape)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (rows, n), also where n is 0."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


class _LinearSlice(torch.autograd.Function):
    """linear(x, weight, bias) with the gradients of ``_ConvSlice``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        slice_: torch.Tensor,
        bias_slice: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: SlicedLinear,
    ) -> torch.Tensor:
        _remember(ctx, x, slice_, bias_slice, weight, layer)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = _remembered(ctx)
        n = ctx.count
        for_x = for_slice = for_bias = None
        rows = _rows(gradient)
        if ctx.needs_input_grad[0]:
            for_x = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            seen = _rows(x)
            parts = (rows[:, :n], seen) if ctx.dim == 0 else (rows, seen[:, :n])
            for_slice = parts[0].t().mm(parts[1]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            for_bias = rows[:, : ctx.bias_count].sum(0).to(ctx.dtypes[1])
        return for_x, for_slice, for_bias, None, None, None


class Sliced(nn.Module):
    """What both plain layers share; ``attach`` gives it ``dim`` and the slice parameters.

    ``weight`` and ``bias`` among the parameters are the frozen whole. What they hold where the
    slice lies is not looked at; a state dict shows the learned values there, too.
    """

    dim: int
    learned_weight: nn.Parameter
    learned_bias: nn.Parameter | None

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight. Gradients reach its slice."""
        whole = self._parameters["weight"]
        assert whole is not None
        return assembled(whole, self.learned_weight, self.dim)

    @property
    def bias(self) -> torch.Tensor | None:
        """The whole bias, as ``weight``."""
        whole = self._parameters["bias"]
        if whole is None or self.learned_bias is None:
            return whole
        return assembled(whole, self.learned_bias, 0)

    def parts(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int]]:
        """(name, whole, learned part, dim) of what is sliced."""
        for leaf, learned, dim in (
            ("weight", self.learned_weight, self.dim), ("bias", self.learned_bias, 0)
        ):  # fmt: skip
            whole = self._parameters[leaf]
            if whole is not None and learned is not None:
                yield leaf, whole, learned, dim

    def operands(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What the functions above take, as autocast wants it."""
        with torch.no_grad():
            weight, bias = self.weight, self.bias
        x_, weight_, bias_ = _under_autocast(x, weight, bias)
        return x_, self.learned_weight, self.learned_bias, weight_, bias_, self

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        for _, whole, learned, dim in self.parts():
            write_slice(whole, learned, dim)
        super()._save_to_state_dict(*args, **options)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        # the state of a plain layer says what the slice is
        for leaf, _, learned, dim in self.parts():
            given = state.get(prefix + leaf)
            if given is not None and prefix + f"learned_{leaf}" not in state:
                part = given.narrow(dim, 0, learned.shape[dim])
                state[prefix + f"learned_{leaf}"] = part.clone()
        super()._load_from_state_dict(state, prefix, *args)


class SlicedConv2d(Sliced, nn.Conv2d):  # type: ignore[override]
    """A plain nn.Conv2d of which a slice is learned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) -> (N, out, H', W'), or without N."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if transformed():
            return super().forward(x)
        operands = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out: torch.Tensor = _ConvSlice.apply(*operands)
        return out


class SlicedLinear(Sliced, nn.Linear):  # type: ignore[misc, override]
    """A plain nn.Linear of which a slice is learned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        if transformed():
            return super().forward(x)
        operands = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out: torch.Tensor = _LinearSlice.apply(*operands)
        return out


PLAIN: dict[type[nn.Module], type[Sliced]] = {nn.Conv2d: SlicedConv2d, nn.Linear: SlicedLinear}


def is_plain(module: nn.Module, dim: int) -> bool:
    """True if the functions above compute this layer."""
    if type(module) is nn.Conv2d:
        fits = module.groups == 1 and module.padding_mode == "zeros"
        return fits and not isinstance(module.padding, str) and dim < 2
    return type(module) is nn.Linear and dim < 2
