"""``randsurgery popup``: find a subnetwork of a random (or dense) network."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command
from randsurgery.cli.methods import MASK, method_of, takes_method_options
from randsurgery.cli.options import RunOptions, plan_of, takes_run_options


@command
@takes_run_options()
@takes_method_options
def popup(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A timm architecture or a file of init.")
    ],
    *,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Weights times 1/sqrt(k).", rich_help_panel=common.MODEL),
    ] = False,
    save_scores: Annotated[
        bool,
        typer.Option("--save-scores", help="Keep the scores in the file.", rich_help_panel=MASK),
    ] = False,
    algorithm: str,
    given: dict[str, Any],
    run: RunOptions,
) -> None:
    """Learn which weights of a network to keep (edge-popup, Ramanujan et al.; supermasks, Zhou et
    al.), or put known masks on it.

    Without a dataset this runs offline on digits: real 8x8 scans, shown at 32x32.
    """
    from randsurgery.cli import running
    from randsurgery.jobs.popup import PopupPlan, popup_facts, prepare_popup, run_popup

    method = method_of(algorithm, given, run.seed, scaled)
    share = getattr(method, "share", None) if scaled else None
    job = prepare_popup(PopupPlan(plan_of(source, run, share), method, save_scores))
    running.show(job.run, run, lambda: popup_facts(job), lambda hooks: run_popup(job, hooks))
