"""predict: the CSV against a slow twin and against eval; images that cannot be read; names."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from surgery_helpers import attach, conv2, quick, save_dense, write, write_images
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.cli.common import clean
from randsurgery.cli.predicting import _to_stdout
from randsurgery.errors import DataError, IncompatibleError, OutputError
from randsurgery.format.recipe import Member
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.jobs import predict as job
from randsurgery.jobs.inputs import DataOptions, look_for_file
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.modules import build
from randsurgery.training import images as images_module
from randsurgery.training.data import Data, Resident
from randsurgery.training.datasets import folder_data, open_data, open_images
from randsurgery.training.evaluate import evaluate
from randsurgery.training.folders import read_folder
from randsurgery.training.images import Failure, decode, find_images, suffixes
from randsurgery.training.loop import fit
from randsurgery.training.predict import Prediction, predict

pytestmark = pytest.mark.slow

NAMES = ("ant", "bee, wasp", 'a "cat"', "Köter")
ONE = tuple(f"{what}_{rank}" for rank in range(1, 5) for what in ("class", "probability"))


def look(channels: int = 3) -> InputSpec:
    return InputSpec(
        size=(32, 32), channels=channels, mean=((0.4).hex(),) * channels,
        std=((0.25).hex(),) * channels, interpolation="bicubic", crop=(0.875).hex(),
    )  # fmt: skip


def network(path: Path, spec: InputSpec | None = None, names: Any = NAMES, **args: Any) -> Path:
    """A file of a random conv2 that records a preprocessing and class names."""
    made = conv2(num_classes=4, **args)
    member = made.member().model_copy(update={"classes": names})
    recipe = made.recipe.model_copy(update={"input": spec, "members": (member,)})
    return write(path, type(made)(recipe, made.payloads))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def fails(code: int, *arguments: object) -> str:
    """The one line of a command that ends with that code and has written nothing."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def rows(text: str) -> list[dict[str, str]]:
    found = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert all(None not in row and None not in row.values() for row in found)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a network, and six images in two classes' folders."""
    monkeypatch.chdir(tmp_path)
    network(tmp_path / "net.safetensors", look())
    write_images(tmp_path / "images", {"ant": 3, "Köter": 3}, size=40)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "validation").symlink_to("../images")
    return tmp_path


def split_of(root: str, part: Any) -> Data:
    folder = read_folder(root)
    return folder_data(folder, part, look(), NAMES)


# --- the figures ---------------------------------------------------------------------------------


def slow_twin(path: str, file: str = "net.safetensors") -> torch.Tensor:
    """Logits of one image, by timm's own transform with its own normalisation."""
    spec = rs.read_recipe(file).input
    assert spec is not None
    transform = timm.data.create_transform(
        (3, *spec.size), mean=[float.fromhex(m) for m in spec.mean],
        std=[float.fromhex(s) for s in spec.std], interpolation=spec.interpolation,
        crop_pct=float.fromhex(spec.crop),
    )  # fmt: skip
    with Image.open(path) as image, torch.no_grad():
        return rs.load(file)(transform(image.convert("RGB"))[None])[0]


def test_every_line_agrees_with_a_slow_twin(here: Path) -> None:
    found = rows(succeed("predict", "net.safetensors", "images").stdout)
    assert [row["path"] for row in found] == [
        f"images/{name}/{i}.png" for name in ("Köter", "ant") for i in range(3)
    ]
    for row in found:
        shares, order = slow_twin(row["path"]).softmax(0).sort(descending=True)
        assert [row[f"class_{rank}"] for rank in range(1, 5)] == [NAMES[i] for i in order]
        said = [float(row[f"probability_{rank}"]) for rank in range(1, 5)]
        np.testing.assert_allclose(said, shares, rtol=1e-4)
        assert (row["class"], row["probability"]) == (row["class_1"], row["probability_1"])


class Kept(nn.Module):
    """A network that keeps what it says."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.said = model, []  # type: ignore[var-annotated]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.said.append(self.model(x))
        return self.said[-1]

    def taken(self) -> torch.Tensor:
        taken, self.said = torch.cat(self.said), []
        return taken


@pytest.mark.parametrize("workers", [0, 1])
def test_images_by_path_get_the_very_logits_that_eval_gives_them(here: Path, workers: int) -> None:
    kept = Kept(rs.load("net.safetensors"))
    folder = split_of("set", "validation")
    evaluate(kept, folder, batch_size=6)
    expected = kept.taken()
    found = find_images(["images"])
    there = [path.replace("set/validation", "images") for path in folder.paths]
    assert sorted(found) == sorted(there)
    order = [there.index(path) for path in found]
    by_path = open_images(list(folder.paths), look(), workers=workers)
    list(predict(kept, by_path, batch_size=6))
    assert torch.equal(kept.taken(), expected)
    results = list(predict(kept, open_images(found, look(), workers=workers), batch_size=4))
    assert [result.index for result in results] == list(range(6))
    torch.testing.assert_close(kept.taken(), expected[order])


def test_digits_as_files_and_as_a_dataset_are_the_same(here: Path) -> None:
    succeed("init", "conv2", "--width", 0.1, "--num-classes", 10, "-q", "-o", "d.safetensors")
    spec = look_for_file(
        (r := rs.read_recipe("d.safetensors")), r.member(), "digits", DataOptions()
    )
    digits = open_data(DatasetSpec(name="digits"), spec, "test")
    assert isinstance(digits, Resident)
    (here / "digits").mkdir()
    for index in range(0, 360, 40):
        pixels = digits.images[index].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(f"digits/{index}.png")
    made = conv2()
    recorded = made.recipe.model_copy(update={"input": spec})
    write(here / "e.safetensors", type(made)(recorded, made.payloads))
    dataset = succeed("predict", "e.safetensors", "--dataset", "digits")
    assert dataset.stderr == ""
    whole = rows(dataset.stdout)
    assert [row["path"] for row in whole] == [f"test/{index}" for index in range(360)]
    by_path = rows(succeed("predict", "e.safetensors", "digits").stdout)
    assert len(by_path) == 9
    for row in by_path:
        other = whole[int(Path(row["path"]).stem)]
        assert row["class"] == other["class"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)
    accuracy = json.loads(succeed("eval", "e.safetensors", "--json", "-q").stdout)["accuracy"]
    assert sum(row["class"] == row["label"] for row in whole) == round(accuracy * 360)


def test_a_folder_as_dataset_gives_paths_and_labels(here: Path) -> None:
    found = rows(succeed("predict", "net.safetensors", "--data-dir", "set").stdout)
    assert list(found[0]) == ["path", "class", "probability", *ONE, "label"]
    found = [{**row, "path": row["path"].replace("set/validation", "images")} for row in found]
    assert {row["path"] for row in found} == set(find_images(["images"]))
    assert all(Path(row["path"]).parent.name == row["label"] for row in found)
    plain = rows(succeed("predict", "net.safetensors", "images").stdout)
    assert list(plain[0]) == ["path", "class", "probability", *ONE]
    same = {row["path"]: (row["class"], float(row["probability"])) for row in plain}
    assert {row["path"]: row["class"] for row in found} == {p: c for p, (c, _) in same.items()}
    # another order of the images may move the last digits
    assert all(
        float(row["probability"]) == pytest.approx(same[row["path"]][1], rel=1e-4) for row in found
    )


def test_without_recorded_preprocessing_evals_fallback_is_taken_and_named(here: Path) -> None:
    network(here / "bare.safetensors", None, None)
    spec = look_for_file(
        (r := rs.read_recipe("bare.safetensors")), r.member(), "folder", DataOptions()
    )
    result = succeed("predict", "bare.safetensors", "images")
    assert "no preprocessing is recorded: using 32 x 32 pixels, bilinear, crop 1" in result.stderr
    network(here / "told.safetensors", spec, None)
    told = succeed("predict", "told.safetensors", "images")
    assert told.stderr == ""
    assert told.stdout == result.stdout
    assert {row["class"] for row in rows(told.stdout)} <= set("0123")  # no names: numbers


def test_of_several_networks_one_is_named(here: Path) -> None:
    made = conv2(num_classes=4)
    classes = {"low": tuple("abcd"), "high": tuple("ABCD")}
    members = tuple(Member(name=name, classes=names) for name, names in classes.items())
    recipe = made.recipe.model_copy(update={"input": look(), "members": members})
    write(here / "two.safetensors", type(made)(recipe, made.payloads))
    found = rows(succeed("predict", "two.safetensors", "images", "--member", "high").stdout)
    assert {row["class"] for row in found} <= set("ABCD")
    assert "high" in fails(2, "predict", "two.safetensors", "images", "--member", "none")


def test_a_base_is_taken(here: Path) -> None:
    (here / "far").mkdir()
    save_dense(here / "far" / "d.safetensors", timm.create_model("test_resnet").state_dict())
    succeed("init", "test_resnet", "--checkpoint", "far/d.safetensors", "-q", "-o", "b.safetensors")
    assert "base" in fails(4, "predict", "b.safetensors", "images")
    found = succeed("predict", "b.safetensors", "images", "--base", "far/d.safetensors", "--top", 1)
    assert len(rows(found.stdout)) == 6


# --- the module's side ---------------------------------------------------------------------------


class Says(nn.Module):
    """A network that says what it was given, whatever it is shown."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(x)]


def shown(count: int) -> Resident:
    return Resident(
        torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count) - 1, (), look()
    )


def test_equal_classes_come_in_order_and_close_ones_by_their_logits() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 20.0, 20.000002]])
    assert logits[1, 1] < logits[1, 2]
    first, second = predict(Says(logits), shown(2), top=2)
    assert isinstance(first, Prediction)
    assert isinstance(second, Prediction)
    assert (first.index, first.label, first.classes) == (0, -1, (0, 1))
    assert first.probabilities == pytest.approx((1 / 3, 1 / 3))
    assert (second.index, second.label, second.classes) == (1, 0, (2, 1))


def test_an_output_that_is_no_number_is_a_failure_of_its_image() -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 0.0], [float("-inf"), 0.0]])
    results = list(predict(Says(logits), shown(3)))
    assert results[1] == Failure(1, "the network's output is not a number")
    assert isinstance(results[2], Prediction)
    assert results[2].probabilities == (1.0, 0.0)


def test_outputs_that_are_no_classes_are_refused_and_the_mode_is_given_back() -> None:
    model = Says(torch.zeros(2, 3, 4)).train()
    with pytest.raises(IncompatibleError, match=r"\[2, 3, 4\], expected \[images, classes\]"):
        list(predict(model, shown(2)))
    assert model.training


# --- columns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "columns"), [(1, 1), (3, 3), (9, 4)])
def test_top_says_how_many_classes_are_listed(here: Path, top: int, columns: int) -> None:
    found = rows(succeed("predict", "net.safetensors", "images", "--top", top).stdout)
    assert list(found[0]) == ["path", "class", "probability", *ONE[: 2 * columns]]


def test_options_come_from_a_file_too(here: Path) -> None:
    Path("run.yaml").write_text("top: 2\nbatch-size: 2\n")
    result = succeed("predict", "net.safetensors", "images", "-c", "run.yaml", "-v")
    assert list(rows(result.stdout)[0]) == ["path", "class", "probability", *ONE[:4]]
    assert "6 images, shown as 32 x 32 pixels, bicubic, crop 0.875" in result.stderr


ODD = (
    "a,b.png",
    'say "x".png',
    "new\nline.png",
    "cr\r.png",
    "Ünï 中.png",
    "=1+2.png",
    "\x1b[31m.png",
)


def test_odd_names_come_through_the_csv_whole(here: Path) -> None:
    for name in ODD:
        Image.new("RGB", (8, 8)).save(name, format="png")
    found = rows(succeed("predict", "net.safetensors", "--top", 1, "--", *ODD).stdout)
    assert [row["path"] for row in found] == list(ODD)
    assert {row["class"] for row in found} <= set(NAMES)
    plan = job.prepare(SourceSpec("net.safetensors"), ODD, DataOptions(), None)
    text = b"".join(job.lines(plan, job.Tally(), lambda *_: None, clean)).decode()
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == 1 + len(ODD)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_name_that_is_no_utf_8_is_escaped(here: Path) -> None:
    name = os.fsdecode("é\xff.png".encode("latin-1"))
    Image.new("RGB", (8, 8)).save(name, format="png")
    assert rows(succeed("predict", "net.safetensors", name).stdout)[0]["path"] == r"\xe9\xff.png"
    Path(name).write_bytes(b"")
    assert run("predict", "net.safetensors", name).stderr.startswith(r"\xe9\xff.png: not an image")


# --- images that cannot be read ------------------------------------------------------------------


@pytest.fixture
def broken(here: Path) -> Path:
    """Three of the folder's images are none any more: cut off, text, a link to nowhere."""
    whole = Path("images/ant/0.png").read_bytes()
    Path("images/ant/0.png").write_bytes(whole[: len(whole) // 2])
    Path("images/ant/\x1b[31m.png").write_text("not an image\n")
    Path("images/ant/gone.png").symlink_to("nowhere.png")
    return here


@pytest.mark.parametrize("options", [(), ("-j", 1), ("-b", 1)])
def test_the_others_are_done(broken: Path, options: tuple[object, ...]) -> None:
    result = run("predict", "net.safetensors", "images", "-o", "out.csv", *options)
    assert result.exit_code == 5
    found = rows(Path("out.csv").read_text())
    assert [row["path"] for row in found] == [
        *(f"images/Köter/{index}.png" for index in range(3)),
        *(f"images/ant/{index}.png" for index in (1, 2)),
    ]
    lines = result.stderr.splitlines()
    assert lines[0] == r"images/ant/\x1b[31m.png: not an image of a known format"
    assert lines[1].startswith("images/ant/0.png: ")
    assert lines[2] == "images/ant/gone.png: No such file or directory"
    assert lines[3] == "error: 3 of 8 images failed, named above; the others are done"
    assert len(lines) == 4
    assert result.stdout == "out.csv: 5 images\n"
    assert "probability" in run("predict", "net.safetensors", "images").stdout
    assert len(run("predict", "net.safetensors", "images", "-q").stderr.splitlines()) == 4


def test_as_json(broken: Path) -> None:
    result = run("predict", "net.safetensors", "images", "-o", "out.csv", "--json", "-q")
    assert result.exit_code == 5
    found = json.loads(result.stdout)
    assert [failure["path"] for failure in found.pop("failures")] == [
        "images/ant/\x1b[31m.png", "images/ant/0.png", "images/ant/gone.png",
    ]  # fmt: skip
    assert found == {"file": "net.safetensors", "dataset": None, "output": "out.csv", "images": 5}
    assert "--json needs -o" in fails(2, "predict", "net.safetensors", "images", "--json")


@pytest.mark.parametrize("output", [(), ("-o", "out.csv")])
def test_strict_stops_and_writes_nothing(broken: Path, output: tuple[str, ...]) -> None:
    before = sorted(broken.iterdir())
    for batch in (1, 256):
        message = fails(5, "predict", "net.safetensors", "images", "--strict", "-b", batch, *output)
        assert message.endswith("nothing was written (--strict)\n")
    assert sorted(broken.iterdir()) == before
    good = ("images/Köter", "images/ant/1.png")
    whole = succeed("predict", "net.safetensors", *good, "--strict").stdout
    assert whole == succeed("predict", "net.safetensors", *good).stdout


def test_no_image_at_all_is_an_error_and_no_file(here: Path) -> None:
    Path("a.png").write_text("text")
    result = run("predict", "net.safetensors", "a.png", "net.safetensors", "-o", "out.csv")
    assert result.exit_code == 5
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "a.png: not an image of a known format",
        "net.safetensors: not an image of a known format",
        "error: no image could be used (2 failed, named above); nothing was written",
    ]
    assert not [name for name in os.listdir() if "out.csv" in name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(here: Path) -> None:
    os.mkfifo("images/pipe.png")
    result = run("predict", "net.safetensors", "images")
    assert "images/pipe.png: not a regular file" in result.stderr
    assert len(rows(result.stdout)) == 6


def test_what_would_take_all_memory_is_refused_alone(here: Path) -> None:
    Image.new("1", (1, 300_000)).save("long.png")
    Image.new("1", (15_000, 14_000)).save("large.png")
    result = run("predict", "net.safetensors", "long.png", "large.png", "images")
    assert "long.png: too long to be resized: 1 x 300000 pixels" in result.stderr
    assert "large.png: Image size" in result.stderr
    assert len(rows(result.stdout)) == 6


def test_eval_and_training_stop_at_an_image_that_cannot_be_read(broken: Path) -> None:
    """timm's own dataset would show the next image in its place."""
    message = fails(5, "eval", "net.safetensors", "--data-dir", "set", "-j", 1)
    assert "3 images cannot be read: " in message
    assert "set/validation/ant/0.png (image file is truncated" in message
    assert "set/validation/ant/gone.png (No such file or directory)" in message
    result = run("predict", "net.safetensors", "--data-dir", "set")
    assert result.exit_code == 5
    assert len(rows(result.stdout)) == 5
    (broken / "all").mkdir()
    Path("set/validation").rename("all/train")
    data = split_of("all", "train")
    model = attach(build(conv2(num_classes=2)), Popup(k="0.5"))
    with pytest.raises(DataError, match="cannot be read"):
        fit(model, data, data, quick(batch_size=8))


# --- input and output that cannot be used --------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (5, ("none.png",), "none.png: no such file or folder"),
        (5, ("images", "none"), "none: no such file or folder"),
        (5, ("images", "empty"), "empty: no images in this folder, expected "),
        (2, ("images", "--dataset", "digits"), "exclude each other"),
        (2, ("images", "--data-dir", "images"), "exclude each other"),
        (5, ("--dataset", "digit"), "near: digits"),
        (4, ("--dataset", "digits"), "digits has 10 classes, the network 4"),
        (6, ("images", "-o", "there.csv"), "there.csv: exists already"),
        (6, ("images", "-o", "none/a.csv"), "none: no such folder"),
        (6, ("images", "-o", "net.safetensors", "--force"), "is read by this command"),
        (2, ("images", "--device", "tpu"), "unknown --device 'tpu'"),
    ],
)
def test_a_clear_line_and_nothing_else(
    here: Path, code: int, arguments: tuple[str, ...], message: str
) -> None:
    (here / "empty").mkdir()
    Path("empty/notes.txt").write_text("no image")
    Path("there.csv").write_text("mine")
    before = {path: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert message in fails(code, "predict", "net.safetensors", *arguments)
    assert {path: path.read_bytes() for path in here.iterdir() if path.is_file()} == before
    if "there.csv" in arguments:
        succeed("predict", "net.safetensors", *arguments, "--force")
        assert len(rows(Path("there.csv").read_text())) == 6


def test_a_network_without_classes_or_of_odd_channels_is_refused(here: Path) -> None:
    headless = rs.make_recipe("test_resnet", args={"num_classes": 0})
    rs.save("headless.safetensors", headless)
    assert "no classifier" in fails(4, "predict", "headless.safetensors", "images", "-q")
    network(here / "four.safetensors", look(4), in_chans=4)
    for command in (["predict", "four.safetensors", "images"],
                    ["eval", "four.safetensors", "--data-dir", "set"]):  # fmt: skip
        assert "sees images of 4 channels" in fails(4, *command)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("strict", [True, False])
def test_a_full_disk_behind_stdout_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    plan = job.prepare(
        SourceSpec("net.safetensors"), ["images"], DataOptions(), None, strict=strict
    )
    with open("/dev/full", "w") as full:  # closing it flushes, as the interpreter does at its end
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\)"):
            _to_stdout(plan, job.Tally())


def test_lines_come_as_images_are_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counted(file: Any, mode: str) -> Any:
        opened.append(file.name)
        return decode(file, mode)

    monkeypatch.setattr(images_module, "decode", counted)
    plan = job.prepare(SourceSpec("net.safetensors"), ["images"], DataOptions(), None, batch_size=2)
    made: Iterator[bytes] = job.lines(plan, job.Tally(), lambda *_: None)
    assert next(made).startswith(b"path,class,probability")
    assert len(opened) == 2
    assert len(list(made)) == 6
    assert len(opened) == 6


# --- finding images ------------------------------------------------------------------------------


def test_folders_are_searched_whole_sorted_and_each_image_comes_once(here: Path) -> None:
    for name in ("b.PNG", "a/c.jpeg", "a/b/d.webp", "a.gif", "notes.txt", "png", ".png"):
        (here / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "f" / name).touch()
    expected = ["f/a.gif", "f/a/b/d.webp", "f/a/c.jpeg", "f/b.PNG"]
    assert find_images(["f"]) == expected
    assert find_images(["f", "f/b.PNG", "./f/a/", str(here / "f")]) == expected
    assert find_images(["f/b.PNG", "f"]) == ["f/b.PNG", *expected[:3]]
    assert find_images(["f/notes.txt"]) == ["f/notes.txt"]  # by name, whatever it is


def test_links_are_followed_but_not_in_circles(here: Path) -> None:
    (here / "f" / "a").mkdir(parents=True)
    (here / "f" / "a" / "x.png").touch()
    (here / "f" / "a" / "up").symlink_to("..")
    (here / "f" / "b").symlink_to("a")
    (here / "f" / "y.png").symlink_to("a/x.png")  # a copy, as data sets are made of links
    assert find_images(["f"]) == ["f/a/x.png", "f/y.png"]


def test_a_folder_that_cannot_be_searched_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("ant"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert "images/ant: the folder cannot be searched (Permission denied)" in fails(
        5, "predict", "net.safetensors", "images"
    )


def test_the_suffixes_hold_timms_and_no_document(here: Path) -> None:
    assert {*timm.data.readers.img_extensions.get_img_extensions(), ".webp", ".tif"} <= suffixes()
    assert not suffixes() & {".eps", ".ps", ".pdf", ".mpg", ".h5"}


# --- modes ---------------------------------------------------------------------------------------


def grey(high: int = 255) -> np.ndarray[Any, Any]:
    return np.linspace(0, high, 20 * 30).reshape(20, 30)


def read(image: Image.Image, mode: str = "RGB", format: str = "png", **options: Any) -> Any:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    found = decode(io.BytesIO(file.getvalue()), mode)
    assert found.mode == mode
    return np.asarray(found).astype(int)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_an_image_of_any_mode_is_shown_in_colours_or_grey(mode: str) -> None:
    draw = np.random.default_rng(0)
    start = Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    image, format = start.convert(mode), "tiff" if mode in ("CMYK", "YCbCr") else "png"
    for wanted in ("RGB", "L"):
        expected = np.asarray(image.convert(wanted))
        np.testing.assert_array_equal(read(image, wanted, format), expected)


@pytest.mark.parametrize(
    ("make", "format"),
    [
        (lambda: Image.fromarray(grey(65535).round().astype("<u2")), "png"),
        (lambda: Image.fromarray(grey(65535).round().astype("<u2")), "tiff"),
        (lambda: Image.fromarray(grey(65535).round().astype(">u2")), "tiff"),
        (lambda: Image.fromarray(grey(65535).round().astype(np.int32)), "tiff"),
    ],
)
def test_16_bit_greys_are_scaled_not_cut_off(make: Callable[[], Any], format: str) -> None:
    found = read(make(), "L", format)
    assert np.abs(found - grey()).max() <= 0.51
    assert len(np.unique(found)) == 256
    colours = read(make(), "RGB", format)
    assert (colours == found[..., None]).all()


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="whose range is unknown"):
        read(Image.fromarray(grey().astype(np.float32)), "RGB", "tiff")


def test_transparency_frames_and_rotation_are_as_timm_has_them(here: Path) -> None:
    """Transparency dropped, the first frame, the pixels as they are stored; no warning."""
    stored = Image.fromarray(np.stack([grey()] * 3, axis=2).astype(np.uint8))
    rotated = stored.getexif()
    rotated[0x112] = 6
    assert read(stored, exif=rotated).shape == (20, 30, 3)
    palette = stored.quantize(16)
    some = read(palette, transparency=bytes(range(16)))
    np.testing.assert_array_equal(some, np.asarray(palette.convert("RGB")))
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    assert (read(frames[0], "L", "gif", save_all=True, append_images=frames[1:]) == 10).all()


def test_a_network_of_one_channel_is_shown_greys(here: Path) -> None:
    network(here / "grey.safetensors", look(1), in_chans=1)
    Image.fromarray(grey(65535).astype("<u2")).save("deep.png")
    Image.fromarray(grey().astype(np.uint8)).convert("RGBA").save("flat.png")
    deep, flat = rows(succeed("predict", "grey.safetensors", "deep.png", "flat.png").stdout)
    assert deep["class"] == flat["class"]
    assert float(deep["probability"]) == pytest.approx(float(flat["probability"]), rel=0.02)
