"""``randsurgery inspect``: what is in a file. Never imports torch."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command, print_json

app = typer.Typer(help="See what is in a file.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="FILE", help="A safetensors file.")]


@app.command("storage")
@command
def storage(
    file: File,
    tensors: Annotated[bool, typer.Option("--tensors", help="One row a tensor.")] = False,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Where the bytes go: by source and overlay, against a dense file."""
    from randsurgery.cli import render
    from randsurgery.inspection.storage import storage as report_on

    report = report_on(file)
    if json:
        print_json(report.to_json())
    else:
        render.show_storage(report, tensors=tensors)


@app.command("verify")
@command
def verify(
    file: File,
    base: common.BaseOption = None,
    json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Rebuild every tensor and compare every digest; exit code 3 if one differs."""
    from randsurgery.cli import render
    from randsurgery.inspection.verify import pickled_base, verify_file

    base = base or (str(found) if (found := pickled_base(file)) else None)
    tensors: object = base
    if base is not None and not base.endswith(".safetensors"):
        from randsurgery.surgery.bases import given_base  # .pth needs torch

        tensors = given_base(base)
    report = verify_file(file, base=tensors)  # type: ignore[arg-type]
    if json:
        print_json(report.to_json())
    else:
        render.show_verify(report)
    if not report.ok:
        raise typer.Exit(3)
