"""What is learned: a fraction of every layer's filters, named layers, norms, the classifier.

Rosenfeld & Tsotsos, Section 3: of each layer's filter tensor (out, in, height, width) the first
int(p * size) indices of one dimension are learned. ``make_plan`` turns such a wish into a list of
tensors and slices, which a file keeps as its plan.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.recipe import ConstantSource, Learned, Plan
from randsurgery.format.tensors import hex_float
from randsurgery.surgery.architectures import classifier_names
from randsurgery.surgery.heads import FixedClassifier, check_not_fixed, fixed_heads
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.surgery.roles import (
    Selection,
    is_norm,
    select,
    select_modules,
    weight_names,
)

Dim = Literal["out", "in", "height", "width"]
HeadUse = Literal["learned", "frozen"]
WHOLE = Learned()


@dataclass(frozen=True)
class Freeze:
    """What is to be learned; everything else is frozen.

    fraction: share of each layer's filters, (0, 1], parsed as a decimal. count: their number
    instead. dim: the dimension that is sliced. only: patterns of the layers that are learned,
    whole unless ``fraction`` or ``count`` slices them, or of single parameters (``pos_embed``),
    always whole; without any of the three, every layer is.
    norms: scales and shifts learned. statistics: running statistics follow the data or stay. head:
    the classifier learned (whole) or frozen; None: learned unless ``only`` leaves it out. linear:
    other linear layers sliced like convolutions, or learned whole (the paper's rule). least:
    filters learned at least in a layer.
    """

    fraction: str | float | Fraction | None = None
    count: int | None = None
    dim: Dim = "out"
    only: tuple[str, ...] = ()
    norms: bool = True
    statistics: Literal["tracked", "frozen"] = "tracked"
    head: HeadUse | None = None
    linear: Literal["sliced", "whole"] = "sliced"
    least: int = 0

    @property
    def slices(self) -> bool:
        """True if layers are sliced, False if they are learned whole or not at all."""
        return self.fraction is not None or self.count is not None

    def check(self) -> None:
        """Raises UsageError for values out of range and wishes that contradict each other."""
        if isinstance(self.only, str) or not all(isinstance(p, str) for p in self.only):
            raise UsageError(f"only must be a sequence of patterns, found {self.only!r}")
        for what, value, allowed in (
            ("norms", self.norms, (True, False)),
            ("statistics", self.statistics, ("tracked", "frozen")),
            ("head", self.head, (None, "learned", "frozen")),
        ):
            if value not in allowed:
                raise UsageError(f"{what} must be one of {allowed}, found {value!r}")
        if self.fraction is not None and self.count is not None:
            raise UsageError("--fraction and --count exclude each other")
        if self.fraction is not None:
            parse_fraction(self.fraction, "fraction")
        for what, number, bound in (("--count", self.count, 1), ("--min", self.least, 0)):
            whole = isinstance(number, int) and not isinstance(number, bool)
            if number is not None and not (whole and number >= bound):
                raise UsageError(f"{what} must be a whole number from {bound} on, found {number!r}")
        if self.dim not in get_args(Dim):
            raise UsageError(f"unknown --dim {self.dim!r}, expected {', '.join(get_args(Dim))}")
        if self.linear not in ("sliced", "whole"):
            raise UsageError(f"unknown --linear {self.linear!r}, expected sliced or whole")
        if self.count is not None and self.least > self.count:
            raise UsageError(f"--count {self.count} and --min {self.least} contradict each other")
        if not self.slices and (self.dim != "out" or self.linear != "sliced" or self.least):
            raise UsageError("--dim, --linear and --min go with --fraction or --count")


def dim_index(module: nn.Module, dims: int, dim: Dim) -> int | None:
    """The position of a dimension in a weight of ``dims`` dimensions; None if it has none so named.

    Height and width are the last two of a convolution's; a one-dimensional one has a width only.
    """
    if dim in ("out", "in"):
        swapped = isinstance(module, _ConvTransposeNd)  # its weight is (in, out, ...)
        return int((dim == "in") != swapped)
    place = dims - (2 if dim == "height" else 1)
    return place if place >= 2 else None


def _filters(wish: Freeze, size: int) -> int:
    """How many of ``size`` indices are learned: int(p * size) (Section 3), or the given count."""
    if wish.count is not None:
        found = min(wish.count, size)
    else:
        assert wish.fraction is not None
        found = int(parse_fraction(wish.fraction, "fraction") * size)
    # Section 4.1: slices of the other dimensions keep one element at least
    return min(size, max(found, wish.least, 0 if wish.dim == "out" else 1))


def _slices(name: str, module: nn.Module, wish: Freeze, empty: list[str]) -> dict[str, Learned]:
    """What is learned of one layer's weights and bias."""
    found: dict[str, Learned] = {}
    for leaf in weight_names(module):
        weight = getattr(module, leaf)
        full = f"{name}.{leaf}" if name else leaf
        if leaf not in module._parameters:
            raise IncompatibleError(
                f"{full} is made from other tensors (weight_norm, spectral_norm, prune or another "
                "parametrization), so it has no slice to learn; remove that first, or name other "
                "layers with --only"
            )
        if not isinstance(module, (_ConvNd, nn.Linear, nn.MultiheadAttention)):
            raise IncompatibleError(
                f"{full} ({type(module).__name__}) is not a plain filter tensor; name other layers "
                "with --only"
            )
        if wish.dim == "out" and isinstance(module, _ConvTransposeNd) and module.groups > 1:
            raise IncompatibleError(
                f"{full} has groups, which share its out dimension; choose --dim in, or name other "
                "layers with --only"
            )
        dim = dim_index(module, weight.dim(), wish.dim)
        if dim is None:
            raise UsageError(
                f"{full} {list(weight.shape)} has no {wish.dim}; choose --dim out or in, "
                "--linear whole, or name layers with --only"
            )
        count = _filters(wish, weight.shape[dim])
        if count == 0 and weight.shape[dim]:
            empty.append(full)
        found[full] = Learned(part="slice", dim=dim, count=count)
        bias = {"weight": "bias", "in_proj_weight": "in_proj_bias"}.get(leaf, "")
        if wish.dim == "out" and getattr(module, bias, None) is not None:
            # biases only along out (Section 3)
            found[full.removesuffix(leaf) + bias] = Learned(part="slice", dim=0, count=count)
    return found


def _whole(name: str, module: nn.Module) -> dict[str, Learned]:
    """All of a layer's own parameters; of a fixed classifier those that are not fixed."""
    prefix = f"{name}." if name else ""
    if isinstance(module, FixedClassifier):
        own = module.learned_parameters()
    else:
        own = module.named_parameters(recurse=False)
    return {prefix + leaf: WHOLE for leaf, _ in own}


def make_plan(model: nn.Module, wish: Freeze) -> Plan:
    """The tensors and slices that a wish names, for a module (on meta will do).

    Without ``only``: the slices of every layer, or every layer whole, all norms and the whole
    classifier. With ``only``: the matched layers and all norms. Raises UsageError or
    IncompatibleError: contradictions, a pattern that matches nothing, a dimension that a layer
    lacks, layers of which nothing would be learned, nothing learned or nothing frozen at all.
    """
    wish.check()
    heads = select_modules(model, ("@head",)) if classifier_names(model) else set()
    heads |= set(fixed_heads(model))
    named = _named(model, wish, heads)
    layers = named.modules if named else frozenset[str]()
    use_head = wish.head != "frozen" and (
        wish.head == "learned" or named is None or (bool(heads) and heads <= layers)
    )
    learned: dict[str, Learned] = {}
    empty: list[str] = []
    for name, module in model.named_modules():
        chosen = named is None or name in layers
        if name in heads:
            asked = use_head or (named is not None and chosen and wish.head != "frozen")
            learned |= _whole(name, module) if asked else {}
        elif is_norm(module):
            learned |= _whole(name, module) if wish.norms else {}
        elif not chosen:
            continue
        elif not wish.slices or (isinstance(module, nn.Linear) and wish.linear == "whole"):
            learned |= _whole(name, module)
        else:
            learned |= _slices(name, module, wish, empty)
    if empty:
        raise UsageError(
            f"no filter would be learned in {', '.join(empty)}; pass --min 1 or a larger share"
        )
    own = named.parameters if named else frozenset[str]()
    check_not_fixed(model, sorted(own))
    learned |= dict.fromkeys(own, WHOLE)
    plan = Plan(tensors=dict(sorted(learned.items())), statistics=wish.statistics)
    _check_use(model, wish, plan)
    return plan


def _named(model: nn.Module, wish: Freeze, heads: set[str]) -> Selection | None:
    """What ``only`` names. Raises UsageError for a pattern that names nothing but what another
    option freezes."""
    if not wish.only:
        return None
    named = Selection()
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    for pattern in wish.only:
        found = select(model, (pattern,))
        hits = {*found.modules, *(name.rpartition(".")[0] for name in found.parameters)}
        for frozen, option, what in (
            (not wish.norms, "--norms frozen", norms),
            (wish.head == "frozen", "--head frozen", heads),
        ):
            if frozen and hits <= what:
                raise UsageError(f"--only {pattern} and {option} contradict each other")
        named |= found
    return named


def _check_use(model: nn.Module, wish: Freeze, plan: Plan) -> None:
    """Raises UsageError for options that came to nothing."""
    for pattern in wish.only if wish.slices else ():
        found = select(model, (pattern,))
        inside = tuple(f"{name}." for name in found.modules)
        if not found.parameters and not any(name.startswith(inside) for name in plan.tensors):
            kind = type(model.get_submodule(min(found.modules))).__name__
            raise UsageError(
                f"--only {pattern} names no convolution or linear layer to slice, but "
                f"{min(found.modules)} ({kind}); leave --fraction and --count out to learn it whole"
            )
    if not plan.tensors:
        raise UsageError("nothing would be learned; give --fraction, --count or --only")
    if wish.slices and all(part.part == "whole" for part in plan.tensors.values()):
        option = "--count" if wish.fraction is None else "--fraction"
        raise UsageError(
            f"{option} slices nothing: norms and the classifier are learned whole, and so are "
            "linear layers with --linear whole; leave it out, or name other layers with --only"
        )
    still = wish.statistics == "frozen" and any(
        name.endswith("running_mean") for name, _ in model.named_buffers()
    )
    told = wish.only or wish.slices or fixed_heads(model) or still
    if not told and plan.tensors == everything(model).tensors:
        raise UsageError(
            "nothing would be frozen; give --fraction, --count, --only, or what is to be frozen"
        )


def everything(model: nn.Module) -> Plan:
    """The dense baseline: every parameter whole, but the rows of fixed classifiers."""
    learned: dict[str, Learned] = {}
    for name, module in model.named_modules():
        learned |= _whole(name, module)
    return Plan(tensors=dict(sorted(learned.items())))


def survivors(model: nn.Module, masked: Collection[str]) -> Plan:
    """Everything, but of masked tensors the surviving values alone."""
    alive = Learned(part="survivors")
    whole = everything(model).tensors
    return Plan(tensors={name: alive if name in masked else whole[name] for name in whole})


@dataclass(frozen=True)
class LayerCount:
    """Parameters of one layer: how many are learned, of how many."""

    layer: str
    learned: int
    total: int


def learned_size(part: Learned | None, shape: tuple[int, ...], alive: int | None = None) -> int:
    """The number of learned elements of a tensor; ``alive``: of its survivors."""
    if part is not None and part.part == "survivors" and alive is not None:
        return alive
    size = 1
    for index, length in enumerate(shape):
        sliced = part is not None and part.part == "slice" and part.dim == index
        size *= part.count or 0 if sliced and part is not None else length
    return size if part is not None else 0


def count_layers(
    model: nn.Module, plan: Plan, alive: Mapping[str, int] | None = None
) -> list[LayerCount]:
    """Learned and all parameters by layer, in the module's order; buffers are not counted.
    ``alive``: how many survivors a masked tensor has; without it they count as the whole tensor."""
    rows: list[LayerCount] = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        own = [
            (plan.tensors.get(full := prefix + leaf), tuple(tensor.shape), (alive or {}).get(full))
            for leaf, tensor in module.named_parameters(recurse=False)
        ]
        if own:
            total = sum(learned_size(WHOLE, shape) for _, shape, _ in own)
            learned = sum(learned_size(*one) for one in own)
            rows.append(LayerCount(name or type(module).__name__, learned, total))
    return rows


def with_plan(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """The checkpoint with that plan for its member."""
    member = checkpoint.member().model_copy(update={"plan": plan})
    return replace(checkpoint, recipe=checkpoint.recipe.with_member(member))


def zero_filled(checkpoint: Checkpoint, plan: Plan) -> Checkpoint:
    """Sliced tensors become zero, and their slices start where the tensor's own source would
    have them (Rosenfeld & Tsotsos, Section 4.2)."""
    tensors, parts = dict(checkpoint.recipe.tensors), dict(plan.tensors)
    for name, part in plan.tensors.items():
        if part.part != "slice":
            continue
        entry = tensors[name]
        if entry.overlays or entry.source.kind not in ("random", "base", "constant"):
            raise UsageError(
                f"--fill zero needs weights from a seed or a base, but {name} is "
                f"{entry.source.kind} with {len(entry.overlays)} overlays"
            )
        zero = ConstantSource(value=hex_float(0.0))
        if entry.source == zero:
            continue
        parts[name] = part.model_copy(update={"start": entry.source})
        tensors[name] = entry.model_copy(update={"source": zero, "digest": None})
    recipe = checkpoint.recipe.model_copy(update={"tensors": tensors, "backbone_id": None})
    return with_plan(replace(checkpoint, recipe=recipe), plan.model_copy(update={"tensors": parts}))
