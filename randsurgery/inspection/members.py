"""The members of a file: what each adds, against as many files of their own."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from randsurgery.format.checkpoint import read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.derivation import payload_names
from randsurgery.format.fields import SHARED
from randsurgery.format.members import fault_of
from randsurgery.inspection.headers import MemberBytes, member_bytes
from randsurgery.inspection.pictures import byte_unit, legible, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class MemberRow(MemberBytes):
    """One member. ``fault``: what is wrong with its payloads."""

    classes: int | None
    dataset: str | None
    accuracy: float | None  # at the end of training
    accuracy_on: str  # "test" or "validation": the images that it is of
    temperature: float | None
    fault: str | None = None


@dataclass(frozen=True)
class MembersReport:
    """A file's members. ``shared_bytes``: payloads that all have in common."""

    file: str
    model: str | None
    backbone_id: str | None
    bytes: int
    header_bytes: int
    shared_bytes: int
    members: tuple[MemberRow, ...]
    fault: str | None = None  # of the shared payloads
    bases: tuple[str, ...] = ()  # dense files that the file needs beside it

    @property
    def rest_bytes(self) -> int:
        """Bytes that are no member's: shared payloads and the rest of the header."""
        return self.bytes - sum(member.bytes for member in self.members)

    @property
    def dense_bytes(self) -> int:
        """Bytes of as many networks, each stored whole."""
        return sum(member.dense_bytes for member in self.members)

    @property
    def faults(self) -> list[str]:
        """What is damaged, one line each."""
        found = [] if self.fault is None else [f"the backbone: {self.fault}"]
        return found + [f"{m.name}: {m.fault}" for m in self.members if m.fault is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "dense_bytes": self.dense_bytes, "ok": not self.faults}


def list_members(path: str | os.PathLike[str]) -> MembersReport:
    """Report on a file's members; every payload is held against its digest, and what fails is
    reported beside the rest. Raises FileFormatError if the header cannot be read."""
    with read_checkpoint(path, need_bases=False) as checkpoint:
        file, recipe = checkpoint.payloads, checkpoint.recipe
        assert isinstance(file, Container)
        sizes = {name: info.stop - info.start for name, info in file.infos.items()}
        rows = [
            MemberRow(
                **asdict(member_bytes(recipe, member, file.infos)),
                classes=member.head.classes if member.head else None,
                dataset=member.dataset.name if member.dataset else None,
                accuracy=(measured := recorded_accuracy(member.provenance))[0],
                accuracy_on=measured[1],
                temperature=None
                if member.calibration is None
                else float.fromhex(member.calibration.temperature),
                fault=fault_of(checkpoint, member.name),
            )
            for member in recipe.members
        ]
        return MembersReport(
            file=file.path.name,
            model=recipe.model.name if recipe.model else None,
            backbone_id=recipe.backbone_id,
            bytes=file.size,
            header_bytes=file.header_bytes,
            shared_bytes=sum(sizes[name] for name in payload_names(recipe, SHARED)),
            members=tuple(rows),
            fault=fault_of(checkpoint, SHARED),
            bases=tuple(sorted(ref.file or key for key, ref in recipe.bases.items())),
        )


def recorded_accuracy(provenance: dict[str, Any]) -> tuple[float | None, str]:
    """What training recorded of what it kept, and on which images: test, else validation.
    Provenance is free, so that anything may stand there."""
    metrics = provenance.get("metrics")
    for key, images in (("test_accuracy", "test"), ("val_accuracy", "validation")):
        found = metrics.get(key) if isinstance(metrics, dict) else None
        if isinstance(found, float) and 0 <= found <= 1:
            return found, images
    return None, "test"


MOST = 20
"""Members that get a bar of their own; the others share one."""


def plot_members(report: MembersReport, path: str | os.PathLike[str]) -> None:
    """Two charts, to a .png, .svg or .pdf file: the bytes of this file and of files of their own by
    the number of members, and what each member adds. Raises OutputError."""
    save(drawn(report), path)


def drawn(report: MembersReport) -> Figure:
    """The charts, as high as they have bars."""
    from matplotlib.figure import Figure

    rows = _bars(report)
    figure = Figure(figsize=(9, max(3.4, 1.0 + 0.28 * len(rows))), layout="constrained")
    lines, bars = figure.subplots(1, 2)
    _plot_totals(lines, report)
    _plot_bars(bars, rows)
    return figure


def _bars(report: MembersReport) -> list[tuple[str, float, str]]:
    """(label, bytes, colour) of each bar, top down."""
    members = report.members
    dense = max(row.dense_bytes for row in members)
    found = [
        ("a dense file", float(dense), "0.7"),
        ("shared", float(report.rest_bytes), "tab:cyan"),
    ]
    found += [(legible(row.name, 24), float(row.bytes), "tab:blue") for row in members[:MOST]]
    if others := members[MOST:]:
        mean = sum(row.bytes for row in others) / len(others)
        found.append((f"{len(others)} more, each", mean, "tab:blue"))
    return found


def _plot_totals(axes: Any, report: MembersReport) -> None:
    """Bytes in all by the number of members, from none on."""
    together, apart = [report.rest_bytes], [0]
    for row in report.members:
        together.append(together[-1] + row.bytes)
        apart.append(apart[-1] + row.dense_bytes)
    unit, scale = byte_unit(max(*together, *apart))
    for label, values, colour in (
        ("dense files", apart, "0.6"),
        ("this file", together, "tab:blue"),
    ):
        shown = [value / scale for value in values]
        told = f"{label}: {_told(values[-1])}"
        axes.plot(range(len(shown)), shown, color=colour, marker="o", markersize=3, label=told)
    axes.set_xlabel("members")
    axes.set_ylabel(f"{unit} in all")
    axes.set_ylim(0, 1.3 * max(*together, *apart) / scale)  # room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.3)


def _plot_bars(axes: Any, rows: list[tuple[str, float, str]]) -> None:
    """One bar a row, its figure beside it."""
    labels, sizes, colours = zip(*rows, strict=True)
    unit, scale = byte_unit(max(sizes))
    places = range(len(rows))
    drawn = axes.barh(places, [size / scale for size in sizes], color=colours)
    axes.bar_label(drawn, [_told(size) for size in sizes], padding=3, fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(sizes) / scale)  # room for the longest bar's figure
    axes.set_xlabel(f"{unit} added")


def _told(count: float) -> str:
    """Bytes as a label says them."""
    unit, scale = byte_unit(count)
    return f"{count / scale:.3g} {unit}"
