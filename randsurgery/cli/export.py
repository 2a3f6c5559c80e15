"""``randsurgery export``: a file as a plain dense checkpoint, or as ONNX."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command, note, print_json, size
from randsurgery.cli.options import (
    FileOrDense,
    NetworkOptions,
    network_of,
    takes_network_options,
)


@command
@takes_network_options
def export(
    file: FileOrDense,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="File, or folder for timm.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="dense: one safetensors file; timm: a folder with model.safetensors and "
            "config.json, ready to upload; onnx: one file that ONNX runtimes read "
            "(needs the extra onnx)."
        ),
    ] = "dense",
    self_contained: Annotated[
        bool,
        typer.Option("--self-contained", help="Stay in this format, but embed the base's tensors."),
    ] = False,
    member: Annotated[str | None, typer.Option(help="Which network of several.")] = None,
    img_size: common.ImgSize = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    *,
    network: NetworkOptions,
) -> None:
    """Write dense weights that plain timm or an ONNX runtime loads, no randsurgery needed."""
    from randsurgery.jobs import export as job
    from randsurgery.jobs.inputs import DataOptions

    plan = job.prepare(
        network_of(file, network),
        output,
        kind="self-contained" if self_contained else format,
        member=member,
        force=force,
        options=DataOptions(img_size=img_size, in_chans=network.in_chans),
    )
    graph = plan.graph  # of an ONNX file
    with plan.checkpoint:
        for line in plan.notes:
            note(common.clean(line))
        if graph is not None:
            note(graph.note())
        if dry_run:
            note(f"would write {plan.target}")
            return
        written = job.run(plan)
    found = {"path": str(plan.target), "bytes": written.bytes, "load": plan.how_to_load}
    if graph is not None:
        found |= {**graph.to_json(), "difference": written.difference}
        note(graph.verdict(written.difference))
    if json:
        print_json(found)
        return
    common.out().print(f"{common.clean(str(plan.target))}: {size(written.bytes)}")
    common.out().print(plan.how_to_load)
