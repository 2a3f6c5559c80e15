"""What each tensor of a module is, and patterns that select modules.

The role decides what a random network holds there and what a technique may touch.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format.fields import check_tensor_name
from randsurgery.surgery.architectures import classifier_names

Role = Literal[
    "weight", "bias", "norm scale", "norm shift", "layer scale", "running mean", "running var",
    "batch count", "embedding", "other",
]  # fmt: skip

STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
"""Convolutions that standardise their weight in every forward pass."""

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_CLASS = re.compile(r"Norm(Act|Fp32|1|2d|Tlu)*\w*$")
_NORM_LIKE_BUT_NOT = ("GlobalResponseNorm",)  # zero scale is its identity
_LAYER_SCALE = re.compile(
    r"(^|\.)(gamma(_?\w+)?|ls\d|skipinit_gain|(layer|res)_scale\d?\.(scale|gamma))$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(pos_embed\w*|(cls|dist|reg|mask)_token\w*|pos_emb|(patch|pixel)_pos"
    r"|position_embedding_table)$"
)
"""Positions and tokens, added to or put beside the patch embeddings."""


@dataclass(frozen=True)
class TensorRole:
    """One tensor of the state dict. ``fan_in`` and ``fan_out`` are 0 unless it is a weight."""

    role: Role
    module: str
    fan_in: int = 0
    fan_out: int = 0


def is_norm(module: nn.Module) -> bool:
    """True for normalisation layers, torch's and those timm calls so; not for blocks that bear the
    word in their name because they hold one beside convolutions or linear maps."""
    if isinstance(module, _NORMS):
        return True
    name = type(module).__name__
    if not _NORM_CLASS.search(name) or name in _NORM_LIKE_BUT_NOT:
        return False
    return not any(weight_names(inner) for inner in module.modules())


def has_norms(model: nn.Module) -> bool:
    """True if a network normalises anywhere."""
    return any(is_norm(module) for module in model.modules())


def _fans(module: nn.Module, weight: torch.Tensor) -> tuple[int, int]:
    if isinstance(module, CondConv2d):  # (experts, out * in/groups * kh * kw)
        kernel = math.prod(module.kernel_size)
        return (
            module.in_channels // module.groups * kernel,
            module.out_channels // module.groups * kernel,
        )
    receptive = math.prod(weight.shape[2:])
    # a tensor without elements has a fan all the same, or nothing could be divided by it
    return max(1, weight.shape[1] * receptive), max(1, weight.shape[0] * receptive)


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The module's own parameters that are weights of convolutions or linear maps."""
    if isinstance(module, (_ConvNd, nn.Linear, CondConv2d)):
        return ("weight",)
    if isinstance(module, nn.Bilinear):
        return ()
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if getattr(module, n, None) is not None)
    return ()


def _role(module: nn.Module, leaf: str, full: str, tensor: torch.Tensor) -> Role:
    if leaf in weight_names(module):
        return "weight"
    if isinstance(module, _NormBase) and leaf in ("running_mean", "running_var"):
        return "running mean" if leaf == "running_mean" else "running var"
    if leaf == "num_batches_tracked":
        return "batch count"
    if is_norm(module) and leaf in ("weight", "bias") and tensor.dim() <= 1:
        return "norm scale" if leaf == "weight" else "norm shift"
    if _LAYER_SCALE.search(full):
        return "layer scale"
    if _EMBEDDING.search(full) and isinstance(tensor, nn.Parameter):
        return "embedding"
    if leaf.endswith("bias") and tensor.dim() == 1 and weight_names(module):
        return "bias"
    return "other"


def tensor_roles(model: nn.Module) -> dict[str, TensorRole]:
    """The role of every tensor in the state dict, by its name there."""
    roles: dict[str, TensorRole] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        buffers = [
            (name, buffer)
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if name not in module._non_persistent_buffers_set
        ]
        for leaf, tensor in (*own, *buffers):
            full = f"{prefix}.{leaf}" if prefix else leaf
            role = _role(module, leaf, full, tensor)
            fans = _fans(module, tensor) if role == "weight" else (0, 0)
            roles[full] = TensorRole(role, prefix, *fans)
    return roles


def masked_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(module name, module, parameter name) of every convolution and linear weight."""
    for name, module in model.named_modules():
        for leaf in weight_names(module):
            yield name, module, leaf


def _matches(modules: Iterable[str], pattern: str) -> set[str]:
    """Names that a pattern matches, the same on every system (capitals count)."""
    return {name for name in modules if fnmatch.fnmatchcase(name, pattern)}


def _no_match(pattern: str, role: str, modules: Iterable[str], bare: Iterable[str]) -> str:
    if role in ("@norm", "@head"):
        return f"pattern {pattern!r} matches no layer: the network has no {_ROLES[role]}"
    tops = list(dict.fromkeys(name.partition(".")[0] for name in modules))
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    hint = near(pattern, [*modules, *bare, *_ROLES])
    return f"pattern {pattern!r} matches no layer, expected @norm, @head or a name in {shown}{hint}"


_ROLES = {"@norm": "normalisation layer", "@head": "classifier"}


@dataclass(frozen=True)
class Selection:
    """What patterns select: modules, and parameters that were named themselves."""

    modules: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()

    def __or__(self, other: Selection) -> Selection:
        return Selection(self.modules | other.modules, self.parameters | other.parameters)

    def holds(self, module: str, leaf: str) -> bool:
        """True if the parameter is selected, by its own name or with its module."""
        return module in self.modules or (f"{module}.{leaf}" if module else leaf) in self.parameters


def select(model: nn.Module, patterns: Iterable[str]) -> Selection:
    """The modules that any pattern matches, with all that lies inside them, and the parameters
    that patterns name which match no module (``pos_embed``, ``blocks.*.gamma_1``).

    A pattern is a module name with wildcards (``layer1``, ``blocks.*.attn``) or a role: ``@norm``
    (every normalisation layer), ``@head`` (the classifier). A plain ``norm`` or ``head`` is the
    role where no module bears that name. Raises UsageError, with near names, for a pattern that
    matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    bare = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = Selection()
    for pattern in patterns:
        named, role = _matches(modules, pattern), pattern
        if not pattern.startswith("@") and not named:
            if own := _matches(bare, pattern):
                found |= Selection(parameters=frozenset(own))
                continue
            role = {"norm": "@norm", "head": "@head", "fc": "@head"}.get(pattern, pattern)
        if role == "@norm":
            hits = {name for name, module in modules.items() if is_norm(module)}
        elif role == "@head":
            hits = set(classifier_names(model))
        else:
            hits = named
        if not hits:
            places = [name for name in bare if "." not in name]
            raise UsageError(_no_match(pattern, role, modules, places))
        inside = (n for n in modules if any(n == h or n.startswith(h + ".") for h in hits))
        found |= Selection(frozenset(inside))
    return found


def select_modules(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """As ``select``, where only modules will do."""
    found: set[str] = set()
    for pattern in patterns:
        chosen = select(model, (pattern,))
        if chosen.parameters:
            raise UsageError(
                f"pattern {pattern!r} matches no layer, but the parameter "
                f"{min(chosen.parameters)!r}; name a layer"
            )
        found |= chosen.modules
    return found


def check_storable(state: Mapping[str, object], roles: Mapping[str, TensorRole]) -> None:
    """Raises IncompatibleError if a state dict holds what a file cannot: values that are no
    tensors, tensors that are neither parameters nor buffers, names that the format has not."""
    for name, value in state.items():
        if name.endswith("_extra_state"):
            raise IncompatibleError(
                f"{name} is what the module keeps beside its tensors (get_extra_state), which a "
                "file cannot hold; take a module without it"
            )
        if not isinstance(value, torch.Tensor):
            raise IncompatibleError(
                f"{name} in the state dict is a {type(value).__name__}, expected a tensor; take a "
                "module without it"
            )
        if name not in roles:
            raise IncompatibleError(
                f"{name} in the state dict is neither a parameter nor a buffer of the module (a "
                "state dict hook made it); remove the hook"
            )
        try:
            check_tensor_name(name)
        except ValueError as error:
            raise IncompatibleError(f"{error}; rename the module") from None
