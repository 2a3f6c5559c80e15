"""Partial training (Rosenfeld & Tsotsos, Section 3): learn a plan's part of a network.

``attach`` makes what the plan names the module's only learned parameters. The learned slice of a
weight is a parameter of its own that shares memory with the weight, so that an optimiser's step
changes both and nothing is ever concatenated. Optimiser state, weight decay and momentum know
only the slice. For plain convolutions and linear layers, the weight's gradient is computed for the
slice alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Learned, Plan
from randsurgery.surgery.scores import owners

# --- plain layers: the gradient of the slice alone ------------------------------------------------


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


class _ConvSlice(torch.autograd.Function):
    """conv2d(x, weight, bias); backward gives the gradients of x, of the first ``count`` indices of
    the weight along ``dim``, and of the first elements of the bias."""

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
        ctx.save_for_backward(x, weight)
        ctx.dim, ctx.count = layer.dim, slice_.shape[layer.dim]
        ctx.dtypes = slice_.dtype, None if bias_slice is None else bias_slice.dtype
        ctx.bias_count = 0 if bias_slice is None else len(bias_slice)
        ctx.where = (layer.stride, layer.padding, layer.dilation)
        return torch.conv2d(x, weight, bias, *ctx.where)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
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
        ctx.save_for_backward(x, weight)
        ctx.dim, ctx.count = layer.dim, slice_.shape[layer.dim]
        ctx.dtypes = slice_.dtype, None if bias_slice is None else bias_slice.dtype
        ctx.bias_count = 0 if bias_slice is None else len(bias_slice)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        n = ctx.count
        for_x = for_slice = for_bias = None
        rows = gradient.reshape(-1, gradient.shape[-1])
        if ctx.needs_input_grad[0]:
            for_x = gradient.matmul(weight)
        if ctx.needs_input_grad[1]:
            seen = x.reshape(-1, x.shape[-1])
            parts = (rows[:, :n], seen) if ctx.dim == 0 else (rows, seen[:, :n])
            for_slice = parts[0].t().mm(parts[1]).to(ctx.dtypes[0])
        if ctx.needs_input_grad[2]:
            for_bias = rows[:, : ctx.bias_count].sum(0).to(ctx.dtypes[1])
        return for_x, for_slice, for_bias, None, None, None


def _tie(whole: torch.Tensor, learned: nn.Parameter, dim: int) -> None:
    """Make ``learned`` the first indices of ``whole`` along ``dim`` again, in value and memory,
    after something has moved one of them (``module.to``)."""
    part = whole.detach().narrow(dim, 0, learned.shape[dim])
    if (part.data_ptr(), part.stride()) != (learned.data_ptr(), learned.stride()):
        with torch.inference_mode(False):  # or an evaluation would leave nothing to learn
            part = whole.detach().narrow(dim, 0, learned.shape[dim])
            part.copy_(learned.detach())
            learned.data = part


class _Sliced(nn.Module):
    """What both plain layers share; ``attach`` gives it ``dim`` and the slice parameters."""

    dim: int
    learned_weight: nn.Parameter
    learned_bias: nn.Parameter | None

    @property
    def weight(self) -> torch.Tensor:
        """The whole weight. Gradients reach its slice, for networks that do not call the layer but
        compute with its weight themselves."""
        self.tie()
        whole = self._parameters["weight"]
        found: torch.Tensor = _Narrowed.apply(self.learned_weight, whole, self.dim)
        return found

    @property
    def bias(self) -> torch.Tensor | None:
        """The whole bias, as ``weight``."""
        whole = self._parameters["bias"]
        if whole is None or self.learned_bias is None:
            return whole
        self.tie()
        found: torch.Tensor = _Narrowed.apply(self.learned_bias, whole, 0)
        return found

    def tie(self) -> None:
        """Let the slices be parts of weight and bias again, if something moved one of them."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        _tie(weight, self.learned_weight, self.dim)
        if bias is not None and self.learned_bias is not None:
            _tie(bias, self.learned_bias, 0)

    def operands(self, x: torch.Tensor) -> tuple[Any, ...]:
        """What the functions above take, as autocast wants it."""
        self.tie()
        whole, whole_bias = self._parameters["weight"], self._parameters["bias"]
        x_, weight, bias = _under_autocast(x, whole, whole_bias)
        return x_, self.learned_weight, self.learned_bias, weight, bias, self


class SlicedConv2d(_Sliced, nn.Conv2d):  # type: ignore[override]
    """A plain nn.Conv2d of which a slice is learned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in, H, W) -> (N, out, H', W'), or without N."""
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        operands = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out: torch.Tensor = _ConvSlice.apply(*operands)
        return out


class SlicedLinear(_Sliced, nn.Linear):  # type: ignore[misc, override]
    """A plain nn.Linear of which a slice is learned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        operands = self.operands(x)
        with torch.autocast(x.device.type, enabled=False):
            out: torch.Tensor = _LinearSlice.apply(*operands)
        return out


PLAIN: dict[type[nn.Module], type[_Sliced]] = {nn.Conv2d: SlicedConv2d, nn.Linear: SlicedLinear}


def _is_plain(module: nn.Module, dim: int) -> bool:
    """True if the functions above compute this layer."""
    if type(module) is nn.Conv2d:
        fits = module.groups == 1 and module.padding_mode == "zeros"
        return fits and not isinstance(module.padding, str) and dim < 2
    return type(module) is nn.Linear and dim < 2


# --- every other tensor: the whole gradient, then the part that is learned ------------------------


class _Narrowed(torch.autograd.Function):
    """The whole tensor; backward hands the gradient's slice to the learned part."""

    @staticmethod
    def forward(ctx: Any, learned: torch.Tensor, whole: torch.Tensor, dim: int) -> torch.Tensor:
        ctx.dim, ctx.count = dim, learned.shape[dim]
        return whole.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.narrow(ctx.dim, 0, ctx.count), None, None


class SliceOf(nn.Module):
    """The parametrization of a tensor of which a slice is learned."""

    def __init__(self, tensor_name: str, whole: torch.Tensor, part: Learned) -> None:
        super().__init__()
        assert part.dim is not None
        assert part.count is not None
        self.tensor_name, self.part, self.dim = tensor_name, part, part.dim
        self.learned = nn.Parameter(whole.detach().narrow(part.dim, 0, part.count))

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor itself, its slice as learned; same shape."""
        _tie(whole, self.learned, self.dim)
        out: torch.Tensor = _Narrowed.apply(self.learned, whole, self.dim)
        return out


class Survivors(nn.Module):
    """The parametrization of a masked weight whose surviving values are learned; the rest is 0."""

    positions: torch.Tensor

    def __init__(self, tensor_name: str, whole: torch.Tensor, mask: Mask) -> None:
        super().__init__()
        self.tensor_name, self.part = tensor_name, Learned(part="survivors")
        positions = torch.from_numpy(mask.unpack().nonzero()[0]).to(whole.device)
        self.size = whole.numel()
        self.register_buffer("positions", positions, persistent=False)
        self.learned = nn.Parameter(whole.detach().reshape(-1)[positions])

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        """Zeros with the learned values at their positions; same shape."""
        empty = torch.zeros(whole.numel(), dtype=whole.dtype, device=whole.device)
        return empty.index_copy(0, self.positions, self.learned).view(whole.shape)


# --- what is attached -----------------------------------------------------------------------------


def attached(model: nn.Module) -> dict[str, Learned]:
    """The part that is learned of every sliced or survivors' tensor, by its name in ``model``."""
    found: dict[str, Learned] = {}
    for place, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (SliceOf, Survivors)):
            found[place.replace("parametrizations.", "").rpartition(".")[0]] = module.part
        if isinstance(module, _Sliced):
            prefix = f"{place}." if place else ""
            for leaf, learned, dim in (
                ("weight", module.learned_weight, module.dim), ("bias", module.learned_bias, 0)
            ):  # fmt: skip
                if learned is not None:
                    count = learned.shape[dim]
                    found[prefix + leaf] = Learned(part="slice", dim=dim, count=count)
    return found


def settle(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Turn a state dict of ``model`` into one of plain names: whole tensors, learned parts in."""
    for name in attached(model):
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        prefix = f"{prefix}." if prefix else ""
        if isinstance(module, _Sliced):
            module.tie()
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
    tensors. ``masks``: of the tensors whose survivors are learned. ``starts``: what slices hold
    before training, as whole tensors, where that is not the module's own value. Raises UsageError
    or IncompatibleError; the module is then unchanged.
    """
    if attached(model):
        raise UsageError("the module has a plan attached already")
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
            assert part.dim is not None
            here = (*[slice(None)] * part.dim, slice(part.count))
            whole.data[here] = starts[name][here].to(whole.device)
        _learn(name, module, leaf, part, (masks or {}).get(name))
    if plan.statistics == "frozen":
        _freeze_statistics(model)
    return model


def _learn(name: str, module: nn.Module, leaf: str, part: Learned, mask: Mask | None) -> None:
    whole = module._parameters[leaf]
    assert whole is not None
    if leaf == "bias" and isinstance(module, _Sliced):
        count = part.count if part.count is not None else len(whole)
        module.learned_bias = nn.Parameter(whole.detach().narrow(0, 0, count))
    elif part.part == "whole":
        whole.requires_grad_(True)
    elif part.part == "survivors":
        assert mask is not None
        parametrize.register_parametrization(module, leaf, Survivors(name, whole, mask))
    elif leaf == "weight" and part.dim is not None and _is_plain(module, part.dim):
        assert part.count is not None
        module.__class__ = PLAIN[type(module)]
        assert isinstance(module, _Sliced)
        module.dim = part.dim
        module.learned_weight = nn.Parameter(whole.detach().narrow(part.dim, 0, part.count))
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
