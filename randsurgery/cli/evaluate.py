"""``randsurgery eval``: accuracy of a file on a dataset."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli import common
from randsurgery.cli.common import command, note, print_json
from randsurgery.cli.options import (
    FileOrDense,
    NetworkOptions,
    network_of,
    takes_network_options,
)


@command
@takes_network_options
def evaluate(
    file: FileOrDense,
    member: Annotated[str | None, typer.Option(help="Which network of several.")] = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    split: common.Split = "test",
    img_size: common.ImgSize = None,
    crop_pct: common.CropPct = None,
    interpolation: common.Interpolation = None,
    any_classes: common.AnyClasses = False,
    skip_bad: common.SkipBad = False,
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
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Also accuracy, precision and F1 of each class.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = False,
    confusion: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Which class is taken for which: .csv, .png, .svg, .pdf.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
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
    """Accuracy and loss on the test split, with the preprocessing recorded in the file."""
    from randsurgery.cli import render
    from randsurgery.format.shards import check_not_input
    from randsurgery.inspection import confusion as tables
    from randsurgery.jobs.evaluate import run_eval
    from randsurgery.jobs.inputs import DataOptions

    spec, target = network_of(file, network), None
    if confusion is not None:
        target = tables.check_target(confusion, force=force)
        check_not_input(target, spec.inputs, option="--confusion")
    data = DataOptions(
        dataset, data_dir, dataset_download, img_size=img_size,
        in_chans=network.in_chans, crop_pct=crop_pct, interpolation=interpolation,
        any_classes=any_classes, skip_bad=skip_bad,
    )  # fmt: skip
    found = run_eval(
        spec,
        data,
        member=member,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
        samples=samples,
        split=common.split_of(split),
    )
    result, shown = found.fixed, found.shown
    for line in found.notes:
        note(common.clean(line))
    common.say_shown(shown, "evaluating on digits", found.left_out, found.flattering)
    rows = tables.per_class(result.labels, result.said, found.names) if per_class else []
    if target is not None:
        counted = tables.confusion(result.labels, result.said, len(found.names))
        tables.write_confusion(counted, found.names, target, split=render.SPLIT_WORDS[shown.split])
        note(f"confusion: {target}")
    if json:
        more = tables.to_json(rows) if rows else {}
        print_json({"file": file, **found.to_json(), **more})
        return
    pairs = [
        ("dataset", render.images_of(shown, result.images)),
        ("accuracy", f"{result.accuracy:.4f}"),
        ("top-5 accuracy", f"{result.top5_accuracy:.4f}"),
        ("loss", f"{result.loss:.4f}"),
    ]
    if rows:
        pairs.append(("balanced accuracy", f"{tables.balanced_accuracy(rows):.4f}"))
    if found.samples:
        pairs.append(
            (f"mean of {len(found.samples)} samples", f"{found.mean:.4f} ± {found.deviation:.4f}")
        )
    render.show_pairs(pairs)
    if rows:
        render.show_classes(rows)
