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
    result, spec, fell_back = run_eval(
        file,
        data,
        member=member,
        base=base,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
    )
    if fell_back:
        note("no dataset given or recorded: evaluating on digits")
    if json:
        print_json({"file": file, "dataset": spec.name, **result.to_json()})
        return
    render.show_pairs(
        [
            ("dataset", f"{spec.name}, {result.images:,} test images"),
            ("accuracy", f"{result.accuracy:.4f}"),
            ("top-5 accuracy", f"{result.top5_accuracy:.4f}"),
            ("loss", f"{result.loss:.4f}"),
        ]
    )
