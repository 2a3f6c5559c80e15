"""The weights of networks as pictures: by layer, as Figure 6 of Rosenfeld & Tsotsos has them, and
the values of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from randsurgery.errors import UsageError
from randsurgery.inspection.histograms import Histogram
from randsurgery.inspection.pictures import common_parts, legible, told_apart
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
LINES: tuple[Any, ...] = ("-", (0, (1, 1)), (0, (6, 1, 1, 1)), (0, (6, 1, 1, 1, 1, 1)))
CURVES = 64
"""Curves that ``_look`` tells apart."""
GREY, DASHES = "#555555", (0, (4, 2))
EXPECTED = "expected of the initial distribution"
LABELS = 64
"""Layers that are named on the axis; of more, every second, third ... one."""
LONGEST = 40
"""Letters of a layer's name on the axis."""
HIGHEST = 1e250
"""A logarithmic axis ends here, and at its inverse, so that its margins are within float64."""

MOMENTS = {"mean_abs": "mean |w|", "variance": "variance"}
NORMS = {"norm": "mean norm of the filters"}
"""What panels show: names that a Summary and an Initial have in common, with their titles."""


@dataclass(frozen=True)
class _Curve:
    """The layers of one network in the places of the axis, and the part of their values to draw;
    ``expected``: the initial distribution's figures instead."""

    name: str
    look: dict[str, Any]
    layers: list[LayerWeights | None]
    shown: Shown
    expected: bool

    def heights(self, quantity: str) -> list[float]:
        """The figure of each place; NaN leaves a gap."""
        if self.expected:
            return self.starts(quantity)
        found = [None if layer is None else layer.part(self.shown)[1] for layer in self.layers]
        return [_height(None if s is None else getattr(s, quantity)) for s in found]

    def starts(self, quantity: str) -> list[float]:
        """What the initial distribution gives there."""
        found = [None if layer is None else layer.initial for layer in self.layers]
        return [_height(None if i is None else getattr(i, quantity)) for i in found]

    def hollow(self) -> list[bool]:
        """Where the mark is hollow: that of fixed values."""
        return [
            not self.expected and layer is not None and layer.part(self.shown)[0] == "fixed"
            for layer in self.layers
        ]


def drawn(
    reports: Sequence[WeightsReport],
    *,
    shown: Shown = "auto",
    depth: int = 0,
    norms: bool = False,
    expected: bool = False,
) -> Figure:
    """Mean |w| and variance by layer on logarithmic axes, or the filters' ``norms``; one curve a
    network, learned values as filled and fixed ones as hollow marks; dashed: what the initial
    distribution gives, which ``expected`` makes the curves. A network alone has a curve for each of
    both. Raises UsageError if there is nothing to draw, or more than can be told apart."""
    from matplotlib.figure import Figure

    rows = [{row.label: row for row in in_blocks(r.layers, depth)} for r in reports]
    labels = merged([list(row) for row in rows])
    curves = _curves(reports, rows, labels, shown, expected)
    titles = {
        quantity: f"expected {title}" if expected else title
        for quantity, title in (NORMS if norms else MOMENTS).items()
        if any(_any(curve.heights(quantity)) for curve in curves)
    }
    if not titles:
        raise UsageError(_nothing(labels, norms, expected))
    stem = common_parts(labels) if max(map(len, labels)) > LONGEST else ""
    names = told_apart([label.removeprefix(stem) for label in labels], LONGEST)
    handles, words = _legend_of(curves, list(titles))
    width = min(18.0, max(6.4, 2.5 + 0.17 * len(labels)))
    columns = _columns(words, width)
    tall = 0.6 + 2.4 * len(titles) + 0.055 * max(map(len, names))
    size = (width, tall + 0.18 * math.ceil(len(words) / columns))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (quantity, title) in zip(panels, titles.items(), strict=True):
        _panel(axes, curves, quantity, title)
    step = -(-len(labels) // LABELS)
    panels[-1].set_xticks(range(0, len(labels), step))
    panels[-1].set_xticklabels(names[::step], rotation=90, fontsize=7, parse_math=False)
    panels[-1].set_xlim(-0.6, len(labels) - 0.4)
    if stem:
        _write(panels[-1].set_xlabel(" ", fontsize=8), f"{stem}*", 100)
    _write_legend(figure, handles, words, columns)
    return figure


def _curves(
    reports: Sequence[WeightsReport],
    rows: Sequence[dict[str, LayerWeights]],
    labels: Sequence[str],
    shown: Shown,
    expected: bool,
) -> list[_Curve]:
    _check_count(len(reports))
    curves: list[_Curve] = []
    for report, row in zip(reports, rows, strict=True):
        layers = [row.get(label) for label in labels]
        both = len(reports) == 1 and shown == "auto" and {"learned", "fixed"} <= report.parts
        for part in ("learned", "fixed") if both else (shown,):
            name = f"{report.name} ({part})" if both else report.name
            curves.append(_Curve(name, _look(len(curves)), layers, part, expected))
    return curves


def _check_count(count: int) -> None:
    """Raises UsageError."""
    if count > CURVES:
        raise UsageError(
            f"--plot can tell {CURVES} curves apart, found {count}; name fewer files, or choose "
            "members by --member"
        )


def _nothing(labels: Sequence[str], norms: bool, expected: bool) -> str:
    """Why there is no figure."""
    if not labels:
        return "--plot has nothing to draw: found no layer; --tensors takes every tensor"
    what = "filters' norm" if norms else "mean |w| or variance"
    many = f"{len(labels)} layer{'s' if len(labels) > 1 else ''}"
    what = f"known expected {what}" if expected else f"finite {what}"
    return (
        f"--plot has nothing to draw: found {many}, none with a {what} above 0 (1e-250 to 1e250), "
        "which the logarithmic axis needs"
    )


def _panel(axes: Axes, curves: Sequence[_Curve], quantity: str, title: str) -> None:
    starts: list[tuple[list[float], str]] = []
    for curve in curves:
        heights = curve.heights(quantity)
        hollow = [
            h if fixed else math.nan for h, fixed in zip(heights, curve.hollow(), strict=True)
        ]
        axes.plot(heights, linewidth=1.2, **curve.look)
        axes.plot(hollow, **{**curve.look, "linestyle": "none"}, markerfacecolor="white")
        start = curve.starts(quantity)
        if not curve.expected and _any(start):
            _join(starts, start, curve.look["color"])
    for start, colour in starts:
        look: dict[str, Any] = {"color": colour if len(starts) > 1 else GREY, "zorder": 3}
        axes.plot(start, **look, linestyle=DASHES, linewidth=1)
        axes.plot(_alone(start), **look, linestyle="none", marker="_", markersize=12)
    _scale(axes)
    axes.set_ylabel(title)


def _scale(axes: Axes) -> None:
    """A logarithmic axis on which two ticks or more have a number."""
    from matplotlib.ticker import LogFormatterSciNotation

    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.55)))
    axes.grid(alpha=0.3)


def _look(index: int) -> dict[str, Any]:
    """Colour, line and mark of a curve."""
    turn, place = divmod(index, len(COLOURS))
    return {
        "color": COLOURS[place],
        "linestyle": LINES[turn % len(LINES)],
        "marker": MARKERS[(place + turn) % len(MARKERS)],
        "markersize": 4,
    }


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
    return value if value is not None and 1 / HIGHEST <= value <= HIGHEST else math.nan


def _any(heights: Sequence[float]) -> bool:
    return any(map(math.isfinite, heights))


def _alone(heights: Sequence[float]) -> list[float]:
    """The heights between two gaps, where a line without marks would not be seen."""
    wide = [math.nan, *heights, math.nan]
    around = zip(wide, wide[1:], wide[2:], strict=False)
    return [h if math.isnan(a) and math.isnan(b) else math.nan for a, h, b in around]


# --- legends -------------------------------------------------------------------------------------


def _legend_of(curves: Sequence[_Curve], quantities: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The handles and words of what is drawn, and of networks of which nothing can be."""
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    words = told_apart([curve.name for curve in curves], 48)
    parts, expected = set[bool](), False
    for index, curve in enumerate(curves):
        heights = [curve.heights(quantity) for quantity in quantities]
        found = {
            fixed for row in heights for h, fixed in zip(row, curve.hollow(), strict=True)
            if math.isfinite(h)
        }  # fmt: skip
        parts |= found if curve.shown == "auto" and not curve.expected else set()
        expected |= not curve.expected and any(_any(curve.starts(q)) for q in quantities)
        face: dict[str, Any] = {"markerfacecolor": "white"} if found == {True} else {}
        handles.append(Line2D([], [], **curve.look, **face, linewidth=1.2 if found else 0))
        if not found:
            handles[-1].set_marker("")
            words[index] += " (nothing to draw)"
    if len(parts) > 1:
        look: dict[str, Any] = {"color": GREY, "marker": "o", "markersize": 4, "linestyle": "none"}
        handles += [Line2D([], [], **look), Line2D([], [], **look, markerfacecolor="white")]
        words += ["learned values", "fixed values"]
    if expected:
        handles.append(Line2D([], [], color=GREY, linestyle=DASHES))
        words.append(EXPECTED)
    return handles, words


def _columns(words: Sequence[str], width: float) -> int:
    """Columns of a legend that fit a figure's width, in inches."""
    most = int(width / (0.7 + 0.068 * max(map(len, words))))
    return max(1, min(most, math.ceil(len(words) / 3)))


def _write_legend(
    figure: Figure, handles: Sequence[Any], words: Sequence[str], columns: int
) -> None:
    """A legend above the panels. Its texts are written afterwards: one that begins with an
    underscore would be left out."""
    legend = figure.legend(
        handles, [" "] * len(handles), loc="outside upper left", frameon=False, fontsize=8,
        ncols=columns, handlelength=3.2,
    )  # fmt: skip
    for text, word in zip(legend.get_texts(), words, strict=True):
        _write(text, word, len(word))


def _write(text: Any, words: str, limit: int) -> None:
    """Words from a file on a picture: nothing in them is mathematics."""
    text.set_parse_math(False)
    text.set_text(legible(words, limit))


# --- the values of one layer ---------------------------------------------------------------------


def drawn_histogram(found: Histogram) -> Figure:
    """The values of one layer: the share of them in each bin, one line a network and part; dashed:
    what the initial distributions give. Raises UsageError if there is nothing to draw, or more than
    can be told apart."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    _check_count(len(found.counts))
    most = max((sum(counts) for counts in found.counts.values()), default=0)
    if most == 0:
        raise UsageError(f"--plot has nothing to draw: found no finite value in {found.layer}")
    handles: list[Any] = []
    words = told_apart(list(found.counts), 48)
    starts = {(i.kind, i.scale): i for i in found.initial.values()}
    words += [EXPECTED] if starts else []
    columns = _columns(words, 7.2)
    size = (7.2, 4.2 + 0.18 * math.ceil(len(words) / columns))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    edges, scale = np.array(found.edges), 1e308 if max(map(abs, found.edges)) > 1e307 else 1.0
    for index, counts in enumerate(found.counts.values()):
        handles.append(_stairs(axes, np.array(counts), edges / scale, index, len(found.counts)))
    for initial in starts.values():
        axes.stairs(bin_shares(initial, edges), edges / scale, color=GREY, linestyle=DASHES)
    if starts:
        handles.append(Line2D([], [], color=GREY, linestyle=DASHES))
    _scale(axes)
    axes.set_ylim(bottom=0.4 / most)  # less than one value is nothing that could be seen
    axes.set_ylabel("share of the values, a bin")
    unit = "" if scale == 1.0 else f", in {scale:.0e}"  # an axis cannot be wider than float64
    _write(axes.set_xlabel(" "), f"{legible(found.layer, 80)}{unit}", 100)
    _write_legend(figure, handles, words, columns)
    return figure


def _stairs(axes: Axes, counts: Any, edges: Any, index: int, many: int) -> Any:
    """One network's line, with marks where colours would occur twice; returns its handle."""
    from matplotlib.lines import Line2D

    look = {**_look(index), "markersize": 3}
    if many <= len(COLOURS):
        del look["marker"]
    share = counts / max(1, counts.sum())
    axes.stairs(share, edges, color=look["color"], linestyle=look["linestyle"], linewidth=1.3)
    middle = edges[:-1] / 2 + edges[1:] / 2
    if "marker" in look:
        axes.plot(middle, np.where(counts, share, np.nan), **{**look, "linestyle": "none"})
    return Line2D([], [], **look)


def bin_shares(initial: Initial, edges: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """The share of an initial distribution that falls into each bin. Shape (bins,)."""
    places = edges.tolist()
    if initial.kind == "normal":
        below = [0.5 * (1 + math.erf(e / (initial.scale * math.sqrt(2) or 1.0))) for e in places]
    elif initial.kind == "uniform":
        width = 2 * initial.scale or 1.0
        below = [min(1.0, max(0.0, (e + initial.scale) / width)) for e in places]
    else:  # all of it in one or two places
        ends = [initial.scale] if initial.kind == "constant" else [-initial.scale, initial.scale]
        shares: Any = np.histogram(ends, edges)[0] / len(ends)
        return shares
    return np.diff(below)
