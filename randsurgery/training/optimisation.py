"""Optimiser and learning rate of a run: timm's, by name, and what can be known of them beforehand.

A rate depends on the step alone. With w epochs of warm-up in a run of E, at e epochs (a fraction,
counted in steps from 0): for e < w it rises linearly from ``warmup_lr`` to ``lr``; from there on,
with t = (e - w) / (E - w) and h = lr - min_lr,

    cosine           min_lr + h (1 + cos(pi t)) / 2
    tanh             min_lr + h (1 - tanh(10 t - 7)) / 2
    poly             min_lr + h (1 - t)^decay_rate
    wsd              lr, and over the last fifth of these steps min_lr + h (1 - sqrt(5 t - 4))
    step, multistep  lr decay_rate^n, n of the milestones, counted from the run's start, being <= e
    constant         lr
    none             lr, without a warm-up

timm makes the curves. Its milestones take effect one step early, which is set right here.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import MultiStepLRScheduler, create_scheduler_v2
from torch import nn

from randsurgery.errors import OutputError, UsageError, near, reason
from randsurgery.surgery.randomness import borrowed
from randsurgery.training.settings import Keep, TrainSettings
from randsurgery.training.state import RunState, read_state, write_state

SCHEDULES = ("cosine", "tanh", "poly", "wsd", "step", "multistep", "constant", "none")
"""timm's schedules, which it lists nowhere, less those of ``UNFIT``."""

UNFIT = {
    "plateau": "it follows a metric, and a rate depends on the step alone",
    "rsqrt": "its timescale is not among the options",
}

WSD_DECAY = 0.2  # the share of a wsd run in which its rate falls: timm's default

LOOKAHEAD = "lookahead_"  # timm's prefix: the optimiser whose name follows, wrapped in Lookahead


def resolve_milestones(
    epochs: int, decay_epochs: tuple[int, ...], decay_milestones: tuple[int, ...]
) -> tuple[int, ...]:
    """The epochs, counted from 0, from which a step schedule's rate is lower.

    ``decay_milestones`` are these epochs. So are several ``decay_epochs``; a single one is an
    interval, as it is for timm. With neither, the rate drops after a half and after three quarters
    of the run, in whole epochs: once in 2 epochs, never in 1. Raises UsageError if both are given,
    and for milestones that do not ascend within the run.
    """
    if decay_epochs and decay_milestones:
        raise UsageError("--decay-epochs and --decay-milestones say the same: pass one of them")
    if not (decay_epochs or decay_milestones):
        return tuple(sorted({epochs // 2, epochs * 3 // 4} - {0}))
    option = "--decay-epochs" if decay_epochs else "--decay-milestones"
    given = decay_epochs or decay_milestones
    found = " ".join(map(str, given))
    if given[0] < 1:
        raise UsageError(f"{option} must be 1 or more, found {found}")
    if any(later <= earlier for earlier, later in pairwise(given)):
        raise UsageError(f"{option} must ascend, found {found}")
    if given[-1] >= epochs:
        raise UsageError(
            f"{option} must be less than the run's {epochs} epochs to be reached, found {found}"
        )
    return tuple(range(given[0], epochs, given[0])) if len(decay_epochs) == 1 else given


def idle_options(settings: TrainSettings, given: Collection[str]) -> list[str]:
    """Those of the given options that mean nothing with this schedule and optimiser.

    ``given``: names of ``TrainSettings``, and ``decay_epochs``. Returns them as options:
    ``--decay-rate``. ``momentum`` is one that timm passes on to few optimisers; Adam and its kin
    have betas of their own, and it drops the number without a word.
    """
    idle = set()
    if not settings.steps_down:
        idle |= {"decay_epochs", "decay_milestones"}
    if settings.sched != "poly" and not (settings.steps_down and _milestones(settings)):
        idle.add("decay_rate")
    if settings.steps_down or settings.sched in ("constant", "none"):
        idle.add("min_lr")
    if not settings.warmup_epochs or settings.sched == "none":
        idle.add("warmup_lr")
    name = _base(settings.opt)
    if name in list_optimizers() and not get_optimizer_info(name).has_momentum:
        idle.add("momentum")
    return [_option(name) for name in sorted(idle.intersection(given))]


def set_up(
    learned: list[nn.Parameter], settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    """The optimiser of a run, and the schedule of its rate: timm's object, or None for ``none``.

    ``steps``: optimiser steps an epoch, of which there is at least one. Before each step, the
    schedule's ``step_update`` takes the number of steps that the run has made. Raises UsageError
    for settings that cannot be used.
    """
    _check_numbers(settings)
    _check_schedule(settings)
    if _base(settings.opt) not in list_optimizers():
        known = list_optimizers()
        hint = near(_base(settings.opt), known) or "; timm.optim.list_optimizers() names all"
        raise UsageError(f"unknown --opt {settings.opt!r}, expected an optimiser of timm" + hint)
    try:
        optimizer = create_optimizer_v2(
            learned,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
    except Exception as error:  # whatever the optimiser's own code raises, or its import
        raise UsageError(f"--opt {settings.opt} cannot be set up: {reason(error)}") from None
    return optimizer, _schedule(optimizer, settings, steps)


def _schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, steps: int) -> Any:
    after = settings.epochs - settings.warmup_epochs
    if settings.steps_down:
        return MultiStepLRScheduler(
            optimizer,
            # timm compares milestones with the next step's number
            decay_t=[epoch * steps + 1 for epoch in _milestones(settings)],
            decay_rate=settings.decay_rate,
            warmup_t=settings.warmup_epochs * steps,
            warmup_lr_init=settings.warmup_lr,
            warmup_prefix=False,
            t_in_epochs=False,
        )
    if settings.sched == "wsd" and round(WSD_DECAY * after * steps) < 1:
        raise UsageError(
            "--sched wsd lets the rate fall over a fifth of the steps after the warm-up, found "
            f"{after * steps} such steps; pass more --epochs or another --sched"
        )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=settings.sched,
        num_epochs=after,
        decay_epochs=WSD_DECAY,  # nothing else of what is left reads it
        decay_rate=settings.decay_rate,
        min_lr=settings.min_lr,
        warmup_lr=settings.warmup_lr,
        warmup_epochs=settings.warmup_epochs,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def check_settings(settings: TrainSettings) -> None:
    """Know before any work that a run can be set up, make steps, be written and be resumed.

    Raises UsageError, and OutputError without a temporary folder: a state is written there once.
    """
    _check_numbers(settings)
    _check_schedule(settings)
    with borrowed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say it, if there is one
        _check_optimizer(replace(settings, epochs=max(settings.epochs, 1)))


def _number(holds: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: math.isfinite(value) and holds(value)


def _window(low: float, high: float) -> Callable[[Any], bool]:
    """Two ascending numbers above ``low``, the second one not above ``high`` and finite."""
    return lambda pair: len(pair) == 2 and low < pair[0] <= pair[1] <= high and pair[1] < math.inf


_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": (lambda n: n >= 0, "0 or more"),
    "batch_size": (lambda n: n >= 1, "1 or more"),
    "lr": (_number(lambda x: x >= 0), "a number from 0 on"),
    "weight_decay": (_number(lambda x: x >= 0), "a number from 0 on"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "warmup_epochs": (lambda n: n >= 0, "0 or more"),
    "warmup_lr": (_number(lambda x: x >= 0), "a number from 0 on"),
    "smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "clip_grad": (lambda x: x > 0, "above 0"),
    "class_weights": (lambda word: word == "balanced", "balanced"),
    "crop_padding": (lambda n: n >= 0, "0 or more"),
    "scale": (_window(0, 1), "two ascending numbers in (0, 1]"),
    "ratio": (_window(0, math.inf), "two ascending numbers above 0"),
    "reprob": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "mixup": (_number(lambda x: x >= 0), "a number from 0 on"),
    "cutmix": (_number(lambda x: x >= 0), "a number from 0 on"),
    "model_ema_decay": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "keep": (lambda word: word in get_args(Keep), " or ".join(get_args(Keep))),
    "patience": (lambda n: n >= 1, "1 or more"),
}
"""What a setting must be, unless it is None; the words for it."""


def _check_numbers(settings: TrainSettings) -> None:
    """Each setting by itself, and those that bound each other."""
    for name, (holds, words) in _NUMBERS.items():
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise UsageError(f"{_option(name)} must be {words}, found {_told(value)}")
    if not 0 <= settings.min_lr <= settings.lr:
        raise UsageError(
            f"--min-lr must be in [0, --lr], found {settings.min_lr} with --lr {settings.lr}"
        )
    rate = settings.decay_rate
    if settings.sched == "poly" and not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"--decay-rate must be a number above 0 with --sched poly, found {rate}")
    if settings.sched != "poly" and not 0 < rate <= 1:
        raise UsageError(f"--decay-rate must be in (0, 1], found {rate}")


def _check_schedule(settings: TrainSettings) -> None:
    """The schedule's name, and that its parts fit into the run."""
    sched, epochs, warmup = settings.sched, settings.epochs, settings.warmup_epochs
    names = ", ".join(SCHEDULES)
    if sched in UNFIT:
        raise UsageError(f"--sched {sched} cannot be used: {UNFIT[sched]}; expected one of {names}")
    if sched not in SCHEDULES:
        hint = near(sched, SCHEDULES)
        raise UsageError(f"unknown --sched {sched!r}, expected one of {names}{hint}")
    if warmup and sched == "none":
        raise UsageError(
            f"--sched none has no warm-up, found --warmup-epochs {warmup}; pass --warmup-epochs 0, "
            "or --sched constant"
        )
    if warmup and warmup >= epochs:
        raise UsageError(
            f"--warmup-epochs must be less than the run's {epochs} epochs, found {warmup}"
        )
    if not settings.steps_down:
        return
    if settings.decay_milestones:
        resolve_milestones(epochs, (), settings.decay_milestones)
    if early := [epoch for epoch in _milestones(settings) if epoch < warmup]:
        raise UsageError(
            f"--sched {sched} would let the rate drop after {early[0]} epochs, within the warm-up "
            f"of {warmup}; pass later --decay-milestones, or less --warmup-epochs"
        )


class _Trial:
    """A run of steps on a vector, a matrix and a kernel, which some optimisers treat differently;
    10 steps an epoch, since how many there will be is not yet known."""

    def __init__(self, settings: TrainSettings) -> None:
        self.model = nn.ParameterList(
            torch.arange(1.0, 1 + math.prod(shape), dtype=torch.float32).sin().reshape(shape)
            for shape in ((3,), (4, 5), (4, 3, 3, 3))
        )
        self.optimizer, self.scheduler = set_up(list(self.model), settings, steps=10)

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            if self.scheduler is not None:
                self.scheduler.step_update(step)
            for parameter in self.model:
                parameter.grad = (parameter.detach() + step).cos()
            self.optimizer.step()

    def written(self) -> RunState:
        """Its state, through a file and back."""
        state = RunState.capture(self.model, self.optimizer, epoch=0, step=0)
        state.values |= {"history": [], "sums": {}}
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_state(Path(folder, "state"), state, {})
                return read_state(Path(folder, "state"), {})
        except OSError as error:
            raise OutputError(
                f"no state can be written in a temporary folder ({reason(error)}); set TMPDIR to "
                "one that can be written"
            ) from None


def _check_optimizer(settings: TrainSettings) -> None:
    """Make steps, write the state, and go on from it beside the run that was never stopped."""
    one, other = _Trial(settings), _Trial(settings)
    refused = f"--opt {settings.opt} cannot be used here:"
    if more := set(one.optimizer.state_dict()) - {"state", "param_groups"}:
        raise UsageError(
            f"{refused} it has a state of its own beside the parameters' ({', '.join(more)}), and "
            "a run could not be resumed"
        )
    try:
        one.steps(0, 2)
    except Exception as error:  # some need second derivatives, a closure or another device
        raise UsageError(
            f"{refused} its step needs more than a gradient ({reason(error)})"
        ) from None
    try:
        one.written().restore(other.model, other.optimizer)
    except OutputError:
        raise
    except Exception as error:  # whatever stands in the way of writing or loading it
        raise UsageError(f"{refused} its state cannot be written ({reason(error)})") from None
    one.steps(2, 4)
    other.steps(2, 4)
    for ours, theirs in zip(one.model, other.model, strict=True):
        if not torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True):
            raise UsageError(f"{refused} resumed from its state, it makes other steps")


def _milestones(settings: TrainSettings) -> tuple[int, ...]:
    return settings.decay_milestones or resolve_milestones(settings.epochs, (), ())


def _base(opt: str) -> str:
    """The optimiser's own name. timm reads no case, and takes what follows the last underscore
    for the name, whatever stands before it."""
    return opt.lower().removeprefix(LOOKAHEAD)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _told(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
