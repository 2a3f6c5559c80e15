"""Registry names and arguments -> modules. Nothing here trusts a file.

A model is a name in timm's registry and arguments from ``ARGUMENTS``, each within bounds. It is
built on meta first, where a network of terabytes costs nothing, and its size is known before a
byte is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn
from torch.overrides import TorchFunctionMode

from randsurgery.errors import IncompatibleError, RandsurgeryError, UsageError, near, reason
from randsurgery.format.fields import as_given
from randsurgery.format.rebuild import check_affordable
from randsurgery.format.specs import ModelSpec
from randsurgery.surgery import zoo
from randsurgery.surgery.randomness import borrowed

MAX_HIDDEN_BYTES = 1 << 30
"""Bytes allowed for buffers that no checkpoint holds (position indices, attention masks)."""

ArgValue = bool | int | float | str | None


@dataclass(frozen=True)
class Bound:
    """An allowed model argument: its type and, for numbers, the range of its values."""

    kind: type
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()


ARGUMENTS: dict[str, Bound] = {
    "num_classes": Bound(int, 0, 1_000_000),
    "in_chans": Bound(int, 1, 1024),
    "img_size": Bound(int, 1, 8192),
    "patch_size": Bound(int, 1, 512),
    "embed_dim": Bound(int, 1, 16384),
    "depth": Bound(int, 1, 1000),
    "num_heads": Bound(int, 1, 1024),
    "mlp_ratio": Bound(float, 0.01, 64),
    "width": Bound(float, 0.001, 64),
    "widen_factor": Bound(int, 1, 64),
    "growth_rate": Bound(int, 1, 1024),
    "drop_rate": Bound(float, 0, 1),
    "drop_path_rate": Bound(float, 0, 1),
    "dynamic_img_size": Bound(bool),
    "global_pool": Bound(str, choices=("", "avg", "max", "avgmax", "catavgmax", "token", "map")),
}


def check_name(name: str, error: type[RandsurgeryError] = UsageError) -> str:
    """A plain registry name: no tag, path or hub address. Raises ``error`` with near names."""
    # is_model cuts a tag off; here the whole name must be the registry's
    if "." in name or not timm.is_model(name):
        raise error(
            f"unknown architecture {name[:100]!r}, expected a name of timm.list_models()"
            + near(name[:100], timm.list_models())
        )
    return name


def check_argument(
    key: str, value: ArgValue, error: type[RandsurgeryError] = UsageError
) -> ArgValue:
    """The value in its type. Raises ``error`` if key or value is not allowed."""
    bound = ARGUMENTS.get(key)
    if bound is None:
        raise error(
            f"model argument {key[:100]!r} is not allowed, expected one of {', '.join(ARGUMENTS)}"
        )
    if bound.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not bound.kind:
        raise error(f"model argument {key} must be {bound.kind.__name__}, found {value!r:.60}")
    if isinstance(value, (int, float)) and not (
        isinstance(value, bool) or bound.low <= value <= bound.high
    ):
        raise error(
            f"model argument {key} must lie in [{bound.low:g}, {bound.high:g}], found {value!r:.60}"
        )
    if bound.choices and value not in bound.choices:
        raise error(f"model argument {key} must be one of {bound.choices}, found {value!r:.60}")
    return value


def spec_of(name: str, args: dict[str, ArgValue]) -> ModelSpec:
    """The recipe's model field. Raises UsageError for a name or argument that is not allowed."""
    check_name(name)
    checked = {key: check_argument(key, value) for key, value in sorted(args.items())}
    return ModelSpec(
        name=name,
        args={k: v.hex() if isinstance(v, float) else v for k, v in checked.items()},
    )


def arguments_of(spec: ModelSpec) -> dict[str, ArgValue]:
    """The arguments of a model field read from a file. Raises IncompatibleError."""
    found: dict[str, ArgValue] = {}
    for key, value in spec.args.items():
        if key in ARGUMENTS and ARGUMENTS[key].kind is float:
            value = as_given(value)
        found[key] = check_argument(key, value, IncompatibleError)
    return found


def _create(spec: ModelSpec) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(spec.name, pretrained=False, **arguments_of(spec))
    except RandsurgeryError:
        raise
    except Exception as error:  # whatever the architecture's own code raises
        args = ", ".join(f"{k}={v}" for k, v in arguments_of(spec).items())
        raise IncompatibleError(
            f"{spec.name} cannot be built with {args}: {reason(error, 300)}"
        ) from None
    return model


class _NoDrawing(TorchFunctionMode):
    """Skips initialisation: values on meta mean nothing, and setting them takes the most time."""

    skipped = frozenset(
        (
            torch.Tensor.normal_,
            torch.Tensor.uniform_,
            torch.Tensor.zero_,
            torch.Tensor.fill_,
            nn.init.kaiming_uniform_,
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.skipped and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def build_meta(spec: ModelSpec) -> nn.Module:
    """The module on meta: shapes and names without memory. Raises IncompatibleError."""
    check_name(spec.name, IncompatibleError)
    with torch.device("meta"), _NoDrawing():
        model = _create(spec)
    if (hidden := hidden_bytes(model)) > MAX_HIDDEN_BYTES:
        raise IncompatibleError(
            f"{spec.name} with {dict(spec.args)} needs {hidden / 1e9:,.1f} GB of buffers that no "
            f"checkpoint holds; at most {MAX_HIDDEN_BYTES / 1e9:,.1f} GB are allowed"
        )
    return model


def build_initialised(spec: ModelSpec, torch_seed: int) -> nn.Module:
    """The module with timm's own initial values, drawn in a fork of torch's generator."""
    parts = build_meta(spec).state_dict().values()
    check_affordable(sum(part.numel() * part.element_size() for part in parts), spec.name)
    with borrowed(torch_seed):
        return _create(spec)


def hidden_names(model: nn.Module) -> list[str]:
    """Names of the buffers that the state dict leaves out."""
    kept = set(model.state_dict())
    return [name for name, _ in model.named_buffers() if name not in kept]


def hidden_bytes(model: nn.Module) -> int:
    """Bytes of the buffers that the state dict leaves out."""
    buffers = dict(model.named_buffers())
    return sum(buffers[n].numel() * buffers[n].element_size() for n in hidden_names(model))


def fill_hidden(model: nn.Module) -> bool:
    """Give a module that was built on meta its hidden buffers. False if timm cannot do it.

    Its parameters must be in place: some modules make their buffers where those are.
    """
    for name in hidden_names(model):
        owner_name, _, leaf = name.rpartition(".")
        owner: Any = model.get_submodule(owner_name)
        if not hasattr(owner, "init_non_persistent_buffers"):
            return False
        old = owner.get_buffer(leaf)
        owner.register_buffer(leaf, torch.zeros_like(old, device="cpu"), persistent=False)
    reinit_non_persistent_buffers(model)
    return not any(buffer.is_meta for buffer in model.buffers())


def classifier_names(model: Any) -> tuple[str, ...]:
    """The dotted names of the classifier's modules, whatever the architecture calls them.

    timm models are asked; some have several (distillation, branches) or a list of them. For other
    modules it is the last linear layer.
    """
    names = {id(module): name for name, module in model.named_modules() if name}
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        parts = found if isinstance(found, (tuple, list)) else (found,)
        wanted = [names[id(part)] for part in parts if id(part) in names]
        return tuple(n for n in wanted if any(True for _ in model.get_submodule(n).parameters()))
    linear = [n for n, m in model.named_modules() if n and isinstance(m, nn.Linear)]
    return tuple(linear[-1:])


def classifier_name(model: Any) -> str | None:
    """The first of ``classifier_names``; None if there is no classifier."""
    return next(iter(classifier_names(model)), None)


def class_count(model: Any, classifier: str) -> int:
    """How many classes the classifier tells apart: what timm's model says, else the outputs of
    its last linear or convolution layer."""
    if isinstance(getattr(model, "num_classes", None), int):
        return int(model.num_classes)
    outputs = [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for m in model.get_submodule(classifier).modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    return outputs[-1] if outputs else 0


assert zoo.default_cfgs  # importing the zoo has entered its models in the registry
