"""``randsurgery eval``: accuracy of a file on a dataset."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command, note, print_json


@command
def evaluate(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A randsurgery file.")],
    member: Annotated[str | None, typer.Option(help="Which network of several.")] = None,
    base: common.BaseOption = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    batch_size: common.BatchSize = None,
    workers: common.Workers = None,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Also sample so many masks from a supermask's scores, and give their mean.",
            rich_help_panel=common.DATA,
        ),
    ] = 0,
    amp: common.Amp = None,
    device: common.Device = "auto",
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Accuracy and loss on the test split, with the preprocessing recorded in the file."""
    from randsurgery.cli import render
    from randsurgery.jobs.evaluate import run_eval
    from randsurgery.jobs.inputs import DataOptions

    data = DataOptions(dataset, data_dir, dataset_download)
    found = run_eval(
        file,
        data,
        member=member,
        base=base,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
        samples=samples,
    )
    result = found.fixed
    if found.fell_back:
        note("no dataset given or recorded: evaluating on digits")
    if found.left_out:
        note(f"left out: {found.left_out:,} images that a temperature was fitted on")
    if json:
        print_json({"file": file, **found.to_json()})
        return
    rows = [
        ("dataset", f"{found.dataset.name}, {result.images:,} test images"),
        ("accuracy", f"{result.accuracy:.4f}"),
        ("top-5 accuracy", f"{result.top5_accuracy:.4f}"),
        ("loss", f"{result.loss:.4f}"),
    ]
    if found.samples:
        rows.append(
            (f"mean of {len(found.samples)} samples", f"{found.mean:.4f} ± {found.deviation:.4f}")
        )
    render.show_pairs(rows)
