"""``randsurgery predict``: what a file's network says of images."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common, predicting
from randsurgery.cli.common import command
from randsurgery.cli.options import (
    FileOrDense,
    NetworkOptions,
    network_of,
    takes_network_options,
)


@command
@takes_network_options
def predict(
    file: FileOrDense,
    images: predicting.Images = None,
    output: predicting.CsvOutput = None,
    top: predicting.Top = 5,
    strict: predicting.Strict = False,
    member: Annotated[str | None, typer.Option(help="Which network of several.")] = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    img_size: common.ImgSize = None,
    any_classes: common.AnyClasses = False,
    batch_size: common.BatchSize = None,
    workers: common.Workers = None,
    amp: common.Amp = None,
    device: common.Device = "auto",
    force: common.Force = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
    *,
    network: NetworkOptions,
) -> None:
    """Classes and probabilities of images, as CSV, with the preprocessing recorded in the file.

    Columns: path, class, probability, then class_1, probability_1 and so on
    for the likeliest classes; for a dataset's images, label.

    An image that cannot be read is named on stderr and has no line. The
    others are done, and the exit code is 5.
    """
    predicting.check_json(json, output)
    from randsurgery.jobs import predict as job
    from randsurgery.jobs.inputs import DataOptions

    plan = job.prepare(
        network_of(file, network),
        images or [],
        DataOptions(
            dataset,
            data_dir,
            dataset_download,
            img_size=img_size,
            in_chans=network.in_chans,
            any_classes=any_classes,
        ),
        output,
        member=member,
        top=top,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
        strict=strict,
        force=force,
    )
    predicting.work(plan, file, output, json=json)
