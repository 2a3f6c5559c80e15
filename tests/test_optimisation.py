"""Rates and optimisers: each step's rate against its formula, what is refused, what resumes."""

from __future__ import annotations

import contextlib
import math
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import list_optimizers
from torch import nn

from randsurgery.errors import OutputError, UsageError
from randsurgery.training import optimisation
from randsurgery.training.optimisation import (
    SCHEDULES,
    UNFIT,
    check_settings,
    idle_options,
    resolve_milestones,
    set_up,
)
from randsurgery.training.settings import TrainSettings
from randsurgery.training.state import RunState, read_state, write_state

EPOCHS, STEPS = 10, 7
SMOOTH = ("cosine", "tanh", "poly", "wsd")
REFUSED = ("adahessian", "kron*", "bnb*", "fused*")  # on a machine without apex and bitsandbytes
OFFERED = [name for name in list_optimizers() if not any(fnmatch(name, r) for r in REFUSED)]


def settings_of(**given: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": EPOCHS, "lr": 0.3, **given})


def rates(settings: TrainSettings, steps: int = STEPS) -> list[float]:
    """Every step's rate, as a run sets them."""
    optimizer, schedule = set_up([nn.Parameter(torch.ones(2))], settings, steps)
    found = []
    for step in range(settings.epochs * steps):
        if schedule is not None:
            schedule.step_update(step)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def rate(settings: TrainSettings, step: int, steps: int = STEPS) -> float:
    """The slow twin: the rate of one step, as the formulas say it."""
    low, high, warmup = settings.min_lr, settings.lr, settings.warmup_epochs
    epoch = step / steps
    if epoch < warmup:
        return settings.warmup_lr + (high - settings.warmup_lr) * epoch / warmup
    share = (epoch - warmup) / (settings.epochs - warmup)
    if settings.sched == "cosine":
        return low + (high - low) * (1 + math.cos(math.pi * share)) / 2
    if settings.sched == "tanh":
        return low + (high - low) * (1 - math.tanh(-7 + 10 * share)) / 2
    if settings.sched == "poly":
        return low + (high - low) * (1 - share) ** settings.decay_rate
    if settings.sched == "wsd":
        total = (settings.epochs - warmup) * steps
        fall = round(0.2 * total)
        gone = (step - warmup * steps) - (total - fall)
        return high if gone <= 0 else low + (high - low) * (1 - math.sqrt(gone / fall))
    if settings.sched in ("step", "multistep"):
        reached = [m for m in settings.decay_milestones if m * steps <= step]
        return high * settings.decay_rate ** len(reached)
    return high


def assert_rates(settings: TrainSettings, steps: int = STEPS) -> None:
    expected = [rate(settings, step, steps) for step in range(settings.epochs * steps)]
    assert rates(settings, steps) == pytest.approx(expected, rel=1e-12, abs=1e-15), settings


# --- rates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sched", SMOOTH)
@pytest.mark.parametrize("warmup", [0, 1, 3, 9])
@pytest.mark.parametrize("min_lr", [0.0, 0.02])
def test_smooth_schedules_follow_their_formulas(sched: str, warmup: int, min_lr: float) -> None:
    settings = settings_of(sched=sched, warmup_epochs=warmup, min_lr=min_lr)
    assert_rates(settings)
    assert_rates(replace(settings, warmup_lr=0.0, decay_rate=0.9), steps=3)


@pytest.mark.parametrize("sched", ["step", "multistep"])
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("milestones", [(2,), (5, 7), (3, 4, 9)])
def test_step_schedules_drop_at_the_first_step_of_their_milestones(
    sched: str, warmup: int, milestones: tuple[int, ...]
) -> None:
    for decay_rate in (0.1, 0.5, 1.0):
        settings = settings_of(
            sched=sched, warmup_epochs=warmup, decay_milestones=milestones, decay_rate=decay_rate
        )
        assert_rates(settings)
        assert_rates(settings, steps=1)


def test_a_drop_is_neither_a_step_early_nor_late() -> None:
    found = rates(settings_of(sched="step", decay_milestones=(4,), decay_rate=0.5))
    assert found == [0.3] * 4 * STEPS + [0.15] * 6 * STEPS


def test_step_schedules_without_milestones_drop_at_a_half_and_three_quarters() -> None:
    for epochs in (1, 2, 3, 10):
        settings = settings_of(sched="step", epochs=epochs)
        stated = replace(settings, decay_milestones=resolve_milestones(epochs, (), ()))
        assert_rates(stated)
        assert rates(settings) == rates(stated)


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_constant_schedule_warms_up_and_stays(warmup: int) -> None:
    assert_rates(settings_of(sched="constant", warmup_epochs=warmup))


def test_without_a_schedule_the_rate_is_the_given_one() -> None:
    assert rates(settings_of(sched="none")) == [0.3] * EPOCHS * STEPS


def test_the_cosine_starts_anew_after_the_warm_up_and_ends_at_its_least() -> None:
    warm = rates(settings_of(warmup_epochs=4, min_lr=0.01))
    assert warm[: 4 * STEPS] == sorted(warm[: 4 * STEPS])
    assert warm[0] == 1e-5
    assert warm[4 * STEPS :] == pytest.approx(rates(settings_of(epochs=6, min_lr=0.01)), rel=1e-12)
    assert max(warm) == warm[4 * STEPS] == 0.3
    many = rates(settings_of(min_lr=0.01), steps=1000)
    assert many[-1] == pytest.approx(0.01, rel=1e-4)


def test_a_warm_up_may_begin_above_the_rate() -> None:
    assert_rates(settings_of(lr=1e-6, warmup_epochs=2, warmup_lr=1e-5))


def test_all_schedules_are_tested_and_differ() -> None:
    assert set(SCHEDULES) == {*SMOOTH, "step", "multistep", "constant", "none"}
    distinct = {tuple(rates(settings_of(sched=sched))) for sched in SCHEDULES}
    assert len(distinct) == len(SCHEDULES) - 2  # step is multistep, constant without warm-up none


@pytest.mark.parametrize("opt", ["momentum", "lamb", "lookahead_adamw"])
def test_the_rate_of_a_step_depends_on_nothing_before_it(opt: str) -> None:
    settings = settings_of(opt=opt, warmup_epochs=2)
    optimizer, schedule = set_up([nn.Parameter(torch.ones(2))], settings, STEPS)
    for step in (40, 3, 69, 0):
        schedule.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(settings, step), rel=1e-12)


def test_every_parameter_is_in_one_group_with_the_given_decay() -> None:
    learned = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer, _ = set_up(learned, settings_of(weight_decay=0.25, momentum=0.75), STEPS)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 2
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (0.25, 0.75, False)


# --- milestones ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "every", "at", "expected"),
    [
        (100, (), (), (50, 75)), (10, (), (), (5, 7)), (3, (), (), (1, 2)), (2, (), (), (1,)),
        (1, (), (), ()), (100, (30,), (), (30, 60, 90)), (90, (30,), (), (30, 60)),
        (31, (30,), (), (30,)), (2, (1,), (), (1,)), (40, (15, 30), (), (15, 30)),
        (40, (), (15, 30), (15, 30)), (40, (), (39,), (39,)),
    ],
)  # fmt: skip
def test_milestones_are_resolved(
    epochs: int, every: tuple[int, ...], at: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert resolve_milestones(epochs, every, at) == expected


@pytest.mark.parametrize(
    ("every", "at", "words"),
    [
        ((5,), (5,), "pass one of them"),
        ((0,), (), "--decay-epochs must be 1 or more, found 0"),
        ((-3,), (), "--decay-epochs must be 1 or more, found -3"),
        ((), (0, 3), "--decay-milestones must be 1 or more, found 0 3"),
        ((), (7, 3), "--decay-milestones must ascend, found 7 3"),
        ((), (3, 3), "--decay-milestones must ascend, found 3 3"),
        ((7, 3), (), "--decay-epochs must ascend"),
        ((10,), (), "--decay-epochs must be less than the run's 10 epochs to be reached, found 10"),
        ((), (3, 10), "--decay-milestones must be less than the run's 10 epochs"),
        ((3, 30), (), "--decay-epochs must be less than"),
    ],
)
def test_milestones_that_cannot_be_reached_are_refused(
    every: tuple[int, ...], at: tuple[int, ...], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        resolve_milestones(10, every, at)
    assert "\n" not in str(caught.value)


# --- optimisers ----------------------------------------------------------------------------------

SHAPES = ((3,), (4, 5), (4, 3, 3, 3), (18, 16))  # the last: what Adafactors factor


def parameters() -> nn.ParameterList:
    return nn.ParameterList(
        torch.arange(math.prod(shape), dtype=torch.float32).mul(1.7).sin().reshape(shape)
        for shape in SHAPES
    )


def go(
    model: nn.ParameterList, optimizer: torch.optim.Optimizer, schedule: Any, start: int, stop: int
) -> None:
    for step in range(start, stop):
        schedule.step_update(step)
        for index, parameter in enumerate(model):
            numbers = torch.arange(parameter.numel()).mul(0.9).reshape(parameter.shape)
            parameter.grad = (numbers + 1.3 * step + index).cos() * 0.1
        optimizer.step()


def values(model: nn.ParameterList) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model]


@pytest.mark.parametrize("opt", [*OFFERED, "lookahead_momentum", "lookahead_adamw"])
def test_a_resumed_optimiser_makes_the_same_steps(opt: str, tmp_path: Path) -> None:
    settings = settings_of(opt=opt, lr=0.05, weight_decay=0.01, epochs=3, warmup_epochs=1)
    model, again = parameters(), parameters()
    optimizer, schedule = set_up(list(model), settings, 5)
    go(model, optimizer, schedule, 0, 7)
    state = RunState.capture(model, optimizer, 1, 7)
    state.values |= {"history": [], "sums": {}}
    write_state(tmp_path / "state", state, {})
    other, its_schedule = set_up(list(again), settings, 5)
    read_state(tmp_path / "state", {}).restore(again, other)
    for step in range(7, 15):
        go(model, optimizer, schedule, step, step + 1)
        go(again, other, its_schedule, step, step + 1)
        for ours, theirs in zip(values(model), values(again), strict=True):
            assert torch.isfinite(ours).all()
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (opt, step)


@pytest.mark.parametrize("opt", OFFERED)
def test_momentum_is_idle_where_it_changes_no_step(opt: str) -> None:
    def after(**given: float) -> list[torch.Tensor]:
        model = nn.ParameterList(parameters()[:3])
        settings = settings_of(**{"opt": opt, "lr": 0.05, "weight_decay": 0.01, **given})
        go(model, *set_up(list(model), settings, STEPS), 0, 4)
        return values(model)

    def changes(**given: float) -> bool:
        return not all(map(torch.equal, plain, after(**given)))

    plain = after()
    idle = idle_options(settings_of(opt=opt), ["momentum", "weight_decay", "lr"])
    assert idle == ([] if changes(momentum=0.5) else ["--momentum"])
    assert changes(weight_decay=0.5)
    assert changes(lr=0.02)


def test_all_optimisers_of_timm_are_offered_or_refused_in_one_line() -> None:
    assert len(OFFERED) > 70
    for opt in OFFERED:
        check_settings(settings_of(opt=opt))
    for opt in set(list_optimizers()) - set(OFFERED):
        with pytest.raises(UsageError, match=f"--opt {opt} cannot be") as caught:
            check_settings(settings_of(opt=opt))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("opt", "words"),
    [
        ("kron", r"a state of its own beside the parameters' \(rng_state\)"),
        ("lookahead_kron", "a state of its own"),
        ("adahessian", "its step needs more than a gradient"),
        ("momentun", "unknown --opt 'momentun'.*; near: momentum"),
        ("some_adam", "unknown --opt 'some_adam'"),  # timm would take adam
        ("_adam", "unknown --opt '_adam'"),
        ("lookahead_", "unknown --opt 'lookahead_'"),
        ("zzz", "list_optimizers"),
        ("", "unknown --opt ''"),
    ],
)
def test_optimisers_that_cannot_be_used_are_refused(opt: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_settings(settings_of(opt=opt))


def test_optimisers_are_named_in_any_case() -> None:
    check_settings(settings_of(opt="AdamW"))
    check_settings(settings_of(opt="Lookahead_RAdam"))


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UsageError, match=r"--opt fusedlamb cannot be set up: .*apex"):
        check_settings(settings_of(opt="fusedlamb"))


def test_numbers_that_one_optimiser_refuses_are_told() -> None:
    with pytest.raises(UsageError, match="--opt sgd cannot be set up: Nesterov"):
        check_settings(settings_of(opt="sgd", momentum=0.0))
    check_settings(settings_of(opt="momentum", momentum=0.0))
    check_settings(settings_of(lr=0.0))
    check_settings(settings_of(lr=1e30))  # diverges, and says so when it does


class Lists(torch.optim.SGD):
    """Keeps a list of tensors, as preconditioners are kept."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["factors"] = [torch.ones(2)]


class Complex(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["factors"] = torch.ones(2, dtype=torch.complex64)


class Endless(torch.optim.SGD):
    """Keeps a number that JSON has no word for."""

    def step(self, closure: Any = None) -> None:
        super().step()
        self.param_groups[0]["best"] = math.inf


class Function(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        self.param_groups[0]["rule"] = abs


class Hidden(torch.optim.SGD):
    """Counts in an attribute, which no state holds."""

    count = 0

    def step(self, closure: Any = None) -> None:
        super().step()
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - 0.01 * self.count)


class Closure(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        closure()


class Fine(torch.optim.SGD):
    """The control: keeps tensors, numbers and a seed of torch's generator."""

    def step(self, closure: Any = None) -> None:
        warnings.warn("an optimiser's word", stacklevel=1)
        super().step()
        torch.rand(3)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] |= {"number": 1.5, "buffer": torch.ones(2)}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Lists, "its state cannot be written .*Tensor"), (Function, "its state cannot be written"),
        (Complex, "its state cannot be written .*complex"),
        (Endless, "its state cannot be written"), (Hidden, "it makes other steps"),
        (Closure, "its step needs more than a gradient"), (Fine, None),
    ],
)  # fmt: skip
def test_what_could_not_be_resumed_is_refused_before_any_work(
    kind: Any, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(learned: Any, *, opt: str, lr: float, weight_decay: float, momentum: float) -> Any:
        return kind(learned, lr=lr, momentum=momentum)

    monkeypatch.setattr(optimisation, "create_optimizer_v2", make)
    if words is None:
        before = torch.get_rng_state()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            check_settings(settings_of())
        assert not heard
        assert torch.equal(torch.get_rng_state(), before)
        return
    with pytest.raises(UsageError, match=f"--opt momentum cannot be used here: .*{words}") as found:
        check_settings(settings_of())
    assert "\n" not in str(found.value)


def test_without_a_temporary_folder_the_check_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match="set TMPDIR"):
        check_settings(settings_of())


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr": math.nan}, "--lr must be a number from 0 on, found nan"),
        ({"lr": -0.1}, "found -0.1"),
        ({"lr": math.inf}, "--lr"),
        ({"weight_decay": -1.0}, "--weight-decay must be a number from 0 on, found -1.0"),
        ({"momentum": 1.0}, r"--momentum must be in \[0, 1\), found 1.0"),
        ({"momentum": math.nan}, "--momentum"),
        ({"clip_grad": 0.0}, "--clip-grad must be above 0, found 0.0"),
        ({"clip_grad": math.nan}, "--clip-grad"),
        ({"epochs": -1}, "--epochs must be 0 or more"),
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"decay_rate": 0.0, "sched": "step"}, r"--decay-rate must be in \(0, 1\], found 0.0"),
        ({"decay_rate": 1.5, "sched": "step"}, "--decay-rate"),
        ({"decay_rate": math.nan}, "--decay-rate"),
        ({"decay_rate": 0.0, "sched": "poly"}, "--decay-rate must be a number above 0"),
        ({"decay_rate": math.inf, "sched": "poly"}, "--decay-rate"),
        ({"min_lr": -0.1}, r"--min-lr must be in \[0, --lr\], found -0.1 with --lr 0.3"),
        ({"min_lr": 0.31}, "--min-lr"),
        ({"min_lr": math.nan}, "--min-lr"),
        ({"warmup_lr": -0.1}, "--warmup-lr must be a number from 0 on"),
        ({"warmup_lr": math.inf}, "--warmup-lr"),
        ({"warmup_epochs": -1}, "--warmup-epochs must be 0 or more"),
        ({"warmup_epochs": 10}, "--warmup-epochs must be less than the run's 10 epochs, found 10"),
        ({"warmup_epochs": 11, "sched": "constant"}, "--warmup-epochs must be less than"),
        ({"warmup_epochs": 1, "epochs": 0}, "--warmup-epochs must be less than"),
        ({"warmup_epochs": 2, "sched": "none"}, "--sched none has no warm-up"),
        ({"sched": "step", "decay_milestones": (3, 10)}, "--decay-milestones must be less than"),
        ({"sched": "multistep", "decay_milestones": (4, 2)}, "--decay-milestones must ascend"),
        ({"sched": "step", "decay_milestones": (2, 6), "warmup_epochs": 3}, "drop after 2 epochs"),
        ({"sched": "step", "warmup_epochs": 6}, "drop after 5 epochs, within the warm-up of 6"),
        ({"sched": "cosin"}, "unknown --sched 'cosin', .*; near: cosine"),
        ({"sched": "Cosine"}, "unknown --sched 'Cosine', .*; near: cosine"),
        ({"sched": ""}, "unknown --sched '', expected one of cosine, "),
        ({"sched": "plateau"}, "--sched plateau cannot be used: it follows a metric"),
        ({"sched": "rsqrt"}, "--sched rsqrt cannot be used: its timescale"),
        ({"smoothing": 1.0}, r"--smoothing must be in \[0, 1\)"),
        ({"smoothing": -0.1}, "--smoothing"),
        ({"reprob": 1.1}, r"--reprob must be in \[0, 1\]"),
        ({"reprob": math.nan}, "--reprob"),
        ({"mixup": -0.2}, "--mixup must be a number from 0 on"),
        ({"cutmix": math.inf}, "--cutmix must be a number from 0 on"),
        ({"model_ema_decay": 1.0}, r"--model-ema-decay must be in \[0, 1\)"),
        (
            {"scale": (0.0, 1.0)},
            r"--scale must be two ascending numbers in \(0, 1\], found 0.0 1.0",
        ),
        ({"scale": (0.5, 1.1)}, "--scale"),
        ({"scale": (0.8, 0.4)}, "--scale"),
        ({"scale": (0.8,)}, "--scale"),
        ({"scale": (math.nan, 1.0)}, "--scale"),
        ({"ratio": (1.4, 0.7)}, "--ratio must be two ascending numbers above 0, found 1.4 0.7"),
        ({"ratio": (0.0, 1.0)}, "--ratio"),
        ({"ratio": (1.0, math.inf)}, "--ratio"),
        ({"crop_padding": -1}, "--crop-padding must be 0 or more"),
        ({"class_weights": "balance"}, "--class-weights must be balanced, found balance"),
        ({"keep": "first"}, "--keep must be last or best, found first"),
        ({"patience": 0}, "--patience must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        check_settings(settings_of(**given))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=words):  # and of a run that nobody checked
        set_up([nn.Parameter(torch.ones(2))], settings_of(**given), STEPS)


def test_settings_at_their_bounds_are_taken() -> None:
    for given in (
        {"min_lr": 0.3}, {"decay_rate": 1.0, "sched": "step"}, {"decay_rate": 3.0, "sched": "poly"},
        {"warmup_epochs": 9}, {"warmup_lr": 0.0, "warmup_epochs": 1}, {"reprob": 1.0},
        {"scale": (1.0, 1.0)}, {"ratio": (2.0, 3.0)}, {"crop_padding": None}, {"crop_padding": 0},
        {"class_weights": "balanced"}, {"keep": "best"}, {"patience": 1}, {"mixup": 30.0},
        {"model_ema_decay": 0.0}, {"epochs": 0}, {"epochs": 1, "sched": "step"},
        {"epochs": 1, "sched": "wsd"}, {"clip_grad": 1e-3},
        {"sched": "step", "decay_milestones": (2,), "warmup_epochs": 2},
    ):  # fmt: skip
        check_settings(settings_of(**given))
    for sched in SCHEDULES:
        check_settings(settings_of(sched=sched))
    assert not set(UNFIT) & set(SCHEDULES)


def test_a_run_too_short_for_a_fifth_is_refused() -> None:
    assert len(rates(settings_of(sched="wsd", epochs=1), steps=3)) == 3
    with pytest.raises(UsageError, match=r"--sched wsd .* found 2 such steps"):
        rates(settings_of(sched="wsd", epochs=1), steps=2)


def test_the_check_leaves_everything_global_as_it_was() -> None:
    def stand() -> Iterator[bytes]:
        yield torch.get_rng_state().numpy().tobytes()
        yield repr(random.getstate()).encode()
        yield repr(np.random.get_state()).encode()  # noqa: NPY002
        yield repr(warnings.filters).encode()
        yield repr(torch.get_default_dtype()).encode()
        yield str(torch.is_grad_enabled()).encode()

    before = list(stand())
    for opt in ("momentum", "adahessian", "kron", "lamb", "muon"):
        with contextlib.suppress(UsageError):
            check_settings(settings_of(opt=opt))
        assert list(stand()) == before, opt


# --- options without effect ----------------------------------------------------------------------

EVERY = ("decay_epochs", "decay_milestones", "decay_rate", "min_lr", "warmup_lr", "momentum", "lr")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "decay-epochs decay-milestones decay-rate warmup-lr"),
        ({"warmup_epochs": 1}, "decay-epochs decay-milestones decay-rate"),
        ({"sched": "tanh"}, "decay-epochs decay-milestones decay-rate warmup-lr"),
        ({"sched": "wsd"}, "decay-epochs decay-milestones decay-rate warmup-lr"),
        ({"sched": "poly"}, "decay-epochs decay-milestones warmup-lr"),
        ({"sched": "step"}, "min-lr warmup-lr"),
        ({"sched": "multistep", "warmup_epochs": 1}, "min-lr"),
        ({"sched": "step", "epochs": 1}, "decay-rate min-lr warmup-lr"),
        ({"sched": "constant"}, "decay-epochs decay-milestones decay-rate min-lr warmup-lr"),
        ({"sched": "none"}, "decay-epochs decay-milestones decay-rate min-lr warmup-lr"),
        ({"opt": "adam"}, "decay-epochs decay-milestones decay-rate momentum warmup-lr"),
        ({"opt": "Lookahead_AdamW", "sched": "step"}, "min-lr momentum warmup-lr"),
        ({"opt": "lookahead_sgd", "sched": "step"}, "min-lr warmup-lr"),
        ({"opt": "unknown", "sched": "step"}, "min-lr warmup-lr"),
    ],
)
def test_options_without_effect_are_named(given: dict[str, Any], expected: str) -> None:
    settings = settings_of(**given)
    assert idle_options(settings, EVERY) == [f"--{name}" for name in expected.split()]
    assert idle_options(settings, ()) == []


@pytest.mark.parametrize("sched", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 2])
def test_an_option_is_idle_where_no_rate_depends_on_it(sched: str, warmup: int) -> None:
    settings = settings_of(sched=sched, warmup_epochs=0 if sched == "none" else warmup)
    changed = {
        "decay_milestones": (3,), "decay_rate": 0.3, "min_lr": 0.02, "warmup_lr": 0.01, "lr": 0.2,
    }  # fmt: skip
    for name, value in changed.items():
        idle = rates(replace(settings, **{name: value})) == rates(settings)
        assert idle_options(settings, [name]) == ["--" + name.replace("_", "-")] * idle, name
