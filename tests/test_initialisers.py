"""The papers' distributions: scales by their formulas, fans by kind of layer, exact shares."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from surgery_helpers import everything
from timm.layers import CondConv2d
from torch import nn

from randsurgery.errors import UsageError
from randsurgery.surgery.initialisers import (
    INITS,
    Init,
    check_init,
    kept_count,
    parse_fraction,
    random_source,
)
from randsurgery.surgery.modules import build
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.roles import tensor_roles

FAN_IN, FAN_OUT = 18, 30

# Ramanujan et al., Sections 4.1 and 4.4, and Glorot & Bengio's Equation 16 for the uniform form
FORMULAS: dict[Init, tuple[str, float]] = {
    "signed-constant": ("sign", math.sqrt(2 / FAN_IN)),
    "kaiming-normal": ("normal", math.sqrt(2 / FAN_IN)),
    "kaiming-uniform": ("uniform", math.sqrt(6 / FAN_IN)),
    "xavier-constant": ("sign", math.sqrt(2 / (FAN_IN + FAN_OUT))),
    "xavier-normal": ("normal", math.sqrt(2 / (FAN_IN + FAN_OUT))),
    "xavier-uniform": ("uniform", math.sqrt(6 / (FAN_IN + FAN_OUT))),
}


@pytest.mark.parametrize("init", FORMULAS)
@pytest.mark.parametrize("k", [None, Fraction(3, 10), Fraction(1)])
def test_scales_are_the_papers(init: Init, k: Fraction | None) -> None:
    source = random_source(init, FAN_IN, FAN_OUT, 7, k)
    distribution, scale = FORMULAS[init]
    assert (source.distribution, source.seed) == (distribution, 7)
    found = float.fromhex(source.scale)
    assert found == float(np.float32(found))  # rounded once, to a float32 value
    assert found == pytest.approx(scale / math.sqrt(k or 1), rel=1e-7)


def test_every_name_has_a_formula() -> None:
    assert set(INITS) == set(FORMULAS)


@pytest.mark.parametrize("init", FORMULAS)
def test_generated_weights_have_the_papers_deviation(init: Init) -> None:
    model = nn.Conv2d(16, 32, 3)
    values = build(make_recipe(model, init, seed=1), model=nn.Conv2d(16, 32, 3)).weight.detach()
    fan_in, fan_out = 144, 288
    expected = math.sqrt(2 / (fan_in + fan_out if init.startswith("xavier") else fan_in))
    assert float(values.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(values.mean())) < 0.05 * expected
    if init.endswith("constant"):
        assert len(values.abs().unique()) == 1
    if init.endswith("uniform"):
        assert float(values.abs().max()) <= expected * math.sqrt(3) * (1 + 1e-6)


class Layers(nn.Module):
    """One of each layer whose fans differ from the plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(6, 10, (3, 5))
        self.grouped = nn.Conv2d(6, 12, 3, groups=3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.linear = nn.Linear(7, 5)
        self.experts = CondConv2d(6, 10, 3, groups=2, num_experts=4)
        self.attention = nn.MultiheadAttention(12, 3)
        self.split = nn.MultiheadAttention(12, 3, kdim=5, vdim=7)


FANS = {
    "plain.weight": (6 * 15, 10 * 15),
    "grouped.weight": (2 * 9, 12 * 9),
    "depthwise.weight": (9, 8 * 9),
    "linear.weight": (7, 5),
    "experts.weight": (3 * 9, 5 * 9),
    "attention.in_proj_weight": (12, 36),
    "attention.out_proj.weight": (12, 12),
    "split.q_proj_weight": (12, 12),
    "split.k_proj_weight": (5, 12),
    "split.v_proj_weight": (7, 12),
    "split.out_proj.weight": (12, 12),
}


def test_fans_follow_the_kind_of_layer() -> None:
    roles = tensor_roles(Layers())
    found = {n: (r.fan_in, r.fan_out) for n, r in roles.items() if r.role == "weight"}
    assert found == FANS
    for name in ("plain", "grouped", "depthwise", "linear"):  # torch counts them so, too
        weight = Layers().get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert nn.init._calculate_fan_in_and_fan_out(weight) == FANS[f"{name}.weight"]


def test_roles_cover_every_tensor() -> None:
    roles = {name: role.role for name, role in tensor_roles(everything()).items()}
    assert set(roles) == set(everything().state_dict())
    assert {name for name, role in roles.items() if role == "other"} == set()
    assert roles["norm.weight"] == "norm scale"
    assert roles["norm.running_var"] == "running var"
    assert roles["attention.in_proj_bias"] == "bias"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.9", Fraction(9, 10)), (0.9, Fraction(9, 10)), ("1", Fraction(1)), (1, Fraction(1)),
     ("3e-2", Fraction(3, 100)), ("1/3", Fraction(1, 3)), (" .5 ", Fraction(1, 2)),
     (Fraction(2, 7), Fraction(2, 7)), (1e-5, Fraction(1, 100_000))],
)  # fmt: skip
def test_shares_are_read_as_decimals(text: str | float | Fraction, value: Fraction) -> None:
    assert parse_fraction(text, "k") == value


@pytest.mark.parametrize(
    "text",
    ["0", "-0.1", "1.0000001", "nan", "inf", "", "half", "1/0", "0x1p-1", "1e400", "1e-99999999",
     0, 1.5, float("nan"), None],
)  # fmt: skip
def test_what_is_no_share_is_a_usage_error(text: str | float) -> None:
    with pytest.raises(UsageError, match=r"--k must .*\(0, 1\], found"):
        parse_fraction(text, "--k")


def test_counts_are_exact_where_floats_are_not() -> None:
    assert int((1 - 0.9) * 150) == 14
    assert kept_count(parse_fraction("0.9", "k"), 150) == 135
    assert kept_count(Fraction(1), 7) == 7
    assert kept_count(Fraction(1, 10**9), 7) == 1
    for percent in range(1, 101):
        k = parse_fraction(f"{percent / 100}", "k")
        for size in (1, 2, 10, 99, 100, 150, 1000, 12345):
            assert kept_count(k, size) == size - (100 - percent) * size // 100


def test_unknown_initialisers_are_named_with_near_ones() -> None:
    with pytest.raises(UsageError, match="near: kaiming-normal"):
        check_init("kaiming-norml")
    assert [check_init(name) for name in INITS] == list(INITS)


def test_streams_are_apart_and_follow_the_seed() -> None:
    first = build(make_recipe(everything(), seed=1), model=everything()).state_dict()
    again = build(make_recipe(everything(5), seed=1), model=everything()).state_dict()
    other = build(make_recipe(everything(), seed=2), model=everything()).state_dict()
    weights = [name for name in first if name in tensor_roles(everything()) and "weight" in name]
    for name in weights:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (name == "norm.weight")
    signs = first["attention.out_proj.weight"].sign().flatten()
    assert not torch.equal(signs, first["attention.in_proj_weight"].sign().flatten()[: len(signs)])
