"""Supermasks (Zhou et al.): what is sampled, what is learned, what a file keeps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surgery_helpers import (
    MASKED,
    assert_same_state,
    attach,
    everything,
    logits,
    same_bits,
    train_steps,
)
from torch import nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.cli.options import RunOptions, plan_of
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import read_checkpoint
from randsurgery.format.generator import generate
from randsurgery.jobs.popup import PopupPlan, prepare_popup, run_popup
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build, harvest, plain_state
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.scores import attached
from randsurgery.surgery.supermask import Supermask
from randsurgery.surgery.supermask_scores import Sampler, sampled_bits
from randsurgery.training.loop import Hooks

QUICK = ("--width", "0.1", "--epochs", "1", "-b", "256")


def layer_with(scores: list[float], **wish: Any) -> tuple[nn.Module, Any]:
    """A linear layer of one output under given scores."""
    layer = nn.Linear(len(scores), 1, bias=False)
    attach(layer, Supermask(**wish))
    found = next(iter(attached(layer).values()))
    with torch.no_grad():
        found.scores.copy_(torch.tensor([scores]))
    return layer, found


def test_every_convolution_and_linear_weight_gets_a_score_and_nothing_else_is_learned() -> None:
    model = attach(everything(), Supermask())
    assert sorted(attached(model)) == sorted(MASKED)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == len(MASKED)
    assert all(name.endswith(".scores") for name in learned)


def test_the_fixed_mask_keeps_what_is_more_likely_kept_than_not() -> None:
    layer, scores = layer_with([-2.0, -1e-6, 0.0, 1e-6, 3.0])
    assert scores.mask().unpack().tolist() == [False, False, False, True, True]
    plain = layer.parametrizations.weight.original.detach()  # type: ignore[union-attr, union-attr]
    layer.eval()
    assert same_bits(layer.weight.detach(), torch.where(scores.bits(), plain, torch.zeros(())))  # type: ignore[arg-type]


def test_in_training_weights_are_kept_with_the_sigmoid_of_their_score() -> None:
    values = [-3.0, -1.0, 0.0, 0.5, 2.0]
    layer, _ = layer_with(values * 4000)
    layer.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = (layer.weight.detach() != 0).view(-1, len(values)).double().mean(0)  # type: ignore[operator]
    expected = torch.tensor(values).sigmoid().double()
    assert torch.allclose(kept, expected, atol=5 * 0.5 / math.sqrt(4000))
    again = layer.weight.detach()  # every read is another sample
    assert not same_bits(layer.weight.detach(), again)  # type: ignore[arg-type]


@pytest.mark.parametrize("rescale", [False, True])
def test_the_gradient_passes_straight_through_the_sample(rescale: bool) -> None:
    layer, scores = layer_with([-1.0, 0.25, 2.0, 0.5], rescale=rescale)
    x = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    layer.train()
    with parametrize.cached():  # to see the sample that the forward pass drew
        layer(x).sum().backward()
        masked = layer.weight.detach()
    weight = layer.parametrizations.weight.original.detach()  # type: ignore[union-attr, union-attr]
    kept = int((masked != 0).sum())  # type: ignore[operator]
    factor = 4 / kept if rescale and kept else 1.0
    assert torch.allclose(masked[masked != 0], (weight * factor)[masked != 0])  # type: ignore[index]
    p = torch.tensor([-1.0, 0.25, 2.0, 0.5]).sigmoid()
    assert torch.allclose(scores.scores.grad, x * weight * factor * p * (1 - p))  # type: ignore[operator]


def test_a_sample_follows_from_its_seed_and_compares_with_the_sigmoid() -> None:
    scores = torch.linspace(-4, 4, 1000)
    bits = sampled_bits(scores, "some.weight", 7)
    u = generate("uniform", 1000, 1.0, seed=7, stream="some.weight", role="mask").astype(np.float64)
    slow = (u + 1) / 2 < 1 / (1 + np.exp(-scores.double().numpy()))
    assert (bits.numpy() == slow).mean() > 0.998  # float32 may differ at the boundary
    assert same_bits(bits, sampled_bits(scores, "some.weight", 7))
    assert not same_bits(bits, sampled_bits(scores, "some.weight", 8))


@pytest.mark.parametrize("final", ["threshold", "sample"])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_file_is_the_network_as_evaluated(final: Any, rescale: bool, tmp_path: Path) -> None:
    recipe = make_recipe(everything(), "kaiming-normal", seed=2)
    model = attach(
        build(recipe, model=everything()), Supermask(seed=5, final=final, rescale=rescale)
    )
    with torch.random.fork_rng(devices=[]):
        train_steps(model, lr=50.0)
    model.eval()
    rs.save(tmp_path / "a.safetensors", recipe, model, scores=True)
    again = rs.load(tmp_path / "a.safetensors", model=everything())
    state = again.state_dict()
    for name in MASKED:
        owner, _, leaf = name.rpartition(".")
        assert same_bits(state[name], getattr(model.get_submodule(owner), leaf).detach())
    assert same_bits(logits(again, 8), logits(model, 8))
    with read_checkpoint(tmp_path / "a.safetensors") as file:
        who = file.member()
        assert who.algorithm == "supermask"
        kinds = [o.kind for o in who.tensors["hidden.weight"].overlays]
        assert kinds == (["mask", "scale"] if rescale else ["mask"])
        assert set(who.scores) == set(MASKED)


def test_the_random_weights_below_never_move() -> None:
    recipe = make_recipe(everything(), seed=2)
    model = attach(build(recipe, model=everything()), Supermask())
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    with torch.random.fork_rng(devices=[]):
        train_steps(model, lr=100.0)
    after = plain_state(model)
    still = {n for n in before if "running" not in n and "tracked" not in n}
    assert_same_state({n: before[n] for n in still}, {n: after[n] for n in still})


def test_samples_put_on_a_network_are_those_of_its_scores(tmp_path: Path) -> None:
    recipe = make_recipe("conv2", seed=1, args={"width": 0.1, "num_classes": 10})
    model = attach(build(recipe), Supermask(rescale=True))
    ended = harvest(recipe, model, scores=True)
    plain, drawn = build(ended), build(recipe).state_dict()
    sampler = Sampler(ended)
    sampler.put(plain, 4)
    for name in ended.member().scores:
        bits = sampled_bits(torch.from_numpy(ended.scores(name).copy()), name, 4)
        kept = torch.where(bits, drawn[name], torch.zeros(()))
        factor = torch.tensor(bits.numel() / int(bits.sum()), dtype=torch.float32)
        assert same_bits(plain.state_dict()[name], kept * factor)


def test_a_layer_whose_mask_keeps_everything_is_rescaled_in_samples_all_the_same() -> None:
    recipe = make_recipe("conv2", seed=1, args={"width": 0.1, "num_classes": 10})
    model = attach(build(recipe), Supermask(rescale=True))
    with torch.no_grad():
        attached(model)["fc.weight"].scores.fill_(0.01)
    ended = harvest(recipe, model, scores=True)
    plain = build(ended)
    assert same_bits(plain.state_dict()["fc.weight"], build(recipe).state_dict()["fc.weight"])
    Sampler(ended).put(plain, 0)
    kept = plain.state_dict()["fc.weight"] != 0
    share = float(kept.double().mean())
    assert 0.3 < share < 0.8
    before = build(recipe).state_dict()["fc.weight"]
    assert torch.allclose(plain.state_dict()["fc.weight"][kept], before[kept] / share)


def test_scores_of_another_kind_are_not_sampled() -> None:
    recipe = make_recipe("conv2", seed=1, args={"width": 0.1, "num_classes": 10})
    with pytest.raises(IncompatibleError, match="holds no scores"):
        Sampler(recipe)
    model = attach(build(recipe), Popup("0.5"))
    with pytest.raises(IncompatibleError, match="scores of edge-popup"):
        Sampler(harvest(recipe, model, scores=True))


@pytest.mark.parametrize("wish", [{"final": "mean"}, {"skip": "fc"}, {"seed": -1}])
def test_bad_wishes_are_usage_errors(wish: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Supermask(**wish)


# --- the command ----------------------------------------------------------------------------------


def run(code: int, *arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_popup_finds_a_supermask_and_eval_samples_it(here: Path) -> None:
    told = run(0, "popup", "conv2", *QUICK, "--algorithm", "supermask", "--save-scores", "-o",
               "s.safetensors").stderr  # fmt: skip
    assert "% kept" in told
    record = json.loads(Path("s.metrics.jsonl").read_text().splitlines()[-1])
    assert 0.3 < record["kept"] < 0.7
    found = json.loads(run(0, "eval", "s.safetensors", "--samples", 3, "--json").stdout)
    accuracies = found["samples"]["accuracies"]
    assert len(accuracies) == 3
    assert found["samples"]["mean_accuracy"] == pytest.approx(sum(accuracies) / 3)
    assert "mean of 3 samples" in run(0, "eval", "s.safetensors", "--samples", 3).stdout
    settings = rs.read_recipe("s.safetensors").members[0].provenance["settings"]
    assert settings["lr"] == 200.0
    assert settings["weight_decay"] == 0.0
    facts = (
        "popup",
        "conv2",
        *QUICK,
        "--algorithm",
        "supermask",
        "--rescale",
        "--dry-run",
        "--json",
    )
    assert json.loads(run(0, *facts).stdout)["lr"] == 50.0
    again = ("popup", "conv2", "-c", "s.settings.yaml", "-o", "t.safetensors")
    run(0, *again)
    assert Path("t.safetensors").read_bytes() == Path("s.safetensors").read_bytes()


def test_a_stopped_run_goes_on_with_the_masks_it_would_have_drawn(here: Path) -> None:
    base = ("popup", "conv2", "--width", "0.1", "--epochs", 2, "-b", 256, "--seed", 3,
            "--algorithm", "supermask", "--save-scores")  # fmt: skip
    run(0, *base, "-o", "whole.safetensors")
    options = RunOptions(
        width=0.1, epochs=2, batch_size=256, seed=3, output="cut.safetensors", state_every=3
    )
    job = prepare_popup(PopupPlan(plan_of("conv2", options), Supermask(seed=3), save_scores=True))

    def stop(step: int, loss: float) -> None:
        if step == 8:  # within the second epoch
            raise KeyboardInterrupt

    with job.run.checkpoint, pytest.raises(KeyboardInterrupt):
        run_popup(job, Hooks(on_step=stop))
    run(0, *base, "--state-every", 3, "--resume", "auto", "-o", "cut.safetensors")
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    lines = [Path(f"{name}.metrics.jsonl").read_text().splitlines() for name in ("whole", "cut")]
    first, second = ([json.loads(line)["flipped"] for line in found] for found in lines)
    assert first == second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--algorithm", "supermasks"), "expected edge-popup or supermask"),
        (("--algorithm", "supermask", "--k", "0.3"), "--k does not go with"),
        (("--algorithm", "supermask", "--mask", "random"), "--mask does not go with"),
        (("--algorithm", "supermask", "--scaled"), "--scaled does not go with"),
        (("--algorithm", "supermask", "--final", "mean"), "expected threshold or sample"),
        (("--rescale",), "--rescale does not go with --algorithm edge-popup"),
        (("--final", "sample"), "--final does not go with --algorithm edge-popup"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    here: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in run(2, "popup", "conv2", *options).stderr
    assert not list(here.iterdir())


def test_sampling_a_file_without_scores_is_refused(here: Path) -> None:
    run(0, "init", "conv2", "--width", "0.1", "--num-classes", 10, "-o", "a.safetensors")
    assert "holds no scores" in run(4, "eval", "a.safetensors", "--samples", 2).stderr
