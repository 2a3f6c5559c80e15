"""``randsurgery ensemble eval``, ``calibrate`` and ``predict``: members together on images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from randsurgery.cli import common, predicting
from randsurgery.cli.common import command, note, print_json
from randsurgery.cli.options import ENSEMBLE, EngineOption, File, Into, Members

if TYPE_CHECKING:
    from randsurgery.jobs.ensembles import EvalPlan


def _plan(
    file: str,
    member: list[str] | None,
    base: str | None,
    data: tuple[str | None, str | None, bool, bool, bool],
    batch_size: int | None,
    workers: int | None,
    amp: bool | None,
    device: str,
) -> EvalPlan:
    from randsurgery.jobs.ensembles import EvalPlan
    from randsurgery.jobs.inputs import DataOptions

    return EvalPlan(
        file,
        DataOptions(*data[:3], any_classes=data[3], skip_bad=data[4]),
        tuple(member) if member else None,
        base,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
    )


@command
def evaluate(
    file: File,
    member: Members = None,
    base: common.BaseOption = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    split: common.Split = "test",
    any_classes: common.AnyClasses = False,
    skip_bad: common.SkipBad = False,
    ood: Annotated[
        str | None,
        typer.Option(
            help="A dataset of other things: how well uncertainty tells its images apart.",
            rich_help_panel=common.DATA,
        ),
    ] = None,
    ood_dir: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where it lies; alone, a folder of images.",
            rich_help_panel=common.DATA,
        ),
    ] = None,
    batch_size: common.BatchSize = None,
    workers: common.Workers = None,
    engine: EngineOption = "auto",
    amp: common.Amp = None,
    device: common.Device = "auto",
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Accuracy, calibration and uncertainty of the members' mean and of each.

    One network is held in memory and becomes each member in turn.
    """
    from dataclasses import replace

    from randsurgery.cli import render
    from randsurgery.jobs.ensembles import run_eval
    from randsurgery.jobs.inputs import DataOptions

    data = (dataset, data_dir, dataset_download, any_classes, skip_bad)
    plan = _plan(file, member, base, data, batch_size, workers, amp, device)
    far = DataOptions(ood, ood_dir, dataset_download) if ood or ood_dir else None
    plan = replace(plan, engine=engine, ood=far, split=common.split_of(split))
    with render.image_progress(None) as advance:
        found = run_eval(plan, advance)
    common.say_shown(found.shown, "evaluating on digits", found.left_out, found.flattering)
    if found.ood_told:
        note(found.ood_told)
    if json:
        print_json({"file": file, **found.to_json()})
    else:
        render.show_ensemble(found)


@command
def calibrate(
    file: File,
    member: Members = None,
    share: Annotated[
        str | None,
        typer.Option(
            help="The part of the images to fit on. Default: all validation images that training "
            "had, else 0.2 of the test images, which eval then leaves out.",
            rich_help_panel=ENSEMBLE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which images.", rich_help_panel=ENSEMBLE)] = 0,
    base: common.BaseOption = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    any_classes: common.AnyClasses = False,
    skip_bad: common.SkipBad = False,
    batch_size: common.BatchSize = None,
    workers: common.Workers = None,
    amp: common.Amp = None,
    device: common.Device = "auto",
    output: Into = None,
    force: common.Force = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Fit one temperature to the members' mean, and write it into the file.

    As in Section 4.2 of Guo et al. (2017), of the mean instead of one network.
    FILE itself is changed, whole or not at all, unless --output is given.
    """
    from dataclasses import asdict

    from randsurgery.cli import render
    from randsurgery.jobs.ensembles import run_calibrate

    data = (dataset, data_dir, dataset_download, any_classes, skip_bad)
    plan = _plan(file, member, base, data, batch_size, workers, amp, device)
    with render.image_progress(None) as advance:
        found = run_calibrate(
            plan, share=share, seed=seed, output=output, force=force, on_batch=advance
        )
    if json:
        print_json({**asdict(found), "path": str(found.path)})
        return
    rows = [
        ("temperature", f"{found.temperature:.4f}"),
        ("fitted on", f"{found.images:,} {render.SPLIT_WORDS[found.split]}"),
        ("NLL there", f"{found.before:.4f} before, {found.after:.4f} after"),
    ]
    if found.held_out_before is not None and found.held_out_after is not None:
        words = f"{found.held_out_before:.4f} before, {found.held_out_after:.4f} after"
        rows.append((f"of {found.held_out:,} others", words))
    render.show_pairs(rows)
    if found.split == "test":
        note("training kept no validation images apart: eval leaves these test images out")
    if (found.held_out_after or 0) > (found.held_out_before or 0):
        note("it does not carry over to the other images; fit on more of them (--share)")
    note(f"written and verified: {found.path}")


@command
def predict(
    file: File,
    images: predicting.Images = None,
    top: predicting.Top = 5,
    strict: predicting.Strict = False,
    member: Members = None,
    base: common.BaseOption = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    any_classes: common.AnyClasses = False,
    batch_size: common.BatchSize = None,
    workers: common.Workers = None,
    engine: EngineOption = "auto",
    amp: common.Amp = None,
    device: common.Device = "auto",
    output: predicting.CsvOutput = None,
    force: common.Force = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Mean probabilities of images and how uncertain they are, as CSV.

    Columns: path, class, probability; entropy and mutual_information in nats;
    disagreement, the share of members that say another class; class_1,
    probability_1 and so on for the likeliest classes; for a dataset's images,
    label.
    """
    from randsurgery.jobs import predict as job
    from randsurgery.jobs.inputs import DataOptions
    from randsurgery.jobs.sources import SourceSpec

    predicting.check_json(json, output)
    plan = job.prepare(
        SourceSpec(file, base=base),
        images or [],
        DataOptions(dataset, data_dir, dataset_download, any_classes=any_classes),
        output,
        together=job.Together(tuple(member) if member else None, engine),
        top=top,
        batch_size=batch_size or 256,
        workers=workers or 0,
        amp=bool(amp),
        device=device,
        strict=strict,
        force=force,
    )
    predicting.work(plan, file, output, json=json)
