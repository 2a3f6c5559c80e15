"""``randsurgery inspect``: what is in a file. torch is imported where a network is built or another
program's file is read, and nowhere else."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from randsurgery.cli import common, files
from randsurgery.cli.common import OUTPUT, command, note, print_json

if TYPE_CHECKING:
    from randsurgery.format.recipe import BaseRef
    from randsurgery.inspection.verify import Found, VerifyReport

app = typer.Typer(help="See what is in a file.", no_args_is_help=True)


@app.command("storage")
@command
def storage(
    file: files.File,
    tensors: Annotated[bool, typer.Option("--tensors", help="One row a tensor.")] = False,
    ema: common.EmaOption = False,
    plot: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Bar charts: .png, .svg, .pdf.", rich_help_panel=OUTPUT),
    ] = None,
    force: common.Force = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Where the bytes go: by source and overlay, by member, against dense files."""
    from randsurgery.cli import tables
    from randsurgery.format.container import check_picture
    from randsurgery.inspection.storage import plot_storage
    from randsurgery.inspection.storage import storage as report_on

    if plot is not None:
        check_picture(plot, force=force)
    files.check_file(file)
    file = files.located(file)
    tensors_of = files.read_by_torch(file, ema=ema)
    if "torch" not in sys.modules:  # which watches over the end of its own
        gc.freeze()  # what was imported stays: looking through it again took a tenth of the time
    report = report_on(file, tensors_of)
    if json:
        print_json(report.to_json())
    else:
        tables.show_storage(report, tensors=tensors)
    if plot is not None:
        plot_storage(report, plot)
        note(f"chart: {plot}")


@app.command("model")
@command
def model(
    file: files.FileOrName,
    member: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which network, if the file has several; else what they share."
        ),
    ] = None,
    ema: common.EmaOption = False,
    depth: common.Depth = None,
    num_classes: common.NumClasses = None,
    img_size: common.ImgSize = None,
    in_chans: common.InChans = None,
    width: common.Width = None,
    model_kwargs: common.ModelArgs = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """The network layer by layer: shapes, parameters, what is learned and what makes it; with
    input, classes and provenance. Reads the header alone."""  # fmt: skip
    from randsurgery.cli import tables
    from randsurgery.errors import UsageError
    from randsurgery.inspection.model import inspect_model

    args = common.model_arguments(
        model_kwargs, num_classes=num_classes, img_size=img_size, in_chans=in_chans, width=width
    )
    if files.means_file(file):
        if args:
            raise UsageError("model arguments go with an architecture, not a file")
        file = files.located(file)
        report = inspect_model(file, member, files.read_by_torch(file, ema=ema))
    else:
        made, _ = files.architecture(file, None, None, args)
        report = inspect_model(file, member, recipe=made.recipe)
    if json:
        print_json(report.to_json(depth or 0))
    else:
        tables.show_model(report, depth)


@app.command("verify")
@command
def verify(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE",
            help="Files of randsurgery; of a folder, every .safetensors below it, where files of "
            "others are skipped.",
        ),
    ],
    architecture: Annotated[
        bool,
        typer.Option(
            "--architecture",
            help="Build each network (without memory; imports torch) and check that it fits.",
        ),
    ] = False,
    base: common.BaseOption = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Rebuild every tensor and compare every digest; exit code 3 if one differs."""
    from randsurgery.cli import tables
    from randsurgery.cli.render import many
    from randsurgery.errors import UsageError
    from randsurgery.inspection.headers import bases_of
    from randsurgery.inspection.verify import find_files

    found = find_files(files)
    if len(found) == 1 and found[0].named:
        path = str(found[0].path)
        report = _verified(path, base, architecture, bases_of(path))
        if json:
            print_json(report.to_json())
        else:
            tables.show_verify(report)
        reports = [report]
    else:
        reports = []
        for one in found:
            reports.append(_verified_among(one, base, architecture))
            if not json:
                tables.show_verified(reports[-1])
        if json:
            ok = all(report.ok for report in reports)
            print_json({"ok": ok, "files": [report.to_json() for report in reports]})
        else:
            tables.show_verified_all(reports)
    if all(report.foreign for report in reports):
        raise UsageError(
            f"nothing to verify: none of {many(len(reports), 'file')} is one of randsurgery"
        )
    if not all(report.ok for report in reports):
        raise typer.Exit(3)


def _verified(
    file: str, base: str | None, architecture: bool, bases: dict[str, BaseRef] | None
) -> VerifyReport:
    from randsurgery.errors import FileFormatError
    from randsurgery.inspection.verify import verify_file

    if bases is None:
        raise FileFormatError(f"{file}: not one of randsurgery, so that it holds no digests")
    tensors = files.given_base(file, base, bases.values())
    return verify_file(file, base=tensors, architecture=architecture)


def _verified_among(found: Found, base: str | None, architecture: bool) -> VerifyReport:
    """One of several files: what is wrong with it stops none of the others."""
    from dataclasses import replace

    from randsurgery.errors import FileFormatError, IncompatibleError
    from randsurgery.inspection.headers import bases_of
    from randsurgery.inspection.verify import VerifyReport

    file = str(found.path)
    try:
        bases = bases_of(file)
        if bases is None and not found.named:
            return VerifyReport(file, (), foreign=True)
        report = _verified(file, base if bases else None, architecture, bases)
        return replace(report, file=file)
    except (FileFormatError, IncompatibleError) as error:
        return VerifyReport(file, (), fault=str(error))
