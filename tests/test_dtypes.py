"""Dense checkpoints in any dtype as bases: networks compute in float32, files refer to the base as
it is, and nothing that was learned is rounded away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ensemble_helpers import one_thread, run, said, succeed
from surgery_helpers import bits, save_dense

import randsurgery as rs
from randsurgery.format.recipe import BaseSource
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.modules import build, harvest

pytestmark = pytest.mark.slow

ARCH = "test_resnet"
ON_BASE = (ARCH, "--num-classes", 10, "--checkpoint", "d.safetensors")
SHORT = ("--epochs", 1, "-b", 256)
DTYPES = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "mixed": None}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def dense(name: str, path: str = "d.safetensors", seed: int = 0) -> dict[str, torch.Tensor]:
    """A network of timm's in a dtype; "mixed": norms in single, all else in half precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = timm.create_model(ARCH, num_classes=10).state_dict()
    for key, tensor in state.items():
        if tensor.is_floating_point() and not (name == "mixed" and "bn" in key):
            state[key] = tensor.to(DTYPES[name] or torch.float16)
    save_dense(Path(path), state)
    return state


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("name", DTYPES)
def test_a_file_refers_to_the_base_as_it_is(name: str) -> None:
    state = dense(name)
    succeed("init", *ON_BASE, "-o", "i.safetensors")
    recipe = rs.read_recipe("i.safetensors")
    assert all(isinstance(entry.source, BaseSource) for entry in recipe.tensors.values())
    assert_equal(rs.load("i.safetensors", dtype=None).state_dict(), state)
    module = rs.load("i.safetensors")
    for key, tensor in module.state_dict().items():
        expected = state[key].float() if state[key].is_floating_point() else state[key]
        assert torch.equal(bits(tensor), bits(expected)), key
    # what was computed with, and not learned, is not stored
    with open_checkpoint("i.safetensors") as made:
        kept = harvest(made, build(made))
        assert not kept.recipe.members[0].tensors
    succeed("export", "i.safetensors", "-o", "e.safetensors")
    from safetensors.torch import load_file

    assert_equal(load_file("e.safetensors"), state)
    succeed("export", "i.safetensors", "--format", "timm", "-o", "folder")
    assert_equal(load_file("folder/model.safetensors"), state)


@pytest.mark.parametrize("name", DTYPES)
def test_every_command_computes_with_it(name: str) -> None:
    dense(name)
    succeed("init", *ON_BASE, "-o", "i.safetensors")
    plain = said("eval", "i.safetensors")
    twin = rs.load("i.safetensors")
    assert plain["images"] == 360
    assert said("eval", "i.safetensors", "--amp")["images"] == 360
    assert next(twin.parameters()).dtype == torch.float32
    for command in (("popup", *ON_BASE, "--k", "0.5"), ("train", *ON_BASE),
                    ("popup", *ON_BASE, "--algorithm", "supermask", "--rescale")):  # fmt: skip
        succeed(*command, *SHORT, "-o", "t.safetensors", "--force")
        recorded = rs.read_recipe("t.safetensors").members[0].provenance["metrics"]
        found = said("eval", "t.safetensors")
        assert found["accuracy"] == recorded["test_accuracy"]
        assert found["loss"] == pytest.approx(recorded["test_loss"], rel=1e-6)
        succeed("inspect", "verify", "t.safetensors")
    succeed("freeze", *ON_BASE, "--fraction", "0.4", "-o", "f.safetensors")
    succeed("train", "f.safetensors", *SHORT, "-o", "s.safetensors")
    recorded = rs.read_recipe("s.safetensors").members[0].provenance["metrics"]
    assert said("eval", "s.safetensors")["accuracy"] == recorded["test_accuracy"]
    succeed("ensemble", "build", *ON_BASE, "--members", 2, "--kind", "share", "--share", "0.9",
            *SHORT, "-o", "m.safetensors")  # fmt: skip
    for engine in ("switch", "batched"):
        assert said("ensemble", "eval", "m.safetensors", "--engine", engine)["split"] == "test"


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_masks_over_a_half_base_cost_their_bits(name: str) -> None:
    state = dense(name)
    succeed("popup", *ON_BASE, *SHORT, "-o", "p.safetensors")
    module, exact = rs.load("p.safetensors"), rs.load("p.safetensors", dtype=None)
    masked = 0
    for key, tensor in exact.state_dict().items():
        if key.endswith("weight") and tensor.dim() > 1:
            masked += 1
            alive = tensor != 0
            assert tensor.dtype == state[key].dtype
            assert torch.equal(bits(tensor[alive]), bits(state[key][alive]))
            assert torch.equal(module.state_dict()[key], tensor.float())
    assert masked
    size = Path("p.safetensors").stat().st_size
    assert size < Path("d.safetensors").stat().st_size / 4


def test_what_is_learned_is_not_rounded() -> None:
    dense("half")
    succeed("train", *ON_BASE, *SHORT, "-o", "t.safetensors")
    exact = rs.load("t.safetensors", dtype=None).state_dict()
    weight = exact["fc.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.half().float())


def test_a_base_is_named_counted_and_placed() -> None:
    dense("half")
    result = succeed("init", *ON_BASE, "-o", "i.safetensors")
    assert "1.04x as large with its base of 759." in result.stdout
    assert "i.safetensors builds on d.safetensors, which lies beside it" in result.stderr
    Path("sub").mkdir()
    result = succeed("init", *ON_BASE, "-o", "sub/i.safetensors")
    assert "smaller beside its base" in result.stdout
    assert "must lie beside it, or be given as --base" in result.stderr
    assert (
        "builds on d.safetensors"
        in succeed("freeze", *ON_BASE, "--fraction", "0.1", "-o", "f.safetensors").stderr
    )
    assert run("eval", "sub/i.safetensors").exit_code == 4
    assert said("eval", "sub/i.safetensors", "--base", "d.safetensors")["images"] == 360


FAMILIES = (
    "resnet18", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0", "mobilenetv3_small_050",
    "regnetx_002", "densenet121",
)  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_families_keep_the_bases_bits(arch: str, dtype: torch.dtype) -> None:
    args: dict[str, Any] = {"num_classes": 5}
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model(arch, **args).state_dict()
    state = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    save_dense(Path("d.safetensors"), state)
    succeed(
        "init", arch, "--num-classes", 5, "--checkpoint", "d.safetensors", "-o", "i.safetensors"
    )
    succeed("export", "i.safetensors", "-o", "e.safetensors")
    from safetensors.torch import load_file

    assert_equal(load_file("e.safetensors"), state)
