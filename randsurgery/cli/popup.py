"""``randsurgery popup``: find a subnetwork of a random (or dense) network."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from randsurgery.cli import common
from randsurgery.cli.common import TRAINING, command, note, print_json

MASK = "Mask"


@command
def popup(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A timm architecture or a file of init.")
    ],
    k: Annotated[
        str, typer.Option("--k", help="Share of weights kept, (0, 1].", rich_help_panel=MASK)
    ] = "0.3",
    init: common.InitOption = None,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Weights times 1/sqrt(k).", rich_help_panel=common.MODEL),
    ] = False,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Layers left dense and frozen; repeatable.",
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
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of scores, order, augmentation.", rich_help_panel=TRAINING),
    ] = 0,
    init_seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of the weights; default: --seed.", rich_help_panel=common.MODEL
        ),
    ] = None,
    pretrained: common.Pretrained = False,
    checkpoint: common.CheckpointOption = None,
    base: common.BaseOption = None,
    width: common.Width = None,
    model_kwargs: common.ModelArgs = None,
    dataset: common.Dataset = None,
    data_dir: common.DataDir = None,
    dataset_download: common.Download = False,
    num_classes: common.NumClasses = None,
    img_size: common.ImgSize = None,
    in_chans: common.InChans = None,
    workers: common.Workers = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs.", rich_help_panel=TRAINING)
    ] = None,
    batch_size: common.BatchSize = None,
    opt: Annotated[
        str | None,
        typer.Option(
            help="timm's optimiser name; momentum is classical, sgd is Nesterov's.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate.", rich_help_panel=TRAINING)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option("--weight-decay", "--wd", help="On the scores too.", rich_help_panel=TRAINING),
    ] = None,
    momentum: Annotated[float | None, typer.Option(rich_help_panel=TRAINING)] = None,
    sched: Annotated[
        str | None, typer.Option(help="timm's schedule name.", rich_help_panel=TRAINING)
    ] = None,
    warmup_epochs: Annotated[int | None, typer.Option(min=0, rich_help_panel=TRAINING)] = None,
    smoothing: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Label smoothing.", rich_help_panel=TRAINING),
    ] = None,
    clip_grad: Annotated[
        float | None, typer.Option(min=0, help="Gradient norm bound.", rich_help_panel=TRAINING)
    ] = None,
    amp: common.Amp = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last", rich_help_panel=TRAINING)
    ] = None,
    device: common.Device = "auto",
    output: common.Output = None,
    force: common.Force = False,
    dry_run: common.DryRun = False,
    json: common.Json = False,
    config: common.Config = None,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Learn which weights of a network to keep (edge-popup, Ramanujan et al.).

    Without a dataset this runs offline on digits: real 8x8 scans, shown at 32x32.
    """
    from randsurgery.jobs.inputs import DataOptions
    from randsurgery.jobs.popup import PopupPlan, prepare_popup
    from randsurgery.jobs.sources import SourceSpec
    from randsurgery.surgery.initialisers import check_init
    from randsurgery.surgery.popup import Popup, check_mask_kind

    args = common.parse_pairs(model_kwargs or [], "--model-kwargs")
    if width is not None:
        args["width"] = width
    wanted = Popup(
        k=k,
        seed=seed,
        skip=tuple(skip or ()),
        learn=tuple(learn or ()),
        mask=check_mask_kind(mask),
    )
    overrides: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "opt": opt, "lr": lr,
        "weight_decay": weight_decay, "momentum": momentum, "sched": sched,
        "warmup_epochs": warmup_epochs, "smoothing": smoothing, "clip_grad": clip_grad,
        "amp": amp, "channels_last": channels_last, "workers": workers,
    }  # fmt: skip
    plan = PopupPlan(
        source=SourceSpec(
            name=source,
            init=check_init(init) if init is not None else None,
            seed=init_seed,
            scaled_for=wanted.share if scaled else None,
            pretrained=pretrained,
            checkpoint=checkpoint,
            base=base,
            args=args,
        ),
        popup=wanted,
        data=DataOptions(dataset, data_dir, dataset_download, num_classes, img_size, in_chans),
        overrides=overrides,
        output=output,
        device=device,
        save_scores=save_scores,
        force=force,
    )
    job = prepare_popup(plan)
    for line in job.notes:
        note(line)
    with job.checkpoint:
        if dry_run:
            _show_plan(job, json)
        else:
            _run(job, json)


def _show_plan(job: Any, json: bool) -> None:
    from randsurgery.cli import render
    from randsurgery.jobs.popup import popup_facts

    facts = popup_facts(job)
    if json:
        print_json(facts)
    else:
        render.show_pairs([(key, str(value)) for key, value in facts.items()])


def _run(job: Any, json: bool) -> None:
    from randsurgery.cli import render
    from randsurgery.inspection.storage import storage
    from randsurgery.jobs.popup import popup_facts, run_popup

    for key, value in popup_facts(job).items():
        common.detail(f"{key}: {value}")
    with render.training_progress(job.settings.epochs) as hooks:
        result = run_popup(job, hooks)
    report = storage(result.path)
    last = result.records[-1]
    if json:
        print_json(
            {
                "path": str(result.path),
                "bytes": report.bytes,
                "dense_bytes": report.dense_bytes,
                "verified": True,
                "metrics": last,
            }
        )
        return
    render.show_storage(report, tensors=False)
    note(f"written and verified: {result.path}")
    note(f"metrics: {result.metrics_path}")
    common.out().print(f"test accuracy {last['test_accuracy']:.2%}")
