"""Two networks, tensor by tensor: what differs, where, and by how much.

Finished tensors are compared. Where the headers prove two of them equal, nothing is read; whether
the payloads agree with the headers is ``verify``'s question.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from randsurgery.errors import FileFormatError
from randsurgery.format.masks import popcount
from randsurgery.format.tensors import RawTensor, as_words
from randsurgery.inspection.floats import nonfinite, numbers
from randsurgery.inspection.grouping import natural, place
from randsurgery.inspection.networks import FindBase, Kind, Network, Ours, give_base, open_network
from randsurgery.inspection.overlap import share

State = Literal["values", "kind", "only_a", "only_b"]
_BLOCK = 1 << 20
"""Elements that are compared at once."""
_RUNS = 5000


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that differs: in ``values`` alone, in ``kind`` (dtype or shape), or because one
    network lacks it (``only_a``, ``only_b``).

    Of a tensor of one shape: ``elements`` differ of ``size`` (by their bits; of two dtypes, by
    value), ``bits`` of one dtype, and filters, the indices along dim 0; ``filters_at`` are the
    first and last of each run of them, None if there are thousands. max_abs, mean_abs: |a - b|
    over the ``finite`` elements, those finite in both. mask_bits: of positions kept in one alone;
    None unless both have masks.
    """

    name: str
    state: State
    kind_a: Kind | None
    kind_b: Kind | None
    size: int = 0
    elements: int = 0
    bits: int | None = None
    filters: int = 0
    filters_differ: int = 0
    filters_at: tuple[tuple[int, int], ...] | None = ()
    finite: int = 0
    max_abs: float | None = None
    mean_abs: float | None = None
    mask_bits: int | None = None
    nan_a: int = 0
    nan_b: int = 0
    infinite_a: int = 0
    infinite_b: int = 0

    @property
    def compared(self) -> bool:
        """True if both have the tensor in one shape."""
        return self.kind_a is not None and self.kind_b is not None and (
            self.kind_a[1] == self.kind_b[1]
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the shares of elements and of mask bits."""
        said = asdict(self)
        for side in ("a", "b"):
            dtype, shape = said.pop(f"kind_{side}") or (None, None)
            said |= {f"dtype_{side}": dtype, f"shape_{side}": shape}
        said["element_share"] = share(self.elements, self.size) if self.compared else None
        said["mask_share"] = share(self.mask_bits, self.size)
        return said


@dataclass(frozen=True)
class FactDiff:
    """Something that the headers say differently: JSON values, None where nothing is said."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class DiffReport:
    """Two networks. ``tensors``: names that either has; ``rebuilt``: those that had to be made to
    be compared. same_backbone: None if one of the files knows of none."""

    file_a: str
    file_b: str
    member_a: str | None
    member_b: str | None
    tensors: int
    rebuilt: int
    same_backbone: bool | None
    differences: tuple[TensorDiff, ...]
    facts: tuple[FactDiff, ...]

    @property
    def same(self) -> bool:
        """True if no tensor and no fact differs; backbones may."""
        return not self.differences and not self.facts

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``same``."""
        rows = [row.to_json() for row in self.differences]
        return {**asdict(self), "differences": rows, "same": self.same}


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    member_a: str | None = None,
    member_b: str | None = None,
    base: str | os.PathLike[str] | None = None,
    tensors_a: Mapping[str, RawTensor] | None = None,
    tensors_b: Mapping[str, RawTensor] | None = None,
    find_base: FindBase | None = None,
) -> DiffReport:
    """Compare two networks: members of files of ours, or other safetensors files, sharded or not.
    ``base``: what either builds on, where that does not lie beside it. ``tensors_a``,
    ``tensors_b``: what a file of another format holds, read by whoever can; ``find_base``: who
    reads a base of another format, if one is needed.

    Raises FileFormatError, UsageError (a member that must be named, or is not there), or
    IncompatibleError (a base that is missing where the headers do not suffice).
    """
    with contextlib.ExitStack() as stack:
        one = open_network(a, member_a, "--member-a", stack, tensors_a)
        two = open_network(b, member_b, "--member-b", stack, tensors_b)
        give_base([network.opened for network in (one, two) if isinstance(network, Ours)], base,
                  find_base)  # fmt: skip
        names = sorted({*one.names, *two.names}, key=place)
        held, known = (set(one.names), set(two.names)), len(names)
        found, rebuilt = [], 0
        for name in names:
            kinds = [network.kind(name) if name in there else None
                     for network, there in zip((one, two), held, strict=True)]  # fmt: skip
            if kinds[0] == kinds[1] and one.sure(name) & two.sure(name):
                continue
            rebuilt += kinds[0] is not None and kinds[1] is not None and kinds[0][1] == kinds[1][1]
            row = _tensor(name, one, two, kinds[0], kinds[1])
            found += [] if row is None else [row]
        return DiffReport(
            file_a=Path(a).name,
            file_b=Path(b).name,
            member_a=one.member.name if isinstance(one, Ours) else None,
            member_b=two.member.name if isinstance(two, Ours) else None,
            tensors=known,
            rebuilt=rebuilt,
            same_backbone=_same_backbone(one, two),
            differences=tuple(found),
            facts=tuple(_facts(one, two)),
        )


def _same_backbone(one: Network, two: Network) -> bool | None:
    if not (isinstance(one, Ours) and isinstance(two, Ours)):
        return None
    first, second = one.recipe.backbone_id, two.recipe.backbone_id
    return None if first is None or second is None else first == second


# --- tensors -------------------------------------------------------------------------------------


def _tensor(
    name: str, one: Network, two: Network, kind_a: Kind | None, kind_b: Kind | None
) -> TensorDiff | None:
    """What differs of a tensor; None if nothing does."""
    if kind_a is None or kind_b is None:
        return TensorDiff(name, "only_b" if kind_a is None else "only_a", kind_a, kind_b)
    if kind_a[1] != kind_b[1]:
        return TensorDiff(name, "kind", kind_a, kind_b)
    first, second = one.tensor(name), two.tensor(name)
    for tensor, kind in ((first, kind_a), (second, kind_b)):
        if (tensor.dtype, tensor.shape) != kind:
            raise FileFormatError(f"{name} is {tensor.dtype} {list(tensor.shape)}, the header "
                                  f"says {kind[0]} {list(kind[1])}")  # fmt: skip
    if first.same_bits(second):
        return None
    return _values(name, first, second, _mask_bits(name, one, two))


def _mask_bits(name: str, one: Network, two: Network) -> int | None:
    first = one.kept(name)
    second = None if first is None else two.kept(name)
    if first is None or second is None:
        return None
    return popcount(first.packed ^ second.packed)


def _values(name: str, a: RawTensor, b: RawTensor, mask_bits: int | None) -> TensorDiff:
    """Two tensors of one shape, block by block."""
    shape, size = a.shape, a.array.size
    differ = np.zeros(size, dtype=np.bool_)
    flat_a, flat_b = a.array.reshape(-1), b.array.reshape(-1)
    bits, finite, total, highest = 0, 0, 0.0, 0.0
    strange = np.zeros(4, dtype=np.int64)  # NaN in a, infinities in a, and in b
    for start in range(0, size, _BLOCK):
        at = slice(start, start + _BLOCK)
        left, right = numbers(a.dtype, flat_a[at]), numbers(b.dtype, flat_b[at])
        strange += [*nonfinite(left), *nonfinite(right)]
        if a.dtype == b.dtype:
            changed = as_words(flat_a[at]) ^ as_words(flat_b[at])
            bits += popcount(changed.view(np.uint8))
            differ[at] = changed != 0
        else:
            both_nan = np.isnan(left) & np.isnan(right)
            differ[at] = (left != right) & ~both_nan
        apart = distances(left, right)
        finite += apart.size
        total = min(total + _sum(apart), sys.float_info.max)
        highest = max(highest, float(apart.max(initial=0.0)))
    rows: npt.NDArray[np.bool_] = differ
    if size:
        rows = np.asarray(differ.reshape(shape[0] if shape else 1, -1).any(axis=1))
    runs = _runs(rows)
    return TensorDiff(
        name=name,
        state="values" if a.dtype == b.dtype else "kind",
        kind_a=(a.dtype, shape),
        kind_b=(b.dtype, shape),
        size=size,
        elements=int(np.count_nonzero(differ)),
        bits=bits if a.dtype == b.dtype else None,
        filters=shape[0] if shape else 1,
        filters_differ=int(np.count_nonzero(rows)),
        filters_at=runs,
        finite=finite,
        max_abs=highest if finite else None,
        mean_abs=total / finite if finite else None,
        mask_bits=mask_bits,
        nan_a=int(strange[0]),
        infinite_a=int(strange[1]),
        nan_b=int(strange[2]),
        infinite_b=int(strange[3]),
    )


def distances(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """|left - right| where both are finite. Exact before the result is rounded to float64; beyond
    float64's range, its largest number."""
    if left.dtype == right.dtype and left.dtype.kind in "iu":
        words = left.view(f"u{left.dtype.itemsize}"), right.view(f"u{right.dtype.itemsize}")
        apart = np.where(left > right, words[0] - words[1], words[1] - words[0])
        return apart.astype(np.float64)  # type: ignore[no-any-return]
    finite = np.isfinite(left) & np.isfinite(right)
    with np.errstate(over="ignore"):
        apart = np.abs(left[finite].astype(np.float64) - right[finite].astype(np.float64))
    return np.minimum(apart, sys.float_info.max)  # type: ignore[no-any-return]


def _sum(values: npt.NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):
        return float(values.sum())


def _runs(rows: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...] | None:
    """(first, last) of every run of True; None for more than are of use."""
    edges = np.flatnonzero(np.diff(rows, prepend=False, append=False))
    if edges.size > 2 * _RUNS:
        return None
    return tuple((int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2))


# --- what headers say beside tensors -------------------------------------------------------------


def _facts(one: Network, two: Network) -> list[FactDiff]:
    """Architecture, classifier, input, classes, plan and the like; popup scores, provenance and
    notes are left out. A file of another program says none of these; nothing is held against it."""
    if not (isinstance(one, Ours) and isinstance(two, Ours)):
        return []
    a, b = _said(one), _said(two)
    return [FactDiff(what, a.get(what), b.get(what))
            for what in sorted({*a, *b}, key=natural) if a.get(what) != b.get(what)]  # fmt: skip


def _said(network: Ours) -> dict[str, Any]:
    """Dotted name -> JSON value; what is learned of a tensor is one value."""
    recipe, member = network.recipe, network.member
    parts = {
        "model": recipe.model_of(member), "head": member.head, "input": recipe.input_of(member),
        "dataset": member.dataset, "calibration": member.calibration,
    }  # fmt: skip
    said = {key: part.to_json() for key, part in parts.items() if part is not None}
    found = _leaves("", said)
    if member.classes is not None:
        found["classes"] = list(member.classes)
    if member.plan is not None:
        found["plan.statistics"] = member.plan.statistics
        for name, part in member.plan.tensors.items():
            found[f"plan.{name}"] = {"part": part.part, **part.to_json()}
    return found


def _leaves(path: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists stay whole."""
    if not isinstance(value, dict) or (path and not value):
        return {path: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= _leaves(f"{path}.{key}" if path else str(key), part)
    return found


def differing(rows: Sequence[TensorDiff], state: State) -> list[TensorDiff]:
    """The rows of that state."""
    return [row for row in rows if row.state == state]
