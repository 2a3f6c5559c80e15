"""``randsurgery inspect diff``: what differs between two networks. Imports torch for .pth alone."""

from __future__ import annotations

import json as text
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from randsurgery.cli import common, files
from randsurgery.cli.common import clean, command, out, print_json

if TYPE_CHECKING:
    from randsurgery.inspection.diff import DiffReport, FactDiff, TensorDiff

LISTED = 10
"""Lines of one sort that are shown; --json has all."""
CUT = 28
"""Letters of a value that are shown."""


@command
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=files.ANY_FILE)],
    b: Annotated[str, typer.Argument(metavar="B", help=files.ANY_FILE)],
    member_a: Annotated[
        str | None, typer.Option("--member-a", metavar="NAME", help="The member of A.")
    ] = None,
    member_b: Annotated[
        str | None, typer.Option("--member-b", metavar="NAME", help="The member of B.")
    ] = None,
    base: common.BaseOption = None,
    depth: common.Depth = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Which tensors, filters and bits differ between two networks, and by how much.

    Exit code 1 if anything differs, 0 if not.

    Recorded facts count: model, classes, head, input, plan; popup scores and provenance do not.

    Payloads are not read where the headers prove tensors equal; inspect verify reads them all.
    """
    from randsurgery.inspection.diff import diff as report_on

    files.check_file(a)
    files.check_file(b)
    a, b = files.located(a), files.located(b)
    report = report_on(
        a,
        b,
        member_a=member_a,
        member_b=member_b,
        base=base,
        tensors_a=files.read_by_torch(a),
        tensors_b=files.read_by_torch(b),
        find_base=files.given_base,
    )
    if json:
        print_json(report.to_json())
    else:
        _show(report, depth)
    if not report.same:
        raise typer.Exit(1)


def _show(report: DiffReport, depth: int | None) -> None:
    from randsurgery.inspection.diff import differing

    rows = report.differences
    if compared := [row for row in rows if row.compared]:
        _show_blocks(compared, depth)
        _show_strange(compared)
    if cast := [row for row in differing(rows, "kind") if row.compared]:
        _list("of another dtype", [f"{r.name}: {_kind(r.kind_a)}, {_kind(r.kind_b)}" for r in cast])
    if other := [row for row in differing(rows, "kind") if not row.compared]:
        _list("of another shape", [f"{r.name}: {_kind(r.kind_a)}, {_kind(r.kind_b)}"
                                   for r in other])  # fmt: skip
    for state, kind, where in (("only_a", "kind_a", "A"), ("only_b", "kind_b", "B")):
        if found := [row for row in rows if row.state == state]:
            _list(f"in {where} alone", [f"{r.name}: {_kind(getattr(r, kind))}" for r in found])
    if report.facts:
        _show_facts(report.facts)
    _show_words(report)


def _show_blocks(rows: Sequence[TensorDiff], depth: int | None) -> None:
    from randsurgery.cli.render import show, table
    from randsurgery.inspection.grouping import grouped

    masks = any(row.mask_bits is not None for row in rows)
    columns = ("block", "tensors", "elements", "bits", "filters", "max\n|a-b|", "mean\n|a-b|")
    made = table(*columns, *["mask\nbits"] * masks, right=tuple(range(1, 8)))
    made.padding = (0, 1, 0, 0)
    for name, block in grouped(rows, lambda row: row.name, depth).items():
        size, finite = sum(row.size for row in block), sum(row.finite for row in block)
        highest = max((row.max_abs for row in block if row.max_abs is not None), default=None)
        total = sum((row.mean_abs or 0.0) * (row.finite / max(1, finite)) for row in block)
        masked = [row for row in block if row.mask_bits is not None]
        flipped = _share(sum(r.mask_bits or 0 for r in masked), sum(r.size for r in masked))
        made.add_row(
            clean(name),
            f"{len(block):,}",
            _share(sum(row.elements for row in block), size),
            _bits(block),
            _filters(block),
            _figure(highest),
            _figure(total if finite else None),
            *[flipped] * masks,
        )
    show(made)


def _show_strange(rows: Sequence[TensorDiff]) -> None:
    found = [row for row in rows if row.nan_a or row.nan_b or row.infinite_a or row.infinite_b]
    if found:
        _list("not finite", [f"{r.name}: A has {r.nan_a:,} NaN and {r.infinite_a:,} infinite, "
                             f"B {r.nan_b:,} and {r.infinite_b:,}" for r in found])  # fmt: skip


def _bits(rows: Sequence[TensorDiff]) -> str:
    """The share of bits that differ; of tensors of two dtypes none can be told."""
    from randsurgery.format.tensors import byte_count

    if any(row.bits is None or row.kind_a is None for row in rows):
        return "-"
    total = sum(8 * byte_count(*row.kind_a) for row in rows if row.kind_a)
    return _share(sum(row.bits or 0 for row in rows), total)


def _filters(rows: Sequence[TensorDiff]) -> str:
    """How many filters differ, or of one tensor which, if they lie side by side: ``0-5 of 16``."""
    count, total = (sum(getattr(r, key) for r in rows) for key in ("filters_differ", "filters"))
    runs = rows[0].filters_at if len(rows) == 1 else None
    if runs and len(runs) == 1 and count < total:
        return f"{runs[0][0]:,}-{runs[0][1]:,} of {total:,}"
    return f"{count:,} of {total:,}"


def _show_facts(facts: Sequence[FactDiff]) -> None:
    from randsurgery.cli.render import show, table

    made = table("recorded", "A", "B")
    for fact in facts[:LISTED]:
        numbers = fact.what != "classes"  # names may look like anything
        made.add_row(
            clean(fact.what), _value(fact.a, numbers=numbers), _value(fact.b, numbers=numbers)
        )
    show(made)
    _more(len(facts))


def _show_words(report: DiffReport) -> None:
    console = out()
    count = len(report.differences)
    tensors = f"{count:,} of {report.tensors:,} tensors differ"
    facts = f", and {len(report.facts):,} recorded facts" if report.facts else ""
    backbone = {True: "the same backbone", False: "another backbone", None: ""}
    words = [tensors + facts, backbone[report.same_backbone]]
    if report.same:
        words[0] = f"no difference in {report.tensors:,} tensors"
    console.print(f"A {_label(report.file_a, report.member_a)}")
    console.print(f"B {_label(report.file_b, report.member_b)}")
    console.print("; ".join(word for word in words if word))


def _label(file: str, member: str | None) -> str:
    return clean(file if member in (None, "main") else f"{file}:{member}")


def _list(title: str, lines: Sequence[str]) -> None:
    console = out()
    console.print(f"{title}:")
    for line in lines[:LISTED]:
        console.print(f"  {clean(line)}")
    _more(len(lines))


def _more(count: int) -> None:
    if count > LISTED:
        out().print(f"  and {count - LISTED:,} more; --json has all")


def _kind(kind: tuple[str, tuple[int, ...]] | None) -> str:
    dtype, shape = kind or ("", ())
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}"


def _value(value: Any, *, numbers: bool) -> str:
    """A JSON value for people, in one short line; ``numbers``: texts may be recorded floats."""
    shown = clean(_words(value, numbers=numbers))
    if isinstance(value, list) and len(shown) > CUT:
        shown = f"{len(value):,}: {shown}"
    return shown if len(shown) <= CUT else shown[: CUT - 3] + "..."


def _words(value: Any, *, numbers: bool) -> str:
    from randsurgery.format.fields import as_given

    if value is None:
        return "-"
    if isinstance(value, dict):
        parts = ((key, _words(part, numbers=numbers)) for key, part in value.items())
        return ", ".join(f"{key} {part}" for key, part in parts)
    if isinstance(value, list):
        return ", ".join(_words(part, numbers=numbers) for part in value)
    if isinstance(value, str):
        found = as_given(value) if numbers else value
        return f"{found:.6g}" if isinstance(found, float) else value
    return text.dumps(value)


def _share(part: int, whole: int) -> str:
    if not whole:
        return "-"
    return "<0.1%" if 0 < part / whole < 0.0005 else f"{part / whole:.1%}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
