"""An ensemble as people treat modules: copied, pickled, moved, a part of another, and no state of
one member taken for all."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from ensemble_helpers import learned
from surgery_helpers import everything, save_dense
from torch import nn

import randsurgery as rs
from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.members import graft
from randsurgery.format.writing import write_checkpoint
from randsurgery.surgery.bases import read_base
from randsurgery.surgery.ensembles import Ensemble
from randsurgery.surgery.recipes import make_recipe_on_base

ARGS = {"width": 0.1, "num_classes": 5}


def packed(path: Path, start: Checkpoint, module: Any = None) -> Path:
    """Members of two kinds on one network."""
    parts = [
        learned(start, rs.Popup("0.5"), "mask", 1, **({"model": module()} if module else {})),
        learned(start, rs.Freeze(fraction="0.4", least=1), "slice", 2,
                **({"model": module()} if module else {})),
    ]  # fmt: skip
    write_checkpoint(path, graft(*parts), finished=True)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "two.safetensors"
    return packed(path, rs.make_recipe("conv2", "kaiming-normal", seed=9, args=ARGS))


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def pickled(ensemble: Ensemble) -> Any:
    memory = io.BytesIO()
    torch.save(ensemble, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES = [copy.deepcopy, pickled]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("engine", ["switch", "held", "batched", "auto"])
def test_a_copy_needs_no_file_and_goes_its_own_way(
    make: Any, engine: Any, file: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(file.read_bytes())
    with rs.load_ensemble(own, engine=engine) as ensemble:
        expected = ensemble(images())
        again = make(ensemble)
        again.member("slice")
        with torch.no_grad():
            next(again.backbone.parameters()).fill_(7)
        assert ensemble.resident.model is ensemble.backbone
        torch.testing.assert_close(ensemble(images()), expected)
        again = make(ensemble)
    own.unlink()
    assert again.resident.model is again.backbone
    assert again.members == ("mask", "slice")
    torch.testing.assert_close(again(images()), expected, atol=1e-6, rtol=0)
    for name in again.members:
        state = again.member(name).state_dict()
        wanted = rs.load(file, member=name).state_dict()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    again.close()


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_takes_what_it_needs_of_a_base_along(make: Any, tmp_path: Path) -> None:
    args = {"width": 0.1, "num_classes": 5}
    dense = rs.build(rs.make_recipe("conv2", "kaiming-normal", seed=3, args=args)).state_dict()
    base = save_dense(tmp_path / "base.safetensors", dense)
    start = make_recipe_on_base("conv2", read_base(base), args=args)
    path = packed(tmp_path / "two.safetensors", start)
    start.close()
    with rs.load_ensemble(path, engine="switch") as ensemble:
        expected, again = ensemble(images()), make(ensemble)
    base.unlink()
    path.unlink()
    assert torch.equal(again(images()), expected)
    assert torch.equal(copy.deepcopy(again)(images()), expected)


def test_a_copy_of_an_ensemble_of_the_users_own_module(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.safetensors", rs.make_recipe(everything(), seed=3), everything)
    with rs.load_ensemble(path, model=everything(), engine="held") as ensemble:
        assert torch.equal(copy.deepcopy(ensemble)(images(8)), ensemble(images(8)))


def test_a_closed_ensemble_cannot_be_copied(file: Path) -> None:
    ensemble = rs.load_ensemble(file)
    ensemble.close()
    for make in COPIES:
        with pytest.raises(UsageError, match="was closed, so it cannot be copied"):
            make(ensemble)


def test_there_is_no_state_of_one_member_for_all(file: Path) -> None:
    with rs.load_ensemble(file) as ensemble:
        holder = nn.Sequential(nn.Identity(), ensemble)
        for refused in (ensemble.state_dict, holder.state_dict):
            with pytest.raises(UsageError, match=r"one member of 2; keep its file"):
                refused()
        state = ensemble.member("mask").state_dict()
        whole = {f"1.backbone.{name}": tensor for name, tensor in state.items()}
        before = ensemble(images())
        for load in (
            lambda: ensemble.load_state_dict(state),
            lambda: ensemble.load_state_dict({f"backbone.{n}": t for n, t in state.items()}),
            lambda: holder.load_state_dict(whole),
            lambda: holder.load_state_dict(whole, strict=False),
        ):
            with pytest.raises(UsageError, match=r"takes no state dict; load_ensemble\(FILE\)"):
                load()
        torch.testing.assert_close(ensemble(images()), before)


@pytest.mark.parametrize("engine", ["switch", "held", "batched"])
def test_it_moves_with_the_module_it_is_a_part_of(engine: Any, file: Path) -> None:
    with rs.load_ensemble(file, engine=engine) as ensemble:
        before = ensemble(images())
        nn.Sequential(ensemble).double()
        found = ensemble(images().double())
        torch.testing.assert_close(found.float(), before, atol=1e-6, rtol=0)
        nn.Sequential(ensemble).float()
        assert torch.equal(ensemble(images()), before)


def test_held_members_are_not_rebuilt(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        rs.load_ensemble(file, engine="held") as ensemble,
        rs.load_ensemble(file, engine="switch") as slow,
    ):
        first = ensemble(images())

        def refused(*_: Any) -> Any:
            raise AssertionError("rebuilt")

        expected = slow(images())
        monkeypatch.setattr(Checkpoint, "rebuild", refused)
        assert torch.equal(ensemble(images()), first)
    assert torch.equal(first, expected)
