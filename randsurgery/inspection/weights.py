"""The weights of networks, layer by layer: moments of what was learned and of what stayed fixed,
beside those of the initial distribution (Rosenfeld & Tsotsos, Section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from randsurgery.errors import UsageError, near
from randsurgery.format.checkpoint import in_threads
from randsurgery.inspection.grouping import block, hits, place
from randsurgery.inspection.moments import Summary, joined, summarise, summarise_parts
from randsurgery.inspection.weight_files import (
    FIXED,
    LEARNED,
    MASKED,
    PARTS,
    Initial,
    Network,
    TensorSource,
)

Shown = Literal["auto", "learned", "fixed", "all"]
"""Which values to look at; auto: the learned ones, else those that are kept, else all."""

THREADS = 2


@dataclass(frozen=True)
class LayerWeights:
    """One tensor, or the tensors of a block (``tensors`` of them; ``shape`` is then empty).

    ``all``: every element; None if values were not read. ``learned``, ``fixed``: the elements of
    that part; None where the file does not tell parts apart. ``masked``: elements set to zero.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    initial: Initial | None = None
    all: Summary | None = None
    learned: Summary | None = None
    fixed: Summary | None = None
    masked: int = 0
    tensors: int = 1

    @property
    def label(self) -> str:
        """The layer's name: without ``.weight``."""
        return self.name.removesuffix(".weight") or self.name

    def part(self, shown: Shown) -> tuple[str, Summary | None]:
        """The part to look at, by its name, and its statistics."""
        if shown != "auto":
            return shown, {"learned": self.learned, "fixed": self.fixed, "all": self.all}[shown]
        for name, found in (("learned", self.learned), ("fixed", self.fixed)):
            if found is not None and found.count:
                return name, found
        return "all", self.all

    def to_json(self, *, norms: bool) -> dict[str, Any]:
        """Plain values; ``norms``: every filter's."""
        found: dict[str, Any] = {
            "name": self.name, "dtype": self.dtype, "shape": list(self.shape), "size": self.size,
            "masked": self.masked, "initial": None if self.initial is None
            else {k: plain_number(v) for k, v in
                  {**asdict(self.initial), "std": self.initial.std}.items()},
        }  # fmt: skip
        for part in ("all", "learned", "fixed"):
            summary = getattr(self, part)
            found[part] = None if summary is None else summary_json(summary, norms=norms)
        return found


def summary_json(found: Summary, *, norms: bool) -> dict[str, Any]:
    """A summary's values; what is beyond float64 as null. ``norms``: every filter's norm."""
    values = asdict(found)
    every = values.pop("norms")
    values |= {"finite": found.finite, "std": found.std, "norm": found.norm}
    values["norm_min"] = min(every) if every else None
    values["norm_max"] = max(every) if every else None
    if norms:
        values["norms"] = None if every is None else [plain_number(n) for n in every]
    return {key: plain_number(value) for key, value in values.items()}


def plain_number(value: Any) -> Any:
    """A number that JSON and CSV can hold, or None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class WeightsReport:
    """The layers of one network. ``left_out``: how many tensors were not looked at, by the reason;
    ``skipped``: those that could not be, with theirs."""

    file: str
    member: str | None
    name: str
    model: str | None
    layers: tuple[LayerWeights, ...]
    tensors: int
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> set[str]:
        """The parts that occur: learned, fixed, masked."""
        found = {p for layer in self.layers for p in ("learned", "fixed")
                 if (s := getattr(layer, p)) is not None and s.count}  # fmt: skip
        return found | ({"masked"} if any(layer.masked for layer in self.layers) else set())

    def to_json(self, *, norms: bool = False) -> dict[str, Any]:
        """Plain values; ``norms``: every filter's."""
        return {
            "file": self.file, "member": self.member, "model": self.model, "tensors": self.tensors,
            "left_out": self.left_out, "skipped": self.skipped,
            "layers": [layer.to_json(norms=norms) for layer in self.layers],
        }  # fmt: skip


# --- which tensors -------------------------------------------------------------------------------


def is_layer(tensor: TensorSource) -> bool:
    """True for what holds a layer's weights as far as a header can tell: floating, and of two
    dimensions or more. Biases, norms and integer buffers are none."""
    return len(tensor.shape) > 1 and tensor.dtype.startswith(("F", "BF"))


def chosen(
    networks: Sequence[Network], patterns: Sequence[str] = (), *, everything: bool = False
) -> list[list[TensorSource]]:
    """The tensors to look at: layers, or ``everything``, in the network's order; with patterns
    those that match one, whatever they are if no layer matches it. Raises UsageError for a pattern
    that matches nothing."""
    names = {t.name for network in networks for t in network.tensors}
    layers = {t.name for n in networks for t in n.tensors if everything or is_layer(t)}
    wanted = set() if patterns else layers
    for pattern in patterns:
        found = hits(names, pattern)
        wanted |= found & layers or found
    return [[t for t in in_order(network) if t.name in wanted] for network in networks]


def in_order(network: Network) -> list[TensorSource]:
    """The tensors from the network's first to its last layer."""
    if network.ordered:
        return list(network.tensors)
    return sorted(network.tensors, key=lambda tensor: place(tensor.name, network.head))


# --- statistics ----------------------------------------------------------------------------------


def report_on(
    network: Network, tensors: Sequence[TensorSource], *, values: bool = True
) -> WeightsReport:
    """The statistics of those tensors of a network; ``values`` false: headers alone. One tensor is
    in memory at a time, of files that need no rebuilding a block. Raises FileFormatError or
    IncompatibleError if values cannot be read."""
    by_name = {tensor.name: tensor for tensor in tensors}
    if not values:
        layers = [_described(tensor) for tensor in tensors]
    else:
        threads = THREADS if all(tensor.in_parts for tensor in tensors) else 1
        layers = list(in_threads(lambda name: _measured(by_name[name]), by_name, threads))
    out: dict[str, int] = {}
    for tensor in network.tensors:
        if tensor.name not in by_name:
            reason = "of integers" if not tensor.dtype.startswith(("F", "BF")) else (
                "of fewer than two dimensions" if len(tensor.shape) < 2 else "by --filter"
            )  # fmt: skip
            out[reason] = out.get(reason, 0) + 1
    return WeightsReport(
        network.file, network.member, network.name, network.model, tuple(layers),
        len(network.tensors) + len(network.skipped), out, dict(network.skipped),
    )  # fmt: skip


def _described(tensor: TensorSource) -> LayerWeights:
    return LayerWeights(tensor.name, tensor.dtype, tensor.shape, tensor.size, tensor.initial)


def _measured(tensor: TensorSource) -> LayerWeights:
    about = (tensor.name, tensor.dtype, tensor.shape, tensor.size, tensor.initial)
    if tensor.size == 0:
        return LayerWeights(*about, all=Summary(0))
    fetch = tensor.open()
    found = summarise(tensor.dtype, tensor.shape, fetch)
    if tensor.labels is None:
        parts = {} if tensor.whole is None else {tensor.whole: found}
        return LayerWeights(*about, all=found, **parts)  # type: ignore[arg-type]
    labels = tensor.labels()
    masked = int(np.count_nonzero(labels == MASKED))
    split = summarise_parts(tensor.dtype, tensor.shape, fetch, labels, (FIXED, LEARNED))
    named = {PARTS[part]: summary for part, summary in split.items() if summary.count}
    return LayerWeights(*about, all=found, masked=masked, **named)  # type: ignore[arg-type]


# --- blocks --------------------------------------------------------------------------------------


def in_blocks(layers: Sequence[LayerWeights], depth: int) -> list[LayerWeights]:
    """Layers of one block taken together, in the order of its first; depth 0: as they are."""
    groups: dict[str, list[LayerWeights]] = {}
    for layer in layers:
        groups.setdefault(block(layer.label, depth), []).append(layer)
    return [group[0] if depth == 0 else _block(name, group) for name, group in groups.items()]


def _block(name: str, group: list[LayerWeights]) -> LayerWeights:
    def part(which: str) -> Summary | None:
        found = [s for layer in group if (s := getattr(layer, which)) is not None]
        return joined(found) if found else None

    dtypes = {layer.dtype for layer in group}
    return LayerWeights(
        name,
        dtypes.pop() if len(dtypes) == 1 else "mixed",
        (),
        sum(layer.size for layer in group),
        _joined_initial(group),
        part("all"),
        part("learned"),
        part("fixed"),
        sum(layer.masked for layer in group),
        len(group),
    )


def _joined_initial(group: list[LayerWeights]) -> Initial | None:
    """The moments of several distributions taken together; the norm is that of a mean filter."""
    known = [(layer.initial, layer.size) for layer in group if layer.initial is not None]
    total = sum(size for _, size in known)
    if len(known) < len(group) or not total:
        return None

    def mean_of(values: Iterable[float]) -> float:
        return math.fsum(v * size for v, (_, size) in zip(values, known, strict=True)) / total

    mean = mean_of(initial.mean for initial, _ in known)
    square = mean_of(initial.variance + initial.mean**2 for initial, _ in known)
    norms = [(layer.initial.norm, layer.shape[0] if layer.shape else 0)
             for layer in group if layer.initial and layer.initial.norm is not None]  # fmt: skip
    filters = sum(count for _, count in norms)
    kinds = {initial.kind for initial, _ in known}
    return Initial(
        kinds.pop() if len(kinds) == 1 else "mixed",
        math.nan if len(known) > 1 else known[0][0].scale,
        mean,
        mean_of(initial.mean_abs for initial, _ in known),
        max(0.0, square - mean * mean),
        math.fsum(norm * count for norm, count in norms) / filters if filters else None,
    )


def merged(orders: Iterable[Iterable[str]]) -> list[str]:
    """All labels, each list's in its own order; what only a later list has stands behind the label
    that it follows there."""
    found: list[str] = []
    for order in orders:
        at = 0
        for label in order:
            if label in found:
                at = found.index(label) + 1
            else:
                found.insert(at, label)
                at += 1
    return found


# --- order ---------------------------------------------------------------------------------------

SortKey = Literal[
    "layer", "name", "weights", "mean", "mean-abs", "std", "variance", "min", "max", "zeros",
    "norm", "change",
]  # fmt: skip
SORTS: tuple[str, ...] = get_args(SortKey)


def check_sort(name: str) -> str:
    """A key to sort by. Raises UsageError listing them."""
    if name not in SORTS:
        raise UsageError(
            f"unknown --sort {name!r}, expected one of {', '.join(SORTS)}{near(name, SORTS)}"
        )
    return name


def check_part(name: str) -> Shown:
    """The values to look at. Raises UsageError listing the choices."""
    for part in get_args(Shown):
        if part == name:
            found: Shown = part
            return found
    raise UsageError(f"unknown --part {name!r}, expected auto, learned, fixed or all")


def in_sorted_order(layers: Sequence[LayerWeights], key: str, shown: Shown) -> list[LayerWeights]:
    """The layers by name, or by a figure of the part that is shown, the largest first and those
    without it last. change: mean |w| over the expected one."""
    if key == "layer":
        return list(layers)
    if key == "name":
        return sorted(layers, key=lambda layer: layer.name)

    def figure(layer: LayerWeights) -> tuple[bool, float]:
        value = _figure(layer, key, shown)
        return value is None, 0.0 if value is None else -value

    return sorted(layers, key=figure)


def labels_in_order(rows: Sequence[Sequence[LayerWeights]], key: str, shown: Shown) -> list[str]:
    """The layers of several networks, by the largest figure that one of them has for each."""
    if key == "layer":
        return merged([row.label for row in each] for each in rows)
    every = in_sorted_order([row for each in rows for row in each], key, shown)
    return list(dict.fromkeys(row.label for row in every))


def _figure(layer: LayerWeights, key: str, shown: Shown) -> float | None:
    _, summary = layer.part(shown)
    if key == "weights":
        return layer.size
    if summary is None:
        return None
    if key == "zeros":
        return zero_share(layer, shown)
    if key == "change":
        expected = layer.initial.mean_abs if layer.initial else 0.0
        return summary.mean_abs / expected if expected and summary.mean_abs is not None else None
    found: float | None = getattr(summary, key.replace("-", "_"))
    return found


def zero_share(layer: LayerWeights, shown: Shown) -> float | None:
    """The share of zeros in the part that is shown; of all elements where a mask makes them."""
    _, summary = layer.part("all" if layer.masked else shown)
    return summary.zeros / summary.finite if summary is not None and summary.finite else None


# --- as a table for programs ---------------------------------------------------------------------

_FIGURES = (
    "count", "finite", "nan", "infinite", "zeros", "mean", "mean_abs", "variance", "std", "min",
    "max", "norm", "norm_min", "norm_max",
)  # fmt: skip
_INITIAL = ("kind", "mean", "mean_abs", "variance", "std", "norm")
COLUMNS = (
    "file", "member", "tensor", "dtype", "shape", "masked", "part", *_FIGURES,
    *(f"initial_{name}" for name in _INITIAL),
)  # fmt: skip


def csv_rows(reports: Iterable[WeightsReport]) -> Iterable[list[Any]]:
    """``COLUMNS``, then one row a tensor and part: all of it, and what was learned and what stayed
    fixed where the file tells."""
    yield list(COLUMNS)
    for report in reports:
        for layer in report.layers:
            shape = "x".join(map(str, layer.shape))
            about = [report.file, report.member or "", layer.name, layer.dtype, shape, layer.masked]
            start = [getattr(layer.initial, key, "") for key in _INITIAL]
            found = {p: getattr(layer, p) for p in ("all", "learned", "fixed")}
            for part, summary in {"": None, **found}.items():
                if (summary is None) != (part == "" and layer.all is None):
                    continue
                values = summary_json(summary, norms=False) if summary else {}
                yield [*about, part, *(values.get(key) for key in _FIGURES), *start]
