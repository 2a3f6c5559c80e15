"""``randsurgery init``: a network as a seed."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command, note, print_json


@command
def init(
    source: Annotated[str, typer.Argument(metavar="ARCH", help="A timm architecture.")],
    init: common.InitOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    scaled_for: Annotated[
        str | None,
        typer.Option(
            metavar="K", help="Scale deviations by 1/sqrt(K), as for a mask that keeps K of them."
        ),
    ] = None,
    mask_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take the masks of a file, on these weights: the re-initialised ticket.",
        ),
    ] = None,
    pretrained: common.Pretrained = False,
    checkpoint: common.CheckpointOption = None,
    ema: common.EmaOption = False,
    num_classes: common.NumClasses = None,
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
    """Write a network whose weights are a seed: some kilobytes for any size."""
    from randsurgery.cli import render
    from randsurgery.inspection.storage import storage
    from randsurgery.jobs import init as job
    from randsurgery.jobs.sources import SourceSpec
    from randsurgery.surgery.initialisers import check_init, parse_fraction

    args = common.model_arguments(
        model_kwargs, num_classes=num_classes, img_size=img_size, in_chans=in_chans, width=width
    )
    spec = SourceSpec(
        name=source,
        init=check_init(init) if init is not None else None,
        seed=seed,
        scaled_for=parse_fraction(scaled_for, "--scaled-for") if scaled_for else None,
        pretrained=pretrained,
        checkpoint=checkpoint,
        ema=ema,
        args=args,
    )
    spec, path = job.resolve_init(spec, output, mask_from=mask_from, force=force)
    notes: list[str] = []
    with job.open_init(spec, mask_from, notes) as made:
        for line in notes:
            note(common.clean(line))
        if dry_run:
            count = len(made.recipe.tensors)
            if json:
                print_json({"path": str(path), "tensors": count})
            note(f"would write {path}: {count} tensors")
            return
        job.run_init(spec, made, path, mask_from=mask_from, force=force)
    report = storage(path)
    if json:
        print_json({"path": str(path), "bytes": report.bytes, "dense_bytes": report.dense_bytes})
    else:
        render.show_storage(report, tensors=False)
        note(f"written and verified: {path}")
