"""``randsurgery freeze``: decide what is learned, and write it down."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common, options, training
from randsurgery.cli.common import MODEL, command, note, print_json

LEARNED = "What is learned"


@command
def freeze(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A timm architecture, or a file of randsurgery."),
    ],
    fraction: Annotated[
        str | None,
        typer.Option(
            metavar="P", help="Share of every layer's filters, (0, 1].", rich_help_panel=LEARNED
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, help="Filters of every layer.", rich_help_panel=LEARNED),
    ] = None,
    dim: Annotated[
        str,
        typer.Option(help="Sliced along: out, in, height, width.", rich_help_panel=LEARNED),
    ] = "out",
    least: Annotated[
        int,
        typer.Option("--min", min=0, help="Filters at least, each layer.", rich_help_panel=LEARNED),
    ] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="These layers alone, whole unless --fraction or --count slices them; also @norm, "
            "@head; repeatable.",
            rich_help_panel=LEARNED,
        ),
    ] = None,
    norms: Annotated[
        str, typer.Option(help="Scales and shifts: learned, frozen.", rich_help_panel=LEARNED)
    ] = "learned",
    statistics: Annotated[
        str,
        typer.Option(help="Running statistics: tracked, frozen.", rich_help_panel=LEARNED),
    ] = "tracked",
    head: Annotated[
        str | None,
        typer.Option(
            help="The classifier: learned, frozen, or fixed as orthonormal, hadamard.",
            rich_help_panel=LEARNED,
        ),
    ] = None,
    head_scale: training.HeadScale = None,
    linear: Annotated[
        str,
        typer.Option(
            help="Linear layers but the head: sliced, or whole (the paper's rule).",
            rich_help_panel=LEARNED,
        ),
    ] = "sliced",
    fill: Annotated[
        str,
        typer.Option(
            help="What a slice leaves out: own (seed's or base's values), zero.",
            rich_help_panel=LEARNED,
        ),
    ] = "own",
    init: common.InitOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Seed of the weights and of orthonormal rows; default 0.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    pretrained: common.Pretrained = False,
    checkpoint: common.CheckpointOption = None,
    ema: common.EmaOption = False,
    base: common.BaseOption = None,
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
    """Decide what of a network is learned (partial training, Rosenfeld & Tsotsos).

    The plan is a file of some kilobytes; train learns it.
    """
    from randsurgery.cli import render
    from randsurgery.errors import UsageError
    from randsurgery.inspection.storage import storage
    from randsurgery.jobs.freeze import FreezePlan, prepare_freeze, run_freeze
    from randsurgery.jobs.sources import SourceSpec
    from randsurgery.surgery.heads import FIXED_KINDS
    from randsurgery.surgery.initialisers import check_init
    from randsurgery.surgery.plans import Freeze

    for name, value, allowed in (
        ("--norms", norms, ("learned", "frozen")),
        ("--statistics", statistics, ("tracked", "frozen")),
        ("--fill", fill, ("own", "zero")),
        ("--head", head or "learned", ("learned", "frozen", *FIXED_KINDS)),
    ):
        if value not in allowed:
            raise UsageError(f"{name} must be {' or '.join(allowed)}, found {value!r}")
    args = common.model_arguments(
        model_kwargs, num_classes=num_classes, img_size=img_size, in_chans=in_chans, width=width
    )
    fixed = head in FIXED_KINDS
    kind, scale = options.head_of(head if fixed else None, head_scale)
    wish = Freeze(
        fraction=fraction,
        count=count,
        dim=dim,  # type: ignore[arg-type]
        only=tuple(only or ()),
        norms=norms == "learned",
        statistics=statistics,  # type: ignore[arg-type]
        head="learned" if fixed else head,  # type: ignore[arg-type]
        linear=linear,  # type: ignore[arg-type]
        least=least,
    )
    spec = SourceSpec(
        name=source,
        init=check_init(init) if init is not None else None,
        seed=seed,
        pretrained=pretrained,
        checkpoint=checkpoint,
        ema=ema,
        base=base,
        args=args,
    )
    job = prepare_freeze(FreezePlan(spec, wish, kind, scale, fill == "zero", output, force))
    with job.checkpoint:
        written = None if dry_run else run_freeze(job)
    if json:
        beside = {} if written is None else {"path": str(job.output), "bytes": written}
        print_json({**beside, **job.to_json()})
        return
    if common.verbosity.level >= 1:
        render.show_layers(job.layers)
    for line in job.notes:
        note(common.clean(line))
    if written is None:
        note(f"would write {job.output}")
    else:
        render.say_bases(storage(job.output))
        note(f"written and verified: {job.output} ({common.size(written)})")
