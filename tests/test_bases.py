"""Files that build on dense weights: what may not be written over, and what of a base is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from ensemble_helpers import fails, one_thread, run, said, succeed
from surgery_helpers import assert_same_state, save_dense

import randsurgery as rs
from randsurgery.format.shards import read_behind

pytestmark = pytest.mark.slow

SHORT = ("--epochs", 1, "-b", 256)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def dense(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = timm.create_model("test_resnet", num_classes=10).state_dict()
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def built(base: str) -> None:
    """A network n.safetensors on that base, and an ensemble of two of it."""
    if base.endswith(".pth"):
        torch.save(dense(), base)
    elif base.endswith(".safetensors"):
        save_dense(Path(base), dense())
    else:
        Path(base).mkdir()
        save_dense(Path(base, "model.safetensors"), dense())
    succeed("init", "test_resnet", "--checkpoint", base, "-o", "n.safetensors")
    succeed("ensemble", "build", "n.safetensors", "n.safetensors", "--name", "a", "--name", "b",
            "-o", "e.safetensors")  # fmt: skip


WRITERS = {
    "freeze": ("freeze", "n.safetensors", "--fraction", "0.5", "-o"),
    "train": ("train", "n.safetensors", *SHORT, "-o"),
    "popup": ("popup", "n.safetensors", *SHORT, "-o"),
    "export": ("export", "n.safetensors", "-o"),
    "self-contained": ("export", "n.safetensors", "--self-contained", "-o"),
    "ensemble": ("ensemble", "build", "n.safetensors", "--members", 2, "--kind", "fc", *SHORT,
                 "-o"),
    "pack": ("ensemble", "build", "e.safetensors", "n.safetensors", "--name", "a", "--name", "b",
             "--name", "c", "-o"),
    "add": ("ensemble", "add", "e.safetensors", "n.safetensors", "-o"),
    "remove": ("ensemble", "remove", "e.safetensors", "a", "-o"),
    "extract": ("ensemble", "extract", "e.safetensors", "a", "-o"),
    "convert": ("convert", "t.pth", "--arch", "test_resnet", "--base", "base.safetensors", "-o"),
    "masks": ("init", "test_resnet", "--num-classes", 10, "--mask-from", "p.safetensors", "-o"),
    "weights": ("inspect", "weights", "n.safetensors", "--csv"),
    "predict": ("predict", "n.safetensors", "-o"),
    "per class": ("eval", "n.safetensors", "--confusion"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITERS)
def test_a_base_is_never_written_over(what: str) -> None:
    built("base.safetensors")
    torch.save(dense(), "t.pth")
    if what == "masks":
        succeed("popup", "n.safetensors", *SHORT, "-o", "p.safetensors")
    if what == "per class":  # pictures and tables alone
        Path("base.csv").write_bytes(Path("base.safetensors").read_bytes())
        assert (
            "is read by this command" not in run(*WRITERS[what], "base.csv", "--force").stderr
        )  # no base of it
        return
    told = fails(6, *WRITERS[what], "base.safetensors", "--force")
    assert "is read by this command" in told
    assert said("eval", "n.safetensors")["images"] == 360


@pytest.mark.parametrize("base", ["base.pth", "folder"])
def test_bases_of_other_kinds_are_never_written_over(base: str) -> None:
    built(base)
    target = base if base.endswith(".pth") else f"{base}/model.safetensors"
    assert Path(target) in {path.relative_to(Path.cwd()) if path.is_absolute() else path
                            for path in read_behind("n.safetensors")}  # fmt: skip
    assert "is read by this command" in fails(
        6, "predict", "n.safetensors", "-o", target, "--force"
    )


def test_a_file_is_not_called_as_its_base() -> None:
    built("base.safetensors")
    Path("away").mkdir()
    for command in (("freeze", "n.safetensors", "--fraction", "0.5"), ("train", "n.safetensors"),
                    ("ensemble", "extract", "e.safetensors", "a")):  # fmt: skip
        told = fails(6, *command, "-o", "away/base.safetensors")
        assert "is the name of the base that the file builds on" in told


def test_export_writes_safetensors_under_no_other_name() -> None:
    built("base.safetensors")
    assert "must end in .safetensors" in fails(2, "export", "n.safetensors", "-o", "x.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "bfloat16"])
def test_a_base_of_which_nothing_is_left_is_not_needed(dtype: torch.dtype) -> None:
    torch.save(dense(dtype), "d.pth")
    done = succeed("train", "test_resnet", "--checkpoint", "d.pth", *SHORT, "-o", "t.safetensors")
    assert "builds on" not in done.stderr
    assert "with its base" not in done.stdout
    before = said("eval", "t.safetensors")
    state = rs.load("t.safetensors").state_dict()
    succeed("train", "test_resnet", "--checkpoint", "d.pth", *SHORT, "--seed", 1,
            "-o", "u.safetensors")  # fmt: skip
    succeed("ensemble", "build", "t.safetensors", "u.safetensors", "-o", "e.safetensors")
    Path("away").mkdir()
    for name in ("t", "e"):
        Path(f"{name}.safetensors").rename(f"away/{name}.safetensors")
    assert {**said("eval", "away/t.safetensors"), "file": ""} == {**before, "file": ""}
    assert_same_state(rs.load("away/t.safetensors").state_dict(), state)
    for command in (("inspect", "verify"), ("export",), ("predict",), ("inspect", "weights"),
                    ("inspect", "storage"), ("inspect", "model")):  # fmt: skip
        succeed(*command, "away/t.safetensors")
    succeed("inspect", "verify", "away/e.safetensors")
    assert said("ensemble", "eval", "away/e.safetensors")["split"] == "test"
    # what is to change it needs what it was made on
    assert "pass --base" in fails(4, "train", "away/t.safetensors", *SHORT)
    assert "pass --base" in fails(4, "ensemble", "extract", "away/e.safetensors", "t")
    Path("t.safetensors").write_bytes(Path("away/t.safetensors").read_bytes())
    succeed("train", "t.safetensors", *SHORT, "-o", "v.safetensors")


def test_a_base_of_which_something_is_left_is_needed() -> None:
    torch.save(dense(), "d.pth")
    done = succeed("popup", "test_resnet", "--checkpoint", "d.pth", *SHORT, "-o", "p.safetensors")
    assert "builds on d.pth" in done.stderr
    Path("away").mkdir()
    Path("p.safetensors").rename("away/p.safetensors")
    for command in (("eval",), ("inspect", "verify")):
        assert "pass --base FILE" in fails(4, *command, "away/p.safetensors")
