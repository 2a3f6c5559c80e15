"""The weights of networks as pictures: by layer, as Figure 6 of Rosenfeld & Tsotsos has them, and
the values of one layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from randsurgery.inspection.histograms import Histogram
from randsurgery.inspection.moments import Summary
from randsurgery.inspection.pictures import legible, save
from randsurgery.inspection.weight_files import Initial
from randsurgery.inspection.weights import LayerWeights, Shown, WeightsReport, in_blocks, merged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442",
)  # fmt: skip
"""Okabe and Ito's, which colour-blind readers tell apart."""
MARKERS = "osD^vP*X"
GREY, DASHES = "#555555", (0, (4, 2))
EXPECTED = "expected of the initial distribution"
LABELS = 64
"""Layers that are named on the axis; of more, every second, third ... one."""

Curve = tuple[str, list[LayerWeights | None], Shown]


def plot_weights(
    reports: Sequence[WeightsReport],
    path: str | os.PathLike[str],
    *,
    shown: Shown = "auto",
    depth: int = 0,
) -> None:
    """Mean |w| and variance by layer on logarithmic axes, one curve a network, learned values as
    filled and fixed ones as hollow marks; dashed: what the initial distribution gives. A network
    alone has one curve for each of both. To a .png, .svg or .pdf file. Raises
    OutputError."""
    from matplotlib.figure import Figure

    rows = [{row.label: row for row in in_blocks(r.layers, depth)} for r in reports]
    labels = merged([list(row) for row in rows])
    curves: list[Curve] = []
    for report, row in zip(reports, rows, strict=True):
        layers = [row.get(label) for label in labels]
        both = len(reports) == 1 and shown == "auto" and {"learned", "fixed"} <= report.parts
        for part in ("learned", "fixed") if both else (shown,):
            name = f"{report.name} ({part})" if both else report.name
            curves.append((name, layers, part))
    width = min(18.0, max(6.4, 2.5 + 0.17 * len(labels)))
    tall = 5.6 + 0.2 * len(curves)
    figure = Figure(figsize=(width, tall), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _panel(upper, curves, "mean |w|", lambda s: s.mean_abs, lambda i: i.mean_abs)
    _panel(lower, curves, "variance", lambda s: s.variance, lambda i: i.variance)
    step = -(-len(labels) // LABELS) or 1
    lower.set_xticks(range(0, len(labels), step))
    named = [legible(label) for label in labels[::step]]
    lower.set_xticklabels(named, rotation=90, fontsize=7, parse_math=False)
    lower.set_xlim(-0.6, max(len(labels) - 0.4, 0.6))
    _legend(figure, curves)
    save(figure, path)


def _panel(
    axes: Axes,
    curves: list[Curve],
    title: str,
    value: Callable[[Summary], float | None],
    expected: Callable[[Initial], float],
) -> None:
    starts: list[tuple[list[float], str]] = []
    for index, (_, layers, shown) in enumerate(curves):
        parts = [("", None) if layer is None else layer.part(shown) for layer in layers]
        heights = [_height(None if s is None else value(s)) for _, s in parts]
        hollow = [h if p == "fixed" else math.nan for h, (p, _) in zip(heights, parts, strict=True)]
        look = _look(index)
        axes.plot(heights, linewidth=1.2, **look)
        axes.plot(hollow, **look, linestyle="none", markerfacecolor="white")
        start = [
            _height(None if layer is None or layer.initial is None else expected(layer.initial))
            for layer in layers
        ]
        if any(map(math.isfinite, start)):
            _join(starts, start, look["color"])
    for start, colour in starts:  # grey if it is everyone's
        axes.plot(
            start,
            color=colour if len(starts) > 1 else GREY,
            linestyle=DASHES,
            linewidth=1,
            zorder=3,
        )
    if any(math.isfinite(y) for line in axes.get_lines() for y in np.asarray(line.get_ydata())):
        axes.set_yscale("log")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)


def _look(index: int) -> dict[str, Any]:
    """Colour and mark of a curve."""
    marker = MARKERS[index % len(MARKERS)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker, "markersize": 4}


def _join(starts: list[tuple[list[float], str]], start: list[float], colour: str) -> None:
    """Add a curve with its colour, or to one that it agrees with wherever both have a height."""
    for other, _ in starts:
        both = [(a, b) for a, b in zip(start, other, strict=True) if not math.isnan(a + b)]
        if all(a == b for a, b in both):
            other[:] = [b if math.isnan(a) else a for a, b in zip(start, other, strict=True)]
            return
    starts.append((start, colour))


def _height(value: float | None) -> float:
    """A height on a logarithmic axis; NaN leaves a gap."""
    return value if value is not None and math.isfinite(value) and value > 0 else math.nan


def _legend(figure: Figure, curves: list[Curve]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(index)) for index in range(len(curves))]
    titles = [name for name, _, _ in curves]
    mixed = [layer for _, layers, shown in curves if shown == "auto" for layer in layers if layer]
    parts = {layer.part("auto")[0] for layer in mixed}
    if {"learned", "fixed"} <= parts:
        look: dict[str, Any] = {"color": GREY, "marker": "o", "markersize": 4, "linestyle": "none"}
        handles += [Line2D([], [], **look), Line2D([], [], **look, markerfacecolor="white")]
        titles += ["learned values", "fixed values"]
    if any(layer is not None and layer.initial for _, layers, _ in curves for layer in layers):
        handles.append(Line2D([], [], color=GREY, linestyle=DASHES))
        titles.append(EXPECTED)
    _write_legend(figure, handles, titles)


def _write_legend(figure: Figure, handles: list[Any], titles: list[str]) -> None:
    """A legend above the panels. Its texts are written afterwards: one that begins with an
    underscore would be left out."""
    short = len(titles) > 4 and max(map(len, titles)) <= len(EXPECTED)
    columns = 2 if short or figure.get_figwidth() > 9 else 1
    legend = figure.legend(
        handles, [" "] * len(handles), loc="outside upper left", frameon=False, fontsize=8,
        ncols=columns,
    )  # fmt: skip
    for text, title in zip(legend.get_texts(), titles, strict=True):
        _write(text, title)


def plot_histogram(found: Histogram, path: str | os.PathLike[str]) -> None:
    """The values of one layer: the share of them in each bin, one line a network and part; dashed:
    what the initial distributions give. Raises OutputError."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.2, 4.4 + 0.2 * len(found.counts)), layout="constrained")
    axes = figure.subplots()
    edges = np.array(found.edges)
    handles: list[Any] = []
    for index, counts in enumerate(found.counts.values()):
        colour = COLOURS[index % len(COLOURS)]
        share = np.array(counts) / max(1, sum(counts))
        axes.stairs(share, edges, color=colour, linewidth=1.3)
        handles.append(Line2D([], [], color=colour))
    titles = list(found.counts)
    starts = {(i.kind, i.scale): i for i in found.initial.values()}
    for initial in starts.values():
        axes.stairs(bin_shares(initial, edges), edges, color=GREY, linestyle=DASHES)
    if starts:
        handles.append(Line2D([], [], color=GREY, linestyle=DASHES))
        titles.append(EXPECTED)
    axes.set_yscale("log")
    most = max((sum(counts) for counts in found.counts.values()), default=0)
    axes.set_ylim(bottom=0.4 / max(1, most))  # less than one value is nothing that could be seen
    axes.set_ylabel("share of the values, a bin")
    _write(axes.set_xlabel(" "), found.layer)
    axes.grid(alpha=0.3)
    _write_legend(figure, handles, titles)
    save(figure, path)


def bin_shares(initial: Initial, edges: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """The share of an initial distribution that falls into each bin. Shape (bins,)."""
    if initial.kind == "normal":
        below = [0.5 * (1 + math.erf(e / (initial.scale * math.sqrt(2) or 1.0))) for e in edges]
    elif initial.kind == "uniform":
        width = 2 * initial.scale or 1.0
        below = [min(1.0, max(0.0, (e + initial.scale) / width)) for e in edges]
    else:  # all of it in one or two places
        places = [initial.scale] if initial.kind == "constant" else [-initial.scale, initial.scale]
        shares: Any = np.histogram(places, edges)[0] / len(places)
        return shares
    return np.diff(below)


def _write(text: Any, words: str) -> None:
    """Words from a file on a picture: nothing in them is mathematics."""
    text.set_parse_math(False)
    text.set_text(legible(words))
