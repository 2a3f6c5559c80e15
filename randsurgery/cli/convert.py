"""``randsurgery convert``: a checkpoint of another program as a file of this format."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import MODEL, command, note, print_json, size

SCORES = "Scores of hidden-networks"


@command
def convert(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A state dict: .pth, .pt, .safetensors, the index of a sharded one, a folder.",
        ),
    ],
    arch: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The timm architecture it is of.", rich_help_panel=MODEL),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Dense weights to refer to: what is equal is not stored.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    ema: common.EmaOption = False,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            help="Share of each layer's weights that is kept: their prune_rate.",
            rich_help_panel=SCORES,
        ),
    ] = None,
    algorithm: Annotated[
        str,
        typer.Option(
            help="edge-popup (the highest |scores|), supermask (the positive scores).",
            rich_help_panel=SCORES,
        ),
    ] = "edge-popup",
    weights: Annotated[
        str,
        typer.Option(
            help="signs (one magnitude a layer), stored, survivors (what the masks keep), or auto: "
            "signs where they will do.",
            rich_help_panel=SCORES,
        ),
    ] = "auto",
    save_scores: Annotated[
        bool, typer.Option("--save-scores", help="Keep the scores.", rich_help_panel=SCORES)
    ] = False,
    img_size: common.ImgSize = None,
    in_chans: common.InChans = None,
    width: common.Width = None,
    model_kwargs: common.ModelArgs = None,
    output: common.Output = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Turn a checkpoint of hidden-networks, or any dense one, into a file of randsurgery.

    Every tensor is compared bit for bit before the file is written.
    """
    from randsurgery.cli import render
    from randsurgery.inspection.storage import storage
    from randsurgery.jobs.convert import ConvertPlan, prepare_convert, run_convert
    from randsurgery.surgery.hidden_networks import Reading

    args = common.model_arguments(model_kwargs, img_size=img_size, in_chans=in_chans, width=width)
    reading = Reading(k, algorithm, weights, save_scores)  # type: ignore[arg-type]
    job = prepare_convert(ConvertPlan(file, arch, base, ema, args, reading, output, force))
    with job.checkpoint:
        for line in job.notes:
            note(common.clean(line))
        for key, value in job.facts.items():
            common.detail(f"{key}: {value}")
        if dry_run:
            if json:
                print_json({"path": str(job.output), **job.facts})
            else:
                render.show_pairs([(key, str(value)) for key, value in job.facts.items()])
            note(f"would write {job.output}")
            return
        run_convert(job)
    report = storage(job.output)
    if json:
        groups = [
            dict(zip(("made_of", "tensors", "bytes", "dense_bytes"), row, strict=True))
            for row in report.groups()
        ]
        about = {"path": str(job.output), "bytes": report.bytes, "verified": True}
        print_json({**about, **job.facts, "storage": groups})
        return
    render.show_storage(report, tensors=False)
    ratio = job.input_bytes / report.bytes
    beside = job.facts.get("base_bytes")
    common.out().print(
        f"before: {common.clean(job.facts['file'])}, {size(job.input_bytes)}; "
        f"after: {size(report.bytes)}"
        + (f" beside the base of {size(beside)}, " if beside else ", ")
        + (f"{ratio:.1f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x as large")
    )
    note(f"written and verified: {job.output}")
