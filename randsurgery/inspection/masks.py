"""What masks keep: densities, dead filters and inputs, signs, overlap, and bytes against entropy.

Of files of ours alone. Masks are read from their payloads; of the weights only those that a mask
lies over are made, for their signs, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from randsurgery.errors import IncompatibleError, UsageError, near
from randsurgery.format.checkpoint import is_checkpoint
from randsurgery.format.container import Container, write_atomically
from randsurgery.format.masks import Mask, entropy_bytes
from randsurgery.inspection.floats import nonfinite, numbers
from randsurgery.inspection.grouping import place, selected
from randsurgery.inspection.networks import OpenFile, Ours, give_base
from randsurgery.inspection.overlap import LayerOverlap, Overlap, overlap, share


@dataclass(frozen=True)
class LayerMask:
    """The mask of one tensor. A filter is an index along dim 0, an input one along dim 1 (within
    its group, where a convolution has groups); a tensor without elements has neither.

    filter_kept: what each filter keeps. positive, positive_before: weights above 0 among those
    kept, and among all before the mask; None where the base is missing, and the latter where
    values lie scattered over zeros. nan, infinite: among those kept. payload_bytes: of the masks;
    entropy_bytes: what independent bits of that density take at least.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int
    filter_kept: tuple[int, ...]
    inputs: int
    dead_inputs: int
    positive: int | None
    positive_before: int | None
    nan: int
    infinite: int
    payload_bytes: int
    entropy_bytes: float

    @property
    def filters(self) -> int:
        """The number of filters."""
        return len(self.filter_kept)

    @property
    def filter_size(self) -> int:
        """Weights in a filter."""
        return self.size // max(1, self.filters)

    @property
    def dead_filters(self) -> int:
        """Filters without a kept weight."""
        return self.filter_kept.count(0)

    def to_json(self) -> dict[str, Any]:
        """Plain values, with what ``summary`` says of this mask alone."""
        return {**asdict(self), **summary([self]).to_json()}


@dataclass(frozen=True)
class Summary:
    """Several masks as one. Shares are of all their weights; ``lowest`` and ``highest`` are the
    densities of single filters; ``bound`` is payload bytes over entropy bytes."""

    tensors: int
    size: int
    kept: int
    density: float | None
    lowest: float | None
    highest: float | None
    filters: int
    dead_filters: int
    inputs: int
    dead_inputs: int
    positive_kept: float | None
    positive_all: float | None
    nan: int
    infinite: int
    payload_bytes: int
    entropy_bytes: float
    bound: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def summary(layers: Sequence[LayerMask]) -> Summary:
    """Masks added up; shares of signs over the tensors where they are known."""
    size, kept = sum(row.size for row in layers), sum(row.kept for row in layers)
    after = [row for row in layers if row.positive is not None]
    before = [row for row in layers if row.positive_before is not None]
    sparse = [min(row.filter_kept) / row.filter_size for row in layers if row.size]
    dense = [max(row.filter_kept) / row.filter_size for row in layers if row.size]
    payload = sum(row.payload_bytes for row in layers)
    entropy = math.fsum(row.entropy_bytes for row in layers)
    return Summary(
        tensors=len(layers),
        size=size,
        kept=kept,
        density=share(kept, size),
        lowest=min(sparse, default=None),
        highest=max(dense, default=None),
        filters=sum(row.filters for row in layers),
        dead_filters=sum(row.dead_filters for row in layers),
        inputs=sum(row.inputs for row in layers),
        dead_inputs=sum(row.dead_inputs for row in layers),
        positive_kept=share(sum(row.positive or 0 for row in after), sum(r.kept for r in after)),
        positive_all=share(
            sum(row.positive_before or 0 for row in before), sum(row.size for row in before)
        ),
        nan=sum(row.nan for row in layers),
        infinite=sum(row.infinite for row in layers),
        payload_bytes=payload,
        entropy_bytes=entropy,
        bound=share(payload, entropy),
    )


@dataclass(frozen=True)
class NetworkMasks:
    """The masks of one network. ``tensors``: how many it has, masked or not. ``label``: a name
    that no other network of the report bears."""

    file: str
    member: str
    label: str
    tensors: int
    layers: tuple[LayerMask, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the sums under ``all``."""
        said = {key: getattr(self, key) for key in ("file", "member", "label", "tensors")}
        layers = [row.to_json() for row in self.layers]
        return {**said, "all": summary(self.layers).to_json(), "layers": layers}


@dataclass(frozen=True)
class MasksReport:
    """Networks with their masks, each pair of them, and what could not be said."""

    networks: tuple[NetworkMasks, ...]
    overlaps: tuple[Overlap, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "networks": [network.to_json() for network in self.networks],
            "overlaps": [overlap.to_json() for overlap in self.overlaps],
            "notes": list(self.notes),
        }


def masks(
    paths: Sequence[str | os.PathLike[str]],
    *,
    members: Sequence[str] = (),
    patterns: Sequence[str] = (),
    base: str | os.PathLike[str] | None = None,
) -> MasksReport:
    """Report on the masks of files' members, or of those named, and of the tensors that
    ``patterns`` select. Without ``base`` a missing base leaves signs out.

    Raises FileFormatError; IncompatibleError for a file without masks, or a wrong ``base``;
    UsageError for a name or pattern that fits nothing.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in paths]
        give_base(files, base)
        networks = _networks(files, members)
        masked = {name for network in networks.values() for name in network.masked}
        rows: dict[str, list[LayerMask]] = {label: [] for label in networks}
        pairs: Pairs = {pair: [] for pair in combinations(networks, 2)}
        missing: set[str] = set()
        for name in selected(sorted(masked, key=place), patterns):
            kept = {label: mask for label, network in networks.items()
                    if (mask := network.kept(name)) is not None}  # fmt: skip
            for label, mask in kept.items():
                rows[label].append(_layer(networks[label], name, mask, missing))
            _compare(name, networks, kept, pairs)
        return MasksReport(
            tuple(_report(network, label, rows[label]) for label, network in networks.items()),
            tuple(Overlap(one, two, tuple(shared), _left_out(rows[one], rows[two], len(shared)))
                  for (one, two), shared in pairs.items()),
            tuple(sorted(missing)),
        )  # fmt: skip


Pairs = dict[tuple[str, str], list[LayerOverlap]]
"""Overlaps by the labels of two networks."""


def _compare(
    name: str, networks: Mapping[str, Ours], kept: Mapping[str, Mask], into: Pairs
) -> None:
    """One tensor's masks, each pair of those that lie over one shape."""
    shapes = {label: networks[label].kind(name)[1] for label in kept}
    for (one, two), found in into.items():
        if one in kept and two in kept and shapes[one] == shapes[two]:
            found.append(overlap(name, kept[one], kept[two]))


def _report(network: Ours, label: str, rows: Sequence[LayerMask]) -> NetworkMasks:
    file = Path(network.opened.path).name
    return NetworkMasks(file, network.member.name, label, len(network.names), tuple(rows))


def _left_out(first: Sequence[LayerMask], second: Sequence[LayerMask], shared: int) -> int:
    return len({row.name for row in (*first, *second)}) - shared


def _open(path: str | os.PathLike[str]) -> OpenFile:
    with Container(path) as container:
        if not is_checkpoint(container):
            raise IncompatibleError(
                f"{container.path.name} has no masks: it is not a file of randsurgery; convert "
                "makes one of a checkpoint of hidden-networks"
            )
    return OpenFile(path)


def _networks(files: Sequence[OpenFile], members: Sequence[str]) -> dict[str, Ours]:
    """The networks by label. Raises UsageError for a name that no file knows, IncompatibleError
    for a file without masks."""
    known = [member.name for file in files for member in file.checkpoint.recipe.members]
    for name in members:
        if name not in known:
            hint = near(name, known) or f"; members: {', '.join(dict.fromkeys(known))}"
            raise UsageError(f"no file has a member {name!r}{hint}")
    short = [Path(file.path).name for file in files]
    several = len(files) > 1
    found: dict[str, Ours] = {}
    for file, name in zip(files, short, strict=True):
        everyone = file.checkpoint.recipe.members
        chosen = [m for m in everyone if not members or m.name in members]
        networks = [Ours(file, member) for member in chosen]
        if not any(network.masked for network in networks):
            raise IncompatibleError(
                f"{name} has no masks{_of_members(chosen, everyone)}; inspect storage says what "
                "its tensors are made of"
            )
        where = name if short.count(name) == 1 else os.fspath(file.path)
        where = where.removesuffix(".safetensors") if several else where
        for network in networks:
            label = where if len(everyone) == 1 else f"{where}:{network.member.name}"
            label = label if several or len(everyone) == 1 else network.member.name
            if label in found:
                raise UsageError(f"{label} is named twice")
            found[label] = network
    return found


def _of_members(chosen: Sequence[Any], everyone: Sequence[Any]) -> str:
    if len(chosen) == len(everyone):
        return ""
    return f" in {', '.join(m.name for m in chosen)}" if chosen else " in a member of that name"


def _layer(network: Ours, name: str, mask: Mask, missing: set[str]) -> LayerMask:
    """All that is said of one mask; ``missing`` learns of a base that is."""
    _, shape = network.kind(name)
    bits = mask.unpack()
    filters, inputs = shape[:2] if len(shape) > 1 else (bits.size, 0)
    if not bits.size:  # a dimension beside one of 0 may be absurd
        filters, inputs, filter_kept = 0, 0, []
    else:
        filter_kept = np.count_nonzero(bits.reshape(filters, -1), axis=1).tolist()
    dead_inputs = 0
    if inputs:
        dead_inputs = int((~bits.reshape(filters, inputs, -1).any(axis=(0, 2))).sum())
    made = network.derivation(name).masks
    try:
        signs = _signs(network, name, bits)
    except IncompatibleError as error:
        if network.opened.base is not None:
            raise
        missing.add(f"no signs: {error}")
        signs = (None, None, 0, 0)
    sizes = network.opened.sizes
    return LayerMask(
        name=name,
        shape=shape,
        size=mask.size,
        kept=mask.count,
        filter_kept=tuple(filter_kept),
        inputs=inputs,
        dead_inputs=dead_inputs,
        positive=signs[0],
        positive_before=signs[1],
        nan=signs[2],
        infinite=signs[3],
        payload_bytes=sum(sizes[step.payload("mask")] for step, _ in made),
        entropy_bytes=math.fsum(entropy_bytes(mask.size, own.count) for _, own in made),
    )


def _signs(network: Ours, name: str, bits: Any) -> tuple[int | None, int | None, int, int]:
    """(above 0 among those kept, above 0 before the mask, NaN and infinities among those kept)."""
    before = network.before_masks(name)
    whole = None
    if before is not None:
        whole = numbers(before.dtype, before.array).reshape(-1)
    drawn = None if whole is None else int(np.count_nonzero(whole > 0))
    if whole is None or not network.masks_alone(name):
        after = network.tensor(name)
        whole = numbers(after.dtype, after.array).reshape(-1)
    kept = whole[bits]
    return int(np.count_nonzero(kept > 0)), drawn, *nonfinite(kept)


# --- tables --------------------------------------------------------------------------------------

_COLUMNS = (
    "tensors", "size", "kept", "density", "lowest", "highest", "filters", "dead_filters", "inputs",
    "dead_inputs", "positive_kept", "positive_all", "nan", "infinite", "payload_bytes",
    "entropy_bytes", "bound",
)  # fmt: skip


def write_csv(report: MasksReport, path: str | os.PathLike[str], *, filters: bool) -> None:
    """One row a mask, or one a filter, to a file; densities and shares in [0, 1]. Raises
    OutputError."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    start = ["file", "member", "tensor"]
    columns = ["filter", "size", "kept", "density"] if filters else ["shape", *_COLUMNS[1:]]
    rows.writerow([*start, *columns])
    for network in report.networks:
        for row in network.layers:
            about = [network.file, network.member, row.name]
            if filters:
                size = row.filter_size
                rows.writerows(
                    [*about, index, size, kept, share(kept, size)]
                    for index, kept in enumerate(row.filter_kept)
                )
            else:
                said = summary([row]).to_json()
                shape = "x".join(map(str, row.shape))
                rows.writerow([*about, shape, *(said[key] for key in _COLUMNS[1:])])
    write_atomically(path, iter([text.getvalue().encode()]))
