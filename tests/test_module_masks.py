"""The masked weight is that of the scores as they are, whatever happens between two forward
passes, against networks whose masks are made the slow way in each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from surgery_helpers import same_bits
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import randsurgery as rs
from randsurgery.surgery import popup_scores as popup_module
from randsurgery.surgery.masking import Scores
from randsurgery.surgery.scores import attached, harvest

WISHES: dict[str, Any] = {"popup": rs.Popup(k="0.5"), "supermask": rs.Supermask(),
                          "rescaled": rs.Supermask(rescale=True)}  # fmt: skip


def small() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.Tanh(),
            nn.Linear(6, 3),
        )  # fmt: skip


def masked(wish: str = "popup", *, train: bool = True) -> nn.Sequential:
    model = small()
    rs.attach(model, WISHES[wish])
    return model.train(train)


def images(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)


def shown(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every masked weight as the module gives it."""
    return {n: model.get_submodule(n.rpartition(".")[0]).weight.detach() for n in attached(model)}  # type: ignore[misc, operator, union-attr]


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every masked weight by sorting all of its scores, or by their signs."""
    found = {}
    for name, layer in attached(model).items():
        holder = model.get_submodule(name.rpartition(".")[0])
        weight = holder.parametrizations.weight.original.detach()  # type: ignore[union-attr]
        mask = torch.from_numpy(layer.mask().unpack()).view(weight.shape)
        if hasattr(layer, "zeroed"):
            order = layer.scores.detach().abs().flatten().sort(stable=True).indices
            mask = torch.ones(weight.numel(), dtype=torch.bool)
            mask[order[: layer.zeroed]] = False
            mask = mask.view(weight.shape)
        found[name] = torch.where(mask, weight, torch.zeros(())) * layer.factor
    return found


def assert_current(model: nn.Module) -> None:
    wanted = expected(model)
    for name, weight in shown(model).items():
        assert same_bits(weight, wanted[name]), name


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# --- nothing is stale -----------------------------------------------------------------------------


def by_data(model: nn.Module) -> None:
    for p in parameters(model):
        p.data.mul_(-1).add_(torch.linspace(-1, 1, p.numel()).view(p.shape))


def by_fused(model: nn.Module) -> None:
    for p in parameters(model):
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    torch.optim.AdamW(parameters(model), lr=0.3, fused=True).step()


def by_new_memory(model: nn.Module) -> None:
    for p in parameters(model):
        p.data = p.data.flip(0).clone()


def by_state(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    by_data(other)
    model.load_state_dict(other.state_dict())


def by_assigned_state(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    by_data(other)
    model.load_state_dict(other.state_dict(), assign=True)


def by_one_element(model: nn.Module) -> None:
    for p in parameters(model):  # across the threshold, and nothing else
        flat = p.data.view(-1)
        flat[flat.abs().argmin()] = 9.0


def by_the_weights(model: nn.Module) -> None:
    for name in attached(model):
        holder = model.get_submodule(name.rpartition(".")[0])
        holder.parametrizations.weight.original.data.mul_(2)  # type: ignore[union-attr]


WRITES = [by_data, by_fused, by_new_memory, by_state, by_assigned_state, by_one_element,
          by_the_weights]  # fmt: skip


def whole(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(x)
    return out


def in_parts(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for part in model:
        x = part(x)
    return x


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("call", [whole, in_parts])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients", "inference"])
def test_the_mask_is_that_of_the_scores_after_any_write(
    write: Callable[[nn.Module], None], call: Callable[..., torch.Tensor], mode: str
) -> None:
    model = masked(train=mode == "train")
    x, plain = images(), small()
    without = {"inference": torch.inference_mode, "eval without gradients": torch.no_grad}
    for _ in range(3):
        with without.get(mode, torch.enable_grad)():
            found = call(model, x)
        for name, weight in expected(model).items():
            plain.get_submodule(name.rpartition(".")[0]).weight.data = weight
        assert same_bits(found.detach().clone(), plain(x).detach())
        assert_current(model)
        write(model)
        assert_current(model)


@pytest.mark.parametrize("wish", WISHES)
def test_a_supermask_in_evaluation_is_never_stale(wish: str) -> None:
    model = masked(wish, train=False)
    for write in (*WRITES, by_data):
        model(images())
        write(model)
        assert_current(model)


@pytest.mark.parametrize("wish", WISHES)
def test_in_evaluation_a_mask_is_chosen_once(wish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, chosen = masked(wish), []
    for layer in attached(model).values():
        choose = layer.choose

        def counted(*tensors: Any, name: str = layer.tensor_name, choose: Any = choose) -> Any:
            chosen.append(name)
            return choose(*tensors)

        monkeypatch.setattr(layer, "choose", counted)
    model.eval()
    for batch in range(3):
        with torch.no_grad() if batch else torch.inference_mode():
            model(images())
    out = model(images())
    assert sorted(chosen) == sorted(attached(model))
    out.sum().backward()  # and what was kept can be learned from
    assert all(layer.scores.grad is not None for layer in attached(model).values())
    chosen.clear()
    model.train()
    assert all(layer._settled is None for layer in attached(model).values())
    for _ in range(2):
        model(images())
    assert len(chosen) == 2 * len(attached(model))


def test_writing_into_the_masked_weight_is_undone() -> None:
    model = masked(train=False)
    with torch.no_grad():
        model[0].weight.mul_(2)  # type: ignore[operator, union-attr]
    assert_current(model)


def test_an_interrupted_call_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(images())
    by_data(model)
    assert_current(model)


def test_attention_masks_its_weights_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, names = nn.MultiheadAttention(8, 2, batch_first=True), []
    rs.attach(layer, rs.Popup(k="0.5"))
    select = popup_module.select

    def counted(*arguments: Any) -> Any:
        names.append(arguments[-1])
        return select(*arguments)

    monkeypatch.setattr(popup_module, "select", counted)
    x = torch.randn(2, 3, 8)
    for _ in range(2):
        names.clear()
        layer.train()(x, x, x)[0].sum().backward()
        assert names.count("in_proj_weight") == 1
    by_data(layer)
    assert same_bits(layer.out_proj.weight.detach(), expected(layer.out_proj)["weight"])


# --- checkpointing --------------------------------------------------------------------------------


def learned_gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in parameters(model) if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_have_the_masks_of_the_first_pass(
    wish: str, reentrant: bool
) -> None:
    model = masked(wish)
    x = images().requires_grad_()
    parts = nn.ModuleList([model[:3], model[3:]])
    results = []
    for checked in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            out = x
            for part in parts:
                if checked:
                    out = checkpoint(part, out, use_reentrant=reentrant)
                else:
                    out = part(out)
            torch.rand(7)  # what comes between must not matter
            out.square().sum().backward()
        results.append([out.detach(), *learned_gradients(model)])
    assert len(results[0]) == 4
    for plain, recomputed in zip(*results, strict=True):
        assert same_bits(plain, recomputed)


@pytest.mark.parametrize("wish", ["popup", "supermask"])
def test_timms_checkpointing_trains(wish: str) -> None:
    start = rs.make_recipe("resnet10t", seed=1, args={"num_classes": 5})
    found = []
    for checked in (False, True):
        model = rs.attach(rs.build(start), WISHES[wish]).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model.set_grad_checkpointing(checked)  # type: ignore[operator]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model(torch.ones(2, 3, 32, 32)).square().sum().backward()
        found.append(learned_gradients(model))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


# --- torch.func, and gradients of gradients -------------------------------------------------------


def plain_function(model: nn.Module) -> Callable[[dict[str, torch.Tensor], Any], torch.Tensor]:
    """The network with its masked weights written as torch's own operations: the straight-through
    estimator by detaching."""
    layers, plain = attached(model), small().to(images().dtype)
    hard = {name: weight.clone() for name, weight in expected(model).items()}

    def run(scores: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        weights = {}
        for name in layers:
            holder = model.get_submodule(name.rpartition(".")[0])
            weight = holder.parametrizations.weight.original.detach()  # type: ignore[union-attr]
            own = scores[f"{name.rpartition('.')[0]}.parametrizations.weight.0.scores"]
            soft = weight * (own.abs() if hasattr(layers[name], "zeroed") else own.sigmoid())
            weights[name] = hard[name] + (soft - soft.detach())
        found: torch.Tensor = functional_call(plain, weights, (x,))
        return found

    return run


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own
@pytest.mark.parametrize("wish", ["popup", "supermask"])
def test_torch_func_gives_the_gradients_of_the_written_out_network(wish: str) -> None:
    model = masked(wish, train=False)
    slow, given, x = plain_function(model), scores_of(model), images()

    def fast(scores: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = functional_call(model, scores, (x,))
        return out

    def loss(run: Any) -> Any:
        return lambda scores, x: run(scores, x).square().sum()

    assert_close(grad(loss(fast))(given, x), grad(loss(slow))(given, x))
    each = vmap(grad(lambda s, one: loss(fast)(s, one[None])), in_dims=(None, 0))(given, x)
    twin = vmap(grad(lambda s, one: loss(slow)(s, one[None])), in_dims=(None, 0))(given, x)
    assert_close(each, twin)
    one = torch.autograd.functional.hessian(lambda y: loss(fast)(given, y), x[:1])
    torch.testing.assert_close(hessian(lambda y: loss(fast)(given, y))(x[:1]), one,
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    ours, theirs = (jacrev(lambda y, run=run: run(given, y))(x) for run in (fast, slow))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_stacked_scores_are_networks_side_by_side() -> None:
    model = masked(train=False)
    draw = torch.Generator().manual_seed(5)
    many = {n: torch.randn(3, *p.shape, generator=draw) for n, p in scores_of(model).items()}
    x = images()
    found = vmap(lambda scores: functional_call(model, scores, (x,)))(many)
    for index in range(3):
        own = {name: values[index] for name, values in many.items()}
        torch.testing.assert_close(found[index], functional_call(model, own, (x,)))
    assert_current(model)  # nothing of theirs stayed


@pytest.mark.parametrize("wish", ["popup", "supermask"])
def test_a_gradient_penalty_is_that_of_the_written_out_network(wish: str) -> None:
    model = masked(wish, train=False)
    slow, given = plain_function(model), scores_of(model)
    x = images().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    own = {name: value.clone().requires_grad_() for name, value in given.items()}
    (twin,) = torch.autograd.grad(slow(own, x).square().sum(), x, create_graph=True)
    wanted = torch.autograd.grad(twin.square().sum(), list(own.values()))
    assert_close(found, dict(zip(own, wanted, strict=True)))  # type: ignore[arg-type]


def test_a_gradient_of_the_scores_can_be_differentiated() -> None:
    model = masked()
    slow, given, x = plain_function(model), scores_of(model), images()

    def twice(run: Callable[..., torch.Tensor], own: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        first = torch.autograd.grad(run(own, x).square().sum(), list(own.values()),
                                    create_graph=True)  # fmt: skip
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), list(own.values())))

    own = [{name: value.clone().requires_grad_() for name, value in given.items()} for _ in "ab"]
    fast = twice(lambda scores, x: functional_call(model, scores, (x,)), own[0])
    for found, wanted in zip(fast, twice(slow, own[1]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_score_changed_between_the_passes_is_told_by_torch() -> None:
    model = masked()
    out = model(images()).sum()
    with torch.no_grad():
        parameters(model)[-1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_an_average_of_scores_is_masked_by_the_average() -> None:
    model = masked()
    average = torch.optim.swa_utils.AveragedModel(model)
    steps = []
    for turn in range(3):
        by_fused(model)
        average.update_parameters(model)
        steps.append([p.detach().clone() for p in parameters(model)])
        average.eval()(images())
        assert_current(average.module)
        if turn == 1:
            assert_current(model)
    for p, *seen in zip(parameters(average.module), *steps, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(seen).mean(0))
    assert harvest(average.module).keys() == harvest(model).keys()
    assert all(isinstance(layer, Scores) for layer in attached(average.module).values())
