"""Plans: what a wish names, what is refused, what a file then stores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from slice_helpers import net, steps
from surgery_helpers import attach, logits, same_bits
from surgery_helpers import everything as every_layer
from torch import nn

import randsurgery as rs
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.recipe import ConstantSource, Learned, Plan
from randsurgery.format.tensors import hex_float
from randsurgery.inspection.storage import storage
from randsurgery.surgery import slices
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module, plain_state
from randsurgery.surgery.plans import (
    Freeze,
    everything,
    make_plan,
    survivors,
    with_plan,
    zero_filled,
)
from randsurgery.surgery.recipes import make_recipe

# --- plans ----------------------------------------------------------------------------------------


def test_counts_are_exact() -> None:
    # int((1 - 0.9) * 150) is 14 in floats; the paper's count is 15
    plan = make_plan(nn.Conv2d(2, 150, 1), Freeze(fraction="0.1"))
    assert plan.tensors["weight"].count == 15


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Freeze(), "nothing would be frozen"),
        (Freeze(only=("@norm",), count=2), "--count slices nothing"),
        (Freeze(only=("norm",), norms=False), "--only norm and --norms frozen contradict"),
        (Freeze(fraction="0.1", count=2), "exclude each other"),
        (Freeze(fraction="0"), "fraction must lie"),
        (Freeze(fraction="1.1"), "fraction must lie"),
        (Freeze(count=0), "whole number from 1"),
        (Freeze(count=1.5), "whole number from 1"),  # type: ignore[arg-type]
        (Freeze(count="3"), "whole number from 1"),  # type: ignore[arg-type]
        (Freeze(fraction="0.5", least="1"), "whole number from 0"),  # type: ignore[arg-type]
        (Freeze(fraction="0.1"), r"no filter would be learned in .*conv1\.weight.*--min 1"),
        (Freeze(fraction="0.5", dim="height"), r"hidden\.weight .* has no height.*--linear whole"),
        (Freeze(count=9, least=10), "contradict"),
        (Freeze(fraction="0.5", dim="depth"), "unknown --dim"),  # type: ignore[arg-type]
        (Freeze(only=("hiden",)), "near: hidden"),
        (Freeze(only=("@norm",), norms=False), "contradict"),
        (Freeze(only=("@head",), head="frozen"), "contradict"),
        (Freeze(only=("hidden",), dim="in"), "go with --fraction"),
        (Freeze(only=("hidden",), least=1), "go with --fraction"),
        (Freeze(only="hidden"), "sequence of patterns"),  # type: ignore[arg-type]
        (Freeze(count=1, statistics="moving"), "statistics must be one of"),  # type: ignore[arg-type]
        (Freeze(count=1, head="fixd"), "head must be one of"),  # type: ignore[arg-type]
    ],
)
def test_wishes_that_cannot_be_met_are_named(wish: Freeze, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(net(), wish)


def test_defaults_are_the_papers() -> None:
    model = net()
    names = {"norm.weight", "norm.bias"}
    head = {"fc.weight", "fc.bias"}
    assert set(make_plan(model, Freeze(only=("@norm",))).tensors) == names
    assert set(make_plan(model, Freeze(only=("@head",))).tensors) == names | head
    assert set(make_plan(model, Freeze(only=("same",))).tensors) == (
        names | {"same.weight", "same.bias"}
    )
    sliced = make_plan(model, Freeze(fraction="0.5")).tensors
    assert {n for n, part in sliced.items() if part.part == "whole"} == names | head
    whole = make_plan(model, Freeze(fraction="0.5", linear="whole")).tensors
    assert whole["hidden.weight"].part == "whole"


def test_every_layer_of_torchs_can_be_sliced() -> None:
    model = every_layer()
    plan = make_plan(model, Freeze(count=1))
    slices.attach(model, plan)
    assert set(slices.attached(model)) == {
        name for name, part in plan.tensors.items() if part.part == "slice"
    }


def test_a_plan_for_another_module_is_refused_and_touches_nothing() -> None:
    model = net()
    with pytest.raises(IncompatibleError, match="lacks"):
        slices.attach(model, Plan(tensors={"elsewhere.weight": Learned()}))
    with pytest.raises(IncompatibleError, match="has no mask"):
        slices.attach(model, Plan(tensors={"conv1.weight": Learned(part="survivors")}))
    assert all(p.requires_grad for p in model.parameters())
    slices.attach(model, make_plan(model, Freeze(count=1)))
    with pytest.raises(UsageError, match="attached already"):
        slices.attach(model, make_plan(net(), Freeze(count=1)))


# --- files ----------------------------------------------------------------------------------------


def planned(wish: Freeze, *, zero: bool = False) -> Checkpoint:
    recipe = make_recipe(net(), "kaiming-normal", seed=3)
    plan = make_plan(net(), wish)
    return zero_filled(recipe, plan) if zero else with_plan(recipe, plan)


@pytest.mark.parametrize("zero", [False, True])
def test_only_what_was_learned_is_stored(zero: bool, tmp_path: Path) -> None:
    start = planned(Freeze(count=2), zero=zero)
    model = learn_plan(build(start, model=net()), start)
    drawn = build(make_recipe(net(), "kaiming-normal", seed=3), model=net())
    assert same_bits(model.conv1.weight[:2], drawn.conv1.weight[:2])  # slices start at their seed
    rest = torch.zeros(6, 3, 3, 3) if zero else drawn.conv1.weight[2:]
    assert same_bits(model.conv1.weight[2:], rest)
    steps(model, "plain")
    rs.save(tmp_path / "slim.safetensors", start, model)
    made = {row.name: row.made_of for row in storage(tmp_path / "slim.safetensors").tensors}
    source = "constant" if zero else "random"
    assert made["conv1.weight"] == f"{source} + slice"
    assert made["hidden.weight"] == f"{source} + slice"
    assert made["conv1.bias"] == "constant + slice"
    assert made["fc.weight"] == "random + replace"
    again = rs.load(tmp_path / "slim.safetensors", model=net())
    state = plain_state(model)
    assert all(same_bits(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert same_bits(logits(again), logits(model))
    assert rs.read_recipe(tmp_path / "slim.safetensors").members[0].plan == start.member().plan


def test_a_constant_that_is_not_zero_starts_where_it_was() -> None:
    recipe = make_recipe(net(), seed=3)
    entry = recipe.recipe.tensors["conv1.bias"]
    one = entry.model_copy(update={"source": ConstantSource(value=hex_float(1.0))})
    tensors = {**recipe.recipe.tensors, "conv1.bias": one}
    recipe = replace(recipe, recipe=recipe.recipe.model_copy(update={"tensors": tensors}))
    start = zero_filled(recipe, make_plan(net(), Freeze(count=2)))
    model = learn_plan(build(start, model=net()), start)
    assert model.conv1.bias.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]  # type: ignore[operator, union-attr]


def test_a_plan_file_is_a_few_kilobytes_and_the_network_as_drawn(tmp_path: Path) -> None:
    start = planned(Freeze(fraction="0.5"))
    rs.save(tmp_path / "plan.safetensors", start)
    assert storage(tmp_path / "plan.safetensors").bytes < 8000
    drawn = build(make_recipe(net(), "kaiming-normal", seed=3), model=net())
    found = rs.load(tmp_path / "plan.safetensors", model=net())
    assert same_bits(found.conv1.weight, drawn.conv1.weight)


def test_survivors_are_learned_and_scattered(tmp_path: Path) -> None:
    recipe = make_recipe(net(), seed=5)
    masked = attach(build(recipe, model=net()), Popup(k="0.3", skip=("fc",)))
    with_masks = harvest(recipe, masked)
    names = set(with_masks.member().tensors)
    start = with_plan(with_masks, survivors(net(), {n for n in names if n.endswith("weight")}))
    model = learn_plan(build(start, model=net()), start)
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    steps(model, "plain")
    rs.save(tmp_path / "ticket.safetensors", start, model)
    again = rs.load(tmp_path / "ticket.safetensors", model=net()).state_dict()
    for name in names:
        if name.endswith("weight"):
            alive = before[name] != 0
            assert bool((again[name][~alive] == 0).all()), name
            assert bool((again[name][alive] != before[name][alive]).any()), name
    made = {row.name: row.made_of for row in storage(tmp_path / "ticket.safetensors").tensors}
    assert made["conv1.weight"] == "constant + scatter"
    second = rs.save(tmp_path / "again.safetensors", start, model)
    assert second == (tmp_path / "ticket.safetensors").stat().st_size


def test_everything_is_the_dense_baseline() -> None:
    start = make_recipe(net(), seed=1)
    model = learn_plan(build(start, model=net()), start)
    assert all(p.requires_grad for p in model.parameters())
    assert set(everything(net()).tensors) == {name for name, _ in net().named_parameters()}


def test_a_planned_network_of_timm_can_be_learned_and_loaded(tmp_path: Path) -> None:
    recipe = make_recipe("test_vit", "kaiming-normal", args={"num_classes": 5, "img_size": 32})
    start = with_plan(recipe, make_plan(meta_module(recipe), Freeze(fraction="0.25")))
    model = learn_plan(build(start), start)
    nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    rs.save(tmp_path / "vit.safetensors", start, model)
    again = rs.load(tmp_path / "vit.safetensors").state_dict()
    state = plain_state(model)
    assert all(same_bits(tensor, state[name]) for name, tensor in again.items())
