"""Partial training: what is learned, what its gradient is, what never moves, what is stored."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surgery_helpers import everything as every_layer
from surgery_helpers import logits, same_bits
from torch import nn
from torch.nn.utils import parametrize

import randsurgery as rs
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.recipe import Learned, Plan
from randsurgery.inspection.storage import storage
from randsurgery.surgery import slices
from randsurgery.surgery.modules import build, harvest, learn_plan, meta_module, plain_state
from randsurgery.surgery.plans import (
    Freeze,
    everything,
    make_plan,
    survivors,
    with_plan,
    zero_filled,
)
from randsurgery.surgery.popup import Popup, attach
from randsurgery.surgery.recipes import make_recipe


class Net(nn.Module):
    """Plain, grouped, strided and dilated layers, a bias here and there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.stepped = nn.Conv2d(8, 8, 1, stride=(2, 1), bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2, stride=(1, 2), padding=1)
        self.same = nn.Conv2d(8, 6, 3, padding="same")
        self.mirrored = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(6, 10, (3, 1), dilation=(2, 1), bias=False)
        self.hidden = nn.Linear(10, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stepped(self.point(self.norm(self.conv1(x)).tanh()).tanh())
        x = self.mirrored(self.same(self.grouped(x).tanh()).tanh()).tanh()
        x = self.dilated(x).mean((2, 3)).tanh()
        out: torch.Tensor = self.fc(self.hidden(x).tanh())
        return out


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 12, 12, generator=draw, dtype=dtype)
    return images, torch.randint(5, (6,), generator=draw)


def whole_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of every parameter, as plain torch computes them."""
    model.requires_grad_(True).zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    """conv1.learned_weight and conv1.parametrizations.weight.0.learned -> conv1.weight."""
    return name.replace("learned_", "").replace("parametrizations.", "").removesuffix(".0.learned")


def part_of(tensor: torch.Tensor, part: Learned) -> torch.Tensor:
    if part.part == "whole":
        return tensor
    assert part.dim is not None
    assert part.count is not None
    return tensor.narrow(part.dim, 0, part.count)


# --- gradients: the fast path against plain torch -------------------------------------------------


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("fraction", ["0.35", "1"])
def test_gradients_are_the_slices_of_torchs(dim: Any, fraction: str) -> None:
    model, twin = net().double(), net().double()
    x, y = batch(dtype=torch.float64)
    plan = make_plan(model, Freeze(fraction=fraction, dim=dim, least=1))
    slices.attach(model, plan)
    nn.functional.cross_entropy(model(x), y).backward()
    expected = whole_gradients(twin, x, y)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert {plain_name(name) for name in found} == set(plan.tensors)
    for name, gradient in found.items():
        wanted = part_of(expected[plain_name(name)], plan.tensors[plain_name(name)])
        assert gradient is not None
        assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("dim", ["height", "width"])
def test_slices_of_the_kernel_take_the_slow_path(dim: Any) -> None:
    model, twin = net().double(), net().double()
    x, y = batch(dtype=torch.float64)
    plan = make_plan(model, Freeze(fraction="0.4", dim=dim, linear="whole"))
    assert plan.tensors["conv1.weight"] == Learned(
        part="slice", dim=2 if dim == "height" else 3, count=1
    )
    assert "conv1.bias" not in plan.tensors  # biases only along out
    slices.attach(model, plan)
    assert parametrize.is_parametrized(model.conv1)
    nn.functional.cross_entropy(model(x), y).backward()
    expected = whole_gradients(twin, x, y)
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = part_of(expected[plain_name(name)], plan.tensors[plain_name(name)])
            assert torch.allclose(p.grad, wanted, rtol=1e-10, atol=1e-12), name  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(3, 4)])
@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(layer: nn.Module, dim: int) -> None:
    layer = copy.deepcopy(layer).double()
    tensors = {"weight": Learned(part="slice", dim=dim, count=2)}
    if dim == 0:
        tensors["bias"] = Learned(part="slice", dim=0, count=2)
    slices.attach(layer, Plan(tensors=tensors))
    x = torch.randn(2, 3, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 7, 3)
    learned = [p for p in layer.parameters() if p.requires_grad]

    function = slices._ConvSlice if isinstance(layer, nn.Conv2d) else slices._LinearSlice

    def run(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()  # type: ignore[operator, union-attr]
        weight.narrow(dim, 0, 2).copy_(parts[0])
        if dim == 0:
            bias[:2] = parts[1]
        bias_part = parts[1] if dim == 0 else None
        out: torch.Tensor = function.apply(x, parts[0], bias_part, weight, bias, layer)
        return out

    parts = [p.detach().clone().requires_grad_(True) for p in learned]
    assert torch.autograd.gradcheck(run, (x.double().requires_grad_(True), *parts))


@pytest.mark.parametrize("path", ["autocast", "channels_last"])
def test_other_precisions_and_layouts_agree_with_torch(path: str) -> None:
    model, twin = net(), net()
    x, y = batch()
    if path == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
        model, twin = (m.to(memory_format=torch.channels_last) for m in (model, twin))
    plan = make_plan(model, Freeze(fraction="0.5"))
    slices.attach(model, plan)
    enabled = path == "autocast"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        out = model(x)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        loss = nn.functional.cross_entropy(out.float(), y)
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert same_bits(out.detach(), twin(x).detach())
    twin.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        loss = nn.functional.cross_entropy(twin(x).float(), y)
    loss.backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    loose = 0.1 if enabled else 1e-4
    for name, p in model.named_parameters():
        if p.requires_grad:
            wanted = part_of(expected[plain_name(name)], plan.tensors[plain_name(name)])  # type: ignore[arg-type]
            assert p.grad is not None
            assert p.grad.dtype == torch.float32
            assert (p.grad - wanted).norm() <= loose * wanted.norm() + 1e-6, name


def test_layers_before_the_first_learned_one_need_no_backward() -> None:
    model = net()
    slices.attach(model, make_plan(model, Freeze(only=("hidden",), norms=False)))
    seen: list[bool] = []
    model.dilated.register_forward_hook(lambda m, i, out: seen.append(out.requires_grad))
    assert model(batch()[0]).requires_grad
    assert seen == [False]


def test_a_network_moved_after_attach_still_learns_its_slice() -> None:
    model = net()
    slices.attach(model, make_plan(model, Freeze(fraction="0.5")))
    model.double().float()  # moves weight and slice apart
    with torch.no_grad():
        model.conv1.learned_weight.fill_(3.0)  # type: ignore[union-attr, operator]
    x = batch()[0]
    model(x)
    assert bool((model.conv1.weight[:4] == 3).all())
    assert not bool((model.conv1.weight[4:] == 3).any())
    model.double().float()
    with torch.inference_mode():
        model(x)
    model(x).sum().backward()
    assert model.conv1.learned_weight.grad is not None  # type: ignore[union-attr]
    again = copy.deepcopy(model)
    assert same_bits(again(x).detach(), model(x).detach())
    with torch.no_grad():
        again.conv1.learned_weight.fill_(5.0)
    again(x)
    assert bool((again.conv1.weight[:4] == 5).all())
    assert bool((model.conv1.weight[:4] == 3).all())


# --- what moves and what does not -----------------------------------------------------------------


WISHES: dict[str, Freeze] = {
    "fraction": Freeze(fraction="0.4"),
    "count": Freeze(count=2),
    "in": Freeze(fraction="0.4", dim="in"),
    "height": Freeze(fraction="0.4", dim="height", linear="whole"),
    "width": Freeze(count=1, dim="width", linear="whole"),
    "linear whole": Freeze(fraction="0.4", linear="whole"),
    "no norms": Freeze(fraction="0.4", norms=False),
    "frozen statistics": Freeze(fraction="0.4", statistics="frozen"),
    "frozen head": Freeze(fraction="0.4", head="frozen"),
    "norms alone": Freeze(only=("@norm",)),
    "head alone": Freeze(only=("@head",), norms=False),
    "one layer": Freeze(only=("grouped",), statistics="frozen"),
    "slices of named layers": Freeze(count=1, only=("same", "mirrored")),
}


def steps(model: nn.Module, mode: str, count: int = 3) -> None:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for turn in range(count):
        x, y = batch(turn)
        if mode == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("mode", ["plain", "autocast", "channels_last"])
@pytest.mark.parametrize("wish", WISHES)
def test_no_frozen_bit_moves_and_every_learned_part_does(wish: str, mode: str) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = make_plan(model, WISHES[wish])
    slices.attach(model, plan)
    steps(model, mode)
    after = plain_state(model)
    assert list(after) == list(before) or set(after) == set(before)
    for name, tensor in after.items():
        part = plan.tensors.get(name)
        if name.startswith("norm.") and ("running" in name or "tracked" in name):
            assert same_bits(tensor, before[name]) == (plan.statistics == "frozen"), name
        elif part is None:
            assert same_bits(tensor, before[name]), name
        else:
            moved = (tensor != before[name]).numpy()
            inside = np.zeros(tensor.shape, dtype=bool)
            part_of(torch.from_numpy(inside), part)[...] = True
            assert not moved[~inside].any(), name
            assert moved[inside].mean() > 0.5, name


def test_the_optimiser_knows_the_slice_alone() -> None:
    model = net()
    slices.attach(model, make_plan(model, Freeze(count=1, head="frozen", norms=False)))
    sizes = {plain_name(n): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sizes["conv1.weight"] == 27
    assert sizes["conv1.bias"] == 1
    assert sizes["hidden.weight"] == 10


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
        (Freeze(count=1, least=2), "contradict"),
        (Freeze(fraction="0.1", count=2), "exclude each other"),
        (Freeze(fraction="0"), "fraction must lie"),
        (Freeze(fraction="1.1"), "fraction must lie"),
        (Freeze(count=0), "at least 1"),
        (Freeze(fraction="0.1"), r"no filter would be learned in .*conv1\.weight.*--min 1"),
        (Freeze(fraction="0.5", dim="height"), r"hidden\.weight .* has no height.*--linear whole"),
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


class Borrower(nn.Module):
    """Computes with its layer's weight itself, as several networks do with their qkv."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(nn.functional.linear(x, self.qkv.weight, self.qkv.bias))
        return out


@pytest.mark.parametrize("dim", ["out", "in"])
def test_a_layer_that_is_not_called_learns_its_slice_too(dim: Any) -> None:
    model, x = Borrower(), torch.randn(3, 6)
    twin = copy.deepcopy(model)
    slices.attach(model, make_plan(model, Freeze(count=2, dim=dim, only=("qkv",))))
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    wanted = twin.qkv.weight.grad.narrow(0 if dim == "out" else 1, 0, 2)  # type: ignore[union-attr]
    assert same_bits(model.qkv.learned_weight.grad, wanted)  # type: ignore[arg-type]
    if dim == "out":
        assert same_bits(model.qkv.learned_bias.grad, twin.qkv.bias.grad[:2])  # type: ignore[index, arg-type, union-attr]
