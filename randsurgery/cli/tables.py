"""What ``inspect`` shows: reports as tables of 80 columns, bars in a terminal alone, and a row a
line, however long, in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from randsurgery.cli import render
from randsurgery.cli.common import clean, out, size
from randsurgery.cli.render import show, table

if TYPE_CHECKING:
    from randsurgery.inspection.layers import Layer
    from randsurgery.inspection.model import MemberView, ModelReport
    from randsurgery.inspection.storage import StorageReport
    from randsurgery.inspection.verify import VerifyReport

EIGHTHS = " ▏▎▍▌▋▊▉█"


def clip(text: Any, width: int = 60) -> str:
    """What a file says, for one line: control characters escaped, cut to ``width``."""
    plain = clean(str(text)[: width + 1])
    return plain if len(plain) <= width else plain[: width - 3] + "..."


# --- storage -------------------------------------------------------------------------------------


def show_storage(report: StorageReport, *, tensors: bool) -> None:
    """The bytes of a file, by member if it has several, and as bars in a terminal."""
    if not report.tensors:
        out().print(f"{clean(report.file)}: {size(report.bytes)}, holds no tensors")
        return
    if not report.dense_bytes:
        count = len(report.tensors)
        out().print(f"{clean(report.file)}: {size(report.bytes)}, {count} tensors without elements")
        return
    if len(report.members) > 1 and not tensors:
        _show_members(report)
    else:
        render.show_storage(report, tensors=tensors)
    if report.parts > 1:
        out().print(f"in {report.parts} parts")
    if sys.stdout.isatty():
        show_bars(report)


def _show_members(report: StorageReport) -> None:
    made = table("made of", "tensors", "bytes", "dense", right=(1, 2, 3))
    for name, count, stored, dense in report.groups():
        made.add_row(name, f"{count:,}", f"{stored:,}", f"{dense:,}")
    show(made)
    out().print()
    made = table("member", "payloads", "header", "bytes", "dense", right=(1, 2, 3, 4))
    shared = report.shared_bytes + report.shared_header_bytes
    made.add_row(
        "shared", f"{report.shared_bytes:,}", f"{report.shared_header_bytes:,}", f"{shared:,}", ""
    )
    for row in report.members:
        made.add_row(
            clean(row.name), f"{row.payload_bytes:,}", f"{row.header_bytes:,}", f"{row.bytes:,}",
            f"{row.dense_bytes:,}",
        )  # fmt: skip
    payloads = report.bytes - report.header_bytes
    made.add_row("file", f"{payloads:,}", f"{report.header_bytes:,}", f"{report.bytes:,}",
                 f"{report.dense_bytes:,}")  # fmt: skip
    show(made)
    out().print(
        f"{clean(report.file)}: {size(report.bytes)}, {len(report.members)} dense files "
        f"{size(report.dense_bytes)}, {render.compared(report.ratio)}"
    )


def show_bars(report: StorageReport) -> None:
    """The file against dense ones, and below it its parts, all on one scale. For terminals."""
    console = out()
    rows = [*report.whole(), *((f"  {name}", count) for name, count in report.breakdown())]
    labels = [clip(name, 30) for name, _ in rows]
    figures = [size(count) for _, count in rows]
    wide, narrow = max(map(len, labels)), max(map(len, figures))
    room = max(8, min(console.width, 100) - wide - narrow - 4)
    largest = max(count for _, count in rows)
    console.print()
    for label, figure, (_, count) in zip(labels, figures, rows, strict=True):
        drawn = bar(count / max(1, largest), room, console.encoding)
        console.print(f"{label:<{wide}}  {figure:>{narrow}}  {drawn}".rstrip())


def bar(share: float, room: int, encoding: str = "utf-8") -> str:
    """A bar of ``share`` of ``room`` columns, in eighths; what is above 0 shows."""
    if not encoding.lower().startswith("utf"):
        return "#" * (max(1, round(share * room)) if share > 0 else 0)
    eighths = max(1, round(share * room * 8)) if share > 0 else 0
    return EIGHTHS[8] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


# --- verify --------------------------------------------------------------------------------------


def show_verify(report: VerifyReport) -> None:
    """One line if all agreed, else the checks that failed."""
    for line in _failures(report):
        out().print(line)
    out().print(f"{clean(report.file)}: {_outcome(report)}")


def _failures(report: VerifyReport) -> list[str]:
    """What is wrong, each fault once: a corrupt payload also fails the tensor made of it."""
    found: dict[str, str] = {}
    for check in report.failures:
        found.setdefault(check.detail, check.what)
    return [clean(f"{what}: {detail}") for detail, what in found.items()]


def _outcome(report: VerifyReport) -> str:
    bad, count = sum(not check.ok for check in report.checks), len(report.checks)
    told = f"{bad} of {count:,} digests differ" if bad else f"{count:,} digests agree"
    if report.networks is None:
        return told
    if not report.networks:
        return f"{told}, names no architecture"
    fit, many = sum(check.ok for check in report.networks), len(report.networks)
    return f"{told}, {fit} of {many} networks fit" if fit < many else f"{told}, {_fitting(many)}"


def _fitting(count: int) -> str:
    return "the network fits" if count == 1 else f"{count} networks fit"


def show_verified(report: VerifyReport) -> None:
    """One of many files, on one line, and what failed below it."""
    console, name = out(), clean(report.file)
    if report.foreign:
        console.print(f"{name}: skipped, not a file of randsurgery")
    elif report.fault is not None:
        console.print(f"{name}: FAILED, {clean(report.fault)}")
    else:
        console.print(f"{name}: {'' if report.ok else 'FAILED, '}{_outcome(report)}")
        lines = _failures(report)
        for line in lines[:5]:
            console.print(f"  {line}")
        if (left := len(lines) - 5) > 0:
            console.print(f"  and {left:,} more; verify this file alone to see them")


def show_verified_all(reports: Sequence[VerifyReport]) -> None:
    """How many files agree, fail, were skipped."""
    skipped = sum(report.foreign for report in reports)
    bad = sum(not report.ok for report in reports)
    good = len(reports) - skipped - bad
    files = render.many(len(reports), "file")
    out().print(f"{files}: {good} verified, {bad} failed, {skipped} skipped")


# --- model ---------------------------------------------------------------------------------------


def show_model(report: ModelReport, depth: int | None) -> None:
    """The facts of a network, then its layers."""
    render.show_pairs(_facts(report))
    if not report.tensors:
        if len(report.members) > 1:
            out().print("the members share no tensors; see one with --member NAME")
        else:
            out().print("no layers: the file holds no tensors")
        return
    chosen = report.fitting_depth() if depth is None else depth
    rows = report.layers(chosen)
    out().print()
    if report.kind not in ("randsurgery", "architecture"):
        show(_foreign_layers(report, rows))
    else:
        show(_layers(report, rows))
    if depth is None and chosen:
        out().print(f"blocks, as by --depth {chosen}; --depth 0 shows every layer")


def _layers(report: ModelReport, rows: Sequence[Layer]) -> Table:
    one = report.member is not None
    total, end = report.parameters, []
    columns = {"layer": [clean(row.name) for row in rows], "shape": [_shape(row) for row in rows]}
    columns["parameters"] = [f"{row.parameters:,}" for row in rows]
    if one and report.learned != 0:
        columns["learned"] = [_learned(row.learned, row.masked, row.parameters) for row in rows]
        end = [_learned(report.learned, report.masked, total)]
    columns["source"] = [", ".join(row.sources) for row in rows]
    overlays = [", ".join(map(_overlay, row.overlays)) for row in rows]
    if any(overlays):
        columns["overlay"] = overlays
    made = table(*columns, right=(2, 3) if end else (2,))
    for cells in zip(*columns.values(), strict=True):
        made.add_row(*cells)
    made.add_row("all", "", f"{total:,}", *end)
    return made


def _foreign_layers(report: ModelReport, rows: Sequence[Layer]) -> Table:
    made = table("layer", "shape", "dtype", "parameters", right=(3,))
    for row in rows:
        made.add_row(clean(row.name), _shape(row), ", ".join(row.dtypes), f"{row.parameters:,}")
    made.add_row("all", "", "", f"{report.parameters:,}")
    return made


def _shape(row: Layer) -> str:
    if row.layers > 1:
        return f"{row.layers} layers"
    return "x".join(map(str, row.shape)) or "scalar"


def _learned(learned: int | None, masked: int, total: int) -> str:
    """A mask, and the share of what is learned otherwise; nothing is said of what is frozen."""
    if learned is None:
        return "?"
    values = learned - masked
    share = [f"{values / total:.1%}".replace("100.0%", "all")] if values and total else []
    return ", ".join((["mask"] if masked else []) + share)


def _overlay(overlay: Any) -> str:
    if overlay.kind in ("replace", "scale") or not overlay.size:
        return str(overlay.kind)
    return f"{overlay.kind} {overlay.count / overlay.size:.1%}"


def _facts(report: ModelReport) -> list[tuple[str, str]]:
    about = {
        "randsurgery": "of randsurgery",
        "safetensors": "dense safetensors",
        "sharded safetensors": f"dense safetensors in {report.parts} parts",
        "torch.save": "of torch.save",
        "architecture": "",
    }[report.kind]
    facts = [("file", f"{clip(report.file)}, {about}, {size(report.bytes)}")] if about else []
    if report.architecture is not None:
        arguments = ", ".join(f"{k}={v}" for k, v in report.arguments.items())
        facts.append(("architecture", clip(f"{report.architecture}({arguments})", 66)))
    elif report.kind == "randsurgery":
        facts.append(("architecture", "none named; load it with a module of your own"))
    for base in report.bases.values():
        told = [str(base[key]) for key in ("origin", "revision", "file") if base.get(key)]
        facts.append(("base", clip(", ".join(told) or base["identity"])))
    if report.shown is not None:
        if len(report.members) > 1:
            facts.append(("member", f"{report.member}, one of {len(report.members)}"))
        facts += _about(report.shown)
    elif report.members:
        facts.append(("shown", "what all members share; see one with --member NAME"))
        facts += [(f"member {m.name}", _in_short(m)) for m in report.members[:20]]
        if len(report.members) > 20:
            facts.append(("", f"and {len(report.members) - 20} more members"))
    for key, value in list(report.metadata.items())[:8]:
        facts.append((f"metadata {clip(key, 20)}", clip(value, 50)))
    return [*facts, *_counts(report)]


def _counts(report: ModelReport) -> list[tuple[str, str]]:
    count, dtypes = len(report.tensors), sorted({t.dtype for t in report.tensors})
    layers = len(report.layers())
    told = f"{report.parameters:,} in {render.many(count, 'tensor')}"
    told += f" of {render.many(layers, 'layer')} ({', '.join(dtypes)})" if count else ""
    facts = [("parameters", told)]
    if report.buffers:
        facts.append(("buffers", f"{report.buffers:,} elements: running statistics and the like"))
    if report.member is not None:
        planned = report.shown is not None and report.shown.planned
        facts.append(("learned", _told_learned(report.learned, report.masked, planned)))
    return facts


def _told_learned(learned: int | None, masked: int, planned: bool) -> str:
    if learned is None:
        return "survivors of several masks, which no header counts"
    parts = [f"{masked:,} weights by a mask"] if masked else []
    parts += [f"{learned - masked:,} values"] if learned - masked else []
    return (" and ".join(parts) or "nothing") + (", as planned" if planned else "")


def _about(view: MemberView) -> list[tuple[str, str]]:
    facts = []
    if (seen := view.input) is not None:
        facts.append(("input", _input(seen)))
    if view.classes:
        names = clip(", ".join(view.classes[:40]), 50)
        facts.append(("classes", f"{len(view.classes):,}: {names}"))
    elif view.head is not None:
        facts.append(("classes", f"{view.head['classes']:,}, not named"))
    if view.head is not None:
        facts.append(("head", clip(f"{view.head['name']}, {view.head['kind']}")))
    if view.dataset is not None:
        splits = f"{view.dataset['train_split']}, {view.dataset['test_split']}"
        facts.append(("dataset", clip(f"{view.dataset['name']} ({splits})")))
    if view.temperature is not None:
        facts.append(("temperature", f"{view.temperature:.4g}"))
    return facts + _provenance(view.provenance)


def _input(seen: dict[str, Any]) -> str:
    height, width = seen["size"]
    means, stds = ([f"{v:.4g}" for v in seen[key]] for key in ("mean", "std"))
    each = [values[0] if len(set(values)) == 1 else " ".join(values) for values in (means, stds)]
    return clip(
        f"{seen['channels']}x{height}x{width}, mean {each[0]}, std {each[1]}, "
        f"{seen['interpolation']}, crop {seen['crop']:.4g} {seen['crop_mode']}",
        66,
    )


def _in_short(view: MemberView) -> str:
    from randsurgery.inspection.members import recorded_accuracy

    accuracy, images = recorded_accuracy(view.provenance)
    learned = _told_learned(view.learned, view.masked, view.planned)
    parts = [
        f"{view.head['classes']:,} classes" if view.head else "",
        str(view.dataset["name"]) if view.dataset else "",
        "nothing learned" if learned == "nothing" else learned,
        "" if accuracy is None else f"{images} accuracy {accuracy:.4f}",
    ]
    return clip(", ".join(part for part in parts if part) or "says nothing of itself", 64)


TOLD = (
    "kind", "k", "share", "fraction", "count", "epochs", "init", "seed", "init_seed", "opt", "lr",
    "algorithm",
)  # fmt: skip
"""Settings that say most of a run."""


def _provenance(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Who made it and how; provenance is free, so that anything may stand there."""
    facts = []
    settings, metrics, versions = (
        found[key] if isinstance(found.get(key), dict) else {}
        for key in ("settings", "metrics", "versions")
    )
    told = [
        f"{key}={clip(settings[key], 24)}"
        for key in TOLD
        if isinstance(settings.get(key), (str, int, float)) and settings[key] is not False
    ]
    if isinstance(found.get("command"), str):
        how = f" with {', '.join(told)}" if told else ""
        facts.append(("made by", clip(clip(found["command"], 24) + how, 66)))
    scored = [
        f"{words} {metrics[name]:.4f}"
        for name, words in (
            ("test_accuracy", "test accuracy"),
            ("test_loss", "test loss"),
            ("val_accuracy", "validation accuracy"),
        )
        if isinstance(metrics.get(name), float)
    ]
    if scored:
        epoch = metrics.get("epoch")
        after = f" after epoch {epoch}" if isinstance(epoch, int) else ""
        facts.append(("result", clip(", ".join(scored) + after)))
    if versions:
        pairs = [f"{clip(name, 16)} {clip(versions[name], 16)}" for name in list(versions)[:8]]
        facts.append(("versions", clip(", ".join(pairs), 66)))
    return facts
