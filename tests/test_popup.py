"""edge-popup on any nn.Module: what is scored, what moves, and what is read off."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import timm
import torch
from surgery_helpers import (
    MASKED,
    Everything,
    attach,
    bits,
    everything,
    logits,
    same_bits,
    train_steps,
)
from torch import nn
from torch.nn.utils import parametrizations

from randsurgery.errors import DivergedError, IncompatibleError, UsageError
from randsurgery.format.generator import generate
from randsurgery.surgery import popup_scores
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.roles import select_modules
from randsurgery.surgery.scores import attached, flipped_share, harvest


def kept(model: nn.Module) -> dict[str, int]:
    return {name: mask.count for name, mask in harvest(model).items()}


def requiring(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- what is scored ------------------------------------------------------------------------------


def test_every_convolution_and_linear_weight_is_scored_and_only_scores_are_learned() -> None:
    model = attach(everything(), Popup(k="0.5"))
    assert sorted(attached(model)) == sorted(MASKED)
    assert len(requiring(model)) == len(MASKED)
    assert all(name.endswith(".scores") for name in requiring(model))


def test_all_torch_convolutions_are_scored() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Conv3d(2, 3, 3), nn.ConvTranspose2d(2, 3, 3), nn.Embedding(4, 5)
    )
    assert tuple(attached(attach(model, Popup(k=1)))) == ("0.weight", "1.weight", "2.weight")


def test_a_module_that_is_itself_a_layer_is_scored() -> None:
    layer = attach(nn.Linear(6, 5), Popup(k="0.5"))
    assert kept(layer) == {"weight": 15}


@pytest.mark.parametrize(
    ("k", "size", "zeroed"),
    [("0.9", 150, 15), (0.9, 150, 15), ("0.3", 10, 7), (0.3, 10, 7), ("0.7", 10, 3), ("1", 9, 0),
     ("0.1", 9, 8), ("1/3", 9, 6), ("0.29", 100, 71), ("0.001", 10, 9), (Fraction(1, 9), 9, 8)],
)  # fmt: skip
def test_counts_are_exact(k: str | float | Fraction, size: int, zeroed: int) -> None:
    model = attach(nn.Linear(size, 1, bias=False), Popup(k=k))
    assert kept(model) == {"weight": size - zeroed}
    assert int((model.weight == 0).sum()) == zeroed


def test_scores_start_uniform_by_fan_in_from_our_generator() -> None:
    model = attach(everything(), Popup(k="0.5", seed=9))
    fans = {
        "stem.weight": 27, "grouped.weight": 18, "attention.in_proj_weight": 8,
        "attention.out_proj.weight": 8, "hidden.weight": 8, "head.weight": 30,
    }  # fmt: skip
    for name, layer in attached(model).items():
        bound = float(np.float32(fans[name] ** -0.5))
        expected = generate(
            "uniform", layer.scores.numel(), bound, seed=9, stream=name, role="score"
        )
        assert np.array_equal(layer.scores.detach().numpy().reshape(-1), expected), name


# --- the step ------------------------------------------------------------------------------------


class Abs(torch.autograd.Function):
    """The paper's h(|s|): one where |s| is among the highest, its gradient that of the identity."""

    @staticmethod
    def forward(ctx: object, magnitude: torch.Tensor, zeroed: int) -> torch.Tensor:
        out = torch.ones(magnitude.numel())
        out[magnitude.flatten().sort(stable=True).indices[:zeroed]] = 0
        return out.view(magnitude.shape)

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def test_the_gradient_is_the_papers() -> None:
    """weight * h(|score|), straight through h only: the gradient carries sign(score)."""
    model = attach(nn.Conv2d(3, 8, 3, padding=1), Popup(k="0.3"))
    layer = attached(model)["weight"]
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model(images).square().sum().backward()

    scores = layer.scores.detach().clone().requires_grad_()
    weight = model.parametrizations.weight.original.detach()
    masked = weight * Abs.apply(scores.abs(), layer.zeroed)
    assert same_bits(model.weight.detach(), masked.detach() + 0.0)
    nn.functional.conv2d(images, masked, model.bias, padding=1).square().sum().backward()
    torch.testing.assert_close(layer.scores.grad, scores.grad, rtol=1e-6, atol=1e-6)
    assert bool((scores.grad != 0).all())  # weights that are zeroed learn, too


@pytest.mark.parametrize("shape", [(7,), (3, 5), (8, 3, 3, 3), (1 << 17, 2)])
def test_the_blockwise_gradient_equals_the_formula(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    gradient, weight, scores = (torch.randn(shape, generator=draw) for _ in range(3))
    scores.view(-1)[::5] = 0.0
    if len(shape) == 4:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
    found = popup_scores.score_gradient(gradient, weight, scores)
    assert torch.equal(found, gradient * weight * scores.sign())


def test_two_forwards_and_two_backwards_add_up() -> None:
    model = attach(nn.Linear(9, 4), Popup(k="0.5"))
    scores = attached(model)["weight"].scores
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 9, generator=draw), torch.randn(3, 9, generator=draw)
    (model(first).sum() + model(second).sum()).backward()
    together, scores.grad = scores.grad, None
    model(first).sum().backward()
    model(second).sum().backward()
    torch.testing.assert_close(scores.grad, together)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensor name of each selection made."""
    found: list[str] = []
    whole = popup_scores.select

    def counted(scores: object, weight: object, zeroed: int, bracket: object, name: str) -> object:
        found.append(name)
        return whole(scores, weight, zeroed, bracket, name)  # type: ignore[arg-type]

    monkeypatch.setattr(popup_scores, "select", counted)
    return found


class Twice(nn.Linear):
    """Reads its weight twice a forward, as norm-free networks and attention do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + nn.functional.linear(x, self.weight)


def test_a_weight_read_twice_by_its_layer_is_masked_once_a_forward(calls: list[str]) -> None:
    layer = Twice(6, 6, bias=False)
    attach(layer, Popup(k="0.5"))
    calls.clear()
    images = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    layer(images).sum().backward()
    assert calls == ["weight"]
    scores = attached(layer)["weight"].scores
    gradient = scores.grad.clone()
    weight = layer.parametrizations.weight.original
    twin = scores.detach().clone().requires_grad_()
    masked = weight * Abs.apply(twin.abs(), 18)
    (images @ masked + images @ masked.T).sum().backward()
    assert torch.equal(layer.weight.detach(), masked.detach())
    torch.testing.assert_close(gradient, twin.grad)


def test_each_forward_computes_each_mask_once(calls: list[str]) -> None:
    model = attach(everything(), Popup(k="0.5")).train()
    images = torch.zeros(2, 3, 8, 8)
    for _ in range(3):
        calls.clear()
        model(images)
        assert sorted(calls) == sorted(MASKED)
    model.eval()
    calls.clear()
    for _ in range(3):
        model(images)
    assert sorted(calls) == sorted(MASKED)  # in evaluation once in all


def test_the_mask_follows_an_optimiser_step_and_data_edits() -> None:
    model = attach(nn.Linear(10, 10), Popup(k="0.5"))
    images = torch.eye(10)
    layer = attached(model)["weight"]

    def is_current() -> bool:
        mask = torch.from_numpy(layer.mask().unpack().reshape(10, 10))
        shown = model(images) - model.bias
        return torch.equal(shown != 0, mask.T)

    assert is_current()
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD([layer.scores], lr=100.0)
    (
        model(images) * torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)  # read without a forward, too
    assert is_current()
    layer.scores.data = layer.scores.data.flip(0)
    assert is_current()
    layer.scores.data.neg_().add_(1)  # torch counts no version here
    assert is_current()
    with torch.no_grad():
        layer.scores.zero_()
    assert is_current()


def test_evaluation_without_gradients_does_not_leave_a_mask_that_cannot_be_learned() -> None:
    model = attach(everything(), Popup(k="0.5"))
    images = torch.zeros(2, 3, 8, 8)
    with torch.inference_mode():
        model.eval()(images)
    with torch.no_grad():
        model(images)
    model(images).sum().backward()
    assert all(layer.scores.grad is not None for layer in attached(model).values())


def test_a_nan_score_names_its_tensor_in_the_forward_pass() -> None:
    model = attach(everything(), Popup(k="0.5"))
    with torch.no_grad():
        attached(model)["hidden.weight"].scores[3, 3] = float("nan")
    with pytest.raises(DivergedError, match=r"hidden\.weight"):
        model(torch.zeros(2, 3, 8, 8))


# --- what moves ----------------------------------------------------------------------------------


def test_frozen_weights_and_norms_do_not_move_by_one_bit() -> None:
    model = attach(everything(), Popup(k="0.5"))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    train_steps(model, 3)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(bits(t), bits(before[n]))}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    scores = {name for name in before if name.endswith(".scores")}
    assert moved == scores | statistics


def test_learned_layers_move_beside_the_mask() -> None:
    model = attach(everything(), Popup(k="0.5", learn=("@norm", "@head")))
    learned = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    scores = {name for name in requiring(model) if name.endswith(".scores")}
    assert requiring(model) - scores == learned
    assert "head.weight" not in attached(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_steps(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in learned | scores), name


# --- patterns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "skipped"),
    [
        (("stem",), {"stem.weight"}),
        (("@head",), {"head.weight"}),
        (("head", "hid*"), {"head.weight", "hidden.weight"}),
        (("fc",), {"head.weight"}),  # nothing bears the name, so it is the role
        (("attention",), {"attention.in_proj_weight", "attention.out_proj.weight"}),
        (("*.out_proj",), {"attention.out_proj.weight"}),
        (("@norm",), set()),
    ],
)
def test_skipped_layers_are_left_dense_and_frozen(
    patterns: tuple[str, ...], skipped: set[str]
) -> None:
    model = attach(everything(), Popup(k="0.5", skip=patterns))
    assert set(MASKED) - set(attached(model)) == skipped
    assert all(name.endswith(".scores") for name in requiring(model))


def test_a_pattern_that_matches_nothing_is_an_error_with_near_names() -> None:
    model = everything()
    with pytest.raises(UsageError, match=r"'hiden' matches no layer.*near: hidden"):
        attach(model, Popup(k="0.5", skip=("hiden",)))
    with pytest.raises(UsageError, match=r"near: @norm"):
        attach(model, Popup(k="0.5", learn=("@nrm",)))
    assert not attached(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_plain_name_is_the_module_where_one_bears_it() -> None:
    model = everything()
    assert select_modules(model, ("norm",)) == {"norm"}
    named = nn.Sequential()
    named.add_module("norm", nn.Linear(2, 2))
    named.add_module("real", nn.LayerNorm(2))
    assert select_modules(named, ("norm",)) == {"norm"}
    assert select_modules(named, ("@norm",)) == {"real"}


@pytest.mark.parametrize(
    "name",
    ["inception_v3", "levit_128s", "cs3darknet_m", "convnextv2_atto", "regnety_002",
     "swin_tiny_patch4_window7_224", "efficientnet_b0", "test_nfnet", "caformer_s18", "hgnet_tiny"],
)  # fmt: skip
def test_norm_is_norms_alone_and_all_of_them(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    modules = dict(model.named_modules())
    plain = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    wanted = {n for n, m in modules.items() if isinstance(m, plain)}
    if not wanted:
        with pytest.raises(UsageError, match="has no normalisation layer"):
            select_modules(model, ("@norm",))
        return
    found = select_modules(model, ("@norm",))
    assert wanted <= found
    assert not [n for n in found if isinstance(modules[n], (nn.Conv2d, nn.Linear))]
    assert not [n for n in found if any(p.dim() > 1 for p in modules[n].parameters(recurse=False))]


def test_roles_match_timms_norms_and_classifier() -> None:
    model = timm.create_model("test_convnext", num_classes=5)
    norms = select_modules(model, ("@norm",))
    assert "stem.1" in norms
    assert "head.norm" in norms
    assert select_modules(model, ("@head",)) == {"head.fc"}


def test_nothing_left_to_mask_is_an_error() -> None:
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        attach(nn.BatchNorm2d(3), Popup(k="0.5"))
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        attach(everything(), Popup(k="0.5", skip=("*",)))


@pytest.mark.parametrize(
    "wrong", [{"mask": "some"}, {"skip": "fc"}, {"learn": (1,)}, {"seed": -1}, {"seed": "7"}]
)
def test_wrong_settings_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Popup(k="0.5", **wrong)


@pytest.mark.parametrize("k", ["0", "1.5", "-0.3", "nan", "inf", "", "30%", 0, 2, "1e-999999999"])
def test_k_outside_its_range_is_an_error_and_touches_nothing(k: str | float) -> None:
    model = everything()
    with pytest.raises(UsageError, match=r"k must"):
        attach(model, Popup(k=k))
    assert all(p.requires_grad for p in model.parameters())


# --- the random baseline -------------------------------------------------------------------------


def test_the_random_mask_is_exact_fixed_and_follows_its_seed() -> None:
    masks = {}
    for seed in (0, 0, 1):
        model = attach(everything(), Popup(k="0.3", seed=seed, mask="random"))
        assert not requiring(model)
        found = harvest(model)
        assert kept(model) == {
            name: mask.size - int(Fraction(7, 10) * mask.size) for name, mask in found.items()
        }
        packed = {name: mask.packed.tobytes() for name, mask in found.items()}
        assert packed == masks.setdefault(seed, packed)
    assert all(masks[0][name] != masks[1][name] for name in MASKED)
    learned = harvest(attach(everything(), Popup(k="0.3", seed=0)))
    assert all(learned[name].packed.tobytes() != masks[0][name] for name in MASKED)


def test_the_random_baseline_may_learn_norms() -> None:
    model = attach(everything(), Popup(k="0.3", mask="random", learn=("@norm",)))
    before = harvest(model)
    assert requiring(model) == {"norm.weight", "norm.bias"}
    train_steps(model)
    after = harvest(model)
    assert flipped_share(before, after) == 0


# --- other modules -------------------------------------------------------------------------------


def test_a_deep_copy_learns_on_its_own() -> None:
    model = attach(everything(), Popup(k="0.5"))
    model.eval()(torch.zeros(2, 3, 8, 8))  # with a mask that is kept
    twin = copy.deepcopy(model)
    before = {name: layer.scores.detach().clone() for name, layer in attached(model).items()}
    train_steps(twin)
    assert all(torch.equal(attached(model)[n].scores, before[n]) for n in before)
    assert not all(torch.equal(attached(twin)[n].scores, before[n]) for n in before)
    assert flipped_share(harvest(model), harvest(twin)) > 0


def test_scores_can_be_attached_once() -> None:
    model = attach(everything(), Popup(k="0.5"))
    with pytest.raises(UsageError, match="already"):
        attach(model, Popup(k="0.5"))


def test_weight_standardised_convolutions_are_refused_and_may_be_skipped() -> None:
    model = timm.create_model("test_nfnet", num_classes=5)
    with pytest.raises(IncompatibleError, match="standardises its weight") as caught:
        attach(model, Popup(k="0.5"))
    assert caught.value.exit_code == 4
    assert all(p.requires_grad for p in model.parameters())
    names = [n for n, m in model.named_modules() if type(m).__name__.startswith("Scaled")]
    attach(model, Popup(k="0.5", skip=tuple(names)))
    assert "head.fc.weight" in attached(model)


def test_other_parametrizations_are_refused() -> None:
    model = everything()
    parametrizations.weight_norm(model.hidden)
    with pytest.raises(IncompatibleError, match=r"hidden\.weight.*parametri"):
        attach(model, Popup(k="0.5"))
    assert not attached(model)
    attach(model, Popup(k="0.5", skip=("hidden",)))
    assert "hidden.weight" not in attached(model)


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.relu(self.first(x))))


def test_a_shared_layer_has_one_mask_under_all_its_names() -> None:
    model = attach(Shared(), Popup(k="0.5"))
    found = harvest(model)
    assert sorted(found) == ["first.weight", "head.weight", "second.weight"]
    assert found["first.weight"].packed.tobytes() == found["second.weight"].packed.tobytes()


def test_scores_on_a_part_are_named_by_their_place_in_the_whole() -> None:
    model = everything()
    attach(model.attention, Popup(k="0.5"))
    assert sorted(attached(model)) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert sorted(harvest(model)) == sorted(attached(model))


def test_channels_last_weights_are_masked_alike() -> None:
    plain = attach(everything(), Popup(k="0.3"))
    last = attach(everything().to(memory_format=torch.channels_last), Popup(k="0.3"))
    for name, mask in harvest(plain).items():
        assert mask.packed.tobytes() == harvest(last)[name].packed.tobytes(), name
    train_steps(last)
    torch.testing.assert_close(logits(plain, 8), logits(attach(everything(), Popup(k="0.3")), 8))


def test_flipped_share_counts_bits() -> None:
    model = attach(nn.Linear(10, 10, bias=False), Popup(k="0.5"))
    before = harvest(model)
    with torch.no_grad():
        scores = attached(model)["weight"].scores.view(-1)
        scores.copy_(torch.arange(100.0))
    first = harvest(model)
    with torch.no_grad():
        scores[0], scores[99] = 1000.0, 0.0
    assert flipped_share(first, first) == 0
    assert flipped_share(first, harvest(model)) == pytest.approx(0.02)
    assert 0 < flipped_share(before, first) < 1


def test_infinite_scores_are_not_harvested() -> None:
    model = attach(Everything(), Popup(k="0.5"))
    with torch.no_grad():
        attached(model)["head.weight"].scores[0, 0] = float("inf")
    with pytest.raises(IncompatibleError, match=r"head\.weight.*finite"):
        harvest(model)
