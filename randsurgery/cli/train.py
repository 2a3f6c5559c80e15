"""``randsurgery train``: learn what a plan names."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli.common import command
from randsurgery.cli.options import RunOptions, plan_of, takes_run_options


@command
@takes_run_options()
def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A plan of freeze, a file of popup, or an architecture."
        ),
    ],
    *,
    run: RunOptions,
) -> None:
    """Learn a plan's slices and layers; of a popup file, the surviving weights; else everything.

    Only what is learned is stored. What is frozen does not move by one bit.
    """
    from randsurgery.cli import running
    from randsurgery.jobs.train import prepare_train, run_train, train_facts

    job = prepare_train(plan_of(source, run))
    running.show(job, run, lambda: train_facts(job), lambda hooks: run_train(job, hooks))
