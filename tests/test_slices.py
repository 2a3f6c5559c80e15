"""Partial training: what is learned, what its gradient is, what never moves, what is stored."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from slice_helpers import batch, net, part_of, steps
from surgery_helpers import attach, same_bits
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Learned, Plan
from randsurgery.surgery import slices
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.heads import with_fixed_head
from randsurgery.surgery.learning import learn_plan, survivor_mask
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
from randsurgery.surgery.sliced_layers import Sliced

pytestmark = pytest.mark.slow


def whole_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of every parameter, as plain torch computes them."""
    model.requires_grad_(True).zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def plain_name(name: str) -> str:
    """conv1.learned_weight and conv1.parametrizations.weight.0.learned -> conv1.weight."""
    return name.replace("learned_", "").replace("parametrizations.", "").removesuffix(".0.learned")


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


class Subclass(nn.Conv2d):
    """A convolution that is not torch's own, as timm has several."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(4, 4, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(4, 4, (3, 1), dilation=(2, 1), bias=False),
    "pointwise": nn.Conv2d(4, 4, 1),
    "pointwise strided": nn.Conv2d(4, 4, 1, stride=2),
    "pointwise strided one way": nn.Conv2d(4, 4, 1, stride=(1, 3)),
    "pointwise padded": nn.Conv2d(4, 4, 1, stride=2, padding=1),
    "linear": nn.Linear(4, 4),
    "grouped": nn.Conv2d(4, 4, 3, groups=2),
    "same": nn.Conv2d(4, 4, 3, padding="same"),
    "mirrored": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    "one dimension": nn.Conv1d(4, 4, 3),
    "transposed": nn.ConvTranspose2d(4, 4, 3),
    "subclass": Subclass(4, 4, 3),
}
FAST = {"conv", "dilated", "linear"} | {name for name in LAYERS if name.startswith("pointwise")}


def gradcheck(layer: nn.Module, x: torch.Tensor) -> bool:
    """torch's check of the input's gradient and of those of all that is learned."""
    learned = {n: p.detach().clone() for n, p in layer.named_parameters() if p.requires_grad}

    def run(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = functional_call(layer, dict(zip(learned, parts, strict=True)), (x,))
        return found

    parts = [part.requires_grad_(True) for part in learned.values()]
    return torch.autograd.gradcheck(run, (x.requires_grad_(True), *parts))


CHECKED = [
    (name, dim)
    for name, layer in LAYERS.items()
    for dim in ("out", "in", "height", "width")
    if dim in ("out", "in") or layer.weight.dim() == 4  # type: ignore[operator]
]


@pytest.mark.parametrize(("name", "dim"), CHECKED)
def test_gradcheck(name: str, dim: Any) -> None:
    layer = copy.deepcopy(LAYERS[name]).double()
    plan = make_plan(layer, Freeze(count=1 if dim in ("height", "width") else 3, dim=dim))
    slices.attach(layer, plan)
    fast = name in FAST and dim in ("out", "in")
    assert isinstance(layer, Sliced) == fast
    assert parametrize.is_parametrized(layer) != fast
    # 6 x 6 pixels: enough for a pointwise layer's gradient to be a matrix product
    shapes = {"linear": (2, 7, 4), "one dimension": (2, 4, 6)}
    assert gradcheck(layer, torch.randn(*shapes.get(name, (2, 4, 6, 6)), dtype=torch.float64))


def test_gradcheck_of_survivors() -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).double()
    keep = np.random.default_rng(0).random(layer.weight.numel()) < 0.3
    plan = Plan(tensors={"weight": Learned(part="survivors"), "bias": Learned()})
    slices.attach(layer, plan, masks={"weight": Mask.of(keep)})
    assert layer.parametrizations.weight[0].learned.numel() == keep.sum()  # type: ignore[index, union-attr]
    assert gradcheck(layer, torch.randn(2, 3, 5, 5, dtype=torch.float64))


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


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1, stride=2)])
def test_a_sliced_layer_takes_one_image_without_a_batch(layer: nn.Conv2d) -> None:
    layer, twin = copy.deepcopy(layer), copy.deepcopy(layer)
    x = torch.randn(3, 9, 9)
    slices.attach(layer, make_plan(layer, Freeze(count=2)))
    layer(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert same_bits(layer(x).detach(), twin(x).detach())
    found = layer.learned_weight.grad  # type: ignore[union-attr]
    assert torch.allclose(found, twin.weight.grad[:2], rtol=1e-4, atol=1e-5)  # type: ignore[index, arg-type]


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


def timm_start(kind: str) -> Checkpoint:
    """Plans over files: survivors of masks, zero fill, fixed classifiers."""
    recipe = make_recipe("test_resnet", "kaiming-normal", seed=2, args={"num_classes": 5})
    if kind == "survivors":
        masked = harvest(recipe, attach(build(recipe), Popup(k="0.4")))
        names = set(attached_masks(masked))
        return with_plan(masked, survivors(meta_module(masked), names))
    if kind in ("hadamard", "orthonormal"):
        fixed = with_fixed_head(recipe, kind)  # type: ignore[arg-type]
        return with_plan(fixed, make_plan(meta_module(fixed), Freeze(fraction="0.4")))
    if kind == "given scale":
        fixed = with_fixed_head(recipe, "hadamard", scale=3.0)
        return with_plan(fixed, everything(meta_module(fixed)))
    plan = make_plan(meta_module(recipe), Freeze(fraction="0.4", statistics="frozen"))
    return zero_filled(recipe, plan)


def attached_masks(checkpoint: Checkpoint) -> list[str]:
    own = checkpoint.member().tensors
    return [n for n, t in own.items() if any(o.kind == "mask" for o in t.overlays)]


@pytest.mark.parametrize("mode", ["plain", "autocast", "channels_last"])
@pytest.mark.parametrize(
    "kind", ["survivors", "zero fill", "hadamard", "orthonormal", "given scale"]
)
def test_no_frozen_bit_of_a_file_moves(kind: str, mode: str) -> None:
    start = timm_start(kind)
    who = start.member()
    assert who.plan is not None
    model = learn_plan(build(start), start)
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    steps(model, mode)
    after = plain_state(model)
    assert set(after) == set(before)
    for name, tensor in after.items():
        moved = (tensor != before[name]).numpy()
        inside = np.zeros(tensor.shape, dtype=bool)
        part = who.plan.tensors.get(name)
        if "running" in name or "tracked" in name:
            assert same_bits(tensor, before[name]) == (who.plan.statistics == "frozen"), name
            continue
        if part is not None and part.part == "survivors":
            inside = survivor_mask(start, who, name).unpack().reshape(tensor.shape)
            assert bool((tensor.numpy()[~inside] == 0).all()), name
        elif part is not None:
            part_of(torch.from_numpy(inside), part)[...] = True
        assert same_bits(tensor, before[name]) or part is not None, name
        assert not moved[~inside].any(), name
        # where a layer before is zero, a rectifier's gradient is
        assert not inside.any() or moved[inside].mean() > (0 if kind == "zero fill" else 0.5), name
    assert ("fc.weight" in who.plan.tensors) == (kind in ("survivors", "zero fill"))


def test_the_optimiser_knows_the_slice_alone() -> None:
    model = net()
    slices.attach(model, make_plan(model, Freeze(count=1, head="frozen", norms=False)))
    sizes = {plain_name(n): p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sizes["conv1.weight"] == 27
    assert sizes["conv1.bias"] == 1
    assert sizes["hidden.weight"] == 10


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
