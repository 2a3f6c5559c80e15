"""Scores on weights: what edge-popup (Ramanujan et al.) and supermasks (Zhou et al.) share.

A score is a parametrization of one weight. It turns scores into a mask its own way; where scores
go, what else is learned, and how masks are read off is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.generator import Role, generate
from randsurgery.format.masks import Mask, popcount
from randsurgery.format.tensors import f32
from randsurgery.surgery.heads import FixedClassifier, check_not_fixed, fixed_heads
from randsurgery.surgery.masking import Scores, share_within_calls
from randsurgery.surgery.method import Method, Scoring
from randsurgery.surgery.roles import (
    STANDARDISED,
    Selection,
    masked_weights,
    select,
    tensor_roles,
)


def attached(model: nn.Module) -> dict[str, Scores]:
    """The scores of a module by tensor name (``layer1.0.conv1.weight``).

    The name is the place in ``model``: a shared layer appears under each of its names, scores
    attached to a part under the whole's.
    """
    return {
        place.replace("parametrizations.", "").rpartition(".")[0]: layer
        for place, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, Scores)
    }


def tensor_name(layer: str, leaf: str) -> str:
    """The name of a layer's parameter; the layer may be the whole module."""
    return f"{layer}.{leaf}" if layer else leaf


Target = tuple[str, nn.Module, str]


def resolve(model: nn.Module, wish: Scoring) -> tuple[list[Target], Selection]:
    """What ``put_scores`` will mask, as (module name, module, parameter), and what is learned
    beside. Touches nothing, so a module on meta will do. Raises as it does."""
    if attached(model):
        raise UsageError("the module has scores already")
    learned = select_learned(model, wish)
    left_out = select(model, wish.skip) | learned
    targets = [
        (name, module, leaf)
        for name, module, leaf in masked_weights(model)
        if not left_out.holds(name, leaf) and getattr(module, leaf).numel()
    ]
    if not targets:
        raise UsageError("no convolution or linear layer is left to mask")
    holders = owners(model)
    for name, module, leaf in targets:
        tied = holders.get(id(module._parameters.get(leaf)), [])
        if len(tied) > 1:
            raise IncompatibleError(
                f"{' and '.join(tied)} are one parameter, which cannot be masked in one place "
                "only; untie them, or --skip the layers"
            )
        if leaf not in module._parameters:
            raise IncompatibleError(
                f"{tensor_name(name, leaf)} has a parametrization already; remove it first, or "
                "--skip the layer"
            )
        if isinstance(module, STANDARDISED):
            raise IncompatibleError(
                f"{name} standardises its weight ({type(module).__name__}), which leaves no zeros "
                "of a mask; choose another architecture, or --skip such layers"
            )
    return targets, learned


def target_sizes(model: nn.Module, wish: Scoring) -> dict[str, int]:
    """The weights of each tensor that ``put_scores`` will mask, by its name."""
    targets, _ = resolve(model, wish)
    return {tensor_name(at, leaf): getattr(module, leaf).numel() for at, module, leaf in targets}


def unmasked(model: nn.Module, wish: Scoring) -> str | None:
    """What popup leaves as it is although it is no bias, norm, position or token: recurrent layers,
    embeddings, parameters of the user's own. One sentence; None if there is none. A module on meta
    will do."""
    left_out = select(model, (*wish.skip, *wish.learn))
    roles, places = tensor_roles(model), dict[str, None]()
    for place, module in model.named_modules():
        if isinstance(module, FixedClassifier):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            other = roles[tensor_name(place, leaf)].role == "other"
            if other and parameter.numel() and not left_out.holds(place, leaf):
                whole = place and not any(True for _ in module.children())
                kind = type(module).__name__
                places[f"{place} ({kind})" if whole else tensor_name(place, leaf)] = None
    if not places:
        return None
    shown = list(places)[:6]
    more = f" and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
    return (
        f"neither masked nor learned, left as they are: {', '.join(shown)}{more}; name them in "
        "learn (--learn) to train them, in skip (--skip) if that is meant"
    )


def check_has_values(model: nn.Module, what: str) -> None:
    """Raises IncompatibleError if some of the module is on meta."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise IncompatibleError(
                f"{what} needs a module with values, but {name} is on meta; build the module on "
                "the CPU, or load a file into it first"
            )


def owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of every parameter, one for each module that holds it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{prefix}.{leaf}" if prefix else leaf)
    return found


def put_scores(
    model: nn.Module, wish: Scoring, make: Callable[[str, torch.Tensor, int], Scores]
) -> nn.Module:
    """Give every convolution and linear weight a score; freeze everything else. In place.

    ``make`` gets (tensor name, weight, fan in). Afterwards ``model.parameters()`` that
    require gradients are the scores, what ``wish.learn`` names, and scale and bias of a fixed
    classifier. Works on any nn.Module. Raises UsageError (a pattern that matches nothing, nothing
    to mask) or IncompatibleError (a tied weight, a weight-standardised convolution, a weight under
    another parametrization).
    """
    targets, learned = resolve(model, wish)
    check_has_values(model, "a mask")
    roles = tensor_roles(model)
    _learn_alone(model, learned)
    for name, module, leaf in targets:
        full = tensor_name(name, leaf)
        layer = make(full, getattr(module, leaf), roles[full].fan_in).eval()
        parametrize.register_parametrization(module, leaf, layer)  # computes it once
        share_within_calls(module)
        layer.train(module.training)
    return model


def learn_beside(model: nn.Module, wish: Method) -> nn.Module:
    """Learn what ``wish.learn`` names, and scale and bias of a fixed classifier; freeze everything
    else. In place: for networks whose masks are there already."""
    _learn_alone(model, select_learned(model, wish))
    return model


def select_learned(model: nn.Module, wish: Method) -> Selection:
    """What ``wish.learn`` names. Raises UsageError for a pattern without a match, IncompatibleError
    for one that names what a fixed classifier fixes."""
    found = select(model, wish.learn)
    check_not_fixed(model, sorted(found.parameters))
    return found


def _learn_alone(model: nn.Module, learned: Selection) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in learned.modules:
        module = model.get_submodule(name)
        if not isinstance(module, FixedClassifier):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    for name in learned.parameters:
        model.get_parameter(name).requires_grad_(True)
    for head in fixed_heads(model).values():
        for _, parameter in head.learned_parameters():
            parameter.requires_grad_(True)


def initial_scores(
    name: str, weight: torch.Tensor, fan_in: int, seed: int, role: Role = "score"
) -> torch.Tensor:
    """Uniform in ±1/sqrt(fan_in), as Kaiming uniform with a = sqrt(5) draws them; the weight's
    shape and device."""
    bound = f32(max(fan_in, 1) ** -0.5)
    values = generate("uniform", weight.numel(), bound, seed=seed, stream=name, role=role)
    return torch.from_numpy(values.reshape(tuple(weight.shape))).to(weight.device)


def harvest(model: nn.Module) -> dict[str, Mask]:
    """The mask of every scored tensor by name. Leaves the module as it is."""
    for name, layer in attached(model).items():
        if not bool(torch.isfinite(layer.scores).all()):
            raise IncompatibleError(f"{name}: its scores are not finite")
    return {name: layer.mask() for name, layer in attached(model).items()}


def flipped_share(before: dict[str, Mask], after: dict[str, Mask]) -> float:
    """The share of mask bits that differ between two harvests of one module."""
    flips = sum(popcount(before[name].packed ^ after[name].packed) for name in after)
    return flips / max(1, sum(mask.size for mask in after.values()))
