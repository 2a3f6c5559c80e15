"""Dense checkpoints as people have them: every layout of docs/checkpoints.md, and what fails."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_helpers as files
import pytest
import torch
from checkpoint_helpers import ARCH, LAYOUTS, dense
from safetensors.torch import save_file
from surgery_helpers import assert_same_state
from torch import nn
from torch.nn.utils import parametrizations
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.jobs.init import open_init
from randsurgery.jobs.sources import SourceSpec, open_source, resolve_source
from randsurgery.surgery.checkpoints import plain_names

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def succeed(*command: object) -> tuple[str, str]:
    """What a command writes to stdout and stderr."""
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, (command, result.output, result.exception)
    return result.stdout, result.stderr


def fail(code: int, *command: object) -> str:
    """The one line of a command that fails."""
    before = sorted(Path().rglob("*"))
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == code, (command, result.output, result.exception)
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert result.stderr.splitlines()[-1] == error[0]
    assert sorted(Path().rglob("*")) == before, "something was written"
    return error[0]


def init(path: object, *more: object) -> str:
    """``init`` on a checkpoint; what it notes."""
    return succeed("init", ARCH, "--checkpoint", path, "-o", "i.safetensors", "--force", *more)[1]


def refused(code: int, path: object, *more: object) -> str:
    """The line with which ``init`` refuses a checkpoint."""
    return fail(code, "init", ARCH, "--checkpoint", path, "-o", "refused.safetensors", *more)


def rows(title: str) -> list[list[str]]:
    """The table below a title of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    found = [line.strip("|\n ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return found[2:]


def test_the_page_has_a_row_for_every_layout() -> None:
    assert [row[0] for row in rows("What is read")] == list(LAYOUTS)


# --- what is read ---------------------------------------------------------------------------------


def expected_of(layout: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that a layout's file stands for."""
    state = dict(model.state_dict())
    if "num_batches" in layout:
        zero = torch.tensor(0)
        state = {n: zero if n.endswith("tracked") else t for n, t in state.items()}
    if "prune" in layout:  # ours have no negative zero
        state = {n: t + 0.0 if t.is_floating_point() else t for n, t in state.items()}
    return state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_a_base_and_is_converted(layout: str, here: Path) -> None:
    model = dense()
    path = LAYOUTS[layout](here, model)
    expected = expected_of(layout, model)
    init(path)
    assert_same_state(rs.load("i.safetensors").state_dict(), expected)  # found beside the file
    succeed("convert", path, "--arch", ARCH, "-o", "c.safetensors")
    assert_same_state(rs.load("c.safetensors").state_dict(), expected)
    stored = json.loads(succeed("inspect", "storage", path, "--json")[0])
    assert stored["dense_bytes"] >= sum(t.nbytes for t in expected.values() if t.ndim)


@pytest.mark.parametrize(
    "layout",
    [
        "timm's train.py, `model_best.pth.tar`",
        "`model.safetensors.index.json`",
        "`pytorch_model.bin.index.json`",
        "a folder with `model.safetensors`",
        "torch.nn.utils.prune: `weight_orig`, `weight_mask`",
    ],
)
def test_other_commands_read_the_same(layout: str, here: Path) -> None:
    model = dense()
    path = LAYOUTS[layout](here, model)
    expected = expected_of(layout, model)
    init(path)
    assert_same_state(rs.load("i.safetensors", base=path).state_dict(), expected)
    succeed("inspect", "verify", "i.safetensors")
    succeed("inspect", "verify", "i.safetensors", "--base", path)
    succeed("freeze", ARCH, "--checkpoint", path, "--only", "@head", "-o", "f.safetensors")
    assert_same_state(rs.load("f.safetensors").state_dict(), expected)
    succeed("convert", path, "--arch", ARCH, "--base", path, "-o", "b.safetensors")
    assert_same_state(rs.load("b.safetensors").state_dict(), expected)
    assert Path("b.safetensors").stat().st_size < 200_000
    succeed("inspect", "weights", path, "i.safetensors")
    succeed("inspect", "model", path)
    succeed("popup", ARCH, "--checkpoint", path, "--dry-run")


def test_the_classes_are_the_checkpoints_unless_others_are_asked_for(here: Path) -> None:
    files.plain(here, dense(classes=7))
    init("model.pth")
    assert rs.load("i.safetensors").state_dict()["fc.weight"].shape[0] == 7
    notes = init("model.pth", "--num-classes", "5")
    assert "fc.weight is [7, " in notes
    assert "drawn anew" in notes


def test_a_base_elsewhere_is_given_and_a_missing_one_is_named(here: Path) -> None:
    for layout in ("`model.safetensors.index.json`", "a folder with `pytorch_model.bin`"):
        path = LAYOUTS[layout](here, dense())
        init(path)
        place = here / "elsewhere"
        place.mkdir()
        for one in [path] if path.is_dir() else list(here.glob("model*")):
            shutil.move(one, place)
        message = fail(4, "inspect", "verify", "i.safetensors")
        assert f"put {path.name} beside the file or pass --base" in message
        succeed("inspect", "verify", "i.safetensors", "--base", place / path.name)
        shutil.rmtree(place)


def test_an_ensemble_is_packed_of_files_of_every_sort(here: Path) -> None:
    base, first, second = dense(), dense(), dense()
    for model, value in ((first, 1.0), (second, 2.0)):
        model.state_dict()["conv1.0.weight"][0].fill_(value)
    files.folder_of(files.safetensors, "model.safetensors")(here, base)
    (here / "a").mkdir()
    one, two = files.timm_train(here / "a", first), files.sharded_bin(here, second)
    build = ("ensemble", "build", one, two, "--base", "hf", "--arch", ARCH, "--name", "one",
             "--name", "two", "-o", "e.safetensors")  # fmt: skip
    succeed(*build)
    for name, model in (("one", first), ("two", second)):
        assert_same_state(rs.load("e.safetensors", member=name).state_dict(), model.state_dict())


# --- averaged weights -----------------------------------------------------------------------------


def test_averaged_weights_are_taken_if_asked_for_alone(here: Path) -> None:
    model, average = dense(), dense(1)
    path = files.timm_train(here, model, ema=average)
    notes = init(path)
    assert "averaged weights lie beside the others (state_dict_ema); --ema takes them" in notes
    assert_same_state(rs.load("i.safetensors").state_dict(), model.state_dict())
    notes = init(path, "--ema")
    assert "the averaged weights are taken (state_dict_ema), not state_dict" in notes
    # later commands find in the file what it was made on
    assert_same_state(rs.load("i.safetensors").state_dict(), average.state_dict())
    assert_same_state(rs.load("i.safetensors", base=path).state_dict(), average.state_dict())
    succeed("inspect", "verify", "i.safetensors")
    convert = ("convert", path, "--arch", ARCH, "-o", "c.safetensors")
    succeed(*convert, "--ema")
    assert_same_state(rs.load("c.safetensors").state_dict(), average.state_dict())
    plain, ema = (
        succeed("inspect", "weights", path, "--json", *more)[0] for more in ((), ("--ema",))
    )
    assert plain != ema


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_alone_are_not_taken_without_a_word(key: str, here: Path) -> None:
    torch.save({key: dense().state_dict()}, "average.pth")
    assert f"averaged weights alone ({key}); pass --ema" in refused(2, "average.pth")
    init("average.pth", "--ema")
    assert_same_state(rs.load("i.safetensors").state_dict(), dense().state_dict())


@pytest.mark.parametrize("layout", ["safetensors", "`model`", "`pytorch_model.bin.index.json`"])
def test_ema_without_an_average_is_refused(layout: str, here: Path) -> None:
    path = LAYOUTS[layout](here, dense())
    assert "holds no averaged weights" in refused(2, path, "--ema")
    assert "goes with --checkpoint" in fail(2, "init", ARCH, "--ema")


def test_two_state_dicts_are_not_chosen_from(here: Path) -> None:
    state = dense().state_dict()
    torch.save({"model": state, "net": state}, "two.pth")
    assert "several state dicts, 'model' and 'net'" in refused(3, "two.pth")
    torch.save({"student": state, "teacher": state}, "two.pth")
    assert "several state dicts, 'student' and 'teacher'" in refused(3, "two.pth")
    torch.save({"model": state, "discriminator": {"weight": torch.ones(2)}}, "two.pth")
    assert "'model' is taken; beside it discriminator, not read" in init("two.pth")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        ({"module.a", "module.b"}, {"a", "b"}),
        ({"model.module.net.a", "model.module.net.b"}, {"a", "b"}),
        ({"module.a", "b"}, {"module.a", "b"}),  # not all
        ({"model.a", "model.c"}, {"model.a", "model.c"}),  # which the architecture has so
        ({"n_averaged", "module.a"}, {"a"}),
        ({"a", "b", "total_ops"}, {"a", "b"}),
        ({"a._orig_mod.w", "b"}, {"a.w", "b"}),
        ({"x.a", "x.b"}, {"x.a", "x.b"}),
    ],
)
def test_prefixes_go_where_the_architecture_knows_more_names_without(
    names: set[str], plain: set[str]
) -> None:
    known = {"a", "b", "a.w", "model.a", "model.c"}
    found = plain_names(names, known.__contains__)
    assert set(found.own) == plain
    assert set(found.own.values()) | set(found.left_out) == names


def test_what_was_taken_away_and_left_out_is_said(here: Path) -> None:
    assert "taken away before the names: model." in (notes := init(files.lightning(here, dense())))
    assert "left out, no part of the network: criterion.weight" in notes
    notes = init(files.without_counts(here, dense()))
    assert re.search(
        r"\d+ counts of batches \(num_batches_tracked\) are missing; they are 0", notes
    )


def test_what_does_not_fit_is_told_both_ways(here: Path) -> None:
    state = dense().state_dict()
    whole = dict(state)
    renamed = {n.replace("bn1", "norm1"): t for n, t in state.items()}
    torch.save(renamed, "x.pth")
    message = refused(4, "x.pth")
    assert re.search(
        r"'layer1\.0\.norm1\.bias' is not one of test_resnet, nor are \d+ others", message
    )
    assert "it lacks 'bn1.bias' and" in message or "it lacks 'layer1.0.bn1.bias' and" in message
    assert "near: layer1.0.bn1.bias" in message
    inner = {f"model.{n}": t for n, t in state.items()}
    torch.save({**inner, "classifier.weight": torch.ones(2)}, "x.pth")
    message = refused(4, "x.pth")
    assert "'classifier.weight' is not one of test_resnet" in message
    assert "all but 1 of its names fit without 'model.'" in message
    del state["bn1.weight"]
    torch.save(state, "x.pth")
    assert "lacks 'bn1.weight' of test_resnet" in refused(4, "x.pth")
    whole["bn1.weight"] = torch.ones(3)
    torch.save(whole, "x.pth")
    assert "'bn1.weight' is [3], test_resnet needs" in refused(4, "x.pth")
    torch.save({"arch": "resnet18", "state_dict": {"layer9.weight": torch.ones(3)}}, "x.pth")
    assert "the checkpoint says it is of resnet18" in refused(4, "x.pth")
    message = fail(2, "convert", "x.pth", "-o", "c.safetensors")
    assert "--arch is missing" in message
    assert "resnet18" in message


# --- pruned and parametrized ----------------------------------------------------------------------


def test_pruned_tensors_are_the_base_under_a_mask(here: Path) -> None:
    path = files.pruned(here, dense())
    assert "pruned by torch.nn.utils.prune: 2 of the tensors" in init(path)
    recipe = rs.read_recipe("i.safetensors")
    for name in files.PRUNED:
        entry = recipe.tensors[f"{name}.weight"]
        assert (entry.source.kind, [o.kind for o in entry.overlays]) == ("base", ["mask"])
        assert entry.source.tensor == f"{name}.weight_orig"  # type: ignore[union-attr]
    succeed("convert", path, "--arch", ARCH, "-o", "c.safetensors")
    recipe = rs.read_recipe("c.safetensors")
    assert [o.kind for o in recipe.tensors["fc.weight"].overlays] == ["scatter"]
    # later masks are within the first
    with open_source(resolve_source(SourceSpec(ARCH, checkpoint=str(path)))) as source:
        model = rs.attach(rs.build(source), rs.Popup(k="0.5"))
        state = {name: raw.array for name, raw in rs.harvest(source, model).tensors().items()}
    dropped = (torch.load(path)["conv1.0.weight_mask"] == 0).numpy()
    assert dropped.any()
    assert not state["conv1.0.weight"][dropped].any()


def test_a_mask_that_is_none_is_refused(here: Path) -> None:
    path = files.pruned(here, dense())
    state = torch.load(path)
    state["fc.weight_mask"][0, 0] = 0.5
    torch.save(state, path)
    assert "'fc.weight_mask' is no mask, expected 0 and 1" in refused(4, path)
    assert "is no mask" in fail(4, "convert", path, "--arch", ARCH, "-o", "c.safetensors")


OLD_NORMS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "weight_norm": (torch.nn.utils.weight_norm, "remove_weight_norm"),
    "spectral_norm": (torch.nn.utils.spectral_norm, "remove_spectral_norm"),
    "new weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "new spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "orthogonal": (parametrizations.orthogonal, "remove_parametrizations"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("what", OLD_NORMS)
def test_computed_weights_are_refused_with_the_remedy(what: str, here: Path) -> None:
    model = dense()
    wrap, remedy = OLD_NORMS[what]
    wrap(model.get_submodule("fc"))
    torch.save(model.state_dict(), "normed.pth")
    assert remedy in refused(4, "normed.pth")
    assert remedy in fail(4, "convert", "normed.pth", "--arch", ARCH, "-o", "c.safetensors")


# --- folders and parts ----------------------------------------------------------------------------


def test_a_folder_is_a_source_by_timms_config(here: Path) -> None:
    files.folder_of(files.safetensors, "model.safetensors")(here, dense())
    succeed("init", "hf", "-o", "i.safetensors")
    assert_same_state(rs.load("i.safetensors").state_dict(), dense().state_dict())
    shown = succeed("popup", "./hf", "--epochs", "1", "--dry-run", "--json")[0]
    assert json.loads(shown)["model"] == ARCH
    source = resolve_source(SourceSpec("hf"))
    assert source.look["mean"] == [0.5, 0.5, 0.5]
    assert source.checkpoint == "hf"
    (here / "hf" / "config.json").write_text('{"model_type": "resnet"}')
    assert "names an architecture of timm; pass that as the source" in fail(3, "init", "hf")
    assert "leave --pretrained and --checkpoint out" in fail(2, "init", "hf", "--pretrained")


def test_timms_own_folder_is_read(here: Path) -> None:
    from timm.models import save_for_hf

    model = dense()
    save_for_hf(model, "hf", model_config={"num_classes": 10})
    for option in ((ARCH, "--checkpoint", "hf"), ("hf",)):
        succeed("init", *option, "-o", "i.safetensors", "--force")
        assert_same_state(rs.load("i.safetensors").state_dict(), model.state_dict())


def test_of_two_formats_in_a_folder_the_one_that_is_read_is_named(here: Path) -> None:
    path = files.folder_of(files.safetensors, "model.safetensors")(here, dense())
    torch.save(dense(1).state_dict(), path / "pytorch_model.bin")
    assert "hf: model.safetensors is read, not pytorch_model.bin" in init(path)
    assert_same_state(rs.load("i.safetensors").state_dict(), dense().state_dict())


def test_a_file_within_the_folder_it_builds_on_finds_it(here: Path) -> None:
    files.folder_of(files.sharded)(here, dense())
    succeed("init", "hf", "-o", "hf/i.safetensors")
    assert_same_state(rs.load("hf/i.safetensors").state_dict(), dense().state_dict())
    succeed("inspect", "verify", "hf/i.safetensors")


def test_a_name_that_no_file_can_refer_to_is_refused(here: Path) -> None:
    files.plain(here, dense()).rename("a..b.pth")
    assert "rename it" in refused(2, "a..b.pth")
    init_base = ("convert", "a..b.pth", "--arch", ARCH, "--base", "a..b.pth")
    assert "rename it" in fail(2, *init_base, "-o", "c.safetensors")


def test_differences_from_a_file_on_a_folder_are_told(here: Path) -> None:
    model = dense()
    path = files.folder_of(files.sharded)(here, model)
    init(path)
    succeed("inspect", "diff", "i.safetensors", path)
    model.state_dict()["fc.bias"][0] = 9
    other = files.plain(here, model)
    result = CliRunner().invoke(app, ["inspect", "diff", "i.safetensors", str(other)])
    assert result.exit_code == 1
    assert "1 of 10" in result.stdout or "fc.bias" in result.stdout


def test_an_empty_folder_is_refused(here: Path) -> None:
    (here / "nothing").mkdir()
    assert "a folder without weights, expected model.safetensors" in refused(3, "nothing")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_indexes_that_do_not_fit_their_parts_are_refused(kind: str, here: Path) -> None:
    write = {"safetensors": files.sharded, "bin": files.sharded_bin}[kind]
    path = write(here, dense())
    right = json.loads(path.read_text())
    names = sorted(right["weight_map"])
    parts = sorted(set(right["weight_map"].values()))

    def changed(**places: str) -> str:
        found = {**right["weight_map"], **{names[0]: next(iter(places.values()))}}
        path.write_text(json.dumps({"weight_map": found}))
        return refused(3, path)

    assert "not a bare name" in changed(a=f"../{parts[0]}")
    assert "not a bare name" in changed(a=f"/etc/x.{kind}")
    assert "is missing; put it beside the index" in changed(a=f"gone.{kind}")
    assert f"is not in {parts[1]}" in changed(a=parts[1])
    path.write_text(json.dumps(right))
    (here / parts[1]).unlink()
    assert f"its part {parts[1]} is missing" in refused(3, path)
    shutil.copy(here / parts[0], here / parts[1])
    message = refused(3, path)
    assert "lies in two parts" in message
    path.write_text("{}")
    assert "no weight_map" in refused(3, path)


def test_a_file_is_not_written_over_what_it_is_made_of(here: Path) -> None:
    path = files.folder_of(files.sharded)(here, dense())
    part = next(path.glob("*-00001-*"))
    for source in (path, path / "model.safetensors.index.json"):
        message = fail(6, "init", ARCH, "--checkpoint", source, "-o", part, "--force")
        assert "is read by this command" in message


def test_content_decides_not_the_ending(here: Path) -> None:
    save_file(dense().state_dict(), "weights.bin")
    init("weights.bin")
    assert_same_state(rs.load("i.safetensors").state_dict(), dense().state_dict())
    torch.save(dense().state_dict(), "torch.pth")
    Path("torch.pth").rename("torch.safetensors")
    assert "rename it to .pth" in refused(3, "torch.safetensors")


def test_notes_reach_the_caller(here: Path) -> None:
    path = files.lightning(here, dense())
    notes: list[str] = []
    spec = resolve_source(SourceSpec(ARCH, checkpoint=str(path)))
    with open_init(spec, notes=notes):
        assert len(notes) == 2
