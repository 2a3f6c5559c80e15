"""Where a file's bytes go: by tensor, by what makes them, by member, and against a dense file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from randsurgery.format.container import TensorInfo
from randsurgery.format.derivation import (
    SCORES,
    derivation,
    needed_bases,
    payload_name,
    payload_names,
)
from randsurgery.format.fields import SHARED
from randsurgery.format.recipe import Member, Recipe
from randsurgery.format.shards import base_beside, bytes_behind
from randsurgery.format.tensors import RawTensor, byte_count
from randsurgery.inspection.headers import MemberBytes, header_of, member_bytes, read_header
from randsurgery.inspection.pictures import byte_unit, legible, save, told_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 24
"""Parts that a chart shows; the smallest share a bar."""
LONGEST = 40
"""Letters of a name beside a bar."""


@dataclass(frozen=True)
class TensorStorage:
    """One tensor of one member. ``bytes`` are its payloads', shared ones counted once."""

    member: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    overlays: tuple[str, ...]
    bytes: int
    dense_bytes: int

    @property
    def made_of(self) -> str:
        """The sentence in short: ``random + mask``."""
        return " + ".join((self.source, *self.overlays))


@dataclass(frozen=True)
class BaseFile:
    """A dense file that a file builds on. ``bytes``: None if it does not lie beside it."""

    name: str
    bytes: int | None


@dataclass(frozen=True)
class StorageReport:
    """A file's bytes. ``dense_bytes`` is what its tensors take stored whole, each member's own.
    ``bases``: the dense files without which it is nothing.

    ``shared_bytes``: payloads that all members have in common. ``members`` is empty for files of
    others; ``parts``: how many files a sharded one has.
    """

    file: str
    kind: str
    bytes: int
    dense_bytes: int
    header_bytes: int
    score_bytes: int
    shared_bytes: int
    tensors: tuple[TensorStorage, ...]
    members: tuple[MemberBytes, ...] = ()
    parts: int = 1
    bases: tuple[BaseFile, ...] = ()

    @property
    def base_bytes(self) -> int | None:
        """Bytes of all bases; None if one does not lie beside the file."""
        sizes = [base.bytes for base in self.bases]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def ratio(self) -> float:
        """Dense bytes over bytes, those of the bases included as far as they are known."""
        return self.dense_bytes / max(1, self.bytes + (self.base_bytes or 0))

    @property
    def shared_header_bytes(self) -> int:
        """What the header says of no member."""
        return self.header_bytes - sum(member.header_bytes for member in self.members)

    def groups(self) -> list[tuple[str, int, int, int]]:
        """(what makes them, tensors, bytes, dense bytes), largest dense part first."""
        found: dict[str, list[int]] = {}
        for tensor in self.tensors:
            row = found.setdefault(tensor.made_of, [0, 0, 0])
            row[0] += 1
            row[1] += tensor.bytes
            row[2] += tensor.dense_bytes
        rows = [(name, row[0], row[1], row[2]) for name, row in found.items()]
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    def whole(self) -> list[tuple[str, int]]:
        """(what, bytes): as many dense files, and this one."""
        count = len(self.members)
        dense = f"{count} dense files" if count > 1 else "a dense file"
        return [(dense, self.dense_bytes), ("this file", self.bytes)]

    def parts_held(self) -> list[tuple[str, int, int]]:
        """(what, bytes, how many) of the parts of the file, which add up to it, bytes times how
        many: members and what they share, or, of one network, what makes its tensors. More than
        ``SHOWN`` have the rest as one row, its bytes their mean, rounded."""
        if len(self.members) > 1:
            rest = [("shared", self.shared_bytes + self.shared_header_bytes)]
            parts = [(member.name, member.bytes) for member in self.members]
        else:
            parts = [(name, stored) for name, _, stored, _ in self.groups() if stored]
            rest = [("popup scores", self.score_bytes)] if self.score_bytes else []
            rest.append(("header", self.header_bytes))
        if len(parts) > SHOWN or len(self.members) < 2:
            parts.sort(key=lambda part: -part[1])
        shown, others = parts[:SHOWN], [size for _, size in parts[SHOWN:]]
        rows = rest + shown if len(self.members) > 1 else shown + rest
        found = [(name, size, 1) for name, size in rows]
        if others:
            mean = round(sum(others) / len(others))
            found.append((f"{len(others)} more, each", mean, len(others)))
        return found

    def breakdown(self) -> list[tuple[str, int]]:
        """(what, bytes) of ``parts_held``: of those that share a row, the bytes of one."""
        return [(name, size) for name, size, _ in self.parts_held()]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``ratio``."""
        return {**asdict(self), "ratio": self.ratio}


def storage(
    path: str | os.PathLike[str], tensors: Mapping[str, RawTensor] | None = None
) -> StorageReport:
    """Report on any safetensors file from its header alone, or on a sharded one from its index.

    ``tensors``: what a file of another format holds, read by whoever can. Raises FileFormatError.
    """
    header = read_header(path) if tensors is None else header_of(path, tensors)
    recipe = header.recipe
    sizes = {name: info.stop - info.start for name, info in header.infos.items()}
    rows, scores, shared = _foreign_rows(header.infos), 0, 0
    members: tuple[MemberBytes, ...] = ()
    if recipe is not None:
        rows, scores = _recipe_rows(recipe, sizes)
        members = tuple(member_bytes(recipe, who, header.infos) for who in recipe.members)
        shared = sum(sizes[name] for name in payload_names(recipe, SHARED))
    return StorageReport(
        file=header.file,
        kind=header.kind,
        bytes=header.bytes,
        dense_bytes=sum(row.dense_bytes for row in rows),
        header_bytes=header.header_bytes,
        score_bytes=scores,
        shared_bytes=shared,
        tensors=tuple(rows),
        members=members,
        parts=header.parts,
        bases=() if recipe is None else tuple(_base_files(recipe, path)),
    )


def _base_files(recipe: Recipe, path: str | os.PathLike[str]) -> Iterator[BaseFile]:
    """The dense files that a recipe needs, with their sizes where they lie beside the file."""
    needed = needed_bases(recipe)
    for key, ref in recipe.bases.items():
        if key not in needed:
            continue
        name = ref.file or ref.origin or "a base without a name"
        lying = None if ref.file is None else base_beside(path, ref.file)
        yield BaseFile(name, None if lying is None else bytes_behind(lying))


def _foreign_rows(infos: Mapping[str, TensorInfo]) -> list[TensorStorage]:
    return [
        TensorStorage(
            "", name, info.dtype, info.shape, "stored", (), info.stop - info.start,
            info.stop - info.start,
        )
        for name, info in sorted(infos.items())
    ]  # fmt: skip


def _recipe_rows(recipe: Recipe, sizes: Mapping[str, int]) -> tuple[list[TensorStorage], int]:
    rows, scores, counted = [], 0, set[str]()
    for member in recipe.members:
        for name in recipe.tensor_names(member):
            rows.append(_row(recipe, member, name, sizes, counted))
        scores += sum(sizes.get(payload_name(member.name, n, SCORES), 0) for n in member.scores)
    return rows, scores


def _row(
    recipe: Recipe, member: Member, name: str, sizes: Mapping[str, int], counted: set[str]
) -> TensorStorage:
    made = derivation(recipe, member, name)
    entry = made.entry
    fresh = {payload for payload, _ in made.payloads} - counted
    counted |= fresh
    return TensorStorage(
        member=member.name,
        name=name,
        dtype=entry.dtype,
        shape=entry.shape,
        source=entry.source.kind,
        overlays=tuple(overlay.kind for overlay in made.overlays),
        bytes=sum(sizes[p] for p in fresh),
        dense_bytes=byte_count(entry.dtype, entry.shape),
    )


def plot_storage(report: StorageReport, path: str | os.PathLike[str]) -> None:
    """Two bar charts, to a .png, .svg or .pdf file: the file against dense ones, and its parts.
    Raises OutputError."""
    save(drawn(report), path)


def drawn(report: StorageReport) -> Figure:
    """The charts, as high as they have bars. A bar that stands for several parts is as long as one
    of them, and says how many they are."""
    from matplotlib.figure import Figure

    parts = report.parts_held()
    figure = Figure(figsize=(9, max(2.6, 1.2 + 0.24 * len(parts))), layout="constrained")
    figure.suptitle(legible(report.file, 60), fontsize=10, parse_math=False)
    whole = [(name, size, 1) for name, size in report.whole()]
    charts = (("against dense", whole), ("what the file holds", parts))
    for axes, (title, rows) in zip(figure.subplots(1, 2), charts, strict=True):
        _plot_bars(axes, rows)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(max(len(parts), 2) - 0.5, -0.5)  # bars of one thickness, from the top
    return figure


def _plot_bars(axes: Axes, rows: list[tuple[str, int, int]]) -> None:
    """One bar a row, its figure beside it."""
    places = range(len(rows))
    unit, scale = byte_unit(max((size for _, size, _ in rows), default=0))
    bars = axes.barh(places, [size / scale for _, size, _ in rows])
    told = [f"{f'{count} x ' if count > 1 else ''}{size / scale:,.2f}" for _, size, count in rows]
    axes.bar_label(bars, told, padding=3, fontsize=8)
    axes.set_yticks(places, told_apart([name for name, _, _ in rows], LONGEST), parse_math=False)
    axes.set_xlabel(unit)
    axes.margins(x=0.18)
    axes.spines[["top", "right"]].set_visible(False)
