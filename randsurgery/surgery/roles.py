"""What each tensor of a module is, and patterns that select modules.

The role decides what a random network holds there and what a technique may touch.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from timm.layers.cond_conv2d import CondConv2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from randsurgery.errors import UsageError, near
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
    return weight.shape[1] * receptive, weight.shape[0] * receptive


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


def _no_match(pattern: str, role: str, modules: Iterable[str]) -> str:
    if role in ("@norm", "@head"):
        return f"pattern {pattern!r} matches no layer: the network has no {_ROLES[role]}"
    tops = list(dict.fromkeys(name.partition(".")[0] for name in modules))
    shown = ", ".join(tops[:8]) + (", ..." if len(tops) > 8 else "")
    hint = near(pattern, [*modules, *_ROLES])
    return f"pattern {pattern!r} matches no layer, expected @norm, @head or a name in {shown}{hint}"


_ROLES = {"@norm": "normalisation layer", "@head": "classifier"}


def select_modules(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Names of the modules that any pattern matches, with all that lies inside them.

    A pattern is a module name with wildcards (``layer1``, ``blocks.*.attn``) or a role: ``@norm``
    (every normalisation layer), ``@head`` (the classifier). A plain ``norm`` or ``head`` is the
    role where no module bears that name. Raises UsageError, with near names, for a pattern that
    matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    found: set[str] = set()
    for pattern in patterns:
        if not pattern.startswith("@") and not _matches(modules, pattern):
            role = {"norm": "@norm", "head": "@head", "fc": "@head"}.get(pattern, pattern)
        else:
            role = pattern
        if role == "@norm":
            hits = {name for name, module in modules.items() if is_norm(module)}
        elif role == "@head":
            hits = set(classifier_names(model))
        else:
            hits = _matches(modules, role)
        if not hits:
            raise UsageError(_no_match(pattern, role, modules))
        found |= {n for n in modules if any(n == h or n.startswith(h + ".") for h in hits)}
    return found
