"""Does every architecture of timm have a recipe? Nothing is allocated: all is done on meta.

For each name of ``timm.list_models()`` the module is built on meta, every tensor of its state
dict gets the entry that a random network would have, and the whole becomes a validated recipe.
What only the architecture's own initialiser can fill counts as ``stored``, even where that
initialiser would give a constant. Checked besides:

    names     pass for tensor names; each has an entry of the tensor's own shape and dtype
    weights   of every convolution and linear layer are random, with a fan in above 0
    norms     of torch's own kinds have constant entries, scales 1, shifts 0, statistics 0 and 1

These checks look at layer classes themselves, not at the roles the package assigns. Failures are
listed with the first reason; the exit code is 1 if there are any.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from benchmarks.timing import note, parser_for, report
from randsurgery.format.fields import check_tensor_name
from randsurgery.format.recipe import ConstantSource, Entry, Member, Recipe, Source, StoredSource
from randsurgery.format.tensors import hex_float
from randsurgery.surgery.architectures import build_meta, hidden_names, spec_of
from randsurgery.surgery.recipes import head_of, planned_source
from randsurgery.surgery.roles import STANDARDISED, tensor_roles
from randsurgery.surgery.tensors import dtype_name

NORM_VALUES = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Census:
    """What was counted over all architectures."""

    models: int = 0
    tensors: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)
    stored: Counter[str] = field(default_factory=Counter)  # tensors by layer class and own name
    models_with_stored: list[str] = field(default_factory=list)
    standardised: list[str] = field(default_factory=list)
    no_head: list[str] = field(default_factory=list)  # though the model has classes
    constructor_buffers: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def entry_of(name: str, tensor: torch.Tensor, source: Source | None) -> Entry:
    """The entry; one without a planned source is stored, under a digest of nothing."""
    dtype = dtype_name(tensor.dtype, name)
    source = source or StoredSource(digest="0" * 32)
    return Entry(dtype=dtype, shape=tuple(tensor.shape), source=source)  # type: ignore[arg-type]


def faults_of(model: nn.Module, entries: dict[str, Entry]) -> Iterator[str]:
    """Everything wrong with the entries, judged by the classes of the layers.

    Raises ValueError for a name that no tensor of a file may bear.
    """
    for name, tensor in model.state_dict().items():
        entry = entries.get(name)
        if entry is None:
            yield f"{name}: no entry"
        elif (entry.shape, entry.dtype) != (tuple(tensor.shape), dtype_name(tensor.dtype, name)):
            yield f"{name}: {entry.dtype} {entry.shape}, not {tensor.dtype} {tuple(tensor.shape)}"
        check_tensor_name(name)
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, (_ConvNd, nn.Linear)):
            if entries[f"{dot}weight"].source.kind != "random":
                yield f"{dot}weight: {entries[f'{dot}weight'].source.kind}, not random"
        elif isinstance(module, NORMS):
            yield from _norm_faults(dot, entries)


def _norm_faults(dot: str, entries: dict[str, Entry]) -> Iterator[str]:
    for leaf, value in NORM_VALUES.items():
        entry = entries.get(dot + leaf)
        if entry is not None and entry.source != ConstantSource(value=hex_float(value)):
            yield f"{dot}{leaf}: {entry.source!r}, not the constant {value}"


def examine(name: str, census: Census) -> None:
    """Build, describe and check one architecture; count what it holds."""
    spec = spec_of(name, {})
    model = build_meta(spec)
    state, roles = model.state_dict(), tensor_roles(model)
    if set(roles) != set(state):
        raise ValueError(f"roles and state dict differ in {sorted(set(roles) ^ set(state))[:3]}")
    entries: dict[str, Entry] = {}
    for tensor_name, tensor in state.items():
        role = roles[tensor_name]
        if role.role == "weight" and not (role.fan_in > 0 and role.fan_out > 0):
            raise ValueError(f"{tensor_name}: fan in {role.fan_in}, fan out {role.fan_out}")
        source = planned_source(role, "signed-constant", 0, None)
        entries[tensor_name] = entry_of(tensor_name, tensor, source)
    head = head_of(model)
    recipe = Recipe(model=spec, tensors=entries, members=(Member(head=head),))
    if fault := next(faults_of(model, recipe.tensors), None):
        raise ValueError(fault)
    _count(name, model, recipe, census)


def _count(name: str, model: nn.Module, recipe: Recipe, census: Census) -> None:
    roles = tensor_roles(model)
    for tensor_name, entry in recipe.tensors.items():
        census.tensors[roles[tensor_name].role] += 1
        census.elements[roles[tensor_name].role] += entry.size
    left = [n for n, entry in recipe.tensors.items() if entry.source.kind == "stored"]
    for owner, _, leaf in (n.rpartition(".") for n in left):
        census.stored[f"{type(model.get_submodule(owner)).__name__}.{leaf}"] += 1
    if left:
        census.models_with_stored.append(name)
    if any(isinstance(module, STANDARDISED) for module in model.modules()):
        census.standardised.append(name)
    if recipe.members[0].head is None and getattr(model, "num_classes", None):
        census.no_head.append(name)
    owners = (model.get_submodule(hidden.rpartition(".")[0]) for hidden in hidden_names(model))
    if not all(hasattr(owner, "init_non_persistent_buffers") for owner in owners):
        census.constructor_buffers.append(name)


def take(names: list[str]) -> Census:
    """Examine every name; a failure does not stop the others."""
    census = Census()
    for index, name in enumerate(names):
        if index % 100 == 0:
            note(f"{index} of {len(names)}")
        census.models += 1
        try:
            examine(name, census)
        except Exception as error:  # whatever an architecture's own code raises is a finding
            lines = str(error).strip().splitlines() or [""]
            census.failures[name] = f"{type(error).__name__}: {lines[0][:300]}"
    return census


def main() -> None:
    """Take the census and print the report."""
    parser = parser_for("census", __doc__)
    parser.add_argument("--match", default="*", metavar="PATTERN", help="names, with wildcards")
    args = parser.parse_args()
    names = timm.list_models(args.match)
    started = time.perf_counter()
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        census = take(names)
    report(
        models=census.models,
        failures=census.failures,
        tensors_by_role=dict(census.tensors.most_common()),
        elements_by_role=dict(census.elements.most_common()),
        models_with_stored=len(census.models_with_stored),
        stored_tensors_by_layer=dict(census.stored.most_common()),
        models_weight_standardised=len(census.standardised),
        weight_standardised=census.standardised,
        classifier_not_found=census.no_head,
        models_with_constructor_buffers=census.constructor_buffers,
        seconds=time.perf_counter() - started,
    )
    raise SystemExit(1 if census.failures else 0)


if __name__ == "__main__":
    main()
