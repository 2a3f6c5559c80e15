"""Masks chosen anew from scores, masks on other seeds, and another share for some layers."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surgery_helpers import attach, same_bits
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.inspection.storage import storage
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.initialisers import kept_count
from randsurgery.surgery.learning import survivor_mask
from randsurgery.surgery.modules import build, harvest
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.tickets import rethresholded, with_masks

pytestmark = pytest.mark.slow

PLAIN = "plain.safetensors"
QUICK = ("--width", "0.1", "--epochs", "1", "-b", "256")
SMALL = {"width": 0.1, "num_classes": 10}


def scored(seed: int = 0) -> Checkpoint:
    recipe = make_recipe("conv2", seed=seed, args=SMALL)
    return harvest(recipe, attach(build(recipe), Popup("0.3", seed=3)), scores=True)


def counts(checkpoint: Checkpoint) -> dict[str, int]:
    who = checkpoint.member()
    return {name: survivor_mask(checkpoint, who, name).count for name in who.tensors}


# --- another share for some layers ----------------------------------------------------------------


def test_the_last_pattern_that_matches_a_layer_decides() -> None:
    model = build(make_recipe("conv2", args=SMALL))
    wish = Popup("0.3", k_for=(("features.*", "0.5"), ("features.2", "1"), ("@head", "0.25")))
    found = {name: str(share) for name, share in wish.shares(model).items()}
    assert found == {"features.0.weight": "1/2", "features.2.weight": "1", "fc1.weight": "3/10",
                     "fc2.weight": "3/10", "fc.weight": "1/4"}  # fmt: skip
    attach(model, wish)
    ended = harvest(make_recipe("conv2", args=SMALL), model)
    sizes = {name: entry.size for name, entry in ended.recipe.tensors.items()}
    kept = {name: kept_count(share, sizes[name]) for name, share in
            wish.shares(build(make_recipe("conv2", args=SMALL))).items()}  # fmt: skip
    assert counts(ended) == kept


@pytest.mark.parametrize(
    ("k_for", "words"),
    [
        ((("nowhere", "0.5"),), "matches no layer"),
        ((("fc", "0"),), "k of fc must lie in"),
        ((("fc", "many"),), "k of fc must be a number"),
    ],
)
def test_bad_patterns_and_shares_are_named(k_for: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        attach(build(make_recipe("conv2", args=SMALL)), Popup("0.3", k_for=k_for))


def test_a_pattern_for_a_layer_that_is_skipped_is_refused() -> None:
    with pytest.raises(UsageError, match="matches no layer that is masked"):
        attach(
            build(make_recipe("conv2", args=SMALL)),
            Popup("0.3", skip=("fc",), k_for=(("fc", "1"),)),
        )


# --- masks chosen anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", ["0.1", "0.7", "1"])
def test_masks_chosen_anew_are_those_of_the_scores(k: str) -> None:
    before = scored()
    after = rethresholded(before, Fraction(k))
    assert not after.member().scores
    for name in before.member().scores:
        magnitudes = np.abs(before.scores(name)).ravel()
        keep = kept_count(Popup(k).share, magnitudes.size)
        slow = np.zeros(magnitudes.size, dtype=bool)
        slow[np.argsort(magnitudes, kind="stable")[magnitudes.size - keep :]] = True
        found = survivor_mask(after, after.member(), name).unpack()
        assert found.sum() == keep
        assert (np.sort(magnitudes[found]) == np.sort(magnitudes[slow])).all()
    plain = build(make_recipe("conv2", seed=0, args=SMALL)).state_dict()
    for name, tensor in build(after).state_dict().items():
        kept = survivor_mask(after, after.member(), name).unpack().reshape(tensor.shape)
        assert same_bits(tensor, torch.where(torch.from_numpy(kept), plain[name], torch.zeros(())))


def test_files_without_scores_of_edge_popup_are_refused() -> None:
    recipe = make_recipe("conv2", args=SMALL)
    with pytest.raises(IncompatibleError, match=r"no scores.*--save-scores"):
        rethresholded(recipe, Fraction("0.5"))
    model = rs.attach(build(recipe), rs.Supermask())
    with pytest.raises(IncompatibleError, match="of a supermask"):
        rethresholded(harvest(recipe, model, scores=True), Fraction("0.5"))


# --- masks on other weights -----------------------------------------------------------------------


def masks(checkpoint: Checkpoint) -> dict[str, Any]:
    who = checkpoint.member()
    return {name: survivor_mask(checkpoint, who, name) for name in who.tensors}


def test_a_ticket_on_another_seed_has_the_same_positions_and_other_values() -> None:
    donor, other = scored(), make_recipe("conv2", seed=9, args=SMALL)
    ticket = build(with_masks(other, masks(donor))).state_dict()
    plain, found = build(other).state_dict(), build(donor).state_dict()
    for name in ticket:
        alive = found[name] != 0
        assert same_bits(ticket[name], torch.where(alive, plain[name], torch.zeros(())))


def test_masks_that_do_not_fit_are_refused() -> None:
    found = masks(scored())
    with pytest.raises(IncompatibleError, match="number of classes"):
        with_masks(make_recipe("conv2", args={**SMALL, "num_classes": 7}), found)
    with pytest.raises(IncompatibleError, match="which the network lacks"):
        with_masks(make_recipe("conv4", args=SMALL), {"features.3.weight": found["fc.weight"]})
    with pytest.raises(IncompatibleError, match="masked already"):
        with_masks(scored(), found)


# --- the command ----------------------------------------------------------------------------------


def run(code: int, *arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tickets_on_the_command_line(here: Path) -> None:
    run(0, "popup", "conv2", *QUICK, "--save-scores", "--k-for", "@head=1", "-o", "a.safetensors")
    anew = ("popup", "a.safetensors", "--rethreshold", "0.5", "--k-for", "fc1=0.1")
    facts = json.loads(run(0, *anew, "--dry-run", "--json").stdout)
    assert facts["epochs"] == 1
    run(0, *anew, "-o", "b.safetensors")
    made = {row.name: row.made_of for row in storage("b.safetensors").tensors}
    assert set(made.values()) == {"random + mask"}
    assert storage("b.safetensors").bytes < storage("a.safetensors").bytes / 5
    kept = {name: t.overlays[0].count for name, t in
            rs.read_recipe("b.safetensors").members[0].tensors.items()}  # fmt: skip
    size = rs.read_recipe("b.safetensors").tensors["fc1.weight"].size
    assert kept["fc1.weight"] == kept_count(Popup("0.1").share, size)
    assert facts["kept_weights"] == sum(kept.values())

    init = ("init", "conv2", "--width", "0.1", "--num-classes", 10, "--seed", 9)
    run(0, *init, "--mask-from", "b.safetensors", "-o", "c.safetensors")
    run(0, "popup", "conv2", "--width", "0.1", "--init-seed", 9, "--mask-from", "b.safetensors",
        "-o", "d.safetensors")  # fmt: skip
    first, second = (rs.load(f"{name}.safetensors").state_dict() for name in ("c", "d"))
    assert all(same_bits(first[name], second[name]) for name in first)
    alive = rs.load("b.safetensors").state_dict()
    assert all(bool(((first[name] != 0) == (alive[name] != 0)).all()) for name in first)
    run(0, "train", "c.safetensors", *QUICK[2:], "-o", "e.safetensors")
    trained = {row.name: row.made_of for row in storage("e.safetensors").tensors}
    assert trained["fc1.weight"] == "constant + scatter"


def test_what_masks_do_not_carry_is_said(here: Path) -> None:
    run(
        0,
        "popup",
        "conv2",
        *QUICK,
        "--k",
        "0.5",
        "--scaled",
        "--save-scores",
        "-o",
        "a.safetensors",
    )
    told = run(0, "popup", "a.safetensors", "--rethreshold", "0.3", "--dry-run").stderr
    assert "scaled for the k they were trained with" in told
    run(0, "popup", "conv2", *QUICK, "--algorithm", "supermask", "--rescale", "-o", "b.safetensors")
    told = run(0, "popup", "conv2", "--width", "0.1", "--mask-from", "b.safetensors", "--dry-run")
    assert "its masks alone are taken" in told.stderr


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ("popup", "conv2", "--rethreshold", "0.5"), "goes with a file"),
        (2, ("popup", "conv2", "--rethreshold", "0"), "--rethreshold must lie in"),
        (4, ("popup", "plain.safetensors", "--rethreshold", "0.5"), "holds no scores"),
        (2, ("popup", "conv2", "--k", "0.5", "--rethreshold", "0.5"), "--k does not go with"),
        (2, ("popup", "conv2", "--k", "0.5", "--mask-from", "a"), "--k does not go with"),
        (2, ("popup", "conv2", "--k-for", "fc"), "--k-for must be PATTERN=K"),
        (
            2,
            ("popup", "plain.safetensors", "--rethreshold", "0.5", "--algorithm", "supermask"),
            "--algorithm does not go with --rethreshold",
        ),
        (
            6,
            (
                "popup",
                "conv2",
                "--mask-from",
                "plain.safetensors",
                "-o",
                "plain.safetensors",
                "--force",
            ),
            "is read by this command",
        ),
        (
            6,
            ("init", "conv2", "--mask-from", PLAIN, "-o", PLAIN, "--force"),
            "is read by this command",
        ),
        (
            6,
            ("popup", "plain.safetensors", "-o", "plain.safetensors", "--force"),
            "is read by this command",
        ),
        (3, ("popup", "conv2", "--mask-from", "nowhere.safetensors"), "no such file"),
        (4, ("popup", "conv2", "--mask-from", "plain.safetensors"), "has no masks"),
        (
            2,
            ("popup", "conv2", "--mask-from", "plain.safetensors", "--save-scores"),
            "learned masks",
        ),
    ],
)
def test_tickets_that_cannot_be_had_are_named(
    here: Path, code: int, arguments: tuple[str, ...], words: str
) -> None:
    run(0, "init", "conv2", "--width", "0.1", "--num-classes", 10, "-o", "plain.safetensors")
    assert words in run(code, *arguments).stderr
    assert [path.name for path in here.iterdir()] == ["plain.safetensors"]
