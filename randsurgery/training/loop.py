"""The one training loop. It knows parameters, batches and a loss, and no technique."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch import nn

from randsurgery.errors import DataError, DivergedError, UsageError
from randsurgery.format.generator import torch_seed
from randsurgery.surgery.randomness import (
    borrowed,
    generator_states,
    set_generator_states,
)
from randsurgery.training.augmentation import mix, mixes
from randsurgery.training.averaging import Average, copied, put
from randsurgery.training.data import Batch, Data
from randsurgery.training.evaluate import autocast, evaluate
from randsurgery.training.optimisation import set_up
from randsurgery.training.settings import TrainSettings
from randsurgery.training.state import RunState

Record = dict[str, Any]

CHANCE = 0.02
"""The share of guessing's loss by which each batch's may miss it, for a network that guesses."""
GUESSED_BATCHES = 4
"""One batch alone may be there by chance."""


@dataclass
class Hooks:
    """What the caller wants to see: each batch, each epoch's record; and what it adds to it."""

    on_epoch_start: Callable[[int, int], None] = lambda epoch, steps: None
    on_step: Callable[[int, float], None] = lambda step, loss: None
    on_epoch: Callable[[Record], None] = lambda record: None
    on_end: Callable[[Record], None] = lambda record: None  # of the kept epoch, with its test
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
    off: float = 0.0  # the furthest that a batch's loss was from ln C,
    off_shares: float = 0.0  # and from what the classes' shares alone tell


@dataclass
class Run:
    """A run in progress: the module, what it learns, and how far it has come."""

    model: nn.Module
    settings: TrainSettings
    steps: int  # optimiser steps an epoch
    classes: int
    weights: torch.Tensor | None = None  # of the classes, in the loss
    average: Average | None = None
    best: dict[str, torch.Tensor] | None = None  # what the best epoch so far had learned
    entropy: float = 0.0  # of the classes' shares, the loss of guessing by these; 0 if unknown
    guessed: float | None = None  # the loss at which the last epoch stayed, if that was guessing
    warned: bool = False
    checked: bool = False  # all labels are known to be classes of the network
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

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The module with the averaged values, if there are some."""
        return contextlib.nullcontext() if self.average is None else self.average.shown(self.model)

    def state(self, memory: dict[str, torch.Tensor] | None = None) -> RunState:
        """The whole state, as one object that can be written."""
        state = RunState.capture(self.model, self.optimizer, self.epoch, self.step)
        state.values |= {"history": list(self.history), "sums": asdict(self.sums)}
        aside = {"memory": memory, "best": self.best}
        aside["average"] = None if self.average is None else self.average.values
        for part, tensors in aside.items():
            state.tensors |= {f"{part}/{name}": one for name, one in (tensors or {}).items()}
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
        self.best = state.part("best/") or None
        if self.average is not None:
            self.average.restore(state.part("average/"))
        self.generators = [tensor for _, tensor in sorted(state.part("generator/").items())]


def start(
    model: nn.Module, train: Data, settings: TrainSettings, classes: int | None = None
) -> Run:
    """Set up optimiser and schedule. Raises UsageError for what cannot be, DataError for labels
    that exceed the network's ``classes`` (default: those of the dataset)."""
    count = classes or len(train.classes)
    run = Run(model, settings, train.steps(settings.batch_size), count)
    labels = train.labels
    if labels is not None and count:
        _check_labels(int(labels.max()), count)
        run.checked = True
    if run.learned and settings.epochs > 0:
        run.optimizer, run.scheduler = set_up(run.learned, settings, run.steps)
        if settings.model_ema:
            run.average = Average(model, settings.model_ema_decay)
    if labels is not None:
        run.entropy = float(entr(np.bincount(labels) / len(labels)).sum())
    if settings.class_weights is not None:
        run.weights = balanced(train, count).to(run.device)
    return run


def balanced(train: Data, classes: int) -> torch.Tensor:
    """A weight for each class, images / (classes x images of the class), so that all classes count
    alike. Shape (classes,); 0 for classes of the network that the dataset does not know. Raises
    DataError for a class without images, or unknown labels."""
    if train.labels is None:
        raise DataError("--class-weights needs a dataset that lists its labels")
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if not counts.all():
        empty = int(np.flatnonzero(counts == 0)[0])
        name = train.classes[empty] if empty < len(train.classes) else str(empty)
        raise DataError(
            f"--class-weights balanced: class {name} has no training image, so no weight; leave "
            "the option out, or the class"
        )
    weights = torch.zeros(max(classes, len(counts)))
    weights[: len(counts)] = torch.from_numpy(counts.sum() / (len(counts) * counts))
    return weights


def fit(
    model: nn.Module,
    train: Data,
    test: Data | None,
    settings: TrainSettings,
    hooks: Hooks | None = None,
    *,
    validation: Data | None = None,
    classes: int | None = None,
    resume: RunState | None = None,
) -> list[Record]:
    """Train what requires gradients; evaluate after each epoch. Returns the epochs' records.

    With ``validation`` each epoch is evaluated on that (``val_*``), and a last record, that of the
    epoch which is kept, has the figures of the test images (``test_*``), which are seen once, at
    the end. Without it each epoch is evaluated on the test images.

    Nothing global is read or set: dropout and the like draw from a fork of torch's generator,
    seeded by (seed, epoch). With nothing to learn the training images still pass once an epoch,
    which settles running statistics. Raises DivergedError on a NaN or infinite loss, UsageError for
    a choice without validation images.
    """
    hooks = hooks or Hooks()
    check_choice(settings, validated=validation is not None)
    seen = validation if validation is not None else test
    run = start(model, train, settings, classes)
    if resume is not None:
        run.restore(resume)
        hooks.recall(resume.part("memory/"))
    while run.epoch < settings.epochs and not _exhausted(run):
        with borrowed(torch_seed(settings.seed, f"epoch-{run.epoch}"), run.device):
            record = _epoch(run, train, hooks)
        _check_finite(run)
        with run.averaged():
            if seen is not None:
                figures = evaluate(model, seen, amp=settings.amp).to_json()
                which = "test" if validation is None else "val"
                record |= {f"{which}_{key}": value for key, value in figures.items()}
            run.epoch += 1
            record = {"epoch": run.epoch, "step": run.step, **record, **hooks.extra()}
            run.history.append(record)
            if settings.keep == "best" and best_epoch(run.history) == run.epoch:
                run.best = copied(model)
        _warn_of_guessing(run, hooks)
        hooks.on_epoch(record)
        if hooks.on_state is not None:
            hooks.on_state(run.state(hooks.memory()))
    return _concluded(run, test, validation, hooks)


def check_choice(settings: TrainSettings, *, validated: bool) -> None:
    """Raises UsageError if an epoch is to be chosen and there is nothing but the test split to
    choose it by."""
    asked = {"--keep best": settings.keep == "best", "--patience": settings.patience is not None}
    for option, wanted in asked.items():
        if wanted and not validated:
            raise UsageError(
                f"{option} needs validation images, or the test images would choose: pass "
                "--val-split 0.1, or bring a validation folder beside a test folder"
            )


def best_epoch(history: Sequence[Record]) -> int:
    """The epoch with the highest validation accuracy; of equal ones the first."""
    return int(max(history, key=lambda record: (record["val_accuracy"], -record["epoch"]))["epoch"])


def _exhausted(run: Run) -> bool:
    """True if no epoch has been better for ``patience`` epochs."""
    patience = run.settings.patience
    if patience is None or not run.history:
        return False
    return run.epoch - best_epoch(run.history) >= patience


def _concluded(run: Run, test: Data | None, validation: Data | None, hooks: Hooks) -> list[Record]:
    """What is kept is put into the module, and tested once if no epoch was tested on."""
    if run.average is not None:
        put(run.average.values, run.model)
    if run.best is not None:
        put(run.best, run.model)
    if validation is None or not run.history:
        return run.history
    best = run.settings.keep == "best"
    record = dict(run.history[best_epoch(run.history) - 1 if best else -1])
    record |= {"kept": run.settings.keep, "epochs_run": run.epoch, "epochs": run.settings.epochs}
    if test is not None:
        result = evaluate(run.model, test, amp=run.settings.amp)
        record |= {f"test_{key}": value for key, value in result.to_json().items()}
    hooks.on_end(record)
    return [*run.history, record]


def _guessed(run: Run) -> float | None:
    """The loss of guessing, if every batch of the epoch stayed there: ln C, or what the classes'
    shares alone tell."""
    if run.sums.batches < GUESSED_BATCHES or mixes(run.settings):
        return None
    for loss, off in ((math.log(run.classes), run.sums.off), (run.entropy, run.sums.off_shares)):
        if off < CHANCE * loss:
            return loss
    return None


def _warn_of_guessing(run: Run, hooks: Hooks) -> None:
    """Say once that a network guesses: whoever says the same of each image has loss ln C."""
    if run.guessed is not None and not run.warned and run.optimizer is not None:
        run.warned = True
        ln = run.guessed == math.log(run.classes)
        by = f"ln {run.classes}" if ln else "by the classes' shares"
        hooks.on_note(
            f"epoch {run.epoch}: the loss stayed at {run.guessed:.3f}, that of guessing ({by}); "
            f"try a lower --lr than {run.settings.lr:g}, or another --init"
        )


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
        if run.average is not None:
            run.average.update(run.model, run.step)
        _add(run.sums, value, logits, batch[1])
        run.sums.off = max(run.sums.off, abs(value - math.log(run.classes)))
        run.sums.off_shares = max(run.sums.off_shares, abs(value - run.entropy))
        hooks.on_step(run.step, value)
        due = hooks.state_every and run.step % hooks.state_every == 0
        if hooks.on_state is not None and due and run.sums.batches < run.steps:
            _check_finite(run)
            hooks.on_state(run.state(hooks.memory()))
    run.guessed = _guessed(run)
    sums, run.sums = run.sums, Sums()
    mixed = mixes(run.settings)  # such an image is of two classes
    return {
        "lr": rate,
        "train_loss": sums.loss / sums.images,
        "train_accuracy": None if mixed else sums.correct / sums.images,
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


def _check_labels(highest: int, classes: int) -> None:
    if highest >= classes:
        raise DataError(f"the dataset has label {highest}, the network {classes} classes")


def _step(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch
    settings, targets = run.settings, batch[1]
    if mixes(settings):
        images, targets = mix(images, labels, settings, run.epoch, run.sums.batches, run.classes)
    if settings.channels_last:
        images = channels_last(images)
    with torch.set_grad_enabled(run.optimizer is not None):
        with autocast(images.device, settings.amp):
            logits = run.model(images)
        if logits.dim() != 2:
            raise DataError(f"the network returns {list(logits.shape)}, expected (batch, classes)")
        run.classes = logits.shape[1]
        if not run.checked:
            _check_labels(int(labels.max()), run.classes)
        soft = targets.is_floating_point()  # mixed, and smoothed by that
        loss = nn.functional.cross_entropy(
            logits.float(), targets, weight=run.weights,
            label_smoothing=0.0 if soft else settings.smoothing,
        )  # fmt: skip
    if run.optimizer is not None:
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if settings.clip_grad is not None:
            nn.utils.clip_grad_norm_(run.learned, settings.clip_grad)
        run.optimizer.step()
    return logits, loss
