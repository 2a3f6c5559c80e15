"""Ways to find masks: what they say of themselves is what they do, and what the options are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from surgery_helpers import conv2
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.cli.methods import method_of
from randsurgery.errors import UsageError
from randsurgery.jobs.methods import ALGORITHMS, METHODS
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.method import Method, Scoring
from randsurgery.surgery.modules import build
from randsurgery.surgery.scores import attached
from randsurgery.surgery.supermask import Supermask

MADE: dict[str, Method] = {
    "edge-popup": Popup("0.3", k_for=(("fc", "0.5"),), learn=("fc1",)),
    "random": Popup("0.3", mask="random"),
    "supermask": Supermask(rescale=True, skip=("fc",)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_method_does_what_it_says_of_itself(name: str) -> None:
    method, network = MADE[name], conv2()
    method.check()
    assert json.loads(json.dumps(method.settings())) == method.settings()
    assert method.label == Path(method.label).name
    sizes = method.sizes(network)
    model = method.attach(build(network))
    layers = attached(model)
    assert sorted(sizes) == sorted(layers)
    for tensor, (size, kept) in sizes.items():
        mask = layers[tensor].mask()
        assert mask.size == size
        assert kept in (None, mask.count)
        assert layers[tensor].scores.requires_grad == method.learns
        assert (kept is None) == layers[tensor].finds_density
    placed, notes = method.place(network, from_file=False)
    assert placed is network
    assert notes == []


def test_every_option_of_every_method_is_one_of_the_command_line() -> None:
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["popup", "--help"]).stdout
    for method in METHODS:
        assert method.paper
        for field in dataclasses.fields(method):
            assert ("help" in field.metadata) == (field.name != "seed")
            if field.metadata:
                assert f"--{field.name.replace('_', '-')} " in shown
    assert all(name in shown for name in ALGORITHMS)


@pytest.mark.parametrize(
    ("algorithm", "given", "expected"),
    [
        ("edge-popup", {}, Popup("0.3", seed=4)),
        ("edge-popup", {"k": "0.5", "k_for": ["fc=0.1"], "learn": ["@norm"]},
         Popup("0.5", k_for=(("fc", "0.1"),), learn=("@norm",), seed=4)),
        ("supermask", {"rescale": True, "final": "sample"},
         Supermask(rescale=True, final="sample", seed=4)),
    ],
)  # fmt: skip
def test_options_choose_a_method(algorithm: str, given: dict[str, Any], expected: Method) -> None:
    assert method_of(algorithm, given, 4, scaled=False) == expected


def test_options_choose_masks_that_are_there() -> None:
    ticket = method_of("edge-popup", {"mask_from": "a/m.safetensors"}, 0, scaled=False)
    assert ticket.inputs == ("a/m.safetensors",)
    assert ticket.settings() == {"mask_from": "m.safetensors", "rethreshold": None}
    assert not isinstance(ticket, Scoring)
    anew = method_of("edge-popup", {"rethreshold": "0.25", "k_for": ["fc=0.5"]}, 0, scaled=False)
    assert anew.label == "popup-k1-4"
    assert anew.settings()["k_for"] == ["fc=0.5"]
    assert anew.reads_scores


@pytest.mark.parametrize(
    ("algorithm", "given", "scaled", "told"),
    [
        ("supermask", {"k": "0.3"}, False, "--k does not go with --algorithm supermask"),
        ("edge-popup", {"final": "sample"}, False, "--final does not go with --algorithm edge-"),
        ("supermask", {}, True, "--scaled does not go with --algorithm supermask"),
        ("supermask", {"mask_from": "m"}, False, "--algorithm does not go with --mask-from"),
        ("edge-popup", {"mask_from": "m", "skip": ["fc"]}, False, "--skip does not go with"),
        ("edge-popup", {"mask_from": "m", "rethreshold": "0.1"}, False, "does not go with"),
        ("magnitudes", {}, False, "unknown --algorithm 'magnitudes', expected edge-popup or"),
        ("edge-popup", {"k_for": ["fc"]}, False, "--k-for must be PATTERN=K, found 'fc'"),
        ("edge-popup", {"mask": "half"}, False, "unknown --mask 'half'"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    algorithm: str, given: dict[str, Any], scaled: bool, told: str
) -> None:
    with pytest.raises(UsageError) as caught:
        method_of(algorithm, given, 0, scaled=scaled)
    assert told in str(caught.value)


def test_a_share_that_none_can_keep_is_told_before_anything_is_read() -> None:
    with pytest.raises(rs.UsageError, match=r"k must lie in \(0, 1\]"):
        Popup("2").check()
    with pytest.raises(rs.UsageError, match="--rethreshold"):
        method_of("edge-popup", {"rethreshold": "0"}, 0, scaled=False).check()
