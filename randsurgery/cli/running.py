"""How a training job is shown: its plan for --dry-run, its epochs, its file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from randsurgery.cli import common, render
from randsurgery.cli.common import note, print_json

if TYPE_CHECKING:
    from randsurgery.cli.options import RunOptions
    from randsurgery.jobs.preparing import Prepared
    from randsurgery.jobs.runs import Result
    from randsurgery.training.loop import Hooks


def show(
    job: Prepared,
    run: RunOptions,
    facts: Callable[[], dict[str, Any]],
    work: Callable[[Hooks], Result],
) -> None:
    """Show what the job would do, or do it and show what came of it."""
    for line in job.notes:
        note(line)
    with job.checkpoint:
        if not run.dry_run:
            for key, value in facts().items():
                common.detail(f"{key}: {value}")
            _work(job, run, work)
        elif run.json:
            print_json(facts())
        else:
            render.show_pairs([(key, str(value)) for key, value in facts().items()])


def _work(job: Prepared, run: RunOptions, work: Callable[[Hooks], Result]) -> None:
    from randsurgery.inspection.storage import storage

    with render.training_progress(job.settings.epochs) as hooks:
        result = work(hooks)
    if run.plot is not None:
        from randsurgery.inspection.curves import plot_curves

        plot_curves(result.records, run.plot)
    report = storage(result.path)
    last = result.records[-1]
    if run.json:
        settings = result.settings
        print_json(
            {
                "path": str(result.path),
                "bytes": report.bytes,
                "dense_bytes": report.dense_bytes,
                "verified": True,
                "source": job.plan.source.origin or job.plan.source.name,
                "settings": settings,
                "metrics": last,
            }
        )
        return
    render.show_storage(report, tensors=False)
    note(f"written and verified: {result.path}")
    note(f"metrics: {result.metrics_path}")
    if run.plot is not None:
        note(f"learning curves: {run.plot}")
    common.out().print(render.final_accuracy(last))
