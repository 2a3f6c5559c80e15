"""The options that several commands share, under timm's names where timm has one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from randsurgery.cli import common
from randsurgery.cli.common import DATA, MODEL, OUTPUT, TRAINING

if TYPE_CHECKING:
    from randsurgery.jobs.runs import RunPlan
    from randsurgery.jobs.sources import SourceSpec

F = TypeVar("F", bound=Callable[..., Any])

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
Sched = Annotated[str | None, typer.Option(help="timm's schedule name.", rich_help_panel=TRAINING)]
Warmup = Annotated[int | None, typer.Option(min=0, rich_help_panel=TRAINING)]
Smoothing = Annotated[
    float | None, typer.Option(min=0, max=1, help="Label smoothing.", rich_help_panel=TRAINING)
]
ClipGrad = Annotated[
    float | None, typer.Option(min=0, help="Gradient norm bound.", rich_help_panel=TRAINING)
]
Crop = Annotated[
    int | None,
    typer.Option(min=0, help="Pixels of random crop (in-memory sets).", rich_help_panel=DATA),
]
Flip = Annotated[
    bool | None,
    typer.Option("--hflip/--no-hflip", help="Random horizontal flip.", rich_help_panel=DATA),
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


@dataclass(frozen=True)
class RunOptions:
    """What every training command takes."""

    seed: Seed = 0
    init: common.InitOption = None
    init_seed: InitSeed = None
    pretrained: common.Pretrained = False
    checkpoint: common.CheckpointOption = None
    base: common.BaseOption = None
    width: common.Width = None
    model_kwargs: common.ModelArgs = None
    head: Head = None
    head_scale: HeadScale = None
    dataset: common.Dataset = None
    data_dir: common.DataDir = None
    dataset_download: common.Download = False
    num_classes: common.NumClasses = None
    img_size: common.ImgSize = None
    in_chans: common.InChans = None
    crop_padding: Crop = None
    hflip: Flip = None
    workers: common.Workers = None
    epochs: Epochs = None
    batch_size: common.BatchSize = None
    opt: Opt = None
    lr: Rate = None
    weight_decay: WeightDecay = None
    momentum: Momentum = None
    sched: Sched = None
    warmup_epochs: Warmup = None
    smoothing: Smoothing = None
    clip_grad: ClipGrad = None
    amp: common.Amp = None
    channels_last: ChannelsLast = None
    device: common.Device = "auto"
    resume: Resume = None
    state_every: StateEvery = 0
    log_to: LogTo = None
    plot: Plot = None
    output: common.Output = None
    force: common.Force = False
    dry_run: common.DryRun = False
    json: common.Json = False
    config: common.Config = None
    quiet: common.Quiet = False
    verbose: common.Verbose = False


_OVERRIDES = (
    "epochs", "batch_size", "opt", "lr", "weight_decay", "momentum", "sched", "warmup_epochs",
    "smoothing", "clip_grad", "crop_padding", "hflip", "amp", "channels_last", "workers",
)  # fmt: skip


def takes_run_options(*, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Give a command the options of ``RunOptions``, which it receives as its argument ``run``;
    those named keep their defaults."""
    return functools.partial(_with_run_options, without=without)


def _with_run_options(function: F, without: tuple[str, ...]) -> F:
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(RunOptions, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(RunOptions) if f.name not in without}
    own = [p for name, p in inspect.signature(function).parameters.items() if name != "run"]
    parameters = [p.replace(annotation=hints[p.name]) for p in own] + [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=shared[name],
        )
        for name, field in fields.items()
    ]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        run = RunOptions(**{name: kwargs.pop(name) for name in fields})
        return function(*args, **kwargs, run=run)

    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped  # type: ignore[return-value]


def source_of(source: str, run: RunOptions, scaled_for: Any = None) -> SourceSpec:
    """Where the network comes from, checked as far as the command line alone can tell."""
    from randsurgery.jobs.sources import SourceSpec
    from randsurgery.surgery.initialisers import check_init

    return SourceSpec(
        name=source,
        init=check_init(run.init) if run.init is not None else None,
        seed=run.init_seed,
        scaled_for=scaled_for,
        pretrained=run.pretrained,
        checkpoint=run.checkpoint,
        base=run.base,
        args=common.model_arguments(run.model_kwargs, width=run.width),
    )


def plan_of(source: str, run: RunOptions, scaled_for: Any = None) -> RunPlan:
    """The job that the options describe."""
    from randsurgery.jobs.inputs import DataOptions
    from randsurgery.jobs.runs import RunPlan

    data = DataOptions(
        run.dataset, run.data_dir, run.dataset_download, run.num_classes, run.img_size, run.in_chans
    )
    kind, scale = head_of(run.head, run.head_scale)
    return RunPlan(
        source=source_of(source, run, scaled_for),
        data=data,
        overrides={name: getattr(run, name) for name in _OVERRIDES},
        seed=run.seed,
        head=kind,
        head_scale=scale,
        output=run.output,
        device=run.device,
        force=run.force,
        resume=run.resume,
        state_every=run.state_every,
        log_to=tuple(run.log_to or ()),
        plot=run.plot,
    )


def head_of(kind: str | None, scale: float | None) -> tuple[Any, float | None]:
    """The fixed classifier that was asked for. Raises UsageError."""
    from randsurgery.errors import UsageError
    from randsurgery.surgery.heads import check_fixed_kind

    if kind is None and scale is not None:
        raise UsageError("--head-scale goes with --head orthonormal or hadamard")
    return (None if kind is None else check_fixed_kind(kind)), scale


# --- of ensembles ---------------------------------------------------------------------------------

ENSEMBLE = "Ensemble"
File = Annotated[str, typer.Argument(metavar="FILE", help="An ensemble: a randsurgery file.")]
Names = Annotated[
    list[str] | None,
    typer.Option("--name", help="A member's name, in order; repeatable.", rich_help_panel=ENSEMBLE),
]
Members = Annotated[
    list[str] | None,
    typer.Option("--member", help="Only this member; repeatable.", rich_help_panel=ENSEMBLE),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="switch: one network becomes each member in turn; batched: all in one call; auto.",
        rich_help_panel=TRAINING,
    ),
]
Into = Annotated[
    str | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write here, not into FILE itself.",
        rich_help_panel=OUTPUT,
    ),
]  # fmt: skip
