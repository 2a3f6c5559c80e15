"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from surgery_helpers import (
    CONV2,
    assert_same_state,
    attach,
    conv2,
    logits,
    same_bits,
    save_dense,
    write,
    write_images,
)
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.format.container import Container
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build, harvest
from randsurgery.surgery.recipes import make_recipe

pytestmark = pytest.mark.slow

QUICK = ("--width", "0.1", "--epochs", "1", "-b", "256")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(code: int, *arguments: object) -> str:
    """The one line on stderr of a command that ends with that code and has nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    if code != 2 or result.stderr.startswith("error: "):
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert [line for line in lines if not line.startswith("no dataset")] == lines[-1:]
        return lines[-1]
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())  # an option typer refused


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def program(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "randsurgery", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), **options
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A popup file that records digits."""
    path = tmp_path_factory.mktemp("net") / "net.safetensors"
    succeed("popup", "conv2", *QUICK, "--k", "0.5", "-q", "-o", path)
    return path


# --- popup ---------------------------------------------------------------------------------------


def test_popup_as_written_trains_on_digits_and_says_so(here: Path) -> None:
    result = succeed("popup", "conv2", *QUICK, "--k", "0.3", "--init", "signed-constant")
    assert sorted(listing(here)) == [
        "conv2-digits-popup-k0.3.metrics.jsonl",
        "conv2-digits-popup-k0.3.safetensors",
        "conv2-digits-popup-k0.3.settings.yaml",
    ]  # fmt: skip
    assert "digits" in result.stderr
    assert "epoch 1/1" in result.stderr
    assert "written and verified" in result.stderr
    assert "random + mask" in result.stdout
    assert re.search(r"test accuracy \d+\.\d\d%", result.stdout)
    recipe = rs.read_recipe("conv2-digits-popup-k0.3.safetensors")
    member = recipe.member()
    assert member.dataset is not None
    assert member.dataset.name == "digits"
    assert member.classes == tuple("0123456789")
    assert recipe.input is not None
    assert recipe.input.size == (32, 32)
    settings = member.provenance["settings"]
    assert settings["k"] == "0.3"
    assert str(here) not in json.dumps(recipe.to_json())
    line = json.loads((here / "conv2-digits-popup-k0.3.metrics.jsonl").read_text())
    assert {"epoch", "train_loss", "test_accuracy", "flipped", "seconds"} <= set(line)
    assert line["test_accuracy"] == member.provenance["metrics"]["test_accuracy"]


def test_popup_as_json_reports_bytes_and_metrics(here: Path) -> None:
    result = succeed("popup", "conv2", *QUICK, "--json", "-q", "-o", "net.safetensors")
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert found["bytes"] == (here / "net.safetensors").stat().st_size
    assert found["dense_bytes"] > 10 * found["bytes"]
    assert found["verified"] is True
    assert 0 <= found["metrics"]["test_accuracy"] <= 1


def test_the_same_command_twice_gives_the_same_bytes(here: Path) -> None:
    for name in ("a", "b"):
        succeed("popup", "conv2", *QUICK, "-q", "-o", f"{name}.safetensors")
    assert (here / "a.safetensors").read_bytes() == (here / "b.safetensors").read_bytes()
    succeed("popup", "conv2", *QUICK, "-q", "--seed", "1", "-o", "c.safetensors")
    assert (here / "a.safetensors").read_bytes() != (here / "c.safetensors").read_bytes()


def test_seeds_of_weights_and_scores_are_apart(here: Path) -> None:
    succeed("popup", "conv2", *QUICK, "-q", "--seed", 5, "--init-seed", 9, "-o", "a.safetensors")
    recipe = rs.read_recipe("a.safetensors")
    assert {entry.source.seed for entry in recipe.tensors.values()} == {9}
    settings = recipe.member().provenance["settings"]
    assert (settings["seed"], settings["init_seed"]) == (5, 9)


def test_popups_controls_reach_the_file(here: Path) -> None:
    succeed(
        "popup", "test_resnet", "--epochs", 1, "-b", 512, "-q", "--k", "0.25", "--init",
        "kaiming-normal", "--scaled", "--skip", "layer1", "--skip", "layer2.*", "--learn", "@norm",
        "--learn", "@head", "--save-scores", "-o", "a.safetensors",
    )  # fmt: skip
    recipe = rs.read_recipe("a.safetensors")
    member = recipe.member()
    masked = {
        name for name, part in member.tensors.items() if "mask" in {o.kind for o in part.overlays}
    }
    assert masked == set(member.scores)
    assert masked
    assert not any(name.startswith(("layer1", "layer2", "fc")) for name in masked)
    assert member.tensors["fc.weight"].overlays[0].kind == "replace"
    assert any(name.startswith("bn1") for name in member.tensors)
    source = recipe.tensors["conv1.0.weight"].source
    assert source.distribution == "normal"
    assert float.fromhex(source.scale) == pytest.approx((2 / 27) ** 0.5 * 2)


def test_the_random_mask_baseline_runs(here: Path) -> None:
    succeed("popup", "conv2", "--width", 0.1, "-b", 512, "-q", "--mask", "random", "--k", "1/2")
    assert sorted(listing(here)) == [
        "conv2-digits-random-mask-k1-2.metrics.jsonl",
        "conv2-digits-random-mask-k1-2.safetensors",
        "conv2-digits-random-mask-k1-2.settings.yaml",
    ]  # fmt: skip


def test_popup_continues_from_a_file_with_its_dataset(here: Path) -> None:
    tiny = ("--width", 0.1, "--num-classes", 10)
    succeed("init", "conv2", *tiny, "--seed", 4, "-o", "b.safetensors")
    result = succeed("popup", "b.safetensors", "--epochs", 1, "-b", 512, "-o", "c.safetensors")
    assert "no dataset given" in result.stderr
    assert rs.read_recipe("c.safetensors").tensors["fc.weight"].source.seed == 4
    result = succeed("popup", "c.safetensors", "--epochs", 1, "-b", 512, "-o", "d.safetensors")
    assert "no dataset given" not in result.stderr


def test_popup_over_dense_weights_is_base_and_mask(here: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, "dense.pth")
    save_dense(here / "dense.safetensors", model.state_dict())
    for name in ("dense.pth", "dense.safetensors"):
        succeed(
            "popup", "test_resnet", "--checkpoint", name, "--epochs", 1, "-b", 512, "-q", "--force",
            "-o", "a.safetensors",
        )  # fmt: skip
        report = json.loads(succeed("inspect", "storage", "a.safetensors", "--json").stdout)
        assert {row["source"] for row in report["tensors"] if row["overlays"]} == {"base"}
        assert report["bytes"] < report["dense_bytes"] / 4
        found = json.loads(succeed("eval", "a.safetensors", "--base", name, "--json", "-q").stdout)
        assert 0 <= found["accuracy"] <= 1


def test_dry_run_trains_and_writes_nothing(here: Path) -> None:
    result = succeed("popup", "conv2", "--width", 0.1, "--k", 0.5, "--dry-run", "--json")
    facts = json.loads(result.stdout)
    assert facts["masked_tensors"] == 5
    assert facts["masked_weights"] / 2 <= facts["kept_weights"] <= facts["masked_weights"] / 2 + 5
    assert facts["train_images"] == 1437
    assert facts["epochs"] == 10
    assert "masked_weights" in succeed("popup", "conv2", "--width", 0.1, "--dry-run").stdout
    assert "would write" in succeed("init", "conv2", "--dry-run").stderr
    assert not listing(here)


# --- configuration and verbosity -----------------------------------------------------------------


def test_a_configuration_file_gives_defaults_and_the_command_line_wins(here: Path) -> None:
    values = {
        "k": 0.25, "epochs": 3, "lr": 0.05, "wd": 0.001, "batch-size": 64, "learn": "@head",
        "skip": ["features.0"], "width": 0.1, "save_scores": True,
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(values))
    facts = json.loads(
        succeed("popup", "conv2", "-c", "run.yaml", "--epochs", 2, "--dry-run", "--json").stdout
    )
    expected = {
        "k": "0.25", "epochs": 2, "lr": 0.05, "weight_decay": 0.001, "batch_size": 64,
        "learn": ["@head"], "skip": ["features.0"], "masked_tensors": 3,
    }  # fmt: skip
    assert {key: facts[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown option 'epoch'; near: epochs"),
        ("[1, 2]", "must hold option names"),
        ("a: [", "is not YAML"),
        ("epochs: many", "'--epochs'"),
        ("epochs: 0", "'--epochs'"),
        ("init: [a, b]", "unknown --init"),
        ("\udcff", "is not YAML"),
    ],
)
def test_a_configuration_file_that_does_not_fit_is_a_usage_error(
    here: Path, text: str, message: str
) -> None:
    Path("run.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = listing(here)
    assert message in fails(2, "popup", "conv2", "-c", "run.yaml", *QUICK[:2])
    assert listing(here) == before


def test_a_missing_configuration_file_is_a_usage_error(here: Path) -> None:
    assert "cannot be read" in fails(2, "popup", "conv2", "-c", "none.yaml")


def test_quiet_shows_errors_only_and_is_forgotten_after_the_command(here: Path, net: Path) -> None:
    assert run("popup", "conv2", *QUICK, "-q", "-o", "a.safetensors").stderr == ""
    assert fails(3, "eval", "none.safetensors", "-q")
    assert "epoch 1/1" in run("popup", "conv2", *QUICK, "-o", "b.safetensors").stderr


def test_verbose_shows_settings_and_where_an_error_arose(here: Path) -> None:
    shown = succeed("popup", "conv2", *QUICK, "-v", "-o", "a.safetensors").stderr
    assert "batch_size: 256" in shown
    assert "masked_tensors: 5" in shown
    shown = run("eval", "none.safetensors", "-v").stderr
    assert "Traceback" in shown
    assert shown.strip().splitlines()[-1].startswith("error: none.safetensors: no such file")
    assert "Traceback" not in run("eval", "none.safetensors").stderr


def test_version_and_help() -> None:
    assert succeed("--version").stdout.strip() == f"randsurgery {rs.__version__}"
    shown = succeed("--help").stdout
    assert all(name in shown for name in ("init", "popup", "eval", "export", "inspect"))
    assert "130" in shown
    for command in ("init", "popup", "eval", "export"):
        assert "--force" in succeed(command, "-h").stdout or command == "eval"


# --- eval, inspect, export -----------------------------------------------------------------------


def test_eval_reports_a_share_and_repeats_the_runs_own_figure(net: Path) -> None:
    found = json.loads(succeed("eval", net, "--json").stdout)
    assert 0 <= found["accuracy"] <= found["top5_accuracy"] <= 1
    assert found["images"] == 360
    recorded = rs.read_recipe(net).member().provenance["metrics"]
    assert found["accuracy"] == recorded["test_accuracy"]
    assert f"{found['accuracy']:.4f}" in succeed("eval", net, "-b", "17").stdout


def test_inspect_storage_gives_the_bytes_of_the_whole(net: Path) -> None:
    found = json.loads(succeed("inspect", "storage", net, "--json").stdout)
    assert found["bytes"] == net.stat().st_size
    model = rs.load(net)
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert found["dense_bytes"] == dense
    parts = found["header_bytes"] + sum(row["bytes"] for row in found["tensors"])
    assert parts == found["bytes"]
    shown = succeed("inspect", "storage", net, "--tensors").stdout
    assert "features.0.weight" in shown
    assert f"{dense:,}" in shown


def test_inspect_storage_reads_foreign_safetensors(here: Path) -> None:
    save_dense(here / "dense.safetensors", {"[red]w": torch.ones(3, 2)})
    found = json.loads(succeed("inspect", "storage", "dense.safetensors", "--json").stdout)
    assert found["dense_bytes"] == 24
    shown = succeed("inspect", "storage", "dense.safetensors", "--tensors").stdout
    assert "[red]w" in shown


def payload_span(path: Path) -> tuple[int, int]:
    with Container(path) as file:
        info = next(iter(file.infos.values()))
        return file.header_bytes + info.start, file.header_bytes + info.stop


def flip(path: Path, target: Path, position: int, bit: int = 0) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    target.write_bytes(data)
    return target


def test_inspect_verify_agrees_or_names_what_differs(net: Path, here: Path) -> None:
    assert "digests agree" in succeed("inspect", "verify", net).stdout
    found = json.loads(succeed("inspect", "verify", net, "--json").stdout)
    assert found["ok"] is True
    assert found["failures"] == []
    start, stop = payload_span(net)
    bad = flip(net, here / "bad.safetensors", (start + stop) // 2)
    result = run("inspect", "verify", bad)
    assert result.exit_code == 3
    assert "corrupt" in result.stdout
    result = run("inspect", "verify", bad, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["failures"]


def popped_resnet(path: Path) -> nn.Module:
    recipe = make_recipe("test_resnet", seed=1, args={"num_classes": 4})
    model = attach(build(recipe), Popup(k="0.5"))
    member = recipe.member().model_copy(update={"classes": ("ant", "bee", "[red]cat", "dog")})
    recipe = type(recipe)(recipe.recipe.with_member(member), recipe.payloads)
    write(path, harvest(recipe, model))
    return model


def test_export_dense_loads_in_plain_timm(here: Path) -> None:
    model = popped_resnet(here / "net.safetensors")
    shown = succeed("export", "net.safetensors", "-o", "dense.safetensors").stdout
    assert "timm.create_model('test_resnet'" in shown
    plain = timm.create_model("test_resnet", checkpoint_path="dense.safetensors", num_classes=4)
    assert same_bits(logits(plain), logits(model))
    said = shown.strip().splitlines()[-1]
    assert same_bits(logits(eval(said, {"timm": timm})), logits(model))


def test_export_of_a_timm_folder_loads_with_labels_and_preprocessing(here: Path) -> None:
    model = popped_resnet(here / "net.safetensors")
    found = json.loads(
        succeed("export", "net.safetensors", "--format", "timm", "-o", "out", "--json").stdout
    )
    assert sorted(listing(here / "out")) == ["config.json", "model.safetensors"]
    assert found["bytes"] == sum(len(data) for data in listing(here / "out").values())
    again = timm.create_model("local-dir:out", pretrained=True)
    assert same_bits(logits(again), logits(model))
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "[red]cat", "dog"]
    assert config["num_classes"] == 4
    theirs = timm.get_pretrained_cfg("test_resnet")
    assert theirs.tag  # what timm says of its own weights is not said of these
    assert not {"tag", "license", "origin_url"} & set(config["pretrained_cfg"])
    assert (here / "out").stat().st_mode & 0o077 == here.stat().st_mode & 0o077 or os.name == "nt"
    assert sorted(p.name for p in here.iterdir()) == ["net.safetensors", "out"]
    fails(6, "export", "net.safetensors", "--format", "timm", "-o", "out")
    succeed("export", "net.safetensors", "--format", "timm", "-o", "out", "--force")


def test_a_timm_folder_of_a_trained_net_carries_its_preprocessing(net: Path, here: Path) -> None:
    succeed("export", net, "--format", "timm", "-o", "out", "-q")
    config = json.loads((here / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == [0.305] * 3
    assert config["label_names"] == list("0123456789")


def test_a_self_contained_export_needs_no_base(here: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4)
    torch.save(model.state_dict(), "dense.pth")
    succeed("init", "test_resnet", "--num-classes", 4, "--checkpoint", "dense.pth", "-o",
            "a.safetensors")  # fmt: skip
    succeed("export", "a.safetensors", "--self-contained", "--base", "dense.pth", "-o",
            "b.safetensors")  # fmt: skip
    assert_same_state(rs.load("b.safetensors").state_dict(), model.state_dict())


def test_export_checks_first_and_overwrites_only_with_force(net: Path, here: Path) -> None:
    Path("dense.safetensors").write_bytes(b"mine")
    assert "--force" in fails(6, "export", net, "-o", "dense.safetensors")
    assert "unknown --format" in fails(2, "export", net, "--format", "tflite")
    assert "would write" in succeed("export", net, "--dry-run").stderr
    assert listing(here) == {"dense.safetensors": b"mine"}
    succeed("export", net, "-o", "dense.safetensors", "--force")
    assert_same_state(
        timm.create_model("conv2", checkpoint_path="dense.safetensors", **CONV2).state_dict(),
        rs.load(net).state_dict(),
    )


def test_names_with_markup_are_shown_as_they_are(here: Path) -> None:
    name = "[red]a[bold] :smile:.safetensors"
    write(here / name, conv2())
    assert name in succeed("inspect", "storage", name).stdout
    assert name in succeed("inspect", "verify", name).stdout
    assert "[bold]no" in fails(2, "popup", "[bold]no")


# --- bad input -----------------------------------------------------------------------------------


def test_unknown_names_are_listed_with_near_ones(here: Path) -> None:
    assert "near: resnet50" in fails(2, "popup", "resnet5O")
    assert "near: resnet50" in fails(2, "init", "resnet5O")
    assert "near: torch/cifar10" in fails(5, "popup", "conv2", "--dataset", "torch/cifar1O")
    assert "near: digits" in fails(5, "popup", "conv2", "--dataset", "digit")
    assert "near: signed-constant" in fails(2, "popup", "conv2", "--init", "signed-constnt")
    assert "near: features.0" in fails(2, "popup", "conv2", *QUICK, "--skip", "featurs.0")
    assert "near: momentum" in fails(2, "popup", "conv2", *QUICK, "--opt", "momentun")
    assert "nowhere" in fails(2, "popup", "conv2", *QUICK, "--sched", "nowhere")
    assert "expected auto, cpu, cuda" in fails(2, "popup", "conv2", *QUICK, "--device", "abacus")
    assert "unknown --mask" in fails(2, "popup", "conv2", "--mask", "some")
    assert "near: torch/mnist" in fails(5, "popup", "conv2", "--dataset", "mnist")
    assert "a name in features, fc1, fc2, fc" in fails(2, "popup", "conv2", "--skip", "stem*")
    assert "has no normalisation layer" in fails(2, "popup", "conv2", "--learn", "@norm")
    assert not listing(here)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--opt", "momentun"), ("--sched", "nowhere"), ("--wd", "-1"), ("--lr", "nan"),
        ("--lr", "-0.1"), ("--clip-grad", "0"), ("--momentum", "1"),
    ],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would_refuse(here: Path, option: str, value: str) -> None:
    assert value in fails(2, "popup", "conv2", *QUICK, "--dry-run", option, value)
    assert not listing(here)


def test_a_file_takes_no_options_about_its_weights(here: Path) -> None:
    succeed("init", "conv2", "--width", 0.1, "-o", "made.safetensors")
    given = [("--init", "signed-constant"), ("--init-seed", 3), ("--scaled",), ("--width", 0.2)]
    for option in given:
        assert "has its weights already" in fails(2, "popup", "made.safetensors", *option)


def test_scores_of_a_random_mask_are_not_kept(here: Path) -> None:
    assert "learned masks" in fails(2, "popup", "conv2", "--mask", "random", "--save-scores")


@pytest.mark.parametrize("k", ["0", "1.01", "-0.5", "nan", "many", "1e-99999999"])
def test_k_outside_its_range_is_a_usage_error(here: Path, k: str) -> None:
    assert "k must" in fails(2, "popup", "conv2", "--k", k)
    assert not listing(here)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model-kwargs", "pretrained=true"),
        ("--model-kwargs", "checkpoint_path=x"),
        ("--model-kwargs", "width"),
        ("--model-kwargs", "width=wide"),
        ("--width", "1e9"),
        ("--num-classes", "0"),
        ("--pretrained", "--checkpoint", "x.pth"),
    ],
)
def test_arguments_that_are_not_allowed_are_usage_errors(
    here: Path, arguments: tuple[str, ...]
) -> None:
    fails(2, "popup", "conv2", *arguments)
    assert not listing(here)


def test_a_model_of_terabytes_is_refused_before_it_is_made(here: Path) -> None:
    started = time.monotonic()
    huge = ("embed_dim=16384", "depth=16", "num_heads=16", "mlp_ratio=64")
    arguments = [part for item in huge for part in ("--model-kwargs", item)]
    assert "GB" in fails(4, "popup", "vit_tiny_patch16_224", *arguments)
    assert "GB" in fails(4, "init", "swin_tiny_patch4_window7_224", "--img-size", "7168",
                         "--model-kwargs", "patch_size=1")  # fmt: skip
    assert "GB" in fails(4, "init", "conv2", "--width", "64", "--img-size", "8192")
    assert "--img-size" in fails(5, "popup", "conv2", "--img-size", "8192")
    assert "GB" in fails(4, "init", "vit_tiny_patch16_224", *arguments)
    assert time.monotonic() - started < 60
    assert not listing(here)


@pytest.mark.parametrize(
    ("name", "size", "least"),
    [("vgg19_cifar", 28, 32), ("alexnet_cifar", 28, 29), ("conv8", 15, 16)],
)
def test_images_too_small_for_the_network_are_refused_before_training(
    here: Path, name: str, size: int, least: int
) -> None:
    said = fails(4, "popup", name, "--epochs", 1, "--img-size", size)
    assert f"{name} cannot be built with img_size={size}," in said
    assert f"at least {least} pixels" in said
    assert not listing(here)


def test_unreadable_files_are_refused_everywhere(net: Path, here: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    whole = net.read_bytes()
    start, stop = payload_span(net)
    files = {
        "missing": None,
        "empty": b"",
        "header": whole[:4],
        "short": whole[: start // 2],
        "cut": whole[:-1],
        "longer": whole + b"\0",
        "text": b"hello, this is no checkpoint at all",
    }
    for name, data in files.items():
        if data is not None:
            (bad / f"{name}.safetensors").write_bytes(data)
    flip(net, bad / "payload.safetensors", (start + stop) // 2)
    flip(net, bad / "recipe.safetensors", net.read_bytes().index(b"signed-constant"), 0)
    flip(net, bad / "length.safetensors", 1)
    foreign = save_dense(bad / "foreign.safetensors", {"w": torch.ones(3)})
    for path in (*(bad / f"{name}.safetensors" for name in files), bad / "length.safetensors",
                 bad / "payload.safetensors", foreign):  # fmt: skip
        message = fails(3, "eval", path)
        assert path.name in message or "corrupt" in message
        fails(3, "popup", path, "--epochs", "1", "-o", "out.safetensors")
        fails(3, "export", path, "-o", "out.safetensors")
    assert "not one of randsurgery" in fails(3, "eval", foreign)
    for name in ("empty", "cut", "text"):
        fails(3, "inspect", "storage", bad / f"{name}.safetensors")
        fails(3, "inspect", "verify", bad / f"{name}.safetensors")
    assert not listing(here)


def test_other_parts_that_do_not_belong_together(net: Path, here: Path) -> None:
    assert "--num-classes 10" in fails(4, "popup", net, "--num-classes", 12, "-o", "o.safetensors")
    model = timm.create_model("test_resnet", num_classes=4)
    save_dense(here / "dense.safetensors", model.state_dict())
    fails(4, "popup", "test_vit", "--checkpoint", "dense.safetensors", "-o", "o.safetensors")
    fails(4, "popup", "test_nfnet", "-o", "o.safetensors")
    assert sorted(listing(here)) == ["dense.safetensors"]


def test_another_base_than_the_one_named_is_refused_with_both_identities(here: Path) -> None:
    for seed, name in enumerate(("right", "wrong")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model("test_resnet", num_classes=4)
        save_dense(here / f"{name}.safetensors", model.state_dict())
    succeed("init", "test_resnet", "--num-classes", 4, "--checkpoint", "right.safetensors", "-o",
            "net.safetensors")  # fmt: skip
    expected = rs.read_recipe("net.safetensors").bases["base"].identity
    (here / "right.safetensors").rename(here / "moved.safetensors")
    for command in (("eval",), ("inspect", "verify"), ("export", "-o", "out.safetensors")):
        message = fails(4, *command, "net.safetensors", "--base", "wrong.safetensors")
        assert len(set(re.findall(r"\b[0-9a-f]{32}\b", message)) | {expected}) == 2
        assert "--base" in fails(4, *command, "net.safetensors")
    succeed("inspect", "verify", "net.safetensors", "--base", "moved.safetensors")
    assert not (here / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("freeze",), "Missing argument 'SOURCE'"),
        (("freeze", "conv2", "--count", "0"), "'--count'"),
        (("popup", "conv2", "--epoch", "3"), "--epochs"),
        (("nothing",), "No such command"),
    ],
)
def test_what_the_parser_refuses_is_one_line(
    here: Path, arguments: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-m", "randsurgery", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert made.stdout == ""
    assert re.fullmatch(r"error: .*; see .*randsurgery.* --help\n", made.stderr)
    assert words in made.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(here: Path) -> None:
    command = [sys.executable, "-m", "randsurgery", "freeze", "conv2", "--count", "1", "--dry-run",
               "--json"]  # fmt: skip
    with open("/dev/full", "w") as full:
        made = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert made.returncode == 6
    assert re.fullmatch(r"error: the output cannot be written \(.*\)\n", made.stderr)


def test_folders_that_cannot_take_the_result(here: Path) -> None:
    Path("file").write_text("no folder")
    for output in ("nowhere/a.safetensors", "file/a.safetensors"):
        assert "no such folder" in fails(6, "popup", "conv2", *QUICK, "-o", output)
        assert "no such folder" in fails(6, "init", "conv2", "-o", output)
    assert "is a folder" in fails(6, "popup", "conv2", *QUICK, "-o", here)
    if os.geteuid() != 0:
        (here / "shut").mkdir(mode=0o555)
        assert "may not be written" in fails(6, "init", "conv2", "-o", "shut/a.safetensors")
    assert listing(here) == {"file": b"no folder"}


def test_an_existing_file_is_refused_before_training(here: Path) -> None:
    Path("a.safetensors").write_bytes(b"old")
    started = time.monotonic()
    assert "--force" in fails(6, "popup", "conv2", "--epochs", 10_000, "-o", "a.safetensors")
    assert "--force" in fails(6, "init", "conv2", "-o", "a.safetensors")
    Path("b.metrics.jsonl").write_bytes(b"old")
    assert "--force" in fails(6, "popup", "conv2", "--epochs", 10_000, "-o", "b.safetensors")
    assert time.monotonic() - started < 30
    assert listing(here) == {"a.safetensors": b"old", "b.metrics.jsonl": b"old"}
    succeed("popup", "conv2", *QUICK, "-q", "--force", "-o", "a.safetensors")
    assert len(listing(here)["a.safetensors"]) > 1000


def test_a_full_disk_leaves_the_old_files(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.safetensors").write_bytes(b"old")
    Path("a.metrics.jsonl").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = fails_after_training(6, "popup", "conv2", *QUICK, "--force", "-o", "a.safetensors")
    assert "No space left" in message
    assert listing(here) == {"a.safetensors": b"old", "a.metrics.jsonl": b"old"}


def fails_after_training(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def test_a_loss_that_is_no_number_ends_with_7_and_writes_nothing(here: Path) -> None:
    message = fails_after_training(
        7, "popup", "test_resnet", "--epochs", 1, "-b", 64, "--learn", "@norm", "--learn", "@head",
        "--lr", "1e30", "--opt", "momentum", "-o", "a.safetensors",
    )  # fmt: skip
    assert message.startswith("error: ")
    assert "--lr" in message
    assert not listing(here)


def test_a_pth_that_is_a_module_is_refused(here: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10), "more.pth")
    message = fails(3, "popup", "test_resnet", "--checkpoint", "more.pth", "-o", "a.safetensors")
    assert "state_dict()" in message
    assert sorted(listing(here)) == ["more.pth"]


def test_data_that_is_missing_or_does_not_fit(net: Path, here: Path, tmp_path: Path) -> None:
    assert "--data-dir" in fails(5, "popup", "conv2", "--dataset", "torch/cifar10")
    message = fails(5, "popup", "conv2", "--dataset", "torch/cifar10", "--data-dir", "none")
    assert "no such folder" in message
    message = fails(5, "popup", "conv2", "--dataset", "torch/cifar10", "--data-dir", here)
    assert "--dataset-download" in message
    write_images(tmp_path / "flat", {"a": 2, "b": 2})
    assert "no folder train/" in fails(5, "popup", "conv2", "--data-dir", tmp_path / "flat")
    many = tmp_path / "many"
    write_images(many / "validation", {f"c{i:02}": 1 for i in range(12)})
    message = fails(5, "eval", net, "--data-dir", many)
    assert "'c00' is not one of the 10 known classes" in message
    message = fails(4, "popup", "conv2", "--num-classes", 5)
    assert "--num-classes 5 is too few" in message
    assert not listing(here)


# --- as a program --------------------------------------------------------------------------------


def _heed_interrupts() -> None:
    """A job that a script started in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_with_130_and_leaves_the_old_files(here: Path) -> None:
    old = {"a.safetensors": b"old", "a.metrics.jsonl": b"old metrics"}
    for name, data in old.items():
        Path(name).write_bytes(data)
    command = [
        sys.executable, "-m", "randsurgery", "popup", "conv2", "--width", "0.1", "--epochs",
        "10000", "-b", "256", "--force", "-o", "a.safetensors",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=here, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(), preexec_fn=_heed_interrupts,
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("epoch 1/"):
                    break
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1] == "interrupted; nothing was written"
    assert "Traceback" not in err
    assert listing(here) == old


def test_output_in_a_pipe_is_plain(net: Path) -> None:
    forced = {**environment(), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "randsurgery", "inspect", "storage", str(net), "--tensors"]
    done = subprocess.run(command, capture_output=True, text=True, env=forced, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) < 200


def test_the_program_is_the_module_too() -> None:
    done = program("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"randsurgery {rs.__version__}")
    done = program("popup", "resnet5O")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown architecture")
    assert "\x1b" not in done.stderr


def test_a_reader_that_goes_away_is_no_error(net: Path) -> None:
    script = f'"{sys.executable}" -m randsurgery inspect storage "{net}" --json | head -c 1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True, env=environment()
    )
    assert done.stderr == ""
