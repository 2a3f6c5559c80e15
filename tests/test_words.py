"""What commands say of slips, and what they leave behind: hints, values, umask, settings files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ensemble_helpers import TINY, one_thread, run, said, succeed

from randsurgery.cli.app import with_value
from randsurgery.errors import UsageError
from randsurgery.surgery.initialisers import parse_fraction

pytestmark = pytest.mark.slow

SHORT = ("conv2", *TINY, "-b", "256", "--epochs", "1")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


@pytest.mark.parametrize(
    ("text", "meant"),
    [("30", "0.3"), ("30%", "0.3"), ("5 %", "0.05"), ("100%", "1"), ("12.5%", "0.125"),
     ("300", None), ("0", None), ("-30", None), ("x", None), ("0.5%", None)],
)  # fmt: skip
def test_a_percentage_is_recognised(text: str, meant: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        parse_fraction(text, "--k")
    words = str(caught.value)
    assert repr(text) in words
    assert words.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in words


def test_the_parsers_complaint_has_the_value() -> None:
    words = "Invalid value for '--epochs': Input should be greater than or equal to 1"
    for given in (["train", "x", "--epochs", "-3"], ["--epochs=-3"]):
        assert with_value(words, given) == f"{words}, found '-3'"
    assert with_value("Invalid value for '-b' / '--batch-size': no", ["--batch-size", "x"]) == (
        "Invalid value for '-b' / '--batch-size': no, found 'x'"
    )
    assert with_value("Missing argument 'SOURCE'", ["train"]) == "Missing argument 'SOURCE'"
    done = subprocess.run(
        [sys.executable, "-m", "randsurgery", "train", "conv2", "--epochs", "-3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "found '-3'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_device_is_named_with_those_there_are() -> None:
    result = run("train", *SHORT, "--device", "gpu")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: unknown --device 'gpu', expected auto, cpu, cuda, cuda:N or mps\n"
    )


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_obey_the_umask(mask: int) -> None:
    before = os.umask(mask)
    try:
        succeed("train", *SHORT, "--plot", "o.png", "-o", "o.safetensors")
        succeed("export", "o.safetensors", "--format", "timm", "-o", "folder")
        succeed("predict", "o.safetensors", "--dataset", "digits", "-o", "o.csv")
        succeed("eval", "o.safetensors", "--confusion", "c.png")
        succeed("eval", "o.safetensors", "--confusion", "c.csv")
    finally:
        os.umask(before)
    for path in [*Path().iterdir(), *Path("folder").iterdir()]:
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~mask, path


def test_a_settings_file_alone_repeats_a_run() -> None:
    for command, more in (("popup", ("--k", "0.5")), ("train", ()), ("popup", (
            "--algorithm", "supermask"))):  # fmt: skip
        succeed(command, *SHORT, *more, "-o", "o.safetensors", "--force")
        succeed(command, "-c", "o.settings.yaml", "-o", "again.safetensors", "--force")
        assert Path("o.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
        assert yaml.safe_load(Path("o.settings.yaml").read_text())["source"] == "conv2"
    succeed("train", "o.safetensors", "--epochs", 1, "-b", 256, "-o", "t.safetensors")
    succeed("train", "-c", "t.settings.yaml", "-o", "u.safetensors")
    assert Path("t.safetensors").read_bytes() == Path("u.safetensors").read_bytes()
    build = ("ensemble", "build", *SHORT, "--members", 2, "--kind", "fc")
    succeed(*build, "-o", "e.safetensors")
    succeed("ensemble", "build", "-c", "e.settings.yaml", "-o", "f.safetensors")
    assert Path("e.safetensors").read_bytes() == Path("f.safetensors").read_bytes()


def test_the_json_of_a_job_says_what_was_done() -> None:
    found = said("popup", *SHORT, "--k", "0.5", "--seed", 3, "-o", "o.safetensors")
    assert found["source"] == "conv2"
    settings = found["settings"]
    assert (settings["k"], settings["seed"], settings["init_seed"]) == ("0.5", 3, 3)
    assert settings["epochs"] == 1


def test_a_finished_run_is_not_resumed_and_says_how_to_go_on() -> None:
    succeed("train", *SHORT, "-o", "o.safetensors")
    before = Path("o.safetensors").read_bytes()
    result = run("train", *SHORT[:-1], "3", "--resume", "auto", "-o", "o.safetensors")
    assert result.exit_code == 6
    assert "is finished, and its state is gone" in result.stderr
    assert Path("o.safetensors").read_bytes() == before
    succeed("train", "o.safetensors", "--epochs", 1, "-o", "more.safetensors")


def test_quiet_is_quiet() -> None:
    result = succeed(
        "freeze", "conv2", "--width", "0.1", "--fraction", "0.5", "-q", "-o", "p.safetensors"
    )
    assert result.output == ""


@pytest.mark.parametrize("arch", [
    "conv2", "conv4", "conv6", "conv8", "resnet18_cifar", "wrn_28_4", "vgg19_cifar",
    "vgg19_bn_cifar", "alexnet_cifar", "resnet56_cifar", "lenet_300_100", "densenet_bc_100_12",
    "resnet18"])  # fmt: skip
def test_freeze_takes_an_image_size_for_all_networks(arch: str) -> None:
    found = said("freeze", arch, "--img-size", 64, "--fraction", "0.1", "--dry-run")
    assert found["learned"] < found["total"]
