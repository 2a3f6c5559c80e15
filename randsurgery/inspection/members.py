"""The members of a file: what each adds, against as many files of their own."""

from __future__ import annotations

import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from randsurgery.format.checkpoint import finished_bytes, payload_names, read_checkpoint
from randsurgery.format.container import Container, write_atomically
from randsurgery.format.fields import SHARED
from randsurgery.format.members import fault_of
from randsurgery.format.recipe import Member
from randsurgery.inspection.headers import header_text


@dataclass(frozen=True)
class MemberRow:
    """One member. ``bytes``: what it adds to the file, its payloads and what the header says of
    it; ``payload_bytes``: the former alone; ``dense_bytes``: its network stored whole. ``fault``:
    what is wrong with its payloads."""

    name: str
    bytes: int
    payload_bytes: int
    dense_bytes: int
    tensors: int
    classes: int | None
    dataset: str | None
    accuracy: float | None  # on the test split, at the end of training
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
        rows = []
        for member in recipe.members:
            names = list(payload_names(recipe, member.name))
            payload = sum(sizes[name] for name in names)
            rows.append(
                MemberRow(
                    name=member.name,
                    bytes=payload + header_text(member, names, file.infos),
                    payload_bytes=payload,
                    dense_bytes=finished_bytes(recipe, member),
                    tensors=len(member.tensors),
                    classes=member.head.classes if member.head else None,
                    dataset=member.dataset.name if member.dataset else None,
                    accuracy=_accuracy(member),
                    temperature=None
                    if member.calibration is None
                    else float.fromhex(member.calibration.temperature),
                    fault=fault_of(checkpoint, member.name),
                )
            )
        return MembersReport(
            file=file.path.name,
            model=recipe.model.name if recipe.model else None,
            backbone_id=recipe.backbone_id,
            bytes=file.size,
            header_bytes=file.header_bytes,
            shared_bytes=sum(sizes[name] for name in payload_names(recipe, SHARED)),
            members=tuple(rows),
            fault=fault_of(checkpoint, SHARED),
        )


def _accuracy(member: Member) -> float | None:
    """What training recorded last; provenance is free, so that anything may stand there."""
    metrics = member.provenance.get("metrics")
    found = metrics.get("test_accuracy") if isinstance(metrics, dict) else None
    return found if isinstance(found, float) and 0 <= found <= 1 else None


def plot_members(report: MembersReport, path: str | os.PathLike[str]) -> None:
    """Two charts, to a .png, .svg or .pdf file: the bytes of this file and of files of their own by
    the number of members, and what each member adds. Raises OutputError."""
    from matplotlib.figure import Figure

    count, unit = len(report.members), 1e6
    rest = report.bytes - sum(row.bytes for row in report.members)
    together, apart = [rest / unit], [0.0]
    for row in report.members:
        together.append(together[-1] + row.bytes / unit)
        apart.append(apart[-1] + row.dense_bytes / unit)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    lines, bars = figure.subplots(1, 2)
    numbers = range(count + 1)
    lines.plot(numbers[1:], apart[1:], marker="o", markersize=3, label="dense files")
    lines.plot(numbers[1:], together[1:], marker="o", markersize=3, label="this file")
    lines.set_xlabel("members")
    lines.set_ylabel("MB in all")
    lines.set_yscale("log")
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.legend(frameon=False)
    lines.grid(alpha=0.3)
    names = [plain_name(row.name) for row in report.members]
    bars.barh(["shared", *names], [rest / unit, *(row.bytes / unit for row in report.members)])
    dense = max(row.dense_bytes for row in report.members) / unit
    bars.axvline(dense, color="black", linestyle="--", linewidth=1)
    bars.annotate("a dense file", (dense, -0.3), ha="right", va="bottom", rotation=90, fontsize=8)
    bars.set_xscale("log")
    bars.invert_yaxis()
    bars.set_xlabel("MB added")
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix.lower().removeprefix("."), dpi=150)
    write_atomically(path, iter([picture.getvalue()]))


def plain_name(name: str) -> str:
    """A member's name on a picture, cut to what fits. It holds no markup: letters, digits, ._-"""
    return name if len(name) <= 24 else name[:21] + "..."
