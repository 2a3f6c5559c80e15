"""``randsurgery inspect weights``: the weights of files, layer by layer."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from randsurgery.cli import common
from randsurgery.cli.common import MODEL, OUTPUT, command, note, print_json
from randsurgery.cli.files import (
    architecture,
    given_base,
    is_pickled,
    located,
    means_file,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from randsurgery.inspection.histograms import Histogram
    from randsurgery.inspection.weight_files import Network
    from randsurgery.inspection.weights import Shown, WeightsReport

SHOW = "What is shown"

Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="Safetensors files, the index of a sharded one, folders of weights, .pth files, or "
        "timm architectures (their initial distribution).",
    ),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        metavar="PATTERN",
        help="Only these layers or blocks, such as layer1 or '*.conv2'; repeatable.",
        rich_help_panel=SHOW,
    ),
]
Tensors = Annotated[
    bool,
    typer.Option(
        "--tensors", help="Biases, norms and integers, too.", rich_help_panel=SHOW
    ),
]  # fmt: skip
Part = Annotated[
    str,
    typer.Option(
        help="learned, fixed or all values; auto: the learned ones, else those that are kept.",
        rich_help_panel=SHOW,
    ),
]
Sort = Annotated[
    str,
    typer.Option(
        metavar="KEY",
        help="layer, name, weights, mean, mean-abs, std, variance, min, max, zeros, norm, or "
        "change (mean |w| against the expected one).",
        rich_help_panel=SHOW,
    ),
]
Expected = Annotated[
    bool,
    typer.Option(
        "--expected",
        help="The initial distributions alone, from headers: no value is read.",
        rich_help_panel=SHOW,
    ),
]
Norms = Annotated[
    bool,
    typer.Option("--norms", help="The norms of the filters; with --json, every one.",
                 rich_help_panel=SHOW),
]  # fmt: skip
HistogramOf = Annotated[
    str | None,
    typer.Option(
        "--histogram", metavar="LAYER", help="The values of one layer in bins.",
        rich_help_panel=SHOW,
    ),
]  # fmt: skip
Members = Annotated[
    list[str] | None,
    typer.Option("--member", help="Only this member of a file that has several; repeatable.",
                 rich_help_panel=SHOW),
]  # fmt: skip
Plot = Annotated[
    str | None,
    typer.Option(metavar="PICTURE", help="Write a figure: .png, .svg, .pdf.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Csv = Annotated[
    str | None,
    typer.Option("--csv", metavar="TABLE", help="Write every figure of every tensor as CSV.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Seed = Annotated[
    int | None, typer.Option(min=0, help="Seed of an architecture.", rich_help_panel=MODEL)
]


@command
def weights(
    files: Files,
    filter: Filter = None,
    tensors: Tensors = False,
    part: Part = "auto",
    sort: Sort = "layer",
    depth: common.Depth = None,
    expected: Expected = False,
    norms: Norms = False,
    histogram: HistogramOf = None,
    member: Members = None,
    base: common.BaseOption = None,
    ema: common.EmaOption = False,
    init: common.InitOption = None,
    seed: Seed = None,
    num_classes: common.NumClasses = None,
    img_size: common.ImgSize = None,
    in_chans: common.InChans = None,
    width: common.Width = None,
    model_kwargs: common.ModelArgs = None,
    plot: Plot = None,
    csv: Csv = None,
    force: common.Force = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Mean |w|, deviation, range, zeros and filter norms of every layer.

    Learned values are told from fixed ones, and the initial distribution's own expected values
    stand beside them. Several files stand side by side; --plot draws them as curves by layer.
    """
    from randsurgery.inspection import histograms, weight_files
    from randsurgery.inspection import weights as inspection
    from randsurgery.inspection.pictures import save

    key = inspection.check_sort(sort)
    shown = inspection.check_part(part)
    _check_outputs(files, base, plot, csv, expected=expected, histogram=histogram, force=force)
    args = common.model_arguments(
        model_kwargs, num_classes=num_classes, img_size=img_size, in_chans=in_chans, width=width
    )
    drawn = {"init": init, "seed": seed, "args": args}
    with contextlib.ExitStack() as stack:
        opened = _open(files, stack, base, drawn, values=not expected, ema=ema)
        networks = weight_files.with_members(opened, member or [])
        patterns = filter or []
        if histogram is not None and not filter:
            patterns = [glob.escape(histograms.find_layer(networks, histogram))]
        chosen = inspection.chosen(networks, patterns, everything=tensors)
        reports = [
            inspection.report_on(network, those, values=not expected)
            for network, those in zip(networks, chosen, strict=True)
        ]
        bins = None if histogram is None else histograms.layer_histogram(networks, histogram)
    if histogram is not None and not filter:  # the others were not asked for
        reports = [replace(report, left_out={}) for report in reports]
    view: _View = {"shown": shown, "expected": expected, "norms": norms}
    figure = None if plot is None else _figure(reports, bins, depth or 0, view)
    if json:
        found: dict[str, Any] = {"files": [report.to_json(norms=norms) for report in reports]}
        print_json(found if bins is None else {**found, "histogram": bins.to_json()})
    else:
        _show(reports, bins, key, depth, view)
    if csv is not None:
        _write_csv(reports, csv)
        note(f"written: {csv}")
    if plot is not None and figure is not None:
        save(figure, plot)
        note(f"written: {plot}")


class _View(TypedDict):
    """What tables and figures show."""

    shown: Shown
    expected: bool
    norms: bool


def _figure(
    reports: list[WeightsReport], bins: Histogram | None, depth: int, view: _View
) -> Figure:
    """What --plot asks for, before anything is printed or written. Raises UsageError."""
    from randsurgery.inspection import weight_plots

    if bins is not None:
        return weight_plots.drawn_histogram(bins)
    return weight_plots.drawn(reports, depth=depth, **view)


def _show(
    reports: list[WeightsReport],
    bins: Histogram | None,
    key: str,
    depth: int | None,
    view: _View,
) -> None:
    """The tables; with a histogram, of the networks that have something to show."""
    from randsurgery.cli import weight_tables
    from randsurgery.inspection.grouping import fitting_depth

    if bins is not None:
        for report in reports:
            if not report.layers:
                note(f"{report.name}: none of the layers that are shown")
        reports = [report for report in reports if report.layers]
    labels = (layer.label for report in reports for layer in report.layers)
    level = fitting_depth(labels) if depth is None else depth
    weight_tables.show_weights(reports, key, depth=level, **view)
    if bins is not None:
        weight_tables.show_histogram(bins)


def _check_outputs(
    files: list[str],
    base: str | None,
    plot: str | None,
    csv: str | None,
    *,
    expected: bool,
    histogram: str | None,
    force: bool,
) -> None:
    """Refuse what cannot be written, or asks for values and for none of them, before anything is
    read. Raises UsageError or OutputError."""
    from randsurgery.errors import UsageError
    from randsurgery.format.container import check_output, check_picture
    from randsurgery.format.shards import check_not_input

    if expected and histogram is not None:
        raise UsageError("--expected reads no values, of which --histogram is made")
    if plot is not None:
        check_picture(plot, force=force)
        check_not_input(Path(plot), (*files, base), option="--plot")
    if csv is not None:
        table = check_output(csv, force=force, option="--csv")
        check_not_input(table, (*files, base), option="--csv")
        if plot is not None and Path(plot).resolve() == Path(csv).resolve():
            raise UsageError("--plot and --csv name the same file")


def _open(
    files: list[str],
    stack: contextlib.ExitStack,
    base: str | None,
    drawn: dict[str, Any],
    *,
    values: bool,
    ema: bool,
) -> list[list[Network]]:
    """The networks of each file or architecture. Raises RandsurgeryError."""
    from randsurgery.errors import UsageError
    from randsurgery.format.shards import is_index
    from randsurgery.inspection.headers import bases_of
    from randsurgery.inspection.weight_files import networks_of, open_networks

    opened: list[list[Network]] = []
    titles = _titles(files)
    files = [located(file) for file in files]
    names = [file for file in files if not means_file(file)]
    if (any(v is not None for v in (drawn["init"], drawn["seed"])) or drawn["args"]) and not names:
        raise UsageError("--init, --seed and model arguments go with an architecture, not a file")
    plain = [file for file in files if file not in names and not is_pickled(file)]
    if ema and len(plain) + len(names) == len(files):
        raise UsageError("--ema goes with files of torch.save, which may hold averaged weights")
    bases = {file: (not is_index(file) and bases_of(file)) or {} for file in plain}
    if base is not None and not any(bases.values()):
        raise UsageError(f"no file builds on a base; leave {base} out")
    for file, title in zip(files, titles, strict=True):
        if file in names:
            made, order = architecture(file, **drawn)
            opened.append(networks_of(made, title, order))
        elif file in plain:
            refs = bases[file].values() if values else ()
            tensors = given_base(file, base, refs) if refs else None
            opened.append(open_networks(file, stack, title, base=tensors, values=values))
        else:
            opened.append(_pickled(file, title, ema=ema))
    return opened


def _titles(files: list[str]) -> list[str]:
    """What to call each file: its name, with its folder where two would be called the same."""
    names = [Path(file).name or file for file in files]
    longer = [f if names.count(n) > 1 else n for f, n in zip(files, names, strict=True)]
    return [
        f"{name} ({longer[: i + 1].count(name)})" if longer.count(name) > 1 else name
        for i, name in enumerate(longer)
    ]


def _pickled(file: str, title: str, *, ema: bool) -> list[Network]:
    from randsurgery.inspection.weight_files import network_in_memory
    from randsurgery.surgery.bases import map_state

    state = map_state(file, ema=ema)
    for line in state.notes:
        note(common.clean(line))
    return [network_in_memory(title, state.tensors, state.about, state.skipped)]


def _write_csv(reports: Iterable[WeightsReport], path: str) -> None:
    from randsurgery.format.container import write_atomically
    from randsurgery.inspection.weights import csv_rows

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in csv_rows(reports):
        writer.writerow([common.clean(cell) if isinstance(cell, str) else cell for cell in row])
    write_atomically(path, iter([text.getvalue().encode()]))
