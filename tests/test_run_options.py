"""What a run is told: choosing an epoch, averages, weights of classes, mixed images, schedules and
defaults; every option does what it says, or is refused."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ensemble_helpers import TINY, Json, one_thread, run, said, succeed
from PIL import Image
from surgery_helpers import assert_same_state, attach, conv2, quick, same_bits, write_images
from torch import nn

import randsurgery as rs
from randsurgery.cli.app import spread
from randsurgery.errors import DataError, UsageError
from randsurgery.format.specs import DatasetSpec
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build
from randsurgery.training.averaging import Average, decay_at
from randsurgery.training.catalogue import input_for
from randsurgery.training.data import Resident
from randsurgery.training.datasets import open_data
from randsurgery.training.evaluate import evaluate
from randsurgery.training.loop import Hooks, Record, balanced, best_epoch, fit
from randsurgery.training.state import RunState, changing, read_state, write_state

pytestmark = pytest.mark.slow

SHORT = ("conv2", *TINY, "-b", "256", "--epochs", "1")
RUN = {"command": "popup"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def few(start: int = 0, count: int = 64) -> Resident:
    whole = open_data(DatasetSpec(name="digits"), input_for("digits", {}), "train")
    assert isinstance(whole, Resident)
    return whole.subset(range(start, start + count))


def popped() -> nn.Module:
    return attach(build(conv2()), Popup(k="0.5", learn=("@head",)))


def resolved(*arguments: object) -> Json:
    """The settings of a job, by a dry run."""
    return said(*spread([str(a) for a in arguments]), "--dry-run")


def refused(*arguments: object, code: int = 2) -> str:
    before = sorted(os.listdir())
    result = run(*spread([str(a) for a in arguments]))
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before
    return result.stderr


# --- which epoch is kept --------------------------------------------------------------------------

CHOOSING: dict[str, Any] = {"epochs": 5, "batch_size": 8, "lr": 1.0, "sched": "constant"}


def states_of(settings: Any, test: Resident | None = None) -> tuple[list[Record], list[Any]]:
    """The records of a run that is validated, and what it had learned after each epoch."""
    model, after = popped(), []
    hooks = Hooks(on_state=lambda state: after.append(state.part("model/")))
    records = fit(model, few(), test, settings, hooks, validation=few(64, 32))
    return records, [*after, {n: t.clone() for n, t in changing(model).items()}]


def test_the_best_epochs_values_are_what_the_module_has_at_the_end() -> None:
    records, after = states_of(quick(**CHOOSING, keep="best"), few(96, 32))
    accuracies = [record["val_accuracy"] for record in records[:-1]]
    best = accuracies.index(max(accuracies))
    assert best < 4, "the last epoch shows nothing"
    assert best_epoch(records[:-1]) == best + 1
    assert_same_state(after[-1], after[best])
    last, twin = records[-1], popped()
    assert (last["epoch"], last["kept"], last["epochs_run"]) == (best + 1, "best", 5)
    for name, tensor in changing(twin).items():
        tensor.data.copy_(after[best][name])
    assert last["test_accuracy"] == evaluate(twin, few(96, 32)).accuracy
    assert_same_state(states_of(quick(**CHOOSING))[1][-1], after[4])


def test_of_equal_epochs_the_first_is_best() -> None:
    history = [{"epoch": i + 1, "val_accuracy": a} for i, a in enumerate((0.1, 0.5, 0.3, 0.5))]
    assert best_epoch(history) == 2


def test_the_test_images_are_seen_once() -> None:
    seen = 0

    class Counted(Resident):
        def parts(self, batch_size: int) -> Iterator[Any]:
            nonlocal seen
            seen += 1
            return super().parts(batch_size)

    whole = few(96, 32)
    test = Counted(whole.images, whole.targets, whole.classes, whole.spec)
    fit(popped(), few(), test, quick(**CHOOSING, keep="best"), validation=few(64, 32))
    assert seen == 1
    fit(popped(), few(), test, quick(**CHOOSING))
    assert seen == 1 + 5


@pytest.mark.parametrize("more", [{"keep": "best"}, {"model_ema": True}, {
    "keep": "best", "model_ema": True, "patience": 2, "mixup": 0.2, "reprob": 0.3,
    "class_weights": "balanced"}])  # fmt: skip
@pytest.mark.parametrize("stop", [3, 8, 17, 40])
def test_a_resumed_run_keeps_the_same_epoch(more: Any, stop: int, here: Path) -> None:
    settings = quick(**{**CHOOSING, **more})

    def ends(hooks: Hooks | None = None, resume: RunState | None = None) -> Any:
        model = popped()
        found = fit(model, few(), few(96, 32), settings, hooks, validation=few(64, 32),
                    resume=resume)  # fmt: skip
        return found, model.state_dict()

    def on_state(state: RunState) -> None:
        write_state(here / "state", state, RUN)
        if state.step == stop:
            raise KeyboardInterrupt

    expected = ends()
    if stop > expected[0][-2]["step"]:
        pytest.skip("patience ended the run before")
    with pytest.raises(KeyboardInterrupt):
        ends(Hooks(on_state=on_state, state_every=1))
    found = ends(resume=read_state(here / "state", RUN))
    assert found[0] == expected[0]
    assert_same_state(found[1], expected[1])


@pytest.mark.parametrize("change", [{"keep": "best"}, {"patience": 2}])
def test_without_validation_images_nothing_is_chosen(change: Any) -> None:
    with pytest.raises(UsageError, match=r"validation images.*--val-split 0\.1"):
        fit(popped(), few(), few(64, 32), quick(**change))


# --- an average of what is learned ----------------------------------------------------------------


def test_the_average_is_timms() -> None:
    from timm.utils import ModelEmaV3

    model, draw = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.Generator()
    theirs = ModelEmaV3(model, decay=0.9, use_warmup=True)
    ours = Average(model, 0.9)
    for step in range(1, 60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw))
            model[1].num_batches_tracked += 1  # type: ignore[operator]
        ours.update(model, step)
        # theirs gives decay 0 to step 1, and counts from there
        theirs.update(model, step=step)
    assert decay_at(1, 0.9) == 0 == theirs.get_decay(1)
    assert [decay_at(s, 0.9) for s in (2, 9, 500)] == [
        pytest.approx(theirs.get_decay(s)) for s in (2, 9, 500)
    ]
    for name, tensor in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.values[name], tensor)


def test_the_average_is_evaluated_and_kept_and_the_run_goes_on_with_its_own() -> None:
    own: list[Any] = []
    hooks = Hooks(on_state=lambda state: own.append(state))
    settings = quick(**{**CHOOSING, "epochs": 3}, model_ema=True, model_ema_decay=0.95)
    model = popped()
    records = fit(model, few(), few(64, 32), settings, hooks)
    average = own[-1].part("average/")
    assert_same_state(dict(changing(model)), average)
    assert not all(same_bits(t, own[-1].part("model/")[n]) for n, t in average.items())
    assert records[-1]["test_accuracy"] == evaluate(model, few(64, 32)).accuracy
    plain: list[Any] = []
    fit(popped(), few(), few(64, 32), quick(**{**CHOOSING, "epochs": 3}),
        Hooks(on_state=lambda state: plain.append(state)))  # fmt: skip
    assert_same_state(plain[-1].part("model/"), own[-1].part("model/"))


def test_a_saved_average_goes_where_the_module_is() -> None:
    model = nn.Linear(2, 2)
    average = Average(model, 0.9)
    before = dict(average.values)
    average.restore({name: tensor + 1 for name, tensor in average.values.items()})
    assert all(average.values[name] is tensor for name, tensor in before.items())
    assert torch.equal(average.values["weight"], model.weight.detach() + 1)


# --- classes, loss, mixed images ------------------------------------------------------------------


def test_balanced_weights_make_all_classes_count_alike() -> None:
    data = few()
    counts = torch.bincount(data.targets, minlength=10).double()
    weights = balanced(data, 10).double()
    assert torch.allclose(weights * counts, torch.full((10,), 6.4).double())
    assert balanced(data, 12)[10:].tolist() == [0, 0]
    rare = data.subset([i for i, label in enumerate(data.labels.tolist()) if label != 3])
    with pytest.raises(DataError, match="class 3 has no training image"):
        balanced(rare, 10)


def test_the_weights_reach_the_loss() -> None:
    losses = []
    data = few(0, 16)
    for weights in (None, "balanced"):
        model = popped()
        model.train()
        seen: list[float] = []
        hooks = Hooks(on_step=lambda _, loss, seen=seen: seen.append(loss))  # type: ignore[misc]
        missing = [c for c in range(10) if c not in data.labels]
        chosen = few(0, 64) if missing else data
        fit(model, chosen, None, quick(class_weights=weights, batch_size=64, hflip=False,
                                       crop_padding=0), hooks)  # fmt: skip
        losses.append(seen[0])
    images, labels = next(few(0, 64).evaluation(64))
    logits = popped().train()(images)
    expected = nn.functional.cross_entropy(logits, labels, weight=balanced(few(0, 64), 10))
    assert losses[1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert losses[0] != losses[1]


def test_a_loss_that_stays_at_guessing_is_told_with_the_remedy() -> None:
    model = build(conv2())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "fc.weight")
    with torch.no_grad():
        model.fc.weight.zero_()
    words: list[str] = []
    fit(model, few(), few(64, 32), quick(epochs=3, lr=0.0), Hooks(on_note=words.append))
    assert len(words) == 1
    assert "the loss stayed at 2.303, that of guessing (ln 10)" in words[0]
    assert "--lr" in words[0]
    words.clear()
    fit(popped(), few(), few(64, 32), quick(epochs=3), Hooks(on_note=words.append))
    assert not words


def test_a_state_within_an_epoch_needs_no_known_labels(here: Path) -> None:
    """As of sets of the Hub that tell a label only with its image."""
    whole = few()
    data = whole._as_pictures(quick())
    data.known = None
    states: list[RunState] = []

    def on_state(state: RunState) -> None:
        write_state(here / "state", state, RUN)
        states.append(read_state(here / "state", RUN))

    hooks = Hooks(on_state=on_state, state_every=1)
    fit(popped(), data, None, quick(batch_size=16, crop_padding=0, hflip=False), hooks)
    assert [state.step for state in states] == [1, 2, 3, 4]


def test_mixed_images_have_no_training_accuracy() -> None:
    records = fit(popped(), few(), few(64, 32), quick(mixup=0.4))
    assert records[0]["train_accuracy"] is None
    assert math.isfinite(records[0]["train_loss"])
    json.dumps(records)


def test_labels_beyond_the_network_are_told_before_a_step() -> None:
    model = attach(build(conv2(num_classes=5)), Popup(k="0.5"))
    with pytest.raises(DataError, match="label 9, the network 5 classes"):
        fit(model, few(), few(64, 32), quick(), classes=5)


# --- options --------------------------------------------------------------------------------------


def test_numbers_may_follow_an_option_as_timms_do() -> None:
    given = ["train", "x", "--decay-epochs", "15", "30", "--lr", "3", "--decay-milestones"]
    given += ["4", "5", "6", "--", "--decay-epochs", "1", "2"]
    assert list(spread(given)) == [
        "train", "x", "--decay-epochs", "15", "--decay-epochs", "30", "--lr", "3",
        "--decay-milestones", "4", "--decay-milestones", "5", "--decay-milestones", "6", "--",
        "--decay-epochs", "1", "2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "milestones"),
    [
        ((), [22, 33]),
        (("--decay-epochs", 15, 30), [15, 30]),
        (("--decay-milestones", 15, 30), [15, 30]),
        (("--decay-epochs", 15), [15, 30]),
        (("--decay-milestones", 15), [15]),
    ],
)
def test_a_step_schedule_falls_where_it_is_told(options: Any, milestones: list[int]) -> None:
    found = resolved("train", "conv2", *TINY, "--epochs", 45, "--sched", "step", *options)
    assert found["decay_milestones"] == milestones
    assert found["decay_rate"] == 0.1


def test_the_rates_of_a_step_schedule() -> None:
    succeed("train", "lenet_300_100", "--img-size", "8", "--epochs", 8, "-b", 512, "--lr", 0.01,
            "--sched", "step", "-o", "o.safetensors")  # fmt: skip
    rates = [json.loads(line)["lr"] for line in Path("o.metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.01] * 4 + [0.001] * 2 + [0.0001] * 2)
    again = yaml.safe_load(Path("o.settings.yaml").read_text())
    assert again["decay-milestones"] == [4, 6]
    succeed("train", "lenet_300_100", "-c", "o.settings.yaml", "-o", "again.safetensors")
    assert Path("o.safetensors").read_bytes() == Path("again.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--decay-epochs", 3), "--decay-epochs would do nothing"),
        (("--decay-milestones", 1, 2), "pass --sched step"),
        (("--decay-rate", 0.2), "--decay-rate would do nothing"),
        (("--sched", "constant", "--min-lr", 0.001), "--min-lr would do nothing"),
        (("--warmup-lr", 0.001), "--warmup-lr would do nothing"),
        (("--opt", "adamw", "--momentum", 0.8), "--momentum would do nothing"),
        (("--model-ema-decay", 0.9), "goes with --model-ema"),
        (("--sched", "plateau"), "plateau"),
        (("--sched", "rsqrt"), "rsqrt"),
        (("--opt", "kron"), "--opt kron cannot be used here"),
        (("--opt", "adahessian"), "--opt adahessian cannot be used here"),
        (("--recipe", "imagnet"), "near: imagenet"),
        (("--scale", 0.5, 1.0, "--crop-padding", 2), "give one of them"),
        (("--scale", 0.9, 0.2), "--scale"),
        (("--aa", "rand-foo"), "--aa"),
        (("--mixup", 0.2, "-b", 33), "even"),
        (("--warmup-epochs", 40), "--warmup-epochs"),
        (("--interpolation", "lanczos"), "bicubic"),
        (("--crop-pct", 1.5), "--crop-pct"),
        (("--class-weights", "inverse"), "balanced"),
        (("--keep", "first"), "--keep"),
        (("--sched", "step", "--decay-epochs", 2, "--decay-milestones", 3), "pass one of them"),
        (("--sched", "step", "--decay-milestones", 3, 2), "ascend"),
        (("--sched", "step", "--decay-milestones", 50), "epochs"),
    ],
)
@pytest.mark.parametrize("command", ["train", "popup"])
def test_what_would_do_nothing_or_cannot_work_is_refused(
    command: str, options: Any, word: str
) -> None:
    assert word in refused(command, "conv2", *TINY, "--epochs", 10, *options)


def weights_after(*options: object, source: tuple[object, ...] = SHORT) -> dict[str, torch.Tensor]:
    succeed("train", *source, *options, "--force", "-o", "o.safetensors")
    return rs.load("o.safetensors").state_dict()


def test_every_augmentation_changes_what_is_learned() -> None:
    plain = weights_after("--no-hflip", "--crop-padding", 0)["fc.weight"]
    for options in (("--crop-padding", 2), ("--hflip",), ("--aa", "rand-m9-mstd0.5"),
                    ("--scale", 0.5, 1.0), ("--ratio", 0.5, 2.0), ("--reprob", 0.5),
                    ("--mixup", 0.4), ("--cutmix", 0.4), ("--model-ema",),
                    ("--smoothing", 0.1), ("--class-weights", "balanced")):  # fmt: skip
        changed = weights_after("--no-hflip", "--crop-padding", 0, *options) if options[0] not in (
            "--crop-padding", "--hflip", "--scale", "--ratio"
        ) else weights_after("--no-hflip", *options) if options[0] != "--hflip" else weights_after(
            "--crop-padding", 0, *options)  # fmt: skip
        assert torch.isfinite(changed["fc.weight"]).all(), options
        assert not same_bits(changed["fc.weight"], plain), options


FOLDER = ("conv2", "--width", "0.1", "--img-size", "16", "--epochs", "1", "-b", "12", "--data-dir",
          "d")  # fmt: skip


def pets(train: int = 6, test: int = 3) -> None:
    write_images(Path("d/train"), {"cat": train, "dog": train}, size=24)
    write_images(Path("d/test"), {"cat": test, "dog": test}, size=24, seed=1)


def test_every_option_of_images_reaches_a_folder() -> None:
    pets()
    found = {}
    for options in ((), ("--crop-padding", 0), ("--crop-padding", 3), ("--no-hflip",),
                    ("--scale", 0.9, 1.0), ("--ratio", 0.2, 0.3), ("--aa", "augmix-m3"),
                    ("--interpolation", "nearest", "--crop-padding", 0),
                    ("--crop-pct", 0.5, "--crop-padding", 0), ("--recipe", "cifar")):  # fmt: skip
        state = weights_after(*options, source=FOLDER)
        found[options] = state["fc1.weight"]
        recorded = rs.read_recipe("o.safetensors").input
        assert recorded is not None
        if "--interpolation" in options:
            assert recorded.interpolation == "nearest"
        if "--crop-pct" in options:
            assert float.fromhex(recorded.crop) == 0.5
    values = list(found.values())
    for at, one in enumerate(values):
        assert not any(same_bits(one, other) for other in values[:at]), list(found)[at]


def test_options_of_a_files_images_are_taken_or_refused() -> None:
    succeed("popup", *SHORT, "-o", "o.safetensors")
    plain = said("eval", "o.safetensors")
    assert said("eval", "o.safetensors", "--crop-pct", 0.5) != plain
    assert said("eval", "o.safetensors", "--interpolation", "nearest")["images"] == 360
    line = refused("train", "o.safetensors", "--img-size", 16, code=4)
    assert "the file's network was built for 8 pixels" in line
    line = refused("train", "o.safetensors", "--in-chans", 1, code=4)
    assert "takes images of 3 channels" in line


# --- defaults -------------------------------------------------------------------------------------

BUILD = ("ensemble", "build", "conv2", "--members", "2", "--kind")


@pytest.mark.parametrize(
    ("command", "init", "lr"),
    [
        (("popup", "conv2"), "signed-constant", 0.05),
        (("popup", "conv2", "--learn", "@head"), "signed-constant", 0.05),
        (("train", "conv2"), "kaiming-normal", 0.01),
        (("train", "resnet10t"), "kaiming-normal", 0.05),
        (("train", "conv2", "--lr", "0.05"), "kaiming-normal", 0.05),
        (("train", "conv2", "--init", "signed-constant"), "signed-constant", 0.01),
        ((*BUILD, "full"), "kaiming-normal", 0.01),
        ((*BUILD, "popup"), "signed-constant", 0.05),
        (("popup", "conv2", "--algorithm", "supermask"), "signed-constant", 200.0),
    ],
)  # fmt: skip
def test_defaults_depend_on_what_is_learned(command: Any, init: str, lr: float) -> None:
    found = resolved(*command)
    assert (found["init"], found["lr"]) == (init, lr)
    assert found["recipe"] == "digits"


def test_a_plan_starts_from_normal_weights() -> None:
    succeed("freeze", "conv2", *TINY, "--fraction", "0.5", "-o", "p.safetensors")
    recipe = rs.read_recipe("p.safetensors")
    assert recipe.tensors["fc1.weight"].source.distribution == "normal"  # type: ignore[union-attr]
    assert resolved("train", "p.safetensors")["lr"] == 0.01


def test_a_conv2_learns_with_the_defaults() -> None:
    """At lr 0.1 and from signed constants its loss stays at ln 10."""
    result = succeed("train", "conv2", "--width", "0.2", "--img-size", "16", "--epochs", 2, "-o",
                     "o.safetensors")  # fmt: skip
    assert "guessing" not in result.stderr
    last = json.loads(Path("o.metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] < 1.5


def test_a_recipe_is_a_row_of_defaults() -> None:
    found = resolved("train", "resnet10t", "--recipe", "imagenet")
    assert found["recipe"] == "imagenet"
    assert (found["lr"], found["batch_size"], found["warmup_epochs"]) == (0.256, 256, 5)
    assert "scale" in found
    assert (
        resolved("train", "resnet10t", "--recipe", "imagenet", "--epochs", 4)["warmup_epochs"] == 2
    )


# --- eval by class --------------------------------------------------------------------------------


def test_eval_by_class_and_confusion(here: Path) -> None:
    pets(test=4)
    succeed("train", *FOLDER, "-o", "o.safetensors")
    found = said("eval", "o.safetensors", "--data-dir", "d", "--per-class", "--confusion", "c.csv")
    assert [row["name"] for row in found["classes"]] == ["cat", "dog"]
    assert [row["images"] for row in found["classes"]] == [4, 4]
    right = sum(row["correct"] for row in found["classes"])
    assert right == round(found["accuracy"] * 8)
    assert found["balanced_accuracy"] == pytest.approx(found["accuracy"])
    rows = list(csv.reader(Path("c.csv").read_text().splitlines()))
    assert [row[0] for row in rows[1:]] == ["cat", "dog"]
    counts = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    assert [sum(row) for row in counts] == [4, 4]
    assert counts[0][0] + counts[1][1] == right
    shown = succeed(
        "eval", "o.safetensors", "--data-dir", "d", "--per-class", "--confusion", "c.png"
    )
    assert "balanced accuracy" in shown.stdout
    assert "mistaken for" in shown.stdout
    with Image.open("c.png") as picture:
        assert picture.format == "PNG"
    assert "exists" in refused("eval", "o.safetensors", "--data-dir", "d", "--confusion", "c.png",
                               code=6)  # fmt: skip
    assert ".csv" in refused("eval", "o.safetensors", "--data-dir", "d", "--confusion", "c.gif")
    line = refused("eval", "o.safetensors", "--data-dir", "d", "--split", "tset")
    assert "near: test" in line
