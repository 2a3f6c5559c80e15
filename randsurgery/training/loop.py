"""The one training loop. It knows parameters, batches and a loss, and no technique."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from randsurgery.errors import DataError, DivergedError, UsageError, near, reason
from randsurgery.format.generator import torch_seed
from randsurgery.surgery.randomness import (
    borrowed,
    generator_states,
    set_generator_states,
)
from randsurgery.training.data import Batch, Data
from randsurgery.training.evaluate import autocast, evaluate
from randsurgery.training.settings import TrainSettings
from randsurgery.training.state import RunState

Record = dict[str, Any]

SCHEDULES = ("cosine", "tanh", "step", "constant", "multistep", "plateau", "poly", "rsqrt", "none")
"""timm's schedules, which it lists nowhere."""


@dataclass
class Hooks:
    """What the caller wants to see: each batch, each epoch's record; and what it adds to it."""

    on_epoch_start: Callable[[int, int], None] = lambda epoch, steps: None
    on_step: Callable[[int, float], None] = lambda step, loss: None
    on_epoch: Callable[[Record], None] = lambda record: None
    on_note: Callable[[str], None] = lambda word: None
    extra: Callable[[], Record] = dict
    on_state: Callable[[RunState], None] | None = None  # at each epoch's end
    state_every: int = 0  # and every so many steps, if not 0
    memory: Callable[[], dict[str, torch.Tensor]] = dict  # what ``extra`` remembers
    recall: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None


@dataclass
class Sums:
    """Sums over the images of the epoch so far."""

    batches: int = 0
    loss: float = 0.0
    correct: int = 0
    images: int = 0


@dataclass
class Run:
    """A run in progress: the module, what it learns, and how far it has come."""

    model: nn.Module
    settings: TrainSettings
    steps: int  # optimiser steps an epoch
    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    epoch: int = 0
    step: int = 0
    history: list[Record] = field(default_factory=list)
    sums: Sums = field(default_factory=lambda: Sums())
    generators: list[torch.Tensor] = field(default_factory=list)  # to go on with, within an epoch

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.model.parameters()).device

    @property
    def learned(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def state(self, memory: dict[str, torch.Tensor] | None = None) -> RunState:
        """The whole state, as one object that can be written."""
        state = RunState.capture(self.model, self.optimizer, self.epoch, self.step)
        state.values |= {"history": list(self.history), "sums": asdict(self.sums)}
        state.tensors |= {f"memory/{name}": tensor for name, tensor in (memory or {}).items()}
        if self.sums.batches:
            for index, generator in enumerate(generator_states(self.device)):
                state.tensors[f"generator/{index}"] = generator
        return state

    def restore(self, state: RunState) -> None:
        """Go on from a state of a run set up alike."""
        state.restore(self.model, self.optimizer)
        self.epoch, self.step = state.epoch, state.step
        self.history = list(state.values["history"])
        self.sums = Sums(**state.values["sums"])
        self.generators = [tensor for _, tensor in sorted(state.part("generator/").items())]


def start(model: nn.Module, train: Data, settings: TrainSettings) -> Run:
    """Set up optimiser and schedule. Raises UsageError for names timm does not know."""
    run = Run(model, settings, train.steps(settings.batch_size))
    if run.learned and settings.epochs > 0:
        run.optimizer, run.scheduler = _set_up(run.learned, settings, run.steps)
    return run


def check_settings(settings: TrainSettings) -> None:
    """Set a run up on one number and step, to know before any work that it can be. Raises
    UsageError."""
    if settings.clip_grad is not None and not settings.clip_grad > 0:
        raise UsageError(f"--clip-grad must be above 0, found {settings.clip_grad}")
    for name, value in (("--lr", settings.lr), ("--weight-decay", settings.weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} must be a number from 0 on, found {value}")
    if not 0 <= settings.momentum < 1:
        raise UsageError(f"--momentum must lie in [0, 1), found {settings.momentum}")
    number = nn.Parameter(torch.zeros(1))
    optimizer, _ = _set_up([number], settings, 1)
    number.grad = torch.zeros(1)
    try:
        optimizer.step()
    except (RuntimeError, TypeError) as error:  # some need second derivatives, or a closure
        raise UsageError(
            f"--opt {settings.opt} cannot be used here: its step needs more than a gradient "
            f"({reason(error)})"
        ) from None


def _set_up(
    learned: list[nn.Parameter], settings: TrainSettings, steps: int
) -> tuple[torch.optim.Optimizer, Any]:
    try:
        optimizer = create_optimizer_v2(
            learned,
            opt=settings.opt,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
        )
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (ValueError, AssertionError, KeyError, TypeError, RuntimeError) as error:
        hint = "" if settings.opt in list_optimizers() else near(settings.opt, list_optimizers())
        hint += "" if settings.sched in SCHEDULES else near(settings.sched, SCHEDULES)
        raise UsageError(
            f"--opt {settings.opt} with --sched {settings.sched} cannot be set up: {reason(error)}"
            + hint
        ) from None
    return optimizer, scheduler


def fit(
    model: nn.Module,
    train: Data,
    test: Data,
    settings: TrainSettings,
    hooks: Hooks | None = None,
    *,
    resume: RunState | None = None,
) -> list[Record]:
    """Train what requires gradients; evaluate after each epoch. Returns the epochs' records.

    Nothing global is read or set: dropout and the like draw from a fork of torch's generator,
    seeded by (seed, epoch). With nothing to learn the training images still pass once an epoch,
    which settles running statistics. Raises DivergedError on a NaN or infinite loss.
    """
    hooks = hooks or Hooks()
    run = start(model, train, settings)
    if resume is not None:
        run.restore(resume)
        hooks.recall(resume.part("memory/"))
    while run.epoch < settings.epochs:
        with borrowed(torch_seed(settings.seed, f"epoch-{run.epoch}"), run.device):
            record = _epoch(run, train, hooks)
        _check_finite(run)
        result = evaluate(model, test, amp=settings.amp)
        run.epoch += 1
        record |= {f"test_{key}": value for key, value in result.to_json().items()}
        record = {"epoch": run.epoch, "step": run.step, **record, **hooks.extra()}
        run.history.append(record)
        hooks.on_epoch(record)
        if hooks.on_state is not None:
            hooks.on_state(run.state(hooks.memory()))
    return run.history


def _epoch(run: Run, train: Data, hooks: Hooks) -> Record:
    """What is left of an epoch; a new run has all of it before it."""
    hooks.on_epoch_start(run.epoch, run.steps)
    run.model.train()
    if run.generators:
        set_generator_states(run.generators, run.device)
        run.generators = []
    rate = _set_rate(run)
    for batch in train.training(run.settings, run.epoch, run.sums.batches):
        rate = _set_rate(run)
        logits, loss = _step(run, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss is {value} at step {run.step + 1} (epoch {run.epoch + 1}); pass a lower "
                "--lr, or --clip-grad"
            )
        run.step += 1
        _add(run.sums, value, logits, batch[1])
        hooks.on_step(run.step, value)
        due = hooks.state_every and run.step % hooks.state_every == 0
        if hooks.on_state is not None and due and run.sums.batches < run.steps:
            _check_finite(run)
            hooks.on_state(run.state(hooks.memory()))
    sums, run.sums = run.sums, Sums()
    return {
        "lr": rate,
        "train_loss": sums.loss / sums.images,
        "train_accuracy": sums.correct / sums.images,
    }


def _check_finite(run: Run) -> None:
    """A step may ruin what it learns without its own loss telling."""
    if not all(bool(torch.isfinite(p).all()) for p in run.learned):
        raise DivergedError(
            f"a learned value is not finite after step {run.step} (epoch {run.epoch + 1}); pass a "
            "lower --lr, or --clip-grad"
        )


def _add(sums: Sums, loss: float, logits: torch.Tensor, labels: torch.Tensor) -> None:
    sums.batches += 1
    sums.loss += loss * len(labels)
    sums.correct += int((logits.detach().argmax(1) == labels).sum())
    sums.images += len(labels)


def _set_rate(run: Run) -> float:
    """The schedule's learning rate for the step to come."""
    if run.optimizer is None:
        return 0.0
    if run.scheduler is not None:
        run.scheduler.step_update(run.step)
    return float(run.optimizer.param_groups[0]["lr"])


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """The images in channels-last layout. One channel lies alike in both; there the strides say
    which is meant, and torch's own conversion leaves them as they are. Shape (n, c, h, w)."""
    _, channels, height, width = images.shape
    strides = (channels * height * width, 1, channels * width, channels)
    found = images.contiguous(memory_format=torch.channels_last)
    return found.as_strided(found.shape, strides)


def _step(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch
    settings = run.settings
    if settings.channels_last:
        images = channels_last(images)
    with torch.set_grad_enabled(run.optimizer is not None):
        with autocast(images.device, settings.amp):
            logits = run.model(images)
        if logits.dim() != 2:
            raise DataError(f"the network returns {list(logits.shape)}, expected (batch, classes)")
        loss = nn.functional.cross_entropy(
            logits.float(), labels, label_smoothing=settings.smoothing
        )
    if run.optimizer is not None:
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(run.learned, settings.clip_grad)
        run.optimizer.step()
    return logits, loss
