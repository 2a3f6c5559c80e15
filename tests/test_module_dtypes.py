"""Modules that were cast: a file keeps its own dtypes, and cast to the module's it has its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import everything, same_bits, save_dense, train_steps
from torch import nn

import randsurgery as rs
from randsurgery.surgery.bases import read_base
from randsurgery.surgery.modules import plain_state
from randsurgery.surgery.recipes import make_recipe_on_base
from randsurgery.surgery.scores import attached, harvest

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
METHODS: dict[str, Any] = {
    "popup": rs.Popup(k="0.5"), "learned norms": rs.Popup(k="0.5", learn=("@norm",)),
    "supermask": rs.Supermask(), "sampled": rs.Supermask(final="sample"),
    "slices": rs.Freeze(fraction="0.4"), "in": rs.Freeze(fraction="0.4", dim="in"),
    "kernels": rs.Freeze(count=1, dim="height", linear="whole", only=("stem", "grouped")),
    "everything": None,
}  # fmt: skip


def start(method: str) -> tuple[rs.Checkpoint, nn.Module]:
    recipe = rs.make_recipe(everything(), seed=7)
    what = METHODS[method]
    if isinstance(what, rs.Freeze):
        recipe = rs.freeze(recipe, what, model=everything())
    model = rs.build(recipe, model=everything())
    known = isinstance(what, (rs.Popup, rs.Supermask))
    return recipe, rs.attach(model, what if known else recipe)


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the module computes with, by plain name."""
    state = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    for name in attached(model):
        place, _, leaf = name.rpartition(".")
        state[name] = getattr(model.get_submodule(place), leaf).detach()
    return state


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", ["not", "before", "before and after"])
def test_the_file_cast_to_the_modules_dtype_is_the_module(
    method: str, dtype: torch.dtype, trained: str, tmp_path: Path
) -> None:
    recipe, model = start(method)
    with torch.random.fork_rng(devices=[]):
        if trained != "not":
            train_steps(model)
    kept = bool(attached(model))
    plain = rs.save(tmp_path / "before.safetensors", recipe, model.eval(), scores=kept)
    model.to(dtype)
    if trained == "before and after":
        for p in model.parameters():
            if p.requires_grad:  # as a step in that dtype would; what double can say and single not
                p.data.mul_(1.5) if dtype != torch.float64 else p.data.mul_(2)
    path = tmp_path / "a.safetensors"
    size = rs.save(path, recipe, model.eval(), scores=kept)
    again = rs.load(path, model=everything())
    assert all(t.dtype in (torch.float32, torch.int64) for t in again.state_dict().values())
    found, wanted = again.to(dtype).state_dict(), values(model)
    assert found.keys() == wanted.keys()
    for name in found:
        assert same_bits(found[name], wanted[name]), name
    if trained == "not":  # nothing learned, nothing stored but masks and scores
        assert abs(size - plain) < 100


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_chosen_in_the_modules_dtype_and_scores_kept_to_the_bit(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    recipe, model = start("popup")
    model.to(dtype).eval()
    rs.save(tmp_path / "a.safetensors", recipe, model, scores=True)
    file = rs.read_checkpoint(tmp_path / "a.safetensors")
    for name, layer in attached(model).items():
        order = layer.scores.detach().double().abs().flatten().sort(stable=True).indices
        keep = torch.ones(layer.scores.numel(), dtype=torch.bool)
        keep[order[: layer.zeroed]] = False  # type: ignore[misc, index]
        assert torch.equal(torch.from_numpy(harvest(model)[name].unpack()), keep)
        stored = torch.from_numpy(file.scores(name).copy())
        assert same_bits(stored.to(dtype), layer.scores.detach())


def test_an_untrained_module_stores_no_weight_whatever_its_dtype(tmp_path: Path) -> None:
    sizes = []
    for dtype in (torch.float32, *DTYPES):
        recipe, model = start("everything")
        sizes.append(rs.save(tmp_path / f"{dtype}.safetensors", recipe, model.to(dtype)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("what", ["weights", "scores"])
def test_double_values_that_would_be_rounded_are_refused(what: str, tmp_path: Path) -> None:
    recipe, model = start("popup" if what == "scores" else "slices")
    model.double()
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1 + 2**-40)
    with pytest.raises(rs.IncompatibleError, match=r"F64.*round.*call \.float\(\)") as caught:
        rs.save(tmp_path / "a.safetensors", recipe, model, scores=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    rs.save(tmp_path / "a.safetensors", recipe, model.float(), scores=what == "scores")


def test_a_rescaled_mask_in_another_dtype_is_refused(tmp_path: Path) -> None:
    recipe = rs.make_recipe(everything(), seed=7)
    model = rs.attach(rs.build(recipe, model=everything()), rs.Supermask(rescale=True))
    with pytest.raises(rs.IncompatibleError, match=r"rescaled.*BF16.*call \.float\(\)"):
        rs.save(tmp_path / "a.safetensors", recipe, model.to(torch.bfloat16))


@pytest.mark.parametrize("method", ["popup", "slices"])
def test_a_half_precision_recipe_trained_in_single_precision_loses_nothing(
    method: str, tmp_path: Path
) -> None:
    """The other way round: what is learned beside a half-precision network is stored whole."""
    recipe = rs.make_recipe(everything().half(), "kaiming-normal", seed=7)
    model = rs.build(recipe, model=everything().half()).float()
    if method == "popup":
        rs.attach(model, rs.Popup("0.5", learn=("@norm",)))
    else:
        recipe = rs.freeze(recipe, rs.Freeze(fraction="0.4"), model=everything())
        rs.attach(model, recipe)
    train_steps(model)
    done = rs.harvest(recipe, model.eval())
    whole = values(model)
    for name in done.recipe.tensor_names(done.member()):
        raw = done.tensor(name)
        found = torch.from_numpy(raw.array.copy())
        assert same_bits(found.to(whole[name].dtype), whole[name]), name
    own = done.member().tensors
    assert (own["hidden.weight"].entry is None) == (method == "popup")


def test_a_base_in_its_own_dtype_is_referred_to(tmp_path: Path) -> None:
    base = save_dense(tmp_path / "base.safetensors", rs.build(
        rs.make_recipe("test_resnet", "kaiming-normal", seed=2, args={"num_classes": 5})
    ).state_dict())  # fmt: skip
    recipe = make_recipe_on_base("test_resnet", read_base(base), args={"num_classes": 5})
    model = rs.build(recipe).to(torch.bfloat16)
    done = rs.harvest(recipe, model)
    assert not done.member().tensors
    recipe.close()
