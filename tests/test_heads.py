"""Fixed classifiers: rows, the module, files, and what techniques make of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from surgery_helpers import CONV2, attach, conv2, logits, same_bits
from torch import nn
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.inspection.storage import storage
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.heads import (
    FixedClassifier,
    FixedKind,
    coherence,
    fixed_heads,
    install,
    orthonormal_rows,
    with_fixed_head,
    with_head,
)
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import Freeze, everything, make_plan, with_plan
from randsurgery.surgery.recipes import make_recipe

KINDS: tuple[FixedKind, ...] = ("orthonormal", "hadamard")


def slow_logits(x: torch.Tensor, head: FixedClassifier) -> torch.Tensor:
    """Hoffer et al., Equation 3, one row at a time."""
    rows = []
    for row, bias in zip(head.weight, head.bias, strict=True):
        cosine = (x * row).sum(-1) / x.norm(dim=-1) / row.norm()
        rows.append(head.scale * cosine + bias)
    return torch.stack(rows, dim=-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [False, True])
def test_logits_are_scaled_cosines(kind: FixedKind, channels: bool) -> None:
    head = FixedClassifier(12, 5, channels=channels)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(orthonormal_rows(5, 12, 3, "fc")))
        head.scale.fill_(2.5)
        head.bias.normal_()
    x = torch.randn(4, 12, 2, 3) if channels else torch.randn(4, 12)
    found = head(x)
    expected = slow_logits(x.movedim(1, -1) if channels else x, head)
    assert torch.allclose(found.movedim(1, -1) if channels else found, expected, atol=1e-5)


@pytest.mark.parametrize("width", [192, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048])
def test_hadamard_heads_are_exactly_orthogonal_where_orders_exist(width: int) -> None:
    # one network stands for all: only its classifier's width matters
    start = with_fixed_head(make_recipe("lenet_300_100", args={"num_classes": 10}), "hadamard")
    entry = start.recipe.tensors["fc.weight"].model_copy(update={"shape": (100, width)})
    recipe = start.recipe.model_copy(update={"tensors": {"fc.weight": entry}})
    rows = rs.Checkpoint(recipe, start.payloads).tensor("fc.weight").array
    signs = np.sign(rows).astype(np.int64)
    assert np.array_equal(signs @ signs.T, width * np.eye(100, dtype=np.int64))
    assert len(np.unique(np.abs(rows))) == 1


def test_orthonormal_rows_are_orthonormal_and_follow_their_seed() -> None:
    rows = orthonormal_rows(10, 64, 1, "fc").astype(np.float64)
    assert np.abs(rows @ rows.T - np.eye(10)).max() < 1e-6
    assert not np.array_equal(rows, orthonormal_rows(10, 64, 2, "fc"))
    assert np.array_equal(rows, orthonormal_rows(10, 64, 1, "fc"))


@pytest.mark.parametrize("kind", KINDS)
def test_more_classes_than_width_get_distinct_rows(kind: FixedKind) -> None:
    args = {**CONV2, "num_classes": 60}  # conv2 of width 0.1 has 25 features
    start = with_fixed_head(make_recipe("conv2", args=args), kind)
    rows = start.tensor("fc.weight").array
    assert rows.shape == (60, 25)
    assert len({row.tobytes() for row in rows}) == 60
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert 0 < coherence(rows) < 1
    if kind == "orthonormal":
        assert coherence(rows[:25]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_scale_starts_where_the_logits_have_a_learned_heads_deviation(kind: FixedKind) -> None:
    start = with_fixed_head(conv2(), kind)
    assert float(start.tensor("fc.scale").array[0]) == pytest.approx(math.sqrt(25 / 10))
    given = with_fixed_head(conv2(), kind, scale=3.0)
    assert float(given.tensor("fc.scale").array[0]) == 3.0
    model = attach(build(given), Popup(k="0.5"))
    assert not model.fc.scale.requires_grad
    assert model.fc.bias.requires_grad
    with pytest.raises(UsageError, match="head-scale"):
        with_fixed_head(conv2(), kind, scale=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_head_takes_its_bytes_and_comes_back(kind: FixedKind, tmp_path: Path) -> None:
    start = with_fixed_head(conv2(), kind)
    model = build(start)
    with torch.no_grad():
        model.fc.scale.fill_(1.7)
        model.fc.bias.normal_()
    rs.save(tmp_path / "head.safetensors", start, model)
    rows = {row.name: row for row in storage(tmp_path / "head.safetensors").tensors}
    assert rows["fc.weight"].bytes == (0 if kind == "hadamard" else 10 * 25 * 4)
    again = rs.load(tmp_path / "head.safetensors")
    assert isinstance(again.fc, FixedClassifier)
    assert same_bits(logits(again), logits(model))
    assert rs.read_recipe(tmp_path / "head.safetensors").members[0].head.kind == kind


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_resnet", {}),
        ("test_vit", {"img_size": 32}),
        ("mobilenetv3_small_050", {}),
        ("levit_128s", {"img_size": 224}),  # a norm before the linear layer, and two heads
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("test_nfnet", {}),
        ("test_convnext", {}),
    ],
)
def test_every_kind_of_classifier_can_be_fixed(name: str, args: dict[str, Any]) -> None:
    recipe = make_recipe(name, args={"num_classes": 7, **args})
    model = build(with_fixed_head(recipe, "hadamard"))
    size = args.get("img_size", timm.get_pretrained_cfg(name).input_size[-1])
    with torch.no_grad():
        assert model(torch.randn(1, 3, size, size)).shape == (1, 7)
    assert len(fixed_heads(model)) >= 1
    plan = make_plan(meta_module(with_fixed_head(recipe, "hadamard")), Freeze(fraction="0.5"))
    head = next(iter(fixed_heads(model)))
    assert f"{head}.bias" in plan.tensors
    assert f"{head}.scale" in plan.tensors
    assert f"{head}.weight" not in plan.tensors


def test_a_convolution_as_classifier_can_be_fixed() -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_classes, self.fc = 4, nn.Conv2d(6, 4, 1)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.fc(x).mean((2, 3))
            return out

    model = Conv()
    made = install(model)
    assert set(made) == {"fc"}
    assert made["fc"].channels
    assert model(torch.randn(2, 6, 3, 3)).shape == (2, 4)
    with pytest.raises(IncompatibleError, match="no classifier"):
        install(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_scale_and_bias_and_no_row(kind: FixedKind) -> None:
    start = with_fixed_head(conv2(), kind)
    for model in (
        attach(build(start), Popup(k="0.5")),
        learn_plan(build(start), with_plan(start, everything(meta_module(start)))),
    ):
        before = {name: tensor.clone() for name, tensor in model.fc.state_dict().items()}
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=0.1, weight_decay=0.1)
        x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after = model.fc.state_dict()
        assert same_bits(after["weight"], before["weight"])
        assert not same_bits(after["scale"], before["scale"])
        assert not same_bits(after["bias"], before["bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_makes_the_head_anew(kind: FixedKind) -> None:
    start = with_fixed_head(conv2(), kind, scale=2.0)
    again = with_head(start, 6)
    assert again.tensor("fc.weight").shape == (6, 25)
    assert float(again.tensor("fc.scale").array[0]) == 2.0
    assert again.member().head.scale == "given"  # type: ignore[union-attr]
    model = build(start)
    with torch.no_grad():
        model.fc.bias.normal_()
    with pytest.raises(IncompatibleError, match="bias is learned for 10 classes"):
        with_head(harvest(start, model), 6)


def test_a_fixed_head_replaces_a_learned_one() -> None:
    recipe = conv2()
    model = build(recipe)
    with torch.no_grad():
        model.fc.weight.normal_()
    fixed = with_fixed_head(harvest(recipe, model), "orthonormal")
    assert "fc.weight" not in fixed.member().tensors
    assert isinstance(build(fixed).fc, FixedClassifier)


def test_plain_exports_refuse_a_fixed_head_with_the_reason(tmp_path: Path) -> None:
    rs.save(tmp_path / "h.safetensors", with_fixed_head(conv2(), "hadamard"))
    for kind, name in (("dense", "d.safetensors"), ("timm", "folder")):
        made = CliRunner().invoke(app, ["export", str(tmp_path / "h.safetensors"), "--format", kind,
                                        "-o", str(tmp_path / name)])  # fmt: skip
        assert made.exit_code == 4
        assert "normalises its input" in made.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.safetensors"]
