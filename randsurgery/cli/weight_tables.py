"""Weights as tables that fit 80 columns: layer by layer, in blocks, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from randsurgery.cli.common import clean, note, out
from randsurgery.cli.render import many, params, show, table

if TYPE_CHECKING:
    from randsurgery.inspection.histograms import Histogram
    from randsurgery.inspection.moments import Summary
    from randsurgery.inspection.weights import LayerWeights, Shown, WeightsReport

SIDE_BY_SIDE = 6
"""Networks in one table."""


def figure(value: float | None) -> str:
    """A number to three digits; nothing for None."""
    return "" if value is None else f"{value:.3g}"


def show_weights(
    reports: Sequence[WeightsReport],
    key: str,
    shown: Shown,
    depth: int,
    *,
    expected: bool,
    norms: bool,
) -> None:
    """The layers of a network with their moments, or mean |w| and variance of several networks side
    by side; ``depth``: grouped by so many parts of the names. ``expected``: of the initial
    distributions alone. ``norms``: the filters' norms instead."""
    from randsurgery.inspection.weights import in_blocks, in_sorted_order

    rows = [in_sorted_order(in_blocks(r.layers, depth), key, shown) for r in reports]
    if not any(rows):
        pass  # what is said of each file says why
    elif len(reports) > 1:
        _show_side_by_side(rows, key, shown, expected=expected, norms=norms)
    elif expected:
        _show_expected(rows[0])
    elif norms:
        _show_norms(rows[0], shown)
    else:
        _show_moments(rows[0], shown)
    for number, report in enumerate(reports):
        apart = len(reports) == 1 and not norms and shown == "auto"
        about = [] if expected else _of_parts(report, shown, apart=apart)
        _show_about(report, f"[{number + 1}] " if len(reports) > 1 else "", about)
    layers = len({layer.label for report in reports for layer in report.layers})
    blocks = len({row.label for each in rows for row in each})
    if blocks < layers:
        note(f"{layers} layers in {many(blocks, 'block')}; --depth 0 shows every layer")


def _show_moments(rows: Sequence[LayerWeights], shown: Shown) -> None:
    odd = any(row.all is not None and row.all.finite < row.all.count for row in rows)
    known = any(row.initial is not None for row in rows)
    learned = any(row.learned is not None and row.learned.count for row in rows)
    columns = ["layer", "weights", "mean |w|", "std", "min", "max", "zeros"]
    columns[3:3] = ["expected"] if known else []
    columns += ["not finite"] if odd else []
    made = table(*columns, right=tuple(range(1, len(columns))))
    for row in rows:
        name, found = row.part(shown)
        title = clean(row.label)
        if shown == "auto" and all(s is not None and s.count for s in (row.learned, row.fixed)):
            made.add_row(title)
            for part in ("learned", "fixed"):
                found = getattr(row, part)
                made.add_row(f"  {part}", *_moments(row, found, part, known=known, odd=odd))
        elif found is None or not found.count:
            made.add_row(title, "empty" if row.size == 0 else "none")
        else:
            title += f" ({name})" if learned and shown == "auto" else ""
            made.add_row(title, *_moments(row, found, shown, known=known, odd=odd))
    show(made)


def _moments(
    row: LayerWeights, found: Summary, shown: Shown, *, known: bool, odd: bool
) -> list[str]:
    """The cells after a layer's name."""
    from randsurgery.inspection.weights import zero_share

    zeros, lost = zero_share(row, shown), found.count - found.finite
    start = [figure(row.initial.mean_abs if row.initial else None)] if known else []
    rest = [figure(found.std), figure(found.min), figure(found.max)]
    share = "" if zeros is None else f"{zeros:.1%}"
    return [
        params(found.count), figure(found.mean_abs), *start, *rest, share,
        *([f"{lost:,}" if lost else ""] if odd else []),
    ]  # fmt: skip


def _show_norms(rows: Sequence[LayerWeights], shown: Shown) -> None:
    made = table(
        "layer", "filters", "norm", "expected", "smallest", "largest", right=(1, 2, 3, 4, 5)
    )
    for row in rows:
        _, found = row.part(shown)
        norms = found.norms if found is not None else None
        start = row.initial.norm if row.initial else None
        if not norms or found is None:
            made.add_row(clean(row.label), "0", "", figure(start))
            continue
        made.add_row(clean(row.label), f"{len(norms):,}", figure(found.norm), figure(start),
                     figure(min(norms)), figure(max(norms)))  # fmt: skip
    show(made)


def _show_expected(rows: Sequence[LayerWeights]) -> None:
    made = table("layer", "weights", "drawn", "mean |w|", "std", "norm", right=(1, 3, 4, 5))
    for row in rows:
        cells = ["not known"]
        if row.initial is not None:
            start = row.initial
            cells = [start.kind, figure(start.mean_abs), figure(start.std), figure(start.norm)]
        made.add_row(clean(row.label), params(row.size), *cells)
    show(made)


def _show_side_by_side(
    rows: Sequence[Sequence[LayerWeights]], key: str, shown: Shown, *, expected: bool, norms: bool
) -> None:
    from randsurgery.inspection.weights import labels_in_order

    labels = labels_in_order(rows, key, shown)
    by_label = [{row.label: row for row in each} for each in rows]
    columns = (("norm", "norm"),) if norms else (("mean |w|", "mean_abs"), ("variance", "variance"))
    for title, name in columns:
        for first in range(0, len(rows), SIDE_BY_SIDE):
            numbers = range(first, min(first + SIDE_BY_SIDE, len(rows)))
            heads = [f"[{number + 1}]" for number in numbers]
            if first or title != columns[0][0]:
                out().print()
            made = table(title, *heads, "expected", right=tuple(range(1, len(heads) + 2)))
            for label in labels:
                layers = [by_label[number].get(label) for number in numbers]
                starts = {getattr(la.initial, name) for la in layers if la and la.initial}
                cells = [_cell(layer, name, shown, expected) for layer in layers]
                start = "differs" if len(starts) > 1 else figure(next(iter(starts), None))
                made.add_row(clean(label), *cells, start)
            show(made)


def _cell(layer: LayerWeights | None, name: str, shown: Shown, expected: bool) -> str:
    found = None if layer is None else layer.initial if expected else layer.part(shown)[1]
    return figure(None if found is None else getattr(found, name))


def _show_about(report: WeightsReport, number: str, parts: list[str]) -> None:
    """What a file holds, of which ``parts`` the figures are, and what was left out."""
    lines = [f"{report.name}: holds no tensor" if not report.tensors else _holds(report), *parts]
    if report.layers:
        odd = [la for la in report.layers if la.all is not None and la.all.finite < la.all.count]
        for layer in odd[:10]:
            assert layer.all is not None
            lines.append(
                f"{layer.label}: {layer.all.nan:,} NaN and {layer.all.infinite:,} infinite values, "
                "left out of the figures"
            )
        if len(odd) > 10:
            lines.append(f"and so in {len(odd) - 10} more layers")
    for name, reason in list(report.skipped.items())[:10]:
        lines.append(f"{name}: not shown ({reason})")
    for index, line in enumerate(lines):
        out().print(clean((number if index == 0 else " " * len(number)) + line))


def _holds(report: WeightsReport) -> str:
    left = [
        f"{many(count, 'tensor')} {reason}" for reason, count in sorted(report.left_out.items())
    ]
    if report.skipped:
        left.append(f"{len(report.skipped):,} that cannot be shown")
    rest = f"; left out: {', '.join(left)}" if left else ""
    if not report.layers:
        tried = "" if "by --filter" in report.left_out else "; --tensors shows them"
        return f"{report.name}: {many(report.tensors, 'tensor')}, no layer{rest}{tried}"
    weights = sum(layer.size for layer in report.layers)
    what = "layer" if all(len(layer.shape) > 1 for layer in report.layers) else "tensor"
    return f"{report.name}: {many(len(report.layers), what)}, {weights:,} weights{rest}"


def _of_parts(report: WeightsReport, shown: Shown, *, apart: bool) -> list[str]:
    """How much was learned, stayed fixed and is masked, and which of them the figures are of, where
    the file tells; ``apart``: learned and fixed values have rows of their own."""
    learned, fixed = (
        sum(s.count for layer in report.layers if (s := getattr(layer, part)) is not None)
        for part in ("learned", "fixed")
    )
    masked = sum(layer.masked for layer in report.layers)
    if not (learned or fixed or masked):
        return []
    share = masked / sum(layer.size for layer in report.layers) if masked else 0.0
    told = [f"{count:,} {what}" for count, what in (
        (learned, "learned"), (fixed, "fixed"), (masked, f"masked out ({share:.1%})")
    ) if count]  # fmt: skip
    if len(told) == 1:
        return [f"all {told[0]}"]
    if apart and learned and fixed:
        return [", ".join(told)]
    of = f"the {shown} values" if shown in ("learned", "fixed") else "all of them"
    if shown == "auto":
        of = "the learned values" if learned else "the fixed values"
        of += ", or the fixed ones of layers without any" if learned and fixed else ""
    return [f"{', '.join(told)}; the figures are of {of}"]


def show_histogram(found: Histogram) -> None:
    """The values of a layer in bins; in a terminal one network alone has bars, too."""
    console = out()
    several = len(found.counts) > 1
    heads = [f"({index + 1})" for index in range(len(found.counts))] if several else ["values"]
    bars = console.is_terminal and not several
    made = table("from", "to", *heads, *([""] if bars else []), right=tuple(range(len(heads) + 2)))
    if bars:
        made.columns[-1].justify = "left"
    top = max((max(counts) for counts in found.counts.values()), default=0) or 1
    for index, counts in enumerate(zip(*found.counts.values(), strict=True)):
        bar = ["█" * round(36 * counts[0] / top)] if bars else []
        made.add_row(figure(found.edges[index]), figure(found.edges[index + 1]),
                     *(f"{count:,}" for count in counts), *bar)  # fmt: skip
    if found.counts:
        show(made)
    for index, title in enumerate(found.counts):
        number = f"({index + 1}) " if several else ""
        console.print(clean(f"{number}{found.layer} of {title}"))
