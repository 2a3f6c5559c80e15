"""``inspect model``: what a header says of a network, against the network itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from format_helpers import raw_file
from inspect_helpers import fails, in_terminal, run, succeed
from surgery_helpers import CONV2, TABLE_1, attach, conv2, save_dense, write
from torch import nn

import randsurgery as rs
from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint, read_checkpoint
from randsurgery.format.recipe import Member
from randsurgery.format.specs import Calibration, DatasetSpec, InputSpec
from randsurgery.inspection.grouping import MOST, ROWS, natural, place
from randsurgery.inspection.model import inspect_model
from randsurgery.jobs.ensembles import learned_parameters
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import Freeze, count_layers, make_plan, with_plan
from randsurgery.surgery.recipes import make_recipe

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
NETS = sorted(
    path for path in GOLDEN.glob("*.safetensors")
    if path.name != "base.safetensors" and rs.read_recipe(path).model is not None
)  # fmt: skip

ARCHITECTURES = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_byobnet")


def own_layers(model: nn.Module) -> dict[str, int]:
    """Parameters by layer, from the network itself; a parameter of the whole is its own layer."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0] or name
        found[layer] = found.get(layer, 0) + parameter.numel()
    return found


# --- against the networks ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_and_parameters_are_the_networks(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "net.safetensors", make_recipe(name, seed=1, args={"num_classes": 4}))
    model = timm.create_model(name, num_classes=4)
    report = inspect_model(path)
    assert {r.name: r.parameters for r in report.layers() if r.parameters} == own_layers(model)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    held = sum(b.numel() for n, b in model.named_buffers() if n in model.state_dict())
    assert report.buffers == held
    assert report.learned == 0
    dense = save_dense(tmp_path / "dense.safetensors", model.state_dict())
    other = inspect_model(dense)
    assert [(r.name, r.parameters, r.shape) for r in other.layers()] == sorted(
        ((r.name, r.parameters, r.shape) for r in report.layers()), key=lambda r: place(r[0])
    )


@pytest.mark.parametrize("path", NETS, ids=lambda path: path.stem)
def test_learned_is_what_an_evaluation_counts(path: Path) -> None:
    """From the header alone, against the count that builds the network and reads the masks."""
    with read_checkpoint(path, need_bases=False) as checkpoint:
        for member in checkpoint.recipe.members:
            report = inspect_model(path, member.name)
            assert report.learned == learned_parameters(checkpoint, member)
            view = report.shown
            assert view is not None
            assert (view.learned, view.masked) == (report.learned, report.masked)


@pytest.mark.parametrize("wish", [Freeze(fraction="0.4"), Freeze(count=1, dim="in"), Freeze(
    only=("@norm",)), Freeze(fraction="0.3", linear="whole", statistics="frozen")])  # fmt: skip
def test_a_plans_layers_are_those_that_freeze_counts(wish: Freeze, tmp_path: Path) -> None:
    recipe = make_recipe("test_resnet", seed=1, args={"num_classes": 4})
    shell = meta_module(recipe)
    plan = make_plan(shell, wish)
    path = write(tmp_path / "plan.safetensors", with_plan(recipe, plan))
    counted = {row.layer: (row.learned, row.total) for row in count_layers(shell, plan)}
    found = {row.name: (row.learned, row.parameters) for row in inspect_model(path).layers()}
    assert found == counted
    assert "as planned" in succeed("inspect", "model", path)


def test_what_a_planned_paper_network_learns_is_the_papers_figure(tmp_path: Path) -> None:
    recipe = make_recipe("wrn_28_4", seed=0, args={"num_classes": 10})
    plan = make_plan(meta_module(recipe), Freeze(only=("@norm",)))
    path = write(tmp_path / "norms.safetensors", with_plan(recipe, plan))
    assert inspect_model(path).learned == TABLE_1["wrn_28_4"]["@norm"]


def test_overlays_are_counted_as_the_tensors_have_them() -> None:
    """Masks' ones, from the masks themselves."""
    path = GOLDEN / "popup.safetensors"
    with read_checkpoint(path) as checkpoint:
        for row in inspect_model(path).layers():
            if [o.kind for o in row.overlays] == ["mask"]:
                kept = np.count_nonzero(checkpoint.tensor(f"{row.name}.weight").array)
                assert (row.overlays[0].count, row.overlays[0].size) == (kept, row.parameters)
    kinds = {
        name: {o.kind for row in inspect_model(GOLDEN / f"{name}.safetensors").layers()
               for o in row.overlays}
        for name in ("popup", "survivors", "slices-out", "supermask")
    }  # fmt: skip
    assert kinds["popup"] == {"mask"}
    assert "scatter" in kinds["survivors"]
    assert "slice" in kinds["slices-out"]
    assert "mask" in kinds["supermask"]


def test_survivors_of_several_masks_are_not_guessed(tmp_path: Path) -> None:
    recipe = rs.read_recipe(GOLDEN / "survivors.safetensors").to_json()
    member = recipe["members"][0]
    member["tensors"] = {}
    name = next(
        n for n, part in member["plan"]["tensors"].items() if part.get("part") == "survivors"
    )
    zero, digest = {"kind": "constant", "value": "0x0.0p+0"}, "0" * 32
    mask = {"kind": "mask", "encoding": "bits", "count": 3, "digest": digest}
    recipe["tensors"][name] = {"dtype": "F32", "shape": [8], "source": zero,
                               "overlays": [mask, mask]}  # fmt: skip
    recipe["tensors"] = {name: recipe["tensors"][name]}
    member["plan"]["tensors"] = {name: {"part": "survivors"}}
    header: dict[str, Any] = {
        f"shared/{name}/{i}.mask": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        for i in range(2)
    }
    header["__metadata__"] = {"randsurgery": json.dumps(recipe)}
    path = tmp_path / "twice.safetensors"
    path.write_bytes(raw_file(header))
    assert inspect_model(path).learned is None
    shown = succeed("inspect", "model", path)
    assert "?" in shown
    assert "no header counts" in shown


# --- what is shown -------------------------------------------------------------------------------


def test_a_network_at_a_glance(tmp_path: Path) -> None:
    recipe = make_recipe("conv2", seed=0, args=CONV2)
    module = attach(build(recipe), Popup(k="0.5"))
    told = {
        "classes": tuple("0123456789"),
        "dataset": DatasetSpec(name="digits"),
        "calibration": Calibration(temperature=(1.5).hex(), dataset="digits", share="0.5"),
        "input": InputSpec(size=(32, 32), channels=3, mean=((0.5).hex(),) * 3,
                           std=((0.25).hex(), (0.5).hex(), (0.25).hex())),
        "provenance": {
            "command": "popup", "settings": {"k": "0.5", "amp": False, "learn": []},
            "metrics": {"test_accuracy": 0.125, "epoch": 3}, "versions": {"torch": "2.9"},
        },
    }  # fmt: skip
    member = recipe.recipe.member().model_copy(update=told)
    recipe = Checkpoint(recipe.recipe.with_member(member), recipe.payloads)
    path = write(tmp_path / "net.safetensors", harvest(recipe, module))
    shown = succeed("inspect", "model", path)
    for words in (
        "conv2(num_classes=10, width=0.1)", "10: 0, 1, 2", "fc, linear",
        "3x32x32, mean 0.5, std 0.25 0.5 0.25, bicubic, crop 1 center", "temperature   1.5",
        "digits (train, validation)", "popup with k=0.5\n", "test accuracy 0.1250 after epoch 3",
        "torch 2.9", "weights by a mask",
        "25x1536", "mask 50.0%", "random",
    ):  # fmt: skip
        assert words in shown
    found = json.loads(succeed("inspect", "model", path, "--json"))
    assert found["architecture"] == "conv2"
    assert found["arguments"] == {"num_classes": 10, "width": CONV2["width"]}
    assert found["members"][0]["classes"] == list("0123456789")
    assert found["members"][0]["provenance"]["command"] == "popup"
    assert found["learned"] == found["masked"] == found["parameters"]
    assert [row["name"] for row in found["layers"]][-1] == "fc"
    assert sum(row["parameters"] for row in found["layers"]) == found["parameters"]


def test_a_member_or_what_all_share() -> None:
    path = GOLDEN / "ensemble-tasks.safetensors"
    shown = succeed("inspect", "model", path)
    assert "what all members share" in shown
    assert "member pets" in shown
    assert "learned   source" not in shown
    found = json.loads(succeed("inspect", "model", path, "--json"))
    assert (found["member"], found["learned"]) == (None, None)
    assert {row["learned"] for row in found["layers"]} == {None}
    pets = succeed("inspect", "model", path, "--member", "pets")
    assert "pets, one of 2" in pets
    assert "3: cat, dög, fish" in pets
    assert "num_classes=3" in pets
    assert "near: pets" in fails(2, "inspect", "model", path, "--member", "pet")
    with pytest.raises(UsageError, match="no members"):
        inspect_model(GOLDEN / "base.safetensors", "main")


def test_blocks_by_depth_add_up(tmp_path: Path) -> None:
    recipe = make_recipe("test_resnet", seed=1, args={"num_classes": 4})
    plan = make_plan(meta_module(recipe), Freeze(fraction="0.4"))
    path = write(tmp_path / "plan.safetensors", with_plan(recipe, plan))
    report = inspect_model(path)
    whole = report.layers()
    for depth in (1, 2, 3, 50):
        rows = report.layers(depth)
        assert sum(row.layers for row in rows) == len(whole)
        for row in rows:
            inner = [x for x in whole if ".".join(x.name.split(".")[:depth]) == row.name]
            assert row.parameters == sum(x.parameters for x in inner)
            assert row.learned == sum(x.learned or 0 for x in inner)
            assert row.tensors == sum(x.tensors for x in inner)
            assert set(row.sources) == {kind for x in inner for kind in x.sources} or row.buffers
    assert [row.name for row in report.layers(50)] == [row.name for row in whole]
    found = json.loads(succeed("inspect", "model", path, "--json", "--depth", "1"))
    assert [row["name"] for row in found["layers"]] == [row.name for row in report.layers(1)]
    assert found["depth"] == 1
    assert run("inspect", "model", path, "--depth", "-1").exit_code == 2


def dense(path: Path, names: list[str]) -> Path:
    return save_dense(path, {name: torch.ones(2, 3) for name in names})


@pytest.mark.parametrize(
    ("names", "depth", "rows"),
    [
        ([f"l{i}.w" for i in range(ROWS)], 0, ROWS),  # all fit
        ([f"s{i % 6}.b{i // 6}.c{i}.w" for i in range(54)], 2, 54),  # 6 rows would be few
        ([f"s{i % 6}.b{i // 6}.c{i}.w" for i in range(66)], 1, 6),  # 66 would be too many
        ([f"s{i % 8}.b{i // 8}.w" for i in range(80)], 1, 8),
        ([f"m.b{i // 6}.l{i % 6}.w" for i in range(300)], 2, 50),  # a long row of equal blocks
        ([f"m.b{i}.l.w" for i in range(MOST + 1)], 1, 1),
        ([f"flat{i}" for i in range(300)], 0, 300),  # no blocks to speak of
    ],
)
def test_300_layers_stay_readable(tmp_path: Path, names: list[str], depth: int, rows: int) -> None:
    report = inspect_model(dense(tmp_path / "net.safetensors", names))
    found = report.fitting_depth()
    assert found == depth
    assert len(report.layers(found)) == rows


def test_numbers_in_names_count_as_numbers() -> None:
    names = ["b.10.w", "b.2.w", "b.1.w", "a", "b.2.1", "10", "9", "x" + "9" * 5000, "²"]
    ordered = sorted(names, key=natural)
    assert ordered[:2] == ["9", "10"] or ordered.index("9") < ordered.index("10")
    assert [n for n in ordered if n.endswith(".w")] == ["b.1.w", "b.2.w", "b.10.w"]


def test_a_table_of_300_layers_fits_80_columns(tmp_path: Path) -> None:
    names = [f"stages.{i // 60}.blocks.{i % 60 // 4}.attention{i % 4}.w" for i in range(300)]
    path = dense(tmp_path / "net.safetensors", names)
    shown = in_terminal("inspect", "model", path, "--depth", "9")
    assert len(shown.splitlines()) > 300
    assert max(map(len, shown.splitlines())) <= 80
    brief = succeed("inspect", "model", path)
    assert len(brief.splitlines()) < 100
    assert "--depth" in brief


# --- what a file says is not believed ------------------------------------------------------------

EVIL = "[red]\x1b[31m\u202e\x07$x$ "


def test_no_text_of_a_file_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    recipe = conv2().recipe.to_json()
    recipe["model"] = {"name": EVIL, "args": {EVIL: EVIL}}
    recipe["bases"] = {EVIL: {"identity": "0" * 32, "origin": EVIL}}
    recipe["members"] = [{
        "classes": [EVIL] * 10, "dataset": {"name": EVIL}, "head": {"name": EVIL, "classes": 10},
        "provenance": {
            "command": EVIL * 100, "settings": {"k": EVIL, "seed": [EVIL], "lr": {EVIL: 1}},
            "metrics": {"test_accuracy": EVIL, "test_loss": 1.5, "epoch": EVIL},
            "versions": {EVIL: EVIL, "x": [EVIL] * 9},
        },
    }]  # fmt: skip
    path = tmp_path / "evil.safetensors"
    several = {**recipe, "members": [{**recipe["members"][0], "name": n} for n in ("a", "b")]}
    for made, more in ((recipe, ()), (several, ()), (several, ("--member", "b"))):
        path.write_bytes(raw_file({"__metadata__": {"randsurgery": json.dumps(made)}}))
        for shown in (succeed("inspect", "model", path, *more),
                      in_terminal("inspect", "model", path, *more)):  # fmt: skip
            assert not set(shown) & set("\x1b\u202e\x07")
            assert "[red]\\x1b[31m\\u202e\\x07$x$" in shown
        assert "\x1b" not in succeed("inspect", "model", path, *more, "--json")
        assert max(map(len, in_terminal("inspect", "model", path, *more).splitlines())) <= 80


@pytest.mark.parametrize("provenance", [{"command": 3}, {"settings": 3, "metrics": [1],
    "versions": "x"}, {"metrics": {"test_accuracy": True}}, {"deep": [[[{}]]]}])  # fmt: skip
def test_provenance_may_hold_anything(tmp_path: Path, provenance: dict[str, Any]) -> None:
    recipe = conv2()
    member = recipe.recipe.member().model_copy(update={"provenance": provenance})
    path = write(tmp_path / "a.safetensors", type(recipe)(recipe.recipe.with_member(member),
                                                          recipe.payloads))  # fmt: skip
    succeed("inspect", "model", path)
    found = json.loads(succeed("inspect", "model", path, "--json"))
    assert found["members"][0]["provenance"] == provenance


def test_a_network_without_layers_is_said(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    path.write_bytes(raw_file({}))
    assert "no layers: the file holds no tensors" in succeed("inspect", "model", path)
    assert json.loads(succeed("inspect", "model", path, "--json"))["layers"] == []
    members = [{"name": name} for name in ("a", "b")]
    for told, words in ((members[:1], "no layers"), (members, "share no tensors")):
        recipe = {"format": "randsurgery", "version": 1, "members": told}
        path.write_bytes(raw_file({"__metadata__": {"randsurgery": json.dumps(recipe)}}))
        assert words in succeed("inspect", "model", path)


def test_tensors_without_elements_and_without_dimensions(tmp_path: Path) -> None:
    state = {"a.w": torch.ones(0, 3), "b": torch.tensor(1.0), "c.running_mean": torch.ones(4)}
    path = save_dense(tmp_path / "odd.safetensors", state)
    report = inspect_model(path)
    assert [(r.name, r.parameters, r.buffers, r.shape) for r in report.layers()] == [
        ("a", 0, 0, (0, 3)), ("b", 1, 0, ()), ("c", 0, 4, (4,))
    ]  # fmt: skip
    shown = succeed("inspect", "model", path)
    assert "0x3" in shown
    assert "scalar" in shown


def test_a_slice_beyond_its_tensor_breaks_nothing(tmp_path: Path) -> None:
    digest = "0" * 32
    source = {"kind": "constant", "value": "0x0.0p+0"}
    cut = {"kind": "slice", "dim": 7, "count": 3, "digest": digest}
    entry = {"dtype": "F32", "shape": [2], "source": source, "overlays": [cut]}
    recipe = {"format": "randsurgery", "version": 1, "tensors": {"a.w": entry}, "members": [{}]}
    info = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "cut.safetensors"
    path.write_bytes(raw_file({"__metadata__": {"randsurgery": json.dumps(recipe)},
                               "shared/a.w/0.slice": info}))  # fmt: skip
    assert "slice 0.0%" in succeed("inspect", "model", path)
    assert Member(name="main").name in succeed("inspect", "model", path, "--json")


def test_an_architecture_is_shown_as_init_would_write_it(tmp_path: Path) -> None:
    path = tmp_path / "init.safetensors"
    succeed("init", "conv2", "--width", "0.1", "-o", path)
    file = json.loads(succeed("inspect", "model", path, "--json"))
    name = json.loads(succeed("inspect", "model", "conv2", "--width", "0.1", "--json"))
    for key in ("layers", "parameters", "architecture", "arguments", "learned"):
        assert name[key] == file[key], key
    assert name["kind"] == "architecture"
    text = succeed("inspect", "model", "conv2", "--width", "0.1")
    assert text.splitlines()[0].startswith("architecture  conv2(width=0.1")
    assert "near: resnet18" in fails(2, "inspect", "model", "resnet181")
    assert "model arguments go with" in fails(2, "inspect", "model", path, "--width", "0.1")
    assert "randsurgery init conv2" in fails(3, "inspect", "storage", "conv2")


def test_what_torch_saved_is_known_by_its_content(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(2, 3), "c": torch.zeros(2, dtype=torch.complex64)}
    for name in ("net.pth", "net", "net.model"):
        torch.save(state, tmp_path / name)
        report = json.loads(succeed("inspect", "model", tmp_path / name, "--json"))
        assert (report["kind"], report["parameters"]) == ("torch.save", 6)
        told = run("inspect", "storage", tmp_path / name).stderr
        assert "c: left out (complex64)" in told
    save_dense(tmp_path / "net.bin", {"a.weight": torch.zeros(2, 3)})
    report = json.loads(succeed("inspect", "model", tmp_path / "net.bin", "--json"))
    assert report["kind"] == "safetensors"
    (tmp_path / "text").write_text("neither of them")
    assert "not a safetensors file" in fails(3, "inspect", "model", tmp_path / "text")


def test_model_arguments_may_look_like_numbers(tmp_path: Path) -> None:
    recipe = make_recipe("conv2", seed=1, args={"width": 0.1}).recipe
    assert recipe.model is not None
    args = {**recipe.model.args, "far": "0x1.0p+99999"}
    model = recipe.model.model_copy(update={"args": args})
    report = inspect_model("x", recipe=recipe.model_copy(update={"model": model}))
    assert report.arguments["width"] == 0.1
    assert report.arguments["far"] == "0x1.0p+99999"
