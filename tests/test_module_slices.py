"""Sliced modules as people treat modules: copied, averaged, saved, differentiated twice, against
plain twins."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from slice_helpers import Net, batch, net, part_of, steps
from surgery_helpers import assert_same_state, same_bits
from timm.utils import ModelEmaV3
from torch import nn
from torch.func import functional_call, grad, hessian, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Learned, Plan
from randsurgery.surgery import slices
from randsurgery.surgery.modules import plain_state
from randsurgery.surgery.plans import Freeze, make_plan

FREEZES = {
    "out": Freeze(fraction="0.4"), "in": Freeze(fraction="0.4", dim="in"),
    "height": Freeze(count=1, dim="height", linear="whole"),
}  # fmt: skip


def sliced(kind: str = "out", model: nn.Module | None = None) -> nn.Module:
    model = net() if model is None else model
    if kind == "survivors":
        names = [n for n, p in model.named_parameters() if p.dim() > 1]
        draw = np.random.default_rng(0)
        masks = {n: Mask.of(draw.random(model.get_parameter(n).numel()) < 0.4) for n in names}
        plan = Plan(tensors={name: Learned(part="survivors") for name in names})
        return slices.attach(model, plan, masks=masks)
    return slices.attach(model, make_plan(model, FREEZES[kind]))


KINDS = [*FREEZES, "survivors"]


def learned(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def twin_of(model: nn.Module) -> Net:
    """The same network without a plan."""
    plain = net(9)
    plain.load_state_dict(plain_state(model))
    return plain.eval()


def assert_is(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """The module has these tensors, shows them, and computes with them."""
    assert_same_state(plain_state(model), state)
    plain, (x, _) = net(9), batch()
    plain.load_state_dict(state)
    assert same_bits(model.eval()(x).detach().clone(), plain.eval()(x).detach())
    assert_same_state(plain_state(model), state)


# --- averages -------------------------------------------------------------------------------------

AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mean": AveragedModel,
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "with buffers": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
    "timm": lambda model: ModelEmaV3(model, decay=0.5),
    "timm without foreach": lambda model: ModelEmaV3(model, decay=0.5, foreach=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_is_that_of_plain_networks(kind: str, average: str) -> None:
    """The twin's average sees, step by step, the plain states of the sliced network."""
    model = sliced(kind)
    plain = twin_of(model)
    ours, theirs = AVERAGES[average](model), AVERAGES[average](plain)
    for turn in range(4):
        steps(model, "plain", 1)
        plain.load_state_dict(plain_state(model))
        for one, of in ((ours, model), (theirs, plain)):
            (one.update if average.startswith("timm") else one.update_parameters)(of)  # type: ignore[operator, union-attr]
        if turn % 2:  # evaluated between: nothing of it may stay
            assert_is(ours.module, theirs.module.state_dict())  # type: ignore[arg-type, union-attr, operator]
    assert_is(ours.module, theirs.module.state_dict())  # type: ignore[arg-type, union-attr, operator]
    assert_is(model, plain.state_dict())


# --- copies and states ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_learn_on_their_own(kind: str) -> None:
    model = sliced(kind)
    steps(model, "plain", 1)
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    again = copy.deepcopy(model)
    assert_is(again, before)
    steps(again, "plain", 2)
    assert_is(model, before)
    assert not same_bits(plain_state(again)["hidden.weight"], before["hidden.weight"])
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in again.parameters()}
    assert len(own) == len(list(model.parameters()))  # no two share memory


def test_a_module_of_plain_layers_can_be_pickled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5))
    slices.attach(model, make_plan(model, Freeze(count=2)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_same_state(plain_state(again), plain_state(model))
    x = torch.randn(2, 3, 4, 4)
    assert same_bits(again(x).detach(), model(x).detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_the_learned_part_along(kind: str, assign: bool) -> None:
    model, other = sliced(kind), sliced(kind, net(5))
    steps(model, "plain", 2)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other.load_state_dict(state, assign=assign)
    if kind == "survivors":  # the masked rest is not in a state dict as such
        assert same_bits(other.eval()(batch()[0]), model.eval()(batch()[0]))
    else:
        assert_is(other, plain_state(model))
    steps(other, "plain", 1)
    assert_same_state(plain_state(sliced(kind)), plain_state(sliced(kind)))


def test_a_state_dict_shows_the_slice_in_the_whole_at_any_time() -> None:
    model = sliced()
    for write in ("step", "data", "fused"):
        for p in learned(model):
            p.grad = torch.ones_like(p)
        if write == "data":
            for p in learned(model):
                p.data.add_(1.5)
        else:
            kind = torch.optim.AdamW(learned(model), lr=0.3, fused=write == "fused")
            kind.step()
        state = model.state_dict()
        assert same_bits(state["conv1.weight"][:3], state["conv1.learned_weight"])
        assert same_bits(state["hidden.bias"][:4], state["hidden.learned_bias"])
        assert_is(model, {name: tensor.clone() for name, tensor in plain_state(model).items()})


@pytest.mark.parametrize("kind", ["out", "in"])
def test_a_plain_state_dict_of_plain_layers_fills_the_slices(kind: str) -> None:
    parts = [nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(24, 5)) for _ in "ab"]
    slices.attach(parts[0], make_plan(parts[0], Freeze(count=2, dim=kind)))  # type: ignore[arg-type]
    parts[0].load_state_dict(parts[1].state_dict())
    x = torch.randn(2, 3, 4, 4)
    assert same_bits(parts[0](x).detach(), parts[1](x).detach())
    whole = parts[1].state_dict()["0.weight"].narrow(int(kind == "in"), 0, 2)
    assert same_bits(parts[0].state_dict()["0.learned_weight"], whole)


# --- other ways to call ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layer_computes_with_is_what_is_learned_now(kind: str) -> None:
    model = sliced(kind)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        for p in learned(model):
            p.data.mul_(-1).add_(0.25)
        with mode():
            found = model.eval()(batch()[0])
        assert same_bits(found.detach().clone(), twin_of(model)(batch()[0]).detach())


def test_two_passes_and_one_backward_with_a_state_dict_between() -> None:
    model, plain = sliced().double().eval(), net().double().eval()
    (x, _), (y, _) = batch(1, torch.float64), batch(2, torch.float64)
    first = model(x).square().sum()
    model.state_dict()
    (first + model(y).square().sum()).backward()
    (plain(x).square().sum() + plain(y).square().sum()).backward()
    wanted = plain.conv1.weight.grad
    assert wanted is not None
    torch.testing.assert_close(model.conv1.learned_weight.grad, wanted[:3])  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_are_the_same(kind: str, reentrant: bool) -> None:
    model = sliced(kind).eval()
    x = batch()[0].requires_grad_()
    found = []
    for checked in (False, True):
        out = checkpoint(model, x, use_reentrant=reentrant) if checked else model(x)
        out.square().sum().backward()
        found.append([p.grad for p in learned(model) if p.grad is not None])
        model.zero_grad()
    assert len(found[0]) == len(learned(model))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


def pairs(kind: str) -> tuple[nn.Module, Net, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Sliced and plain networks in float64, and what is learned of each."""
    model = sliced(kind).double().eval()
    plain = net().double().eval()
    plain.load_state_dict(plain_state(model))
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    names = [n.replace("learned_", "").replace("parametrizations.", "").removesuffix(".0.learned")
             for n in own]  # fmt: skip
    return model, plain, own, {n: plain.get_parameter(n).detach() for n in names}


def assert_parts(model: nn.Module, found: Any, wanted: Any) -> None:
    parts = slices.attached(model)
    for ours, (name, theirs) in zip(found.values(), wanted.items(), strict=True):
        cut = part_of(theirs, parts[name]) if name in parts else theirs
        torch.testing.assert_close(ours, cut, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", list(FREEZES))
def test_torch_func_gives_the_slices_of_plain_gradients(kind: str) -> None:
    model, plain, own, theirs = pairs(kind)
    x = batch(dtype=torch.float64)[0]

    def loss(module: nn.Module) -> Callable[..., torch.Tensor]:
        return lambda given, x: functional_call(module, given, (x,)).square().sum()

    assert_parts(model, grad(loss(model))(own, x), grad(loss(plain))(theirs, x))
    ours, wanted = (
        vmap(grad(lambda g, one, m=m: loss(m)(g, one[None])), in_dims=(None, 0))(given, x)
        for m, given in ((model, own), (plain, theirs))
    )
    first = {name: value[2] for name, value in ours.items()}
    assert_parts(model, first, {name: value[2] for name, value in wanted.items()})


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own
def test_a_hessian_is_the_plain_one() -> None:
    mk = lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))  # noqa: E731
    model = mk().double()
    plain = copy.deepcopy(model)
    slices.attach(model, make_plan(model, Freeze(fraction="0.7", least=1)))
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    ours, theirs = (hessian(lambda y, m=m: m(y).square().sum())(x) for m in (model, plain))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", list(FREEZES))
def test_a_gradient_penalty_has_the_slices_of_plain_gradients(kind: str) -> None:
    model, plain, own, theirs = pairs(kind)
    x = batch(dtype=torch.float64)[0].requires_grad_()
    found = []
    for module in (model, plain):
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        first.square().sum().backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    ours = {name: found[0][name] for name in own if name in found[0]}
    wanted = {name: found[1][name] for name in theirs if name in found[1]}
    assert len(ours) > 10
    assert_parts(model, ours, wanted)


@pytest.mark.parametrize("dim", ["out", "in"])
@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, (3, 1), dilation=(2, 1), bias=False),
    nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, stride=2), nn.Linear(4, 4),
])  # fmt: skip
def test_second_derivatives_are_right(layer: nn.Module, dim: Any) -> None:
    layer = copy.deepcopy(layer).double()
    slices.attach(layer, make_plan(layer, Freeze(count=3, dim=dim)))
    given = {n: p.detach().clone() for n, p in layer.named_parameters() if p.requires_grad}

    def run(x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(layer, dict(zip(given, parts, strict=True)), (x,))
        return out.tanh()

    shape = (2, 5, 4) if isinstance(layer, nn.Linear) else (1, 4, 6, 6)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    parts = [part.requires_grad_(True) for part in given.values()]
    assert torch.autograd.gradgradcheck(run, (x, *parts))
