"""``randsurgery inspect``: what is in a file. torch is imported where a network is built or another
program's file is read, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from randsurgery.cli import common
from randsurgery.cli.common import OUTPUT, command, note, print_json

if TYPE_CHECKING:
    from randsurgery.inspection.verify import Found, VerifyReport

app = typer.Typer(help="See what is in a file.", no_args_is_help=True)

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A safetensors file, the .safetensors.index.json of a sharded one, or a .pth (which "
        "imports torch).",
    ),
]
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
"""What programs call what torch.save writes."""


def _read_by_torch(file: str) -> Any:
    """The tensors of a .pth, in memory; None for what has a header to read."""
    if not file.lower().endswith(PICKLED):
        return None
    note(f"{common.clean(file)}: no safetensors file, so all of it is read, with torch")
    from randsurgery.surgery.bases import read_base

    base = read_base(file)
    return {name: base.tensors.read(name) for name in base.names}


@app.command("storage")
@command
def storage(
    file: File,
    tensors: Annotated[bool, typer.Option("--tensors", help="One row a tensor.")] = False,
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
    report = report_on(file, _read_by_torch(file))
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
    file: File,
    member: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which network, if the file has several; else what they share."
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Blocks instead of layers: names cut to N parts. Default: as deep as fits 40 "
            "rows; with --json, every layer.",
        ),
    ] = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """The network layer by layer: shapes, parameters, what is learned and what makes it; with
    input, classes and provenance. Reads the header alone."""  # fmt: skip
    from randsurgery.cli import tables
    from randsurgery.inspection.model import inspect_model

    report = inspect_model(file, member, _read_by_torch(file))
    if json:
        print_json(report.to_json(depth))
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
    from randsurgery.inspection.verify import find_files

    found = find_files(files)
    if len(found) == 1 and found[0].named:
        report = _verified(str(found[0].path), base, architecture)
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
    if not all(report.ok for report in reports):
        raise typer.Exit(3)


def _verified(file: str, base: str | None, architecture: bool) -> VerifyReport:
    from randsurgery.inspection.verify import pickled_base, verify_file

    base = base or (str(found) if (found := pickled_base(file)) else None)
    tensors: Any = base
    if base is not None and not base.endswith(".safetensors"):
        from randsurgery.surgery.bases import given_base  # .pth needs torch

        tensors = given_base(base)
    return verify_file(file, base=tensors, architecture=architecture)


def _verified_among(found: Found, base: str | None, architecture: bool) -> VerifyReport:
    """One of several files: what is wrong with it stops none of the others."""
    from dataclasses import replace

    from randsurgery.errors import FileFormatError, IncompatibleError
    from randsurgery.inspection.verify import VerifyReport, builds_on_base

    file = str(found.path)
    try:
        based = builds_on_base(file)
        if based is None and not found.named:
            return VerifyReport(file, (), foreign=True)
        return replace(_verified(file, base if based else None, architecture), file=file)
    except (FileFormatError, IncompatibleError) as error:
        return VerifyReport(file, (), fault=str(error))
