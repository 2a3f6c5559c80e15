"""``inspect verify``: one file, several, whole folders, and the networks they name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from inspect_helpers import fails, run, succeed
from surgery_helpers import conv2, save_dense, write

import randsurgery as rs
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import Container
from randsurgery.inspection.verify import find_files, verify_file

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files of ours, one deep below, one of others, and a text."""
    top = tmp_path / "nets"
    deep = top / "b" / "c"
    deep.mkdir(parents=True)
    shutil.copy(GOLDEN / "popup.safetensors", top / "popup.safetensors")
    shutil.copy(GOLDEN / "ensemble-masks.safetensors", deep / "masks.safetensors")
    save_dense(top / "b" / "dense.safetensors", {"w": torch.ones(3)})
    (top / "notes.txt").write_text("nothing")
    return top


def damage(path: Path) -> None:
    with Container(path) as file:
        at = file.header_bytes
    data = bytearray(path.read_bytes())
    data[at + 2] ^= 1
    path.write_bytes(data)


def test_a_folder_is_verified_a_line_a_file(folder: Path) -> None:
    lines = succeed("inspect", "verify", folder).splitlines()
    alone = len(verify_file(GOLDEN / "popup.safetensors").checks)
    assert lines == [
        f"{folder}/b/c/masks.safetensors: 36 digests agree",
        f"{folder}/b/dense.safetensors: skipped, not a file of randsurgery",
        f"{folder}/popup.safetensors: {alone} digests agree",
        "3 files: 2 verified, 0 failed, 1 skipped",
    ]
    found = json.loads(succeed("inspect", "verify", folder, "--json"))
    assert found["ok"] is True
    assert [file["ok"] for file in found["files"]] == [True] * 3
    assert [file.get("skipped") for file in found["files"]] == [
        None, "not a file of randsurgery", None
    ]  # fmt: skip


def test_one_that_fails_stops_no_other_and_ends_with_3(folder: Path) -> None:
    damage(folder / "b" / "c" / "masks.safetensors")
    (folder / "cut.safetensors").write_bytes(b"\x07")
    os.symlink(folder / "nowhere", folder / "link.safetensors")
    result = run("inspect", "verify", folder)
    assert result.exit_code == 3
    assert "masks.safetensors: FAILED" in result.stdout
    assert "corrupt" in result.stdout
    assert "cut.safetensors: FAILED, cut.safetensors: not a safetensors file" in result.stdout
    assert "link.safetensors: FAILED" in result.stdout
    assert "popup.safetensors: 16 digests agree" in result.stdout
    assert result.stdout.splitlines()[-1] == "5 files: 1 verified, 3 failed, 1 skipped"
    result = run("inspect", "verify", folder, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert sum(not file["ok"] for file in found["files"]) == 3


def test_several_files_and_folders_each_once(folder: Path) -> None:
    popup = folder / "popup.safetensors"
    shown = succeed("inspect", "verify", popup, folder, GOLDEN / "plan.safetensors")
    assert shown.count("popup.safetensors") == 1
    assert shown.splitlines()[-1] == "4 files: 3 verified, 0 failed, 1 skipped"
    assert [found.named for found in find_files([popup, folder])] == [True, False, False]


def test_a_foreign_file_that_was_named_is_no_success(folder: Path) -> None:
    dense = folder / "b" / "dense.safetensors"
    assert "not one of randsurgery" in fails(3, "inspect", "verify", dense)
    result = run("inspect", "verify", dense, folder / "popup.safetensors")
    assert result.exit_code == 3
    assert "dense.safetensors: FAILED" in result.stdout


def test_a_folder_without_files_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no .safetensors file" in fails(2, "inspect", "verify", tmp_path / "empty")
    os.mkfifo(tmp_path / "empty" / "pipe.safetensors")  # reading it would wait for ever
    assert "no .safetensors file" in fails(2, "inspect", "verify", tmp_path / "empty")


def test_bases_beside_the_files_and_given(tmp_path: Path) -> None:
    for name in ("base", "on-base", "on-base-popup", "popup"):
        shutil.copy(GOLDEN / f"{name}.safetensors", tmp_path)
    assert "4 files: 3 verified, 0 failed, 1 skipped" in succeed("inspect", "verify", tmp_path)
    elsewhere = tmp_path.parent / "elsewhere.safetensors"
    (tmp_path / "base.safetensors").rename(elsewhere)
    result = run("inspect", "verify", tmp_path)
    assert result.exit_code == 3
    assert result.stdout.count("FAILED") == 2
    assert "--base FILE" in result.stdout
    succeed("inspect", "verify", tmp_path, "--base", elsewhere)


def test_a_name_reaches_the_terminal_escaped(tmp_path: Path) -> None:
    path = tmp_path / "[red]\x1b[31m.safetensors"
    shutil.copy(GOLDEN / "popup.safetensors", path)
    (tmp_path / "\x1b[0m.safetensors").write_bytes(b"")
    result = run("inspect", "verify", tmp_path)
    assert "\x1b" not in result.output
    assert "[red]\\x1b[31m.safetensors: 16 digests agree" in result.stdout


# --- the network ---------------------------------------------------------------------------------


def test_an_architecture_that_fits_is_a_check_a_member() -> None:
    path = GOLDEN / "ensemble-tasks.safetensors"
    plain, built = verify_file(path), verify_file(path, architecture=True)
    assert built.ok
    assert plain.networks is None
    assert built.checks == plain.checks
    assert built.networks is not None
    assert [check.what for check in built.networks] == ["digits: conv2", "pets: conv2"]
    shown = succeed("inspect", "verify", path, "--architecture")
    assert shown == "ensemble-tasks.safetensors: 25 digests agree, 2 networks fit\n"
    assert (
        json.loads(succeed("inspect", "verify", path, "--architecture", "--json"))["networks"] == 2
    )


def test_an_architecture_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Every digest agrees, and yet the network cannot be loaded."""
    recipe = conv2()
    for update, words in (
        ({"name": "test_vit", "args": {}}, "test_vit"),
        ({"name": "no_such_net", "args": {}}, "unknown architecture"),
        ({"name": "conv2", "args": {"width": (0.2).hex(), "num_classes": 10}}, "in the file"),
        ({"name": "conv2", "args": {"depth": "\x1b[31m"}}, "depth"),
    ):
        assert recipe.recipe.model is not None
        model = recipe.recipe.model.model_copy(update=update)
        path = tmp_path / "net.safetensors"
        path.unlink(missing_ok=True)
        write(path, Checkpoint(recipe.recipe.model_copy(update={"model": model}), recipe.payloads))
        assert run("inspect", "verify", path).exit_code == 0
        result = run("inspect", "verify", path, "--architecture")
        assert result.exit_code == 3
        assert words in result.stdout
        assert "\x1b" not in result.output
        with pytest.raises(rs.RandsurgeryError):
            rs.load(path)
        among = run("inspect", "verify", tmp_path, "--architecture")
        assert among.exit_code == 3
        assert words in among.stdout


def test_a_file_that_names_no_architecture_has_none_to_check() -> None:
    path = GOLDEN / "sources.safetensors"
    result = run("inspect", "verify", path, "--architecture")
    assert result.exit_code == 0
    assert "names no architecture" in result.output
    assert verify_file(path, architecture=True).networks == ()


def test_a_folder_with_nothing_of_ours_is_not_sound(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense.safetensors", {"a": torch.zeros(2)})
    result = run("inspect", "verify", tmp_path)
    assert result.exit_code == 2
    assert "nothing to verify: none of 1 file" in result.stderr
    assert "skipped" in result.stdout


def test_a_corrupt_payload_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = bytearray((GOLDEN / "popup.safetensors").read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run("inspect", "verify", path)
    assert result.exit_code == 3
    assert result.stdout.count("is corrupt") == 1
    assert "2 of" in result.stdout
