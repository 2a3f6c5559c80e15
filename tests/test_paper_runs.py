"""The commands that docs/papers.md gives for the papers' runs: each resolves to what the page says,
and on each dataset one is carried out."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dataset_helpers
import pytest
from timm.optim import get_optimizer_info
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app, spread
from randsurgery.training.settings import TrainSettings

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "papers.md"
TITLE = "## The papers' runs, and the command for each"
FOLDERS = ("data", "tiny-imagenet-200", "imagenet")
SOMETIMES = {"crop_padding", "scale", "ratio", "decay_milestones", "decay_rate"}
"""What a dry run says only if it means something."""

Row = dict[str, str]


def tables() -> list[dict[str, Row]]:
    """The section's tables: of each run its cells by column."""
    section = PAGE.read_text(encoding="utf-8").partition(f"{TITLE}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, flags=re.MULTILINE):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        columns, _, *rows = lines
        found.append({row[0]: dict(zip(columns, row, strict=True)) for row in rows})
    return found


COMMANDS, SETTINGS = tables()


def commands(run: str) -> list[list[str]]:
    """The arguments of a run's commands, one after the other."""
    found = [shlex.split(text) for text in re.findall(r"`([^`]+)`", COMMANDS[run]["commands"])]
    assert {command[0] for command in found} == {"randsurgery"}
    return [command[1:] for command in found]


def number(text: str) -> float:
    """``1e-4``, ``2^-15``."""
    base, power, exponent = text.partition("^")
    return float(base) ** int(exponent) if power else float(base)


def said(run: str) -> dict[str, Any]:
    """What the page says of a run, under the names of a dry run."""
    cell = {column: re.sub(r" [co]$", "", text) for column, text in SETTINGS[run].items()}
    *start, epochs = cell["epochs"].split(" + ")
    found: dict[str, Any] = {
        "epochs": int(epochs),
        "batch_size": int(cell["batch"]),
        "opt": cell["optimiser"],
        "lr": number(cell["lr"]),
        "weight_decay": number(cell["weight decay"]),
        "sched": cell["schedule"],
        "warmup_epochs": int(cell["warm-up"]),
        "smoothing": number(cell["smoothing"]),
        "hflip": {"yes": True, "no": False}[cell["flip"]],
        "init": cell["init"],
    }
    found |= {"start_epochs": int(start[0])} if start else {}
    found |= {"momentum": number(cell["momentum"])} if cell["momentum"] != "-" else {}
    if cell["schedule"] == "step":
        found["decay_milestones"] = [int(drop) for drop in cell["drops"].split(", ")]
        found["decay_rate"] = number(cell["factor"])
    else:
        assert (cell["drops"], cell["factor"]) == ("-", "-")
    if cell["crop"] == "resized":
        return found | {"scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]}
    return found | {"crop_padding": int(cell["crop"].removeprefix("pad "))}


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(spread(arguments)))
    assert result.exit_code == 0, result.output
    return result


def provenance(path: Path) -> dict[str, Any]:
    found = rs.read_recipe(str(path)).member().provenance["settings"]
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds a stand-in for each dataset."""
    root = tmp_path_factory.mktemp("sets")
    dataset_helpers.cifar10(root / "data")
    dataset_helpers.cifar100(root / "data")
    dataset_helpers.tiny_imagenet(root / "tiny-imagenet-200")
    dataset_helpers.imagenet(root / "imagenet")
    with pytest.MonkeyPatch.context() as patch:
        dataset_helpers.without_checksums(patch)
        yield root


@pytest.fixture
def here(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder where the datasets lie under the page's names, and nothing else."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(sets / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what the commands resolve to ----------------------------------------------------------------


def resolved(run: str, here: Path) -> tuple[dict[str, Any], str]:
    """What a run's last command would do, after its other ones were carried out; and its notes."""
    *before, last = commands(run)
    for command in before:
        invoke(*command)
    result = invoke(*last, "--dry-run", "--json")
    facts = json.loads(result.stdout)
    if last[0] == "train" and last[1].endswith(".safetensors"):  # a plan knows its own weights
        facts["init"] = provenance(here / last[1])["init"]
    return facts, result.stderr


def test_both_tables_have_the_same_runs() -> None:
    assert list(COMMANDS) == list(SETTINGS)
    assert len(COMMANDS) == 18
    used = {last[last.index("--data-dir") + 1] for *_, last in map(commands, COMMANDS)}
    assert used == set(FOLDERS)


@pytest.mark.parametrize("run", SETTINGS)
def test_the_command_resolves_to_what_the_page_says(run: str, here: Path) -> None:
    facts, _ = resolved(run, here)
    expected = said(run)
    assert {name: facts.get(name) for name in expected} == expected
    assert SOMETIMES & set(facts) == SOMETIMES & set(expected)
    defaults = asdict(TrainSettings())
    others = {name: facts[name] for name in defaults if name in facts and name not in expected}
    assert others == {name: defaults[name] for name in others}  # the page has no word of these
    assert get_optimizer_info(facts["opt"]).has_momentum == ("momentum" in expected)


def test_a_dry_run_writes_nothing(here: Path) -> None:
    resolved("edge-popup conv4", here)
    assert sorted(path.name for path in here.iterdir()) == sorted(FOLDERS)


def test_a_folder_of_imagenets_classes_chooses_its_recipe_and_says_so(here: Path) -> None:
    *_, last = commands("edge-popup ResNet-50")
    assert "--recipe" not in last
    _, notes = resolved("edge-popup ResNet-50", here)
    assert "--recipe imagenet" in notes
    for run in ("fixed classifier, ResNet-50", "WRN, Tiny-ImageNet"):
        _, notes = resolved(run, here)
        assert "--recipe" not in notes


def test_shares_are_those_of_the_papers(here: Path) -> None:
    """Parameters as the papers count them, where they can be counted alike."""
    facts, _ = resolved("cheap ensemble, SGD", here)
    assert round(facts["learned"], -3) == 451_000  # Rosenfeld & Tsotsos, Table 4
    facts, _ = resolved("WRN, full", here)
    assert facts["learned"] // 10_000 == 366  # Table 2
    facts, _ = resolved("edge-popup ResNet-50", here)
    assert facts["k"] == "0.3"
    assert facts["kept_weights"] == pytest.approx(0.3 * facts["masked_weights"], abs=54)


# --- carried out ---------------------------------------------------------------------------------


def carried_out(command: str) -> tuple[Any, dict[str, Any], str]:
    """The recipe that a command's result has, its metrics, and the notes."""
    result = invoke(*shlex.split(command), "--epochs", "1", "--width", "0.1", "-o", "a.safetensors",
                    "--json")  # fmt: skip
    told = json.loads(result.stdout)
    assert told["verified"] is True
    recipe = rs.read_recipe("a.safetensors")
    assert recipe.input is not None
    assert 0 <= told["metrics"]["test_accuracy"] <= 1
    return recipe, recipe.member().provenance["data"], result.stderr


def test_a_network_learns_cifar_10(here: Path) -> None:
    recipe, data, _ = carried_out("popup conv2 --dataset torch/cifar10 --data-dir data -b 50")
    assert recipe.member().classes == dataset_helpers.CIFAR10
    assert data == {"train_images": 100, "test_images": 20}
    assert recipe.input.size == (32, 32)


def test_a_network_learns_cifar_100(here: Path) -> None:
    recipe, data, _ = carried_out("train conv2 --dataset torch/cifar100 --data-dir data -b 100")
    assert recipe.member().classes == dataset_helpers.CIFAR100
    assert data == {"train_images": 200, "test_images": 100}


def test_a_network_learns_tiny_imagenet(here: Path) -> None:
    recipe, data, notes = carried_out(
        "train conv2 --data-dir tiny-imagenet-200 --img-size 64 -b 200"
    )
    assert recipe.member().classes == tuple(sorted(dataset_helpers.TINY_WNIDS))
    assert (data["train_images"], data["test_images"]) == (400, 200)
    assert data["test_from"] == "val/"
    assert recipe.input.size == (64, 64)
    assert "test/ has 3 images without labels" in notes


def test_a_network_learns_imagenet(here: Path) -> None:
    recipe, data, notes = carried_out(
        "popup conv2 --data-dir imagenet --img-size 32 --crop-pct 0.875 --interpolation bilinear "
        "-b 500"
    )
    assert recipe.member().classes == tuple(sorted(dataset_helpers.imagenet_wnids()))
    assert (data["train_images"], data["test_images"]) == (1000, 1000)
    assert "using --recipe imagenet" in notes
    settings = provenance(here / "a.safetensors")
    assert (settings["lr"], settings["smoothing"], settings["warmup_epochs"]) == (0.256, 0.1, 0)
    assert float.fromhex(recipe.input.crop) == 0.875
    assert recipe.input.interpolation == "bilinear"
