"""The options of a training run, under timm's names where timm has one."""

from __future__ import annotations

from typing import Annotated

import typer

from randsurgery.cli.common import MODEL, OUTPUT, TRAINING

VALIDATION, AUGMENTATION = "Validation", "Augmentation"

Seed = Annotated[
    int, typer.Option(min=0, help="Seed of order, augmentation, scores.", rich_help_panel=TRAINING)
]
InitSeed = Annotated[
    int | None,
    typer.Option(min=0, help="Seed of the weights; default: --seed.", rich_help_panel=MODEL),
]
Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="KIND",
        help="Fix the classifier: orthonormal or hadamard.",
        rich_help_panel=MODEL,
    ),
]
HeadScale = Annotated[
    float | None,
    typer.Option(help="A fixed classifier's scale; default: learned.", rich_help_panel=MODEL),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs.", rich_help_panel=TRAINING)]
Opt = Annotated[
    str | None,
    typer.Option(
        help="timm's optimiser name; momentum is classical, sgd is Nesterov's.",
        rich_help_panel=TRAINING,
    ),
]
Rate = Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=TRAINING)]
WeightDecay = Annotated[
    float | None,
    typer.Option(
        "--weight-decay", "--wd", help="On all that is learned.", rich_help_panel=TRAINING
    ),
]
Momentum = Annotated[float | None, typer.Option(rich_help_panel=TRAINING)]
Sched = Annotated[
    str | None,
    typer.Option(
        help="cosine, step, poly, tanh, wsd, constant or none; step falls at 1/2 and 3/4 of the "
        "run unless told otherwise.",
        rich_help_panel=TRAINING,
    ),
]
DecayEpochs = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        metavar="N...",
        help="step: lower the rate every N epochs; of several numbers, at these.",
        rich_help_panel=TRAINING,
    ),
]
DecayMilestones = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        metavar="N...",
        help="step: lower the rate after these epochs.",
        rich_help_panel=TRAINING,
    ),
]
DecayRate = Annotated[
    float | None,
    typer.Option(help="step: the factor, 0.1; poly: the power.", rich_help_panel=TRAINING),
]
MinRate = Annotated[
    float | None,
    typer.Option("--min-lr", help="Where a cosine ends; 0.", rich_help_panel=TRAINING),
]
Warmup = Annotated[
    int | None,
    typer.Option(min=0, help="Epochs in which the rate rises to --lr.", rich_help_panel=TRAINING),
]
WarmupRate = Annotated[
    float | None,
    typer.Option("--warmup-lr", help="Where it rises from; 1e-5.", rich_help_panel=TRAINING),
]
Smoothing = Annotated[
    float | None, typer.Option(help="Label smoothing, in [0, 1).", rich_help_panel=TRAINING)
]
ClipGrad = Annotated[
    float | None, typer.Option(help="Gradient norm bound, above 0.", rich_help_panel=TRAINING)
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        metavar="balanced",
        help="Let rare classes count as much as common ones in the loss.",
        rich_help_panel=TRAINING,
    ),
]
Ema = Annotated[
    bool | None,
    typer.Option(
        "--model-ema", help="Keep a moving average of what is learned.", rich_help_panel=TRAINING
    ),
]
EmaDecay = Annotated[
    float | None, typer.Option(help="Its decay; 0.9998.", rich_help_panel=TRAINING)
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Defaults by name: imagenet, cifar, digits, mnist, fashion, folder. Default: the "
        "dataset's.",
        rich_help_panel=TRAINING,
    ),
]
ValSplit = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Hold out a share of the training images, such as 0.1, to validate on; the test "
        "images are then seen once, at the end.",
        rich_help_panel=VALIDATION,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        metavar="best|last",
        help="The epoch that is kept; best by validation accuracy. Default: last.",
        rich_help_panel=VALIDATION,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="EPOCHS",
        help="Stop after so many without a better validation accuracy.",
        rich_help_panel=VALIDATION,
    ),
]
Crop = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Random windows of images padded by so many pixels; 0: none.",
        rich_help_panel=AUGMENTATION,
    ),
]
Scale = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Random resized crops: shares of the area; 0.08 1.",
        rich_help_panel=AUGMENTATION,
    ),
]
Ratio = Annotated[
    tuple[float, float] | None,
    typer.Option(
        metavar="LOW HIGH",
        help="Random resized crops: width by height; 0.75 1.3333.",
        rich_help_panel=AUGMENTATION,
    ),
]
AutoAugment = Annotated[
    str | None,
    typer.Option(
        "--aa",
        metavar="POLICY",
        help="timm's policies, such as rand-m9-mstd0.5 (without colour jitter beside them).",
        rich_help_panel=AUGMENTATION,
    ),
]
Erasing = Annotated[
    float | None,
    typer.Option(
        "--reprob",
        help="The share of images of which a part is erased.",
        rich_help_panel=AUGMENTATION,
    ),
]
Mixup = Annotated[
    float | None, typer.Option(help="Mixup's alpha; 0: none.", rich_help_panel=AUGMENTATION)
]
CutMix = Annotated[
    float | None,
    typer.Option("--cutmix", help="CutMix's alpha; 0: none.", rich_help_panel=AUGMENTATION),
]
Flip = Annotated[
    bool | None,
    typer.Option(
        "--hflip/--no-hflip", help="Random horizontal flip.", rich_help_panel=AUGMENTATION
    ),
]
ChannelsLast = Annotated[bool | None, typer.Option("--channels-last", rich_help_panel=TRAINING)]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="PATH|auto",
        help="Go on from a state; auto: from this job's own, if there is one.",
        rich_help_panel=TRAINING,
    ),
]
StateEvery = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="STEPS",
        help="Write the state every so many steps, too; 0: at epoch ends only.",
        rich_help_panel=TRAINING,
    ),
]
LogTo = Annotated[
    list[str] | None,
    typer.Option(help="Further records: tensorboard.", rich_help_panel=OUTPUT),
]
Plot = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Learning curves: .png, .svg, .pdf.", rich_help_panel=OUTPUT),
]
