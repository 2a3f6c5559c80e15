"""Dense weights for images of another size or other channels: stems and position embeddings as timm
adapts them when it loads its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping

import timm
import torch
from torch import nn

from randsurgery.errors import IncompatibleError, reason
from randsurgery.format.specs import ModelSpec
from randsurgery.format.tensors import RawTensor
from randsurgery.surgery.architectures import arguments_of, build_meta, classifier_names
from randsurgery.surgery.bases import Base
from randsurgery.surgery.checkpoints import Own
from randsurgery.surgery.randomness import borrowed
from randsurgery.surgery.tensors import from_torch, to_torch


def adapt(
    spec: ModelSpec, base: Base, own: Mapping[str, Own], names: Collection[str]
) -> dict[str, RawTensor]:
    """The tensors ``names`` of a base, whose shapes are not the architecture's, in its shapes.

    ``own``: where the base has the architecture's tensors. Stems of other channels are summed or
    repeated, position embeddings and relative position biases are resampled, in single precision;
    values are rounded to the base's dtype, all by timm's ``load_pretrained``. Raises
    IncompatibleError for what timm cannot adapt.
    """
    file = str(base.file or base.origin)
    for name in names:
        if own[name].mask is not None:
            raise IncompatibleError(
                f"{file}: {name!r} is pruned, and a mask cannot be adapted to another shape; "
                "leave --in-chans and --img-size out"
            )
    shell = build_meta(spec)
    wanted = {name: list(tensor.shape) for name, tensor in shell.state_dict().items()}
    heads = tuple(f"{name}." for name in classifier_names(shell))
    state = {
        name: to_torch(base.tensors.read(place.tensor))
        for name, place in own.items()
        if not name.startswith(heads)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    channels = stem_channels(spec, shell, shapes.get) or 3
    # What timm cannot adapt it leaves at random values, with a line in its log: what truly comes
    # from the base is not a number where the base is none.
    none = {name: torch.full_like(state[name], math.nan) for name in names}
    again, why = _loaded(spec, {**state, **none}, channels)
    for name in names:
        if again is None or not bool(torch.isnan(again[name]).all()):
            raise IncompatibleError(
                f"{file}: {name!r} is {list(state[name].shape)}, {spec.name} needs {wanted[name]}, "
                f"and timm does not adapt it{why}; if "
                "the network was built otherwise, pass --width, --img-size, --in-chans or "
                "--model-kwargs as it was"
            )
    found, _ = _loaded(spec, state, channels)
    assert found is not None
    return {name: from_torch(found[name].to(state[name].dtype), name) for name in names}


def stem_channels(
    spec: ModelSpec, shell: nn.Module, shape_of: Callable[[str], tuple[int, ...] | None]
) -> int | None:
    """How many channels the images of dense weights have, as the shape of their stem tells; None
    if it does not. ``shape_of``: of a tensor by the architecture's name, None if it is missing."""
    cfg = timm.get_pretrained_cfg(spec.name, allow_unregistered=True)
    first = cfg.first_conv if cfg else None
    stem = first[0] if isinstance(first, (tuple, list)) and first else first
    shape = shape_of(f"{stem}.weight")
    module = None if shape is None else shell.get_submodule(str(stem))
    if shape is None or len(shape) != 4 or not isinstance(module, nn.Conv2d):
        return None
    channels = arguments_of(spec).get("in_chans", 3)
    assert isinstance(channels, int)
    # stems that turn space into channels have several for one of the image's
    return shape[1] * channels * module.groups // module.in_channels or None


def _loaded(
    spec: ModelSpec, state: dict[str, torch.Tensor], channels: int
) -> tuple[dict[str, torch.Tensor] | None, str]:
    """The network that timm makes of that state dict; else None, and what it says."""
    cfg = timm.get_pretrained_cfg(spec.name, allow_unregistered=True)
    size = tuple(cfg.input_size[1:]) if cfg else (224, 224)
    overlay = {
        "state_dict": dict(state),
        "input_size": (channels, *size),
        "num_classes": -1,  # no classifier is asked for
        "source": "",
    }
    args = {"in_chans": 3, **arguments_of(spec)}  # else it would be the overlay's
    try:
        with borrowed(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about timm's own code
            model = timm.create_model(
                spec.name, pretrained=True, pretrained_cfg_overlay=overlay, **args
            )
    except Exception as error:  # whatever the architecture's own code raises
        said = reason(error)
        return None, "" if said.startswith("Error(s) in loading") else f" ({said})"
    return dict(model.state_dict()), ""
