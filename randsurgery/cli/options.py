"""The options that several commands share, under timm's names where timm has one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from randsurgery.cli import common, training
from randsurgery.cli.common import OUTPUT, TRAINING

if TYPE_CHECKING:
    from randsurgery.jobs.preparing import RunPlan
    from randsurgery.jobs.sources import SourceSpec

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class RunOptions:
    """What every training command takes."""

    seed: training.Seed = 0
    init: common.InitOption = None
    init_seed: training.InitSeed = None
    pretrained: common.Pretrained = False
    checkpoint: common.CheckpointOption = None
    ema: common.EmaOption = False
    base: common.BaseOption = None
    width: common.Width = None
    model_kwargs: common.ModelArgs = None
    head: training.Head = None
    head_scale: training.HeadScale = None
    dataset: common.Dataset = None
    data_dir: common.DataDir = None
    dataset_download: common.Download = False
    num_classes: common.NumClasses = None
    img_size: common.ImgSize = None
    in_chans: common.InChans = None
    crop_pct: common.CropPct = None
    interpolation: common.Interpolation = None
    any_classes: common.AnyClasses = False
    skip_bad: common.SkipBad = False
    val_split: training.ValSplit = None
    keep: training.Keep = None
    patience: training.Patience = None
    crop_padding: training.Crop = None
    scale: training.Scale = None
    ratio: training.Ratio = None
    hflip: training.Flip = None
    aa: training.AutoAugment = None
    reprob: training.Erasing = None
    mixup: training.Mixup = None
    cutmix: training.CutMix = None
    workers: common.Workers = None
    recipe: training.Recipe = None
    epochs: training.Epochs = None
    batch_size: common.BatchSize = None
    opt: training.Opt = None
    lr: training.Rate = None
    weight_decay: training.WeightDecay = None
    momentum: training.Momentum = None
    sched: training.Sched = None
    decay_epochs: training.DecayEpochs = None
    decay_milestones: training.DecayMilestones = None
    decay_rate: training.DecayRate = None
    min_lr: training.MinRate = None
    warmup_epochs: training.Warmup = None
    warmup_lr: training.WarmupRate = None
    smoothing: training.Smoothing = None
    clip_grad: training.ClipGrad = None
    class_weights: training.ClassWeights = None
    model_ema: training.Ema = None
    model_ema_decay: training.EmaDecay = None
    amp: common.Amp = None
    channels_last: training.ChannelsLast = None
    device: common.Device = "auto"
    resume: training.Resume = None
    state_every: training.StateEvery = 0
    log_to: training.LogTo = None
    plot: training.Plot = None
    output: common.Output = None
    force: common.Force = False
    dry_run: common.DryRun = False
    json: common.Json = False
    config: common.Config = None
    quiet: common.Quiet = False
    verbose: common.Verbose = False


_OVERRIDES = (
    "epochs", "batch_size", "opt", "lr", "weight_decay", "momentum", "sched", "decay_epochs",
    "decay_milestones", "decay_rate", "min_lr", "warmup_epochs", "warmup_lr", "smoothing",
    "clip_grad", "class_weights", "model_ema", "model_ema_decay", "val_split", "keep", "patience",
    "crop_padding", "scale", "ratio", "hflip", "aa", "reprob", "mixup", "cutmix", "amp",
    "channels_last", "workers",
)  # fmt: skip


FileOrDense = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A randsurgery file; with --checkpoint or --pretrained a timm architecture.",
    ),
]


@dataclass(frozen=True)
class NetworkOptions:
    """What every command takes that uses a network as it is: besides files, dense weights of an
    architecture."""

    checkpoint: common.CheckpointOption = None
    pretrained: common.Pretrained = False
    ema: common.EmaOption = False
    base: common.BaseOption = None
    num_classes: common.NumClasses = None
    in_chans: common.InChans = None
    width: common.Width = None
    model_kwargs: common.ModelArgs = None


def takes_run_options(*, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Give a command the options of ``RunOptions``, which it receives as its argument ``run``;
    those named keep their defaults."""
    return functools.partial(_with_options, shared_by=RunOptions, name="run", without=without)


def takes_network_options(function: F) -> F:
    """Give a command the options of ``NetworkOptions``, which it receives as its argument
    ``network``."""
    return _with_options(function, NetworkOptions, "network", ())


def _with_options(function: F, shared_by: type, name: str, without: tuple[str, ...]) -> F:
    hints = get_type_hints(function, include_extras=True)
    shared = get_type_hints(shared_by, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(shared_by) if f.name not in without}
    own = [p for key, p in inspect.signature(function).parameters.items() if key != name]
    parameters = [p.replace(annotation=hints[p.name]) for p in own] + [
        inspect.Parameter(
            key,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=shared[key],
        )
        for key, field in fields.items()
    ]

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = shared_by(**{key: kwargs.pop(key) for key in fields})
        return function(*args, **kwargs, **{name: found})

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
        ema=run.ema,
        base=run.base,
        args=common.model_arguments(run.model_kwargs, width=run.width),
    )


def network_of(name: str, given: NetworkOptions) -> SourceSpec:
    """The network that is to be used: of a file, or an architecture's with dense weights."""
    from randsurgery.jobs.sources import SourceSpec

    return SourceSpec(
        name=name,
        pretrained=given.pretrained,
        checkpoint=given.checkpoint,
        ema=given.ema,
        base=given.base,
        args=common.model_arguments(
            given.model_kwargs, num_classes=given.num_classes, width=given.width
        ),
    )


def plan_of(source: str, run: RunOptions, scaled_for: Any = None) -> RunPlan:
    """The job that the options describe."""
    from randsurgery.jobs.inputs import DataOptions
    from randsurgery.jobs.preparing import RunPlan

    data = DataOptions(
        run.dataset, run.data_dir, run.dataset_download, run.num_classes, run.img_size,
        run.in_chans, run.crop_pct, run.interpolation, run.any_classes, run.skip_bad, common.note,
    )  # fmt: skip
    kind, scale = head_of(run.head, run.head_scale)
    return RunPlan(
        source=source_of(source, run, scaled_for),
        data=data,
        overrides={name: getattr(run, name) for name in _OVERRIDES},
        recipe=run.recipe,
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
        help="switch: one network becomes each member in turn; held: all side by side, one after "
        "another; batched: in one call; auto.",
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
