"""``randsurgery popup``: find a subnetwork of a random (or dense) network."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command
from randsurgery.cli.options import RunOptions, plan_of, takes_run_options

MASK = "Mask"


@command
@takes_run_options
def popup(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A timm architecture or a file of init.")
    ],
    *,
    k: Annotated[
        str, typer.Option("--k", help="Share of weights kept, (0, 1].", rich_help_panel=MASK)
    ] = "0.3",
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Weights times 1/sqrt(k).", rich_help_panel=common.MODEL),
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers left dense and frozen (their running statistics still follow the data); "
            "repeatable.",
            rich_help_panel=MASK,
        ),
    ] = None,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers learned beside the mask, such as @norm or @head; repeatable.",
            rich_help_panel=MASK,
        ),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="learned, or random: the baseline.", rich_help_panel=MASK)
    ] = "learned",
    save_scores: Annotated[
        bool,
        typer.Option("--save-scores", help="Keep the scores in the file.", rich_help_panel=MASK),
    ] = False,
    run: RunOptions,
) -> None:
    """Learn which weights of a network to keep (edge-popup, Ramanujan et al.).

    Without a dataset this runs offline on digits: real 8x8 scans, shown at 32x32.
    """
    from randsurgery.cli import running
    from randsurgery.jobs.popup import PopupPlan, popup_facts, prepare_popup, run_popup
    from randsurgery.surgery.popup import Popup, check_mask_kind

    wanted = Popup(
        k=k,
        seed=run.seed,
        skip=tuple(skip or ()),
        learn=tuple(learn or ()),
        mask=check_mask_kind(mask),
    )
    plan = plan_of(source, run, wanted.share if scaled else None)
    job = prepare_popup(PopupPlan(plan, wanted, save_scores))
    running.show(job.run, run, lambda: popup_facts(job), lambda hooks: run_popup(job, hooks))
