"""``randsurgery inspect masks``: what masks keep. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import clean, command, note, out, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from randsurgery.inspection.masks import MasksReport, Summary
    from randsurgery.inspection.overlap import LayerOverlap, Overlap

SORTS = ("name", "size", "density", "dead", "signs", "bound")
PAIRS = 28
"""Pairs of networks that are listed one by one: those of eight."""


@command
def masks(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files of randsurgery that have masks.")
    ],
    pattern: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="PATTERN", help="Tensors or layers, such as 'layer1.*'."),
    ] = None,
    member: Annotated[
        list[str] | None, typer.Option("--member", metavar="NAME", help="These members alone.")
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            help=f"Order of the first table: {', '.join(SORTS)}. Largest first, but for names.",
        ),
    ] = "name",
    depth: common.Depth = None,
    per_filter: Annotated[
        bool, typer.Option("--per-filter", help="One row a filter, here and in the CSV.")
    ] = False,
    base: common.BaseOption = None,
    csv: Annotated[
        str | None,
        typer.Option(
            "--csv",
            metavar="FILE",
            help="Write one row a mask.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    force: common.Force = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """What masks keep: densities, dead filters, signs, overlap, bytes against entropy.

    Of several members or files each pair is compared, and held against chance. A filter is an
    index along a tensor's first dimension, an input one along its second.
    """
    from randsurgery.errors import UsageError, near
    from randsurgery.format.container import check_output
    from randsurgery.format.shards import check_not_input
    from randsurgery.inspection.masks import masks as report_on
    from randsurgery.inspection.masks import write_csv

    if sort not in SORTS:
        raise UsageError(f"unknown --sort {sort!r}, expected {', '.join(SORTS)}{near(sort, SORTS)}")
    if csv is not None:
        target = check_output(csv, force=force, option="--csv")
        check_not_input(target, (*files, base), option="--csv")
    report = report_on(files, members=member or (), patterns=pattern or (), base=base)
    for line in report.notes:
        note(clean(line))
    if csv is not None:
        write_csv(report, csv, filters=per_filter)
    if json:
        print_json(report.to_json())
    elif per_filter:
        _show_filters(report)
    else:
        _show(report, depth, sort)
    if csv is not None:
        note(f"written: {csv}")


def _show(report: MasksReport, depth: int | None, sort: str) -> None:
    from randsurgery.inspection.grouping import grouped
    from randsurgery.inspection.masks import summary

    networks = report.networks
    if len(networks) == 1:
        blocks = grouped(networks[0].layers, lambda row: _layer(row.name), depth)
        _show_rows("block", [(name, summary(rows)) for name, rows in blocks.items()], sort)
        _show_words(summary(networks[0].layers), networks[0].tensors, networks[0].label)
        return
    _show_rows("network", [(n.label, summary(n.layers)) for n in networks], sort)
    out().print()
    _show_pairs(report.overlaps)
    if any(overlap.layers for overlap in report.overlaps):
        out().print()
        _show_overlap_blocks(report.overlaps, depth)
    left = sum(overlap.left_out for overlap in report.overlaps)
    if left:
        out().print(f"{left:,} masks have no counterpart of their shape in the other of a pair")


def _show_rows(what: str, rows: list[tuple[str, Summary]], sort: str) -> None:
    keys = {
        "size": lambda s: s.size,
        "density": lambda s: s.density,
        "dead": lambda s: s.dead_filters + s.dead_inputs,
        "signs": lambda s: s.positive_kept,
        "bound": lambda s: s.bound,
    }
    if sort != "name":  # what is not known comes last
        rows = sorted(rows, key=lambda row: -(-1.0 if (key := keys[sort](row[1])) is None else key))
    from randsurgery.cli.render import params, show

    made = _narrow(
        what, "weights", "kept", "by\nfilter", "dead\nfilters", "dead\ninputs", "> 0\nkept",
        "> 0\nall", "times\nbound",
    )  # fmt: skip
    for name, row in rows:
        made.add_row(
            clean(name), params(row.size), percent(row.density), _span(row.lowest, row.highest),
            f"{row.dead_filters:,}", f"{row.dead_inputs:,}", percent(row.positive_kept),
            percent(row.positive_all), "-" if row.bound is None else f"{row.bound:.3f}",
        )  # fmt: skip
    show(made)
    if strange := sum(row.nan + row.infinite for _, row in rows):
        nan = sum(row.nan for _, row in rows)
        where = [clean(name) for name, row in rows if row.nan + row.infinite]
        more = ", ..." if len(where) > 5 else ""
        out().print(
            f"kept and not finite: {nan:,} NaN, {strange - nan:,} infinite, in "
            f"{', '.join(where[:5])}{more}"
        )


def _show_words(found: Summary, tensors: int, label: str) -> None:
    """What the table adds up to."""
    from randsurgery.cli.render import show_pairs

    dead = f"{found.dead_filters:,} of {found.filters:,} filters"
    bound = "" if found.bound is None else f" ({found.bound:.3f} times)"
    out().print(f"{clean(label)}: {found.tensors:,} of {tensors:,} tensors are masked")
    show_pairs(
        [
            ("kept", f"{found.kept:,} of {found.size:,} weights ({percent(found.density)})"),
            ("dead", f"{dead}, {found.dead_inputs:,} of {found.inputs:,} inputs keep nothing"),
            ("bytes", f"{found.payload_bytes:,}; entropy bound {found.entropy_bytes:,.0f}{bound}"),
        ]
    )


def _show_pairs(overlaps: Sequence[Overlap]) -> None:
    """Kept by both over kept by either, of each pair or, of many, of the extremes."""
    from randsurgery.cli.render import show

    made = _narrow("kept by both / by either", "and", "overlap", "by chance", left=(1,))
    shown = list(overlaps)
    if len(shown) > PAIRS:
        known = sorted((o for o in shown if o.jaccard is not None), key=lambda o: -(o.jaccard or 0))
        shown = [*known[:5], *known[-5:]]
    for row in shown:
        made.add_row(clean(row.first), clean(row.second), percent(row.jaccard), percent(row.chance))
    show(made)
    if len(shown) < len(overlaps):
        out().print(
            f"the five largest and the five smallest of {len(overlaps):,} pairs; --json has all"
        )


def _show_overlap_blocks(overlaps: Sequence[Overlap], depth: int | None) -> None:
    from randsurgery.cli.render import show
    from randsurgery.inspection.grouping import grouped
    from randsurgery.inspection.overlap import chance, jaccard

    rows = [(number, row) for number, o in enumerate(overlaps) for row in o.layers]
    several = len(overlaps) > 1
    made = _narrow("block", "overlap", "by chance", *(("least", "most") if several else ()))
    for name, block in grouped(rows, lambda row: _layer(row[1].name), depth).items():
        pairs: dict[int, list[LayerOverlap]] = {}
        for number, row in block:
            pairs.setdefault(number, []).append(row)
        known = [share for share in map(jaccard, pairs.values()) if share is not None]
        layers = [row for _, row in block]
        ends = [percent(min(known, default=None)), percent(max(known, default=None))]
        made.add_row(
            clean(name), percent(jaccard(layers)), percent(chance(layers)), *ends[: 2 * several]
        )
    show(made)


def _show_filters(report: MasksReport) -> None:
    from randsurgery.cli.render import show

    several = len(report.networks) > 1
    made = _narrow("tensor", "filter", "kept", "of", "")
    for network in report.networks:
        for row in network.layers:
            name = f"{network.label}: {row.name}" if several else row.name
            for index, kept in enumerate(row.filter_kept):
                density = kept / row.filter_size if row.filter_size else None
                made.add_row(
                    clean(name), str(index), f"{kept:,}", f"{row.filter_size:,}", percent(density)
                )
    show(made)


def _narrow(*columns: str, left: tuple[int, ...] = ()) -> Table:
    """A table whose columns stand close, names first."""
    from randsurgery.cli.render import table

    right = tuple(i for i in range(1, len(columns)) if i not in left)
    made = table(*columns, right=right)
    made.padding = (0, 1, 0, 0)
    return made


def _layer(name: str) -> str:
    """Almost every masked tensor is its layer's weight, and names must be short."""
    return name.removesuffix(".weight")


def _span(lowest: float | None, highest: float | None) -> str:
    if lowest is None or highest is None:
        return "-"
    low, high = f"{100 * lowest:.0f}", f"{100 * highest:.0f}"
    return f"{low}%" if low == high else f"{low}-{high}%"


def percent(share: float | None) -> str:
    """A share for people; ``-`` where there is none. Little is not nothing, nor much all."""
    if share is None:
        return "-"
    if 0 < share < 0.0005:
        return "<0.1%"
    return ">99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"
