"""Which images a job sees: no training image is a test image, in whatever layout they come; what is
held out to choose by; classes; images that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import dataset_helpers
import folder_helpers
import numpy as np
import pytest
import torch
from ensemble_helpers import TINY, Json, one_thread, run, said, succeed
from folder_helpers import CLASSES, COUNTS, LAYOUTS, truth
from PIL import Image
from surgery_helpers import write_images

import randsurgery as rs
from randsurgery.errors import DataError, UsageError
from randsurgery.format.generator import permutation
from randsurgery.format.recipe import Member
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.jobs.holdout import hold_out
from randsurgery.jobs.splits import Request, open_for_evaluation, open_for_training
from randsurgery.training.data import Data, Resident
from randsurgery.training.folders import read_folder

pytestmark = pytest.mark.slow

SMALL = ("conv2", "--width", "0.1", "--img-size", "16", "--epochs", "1", "-b", "64")
FOLDER = DatasetSpec(name="folder")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with one_thread():
        yield folder


def look(channels: int = 3) -> InputSpec:
    half = ((0.5).hex(),) * channels
    return InputSpec(size=(16, 16), channels=channels, mean=half, std=half)


def asked(root: str = "d", **more: Any) -> Request:
    return Request(FOLDER, look(), root, **more)


def refused(code: int, *arguments: object) -> str:
    """The one line of a command that ends with that code and has written nothing."""
    before = sorted(os.listdir())
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == before
    return result.stderr


def provenance(file: str = "o.safetensors") -> Json:
    return rs.read_recipe(file).members[0].provenance


def pets(root: str = "d", **splits: int) -> None:
    """Class folders of cats and dogs, so many of each in each split."""
    for seed, (split, count) in enumerate(splits.items()):
        write_images(Path(root, split), {"cat": count, "dog": count}, size=16, seed=seed)


# --- one small set of images in every layout ------------------------------------------------------


def shown(data: Data | None) -> list[tuple[str, str]]:
    """Which images a split has, by their bytes: (split that they are of, class that it says)."""
    if data is None:
        return []
    known = truth()
    found = []
    for path, label in zip(data.paths, data.labels.tolist(), strict=True):  # type: ignore[union-attr]
        of, name = known[Path(path).read_bytes()]
        assert data.classes[label] == name
        found.append((of, name))
    return found


def every(split: Any) -> list[tuple[str, str]]:
    """All images of a split, as ``shown`` has them."""
    counts = zip(CLASSES, COUNTS[split], strict=True)
    return sorted((split, name) for name, count in counts for _ in range(count))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_each_split_its_own_images(layout: str) -> None:
    root = Path("d")
    root.mkdir()
    LAYOUTS[layout](root)
    folder = read_folder("d")
    has_test = "test" in folder.splits
    if not {"test", "validation"} & set(folder.splits):  # a table without splits
        with pytest.raises(DataError):
            open_for_training(asked())
        found = open_for_training(asked(val_split="0.4"))
        both = shown(found.train) + shown(found.validation)
        assert found.test is None
        assert sorted(both) == every("train")
        assert len(shown(found.validation)) == 5  # of 6, 5 and 4 images, rounded down
        return
    found = open_for_training(asked())
    assert found.classes == CLASSES
    splits = {"train": found.train, "validation": found.validation, "test": found.test}
    roles = {"train": "train", "test": "test" if has_test else "validation"}
    if has_test and "validation" in folder.splits:
        roles["validation"] = "validation"
    for name, data in splits.items():
        wanted = roles.get(name)
        assert (data is not None) == (wanted is not None)
        if wanted is not None:
            assert sorted(shown(data)) == every(wanted)
    paths = [os.path.realpath(path) for data in splits.values() if data for path in data.paths]
    assert len(paths) == len(set(paths))
    assert found.dataset.test_split == roles["test"]
    data, dataset, _ = open_for_evaluation(asked(known=CLASSES), Member(), "test")
    assert shown(data) == shown(found.test)
    assert dataset == found.dataset


@pytest.mark.parametrize("layout", ["class_folders", "tiny_imagenet", "imagenet"])
def test_training_and_eval_see_these_splits_through_the_commands(layout: str) -> None:
    Path("d").mkdir()
    getattr(folder_helpers, layout)(Path("d"))
    result = succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    test = sum(COUNTS["test" if layout == "class_folders" else "validation"])
    assert provenance()["data"]["train_images"] == sum(COUNTS["train"])
    assert provenance()["data"]["test_images"] == test
    assert f"test {test} (" in result.stderr
    assert rs.read_recipe("o.safetensors").members[0].classes == CLASSES
    found = said("eval", "o.safetensors", "--data-dir", "d")
    assert (found["images"], found["split"]) == (test, "test")
    assert found["accuracy"] == provenance()["metrics"]["test_accuracy"]


# --- train and test folders, and their siblings ---------------------------------------------------


def test_training_images_are_no_test_images() -> None:
    pets(train=20, test=6)
    result = succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    assert "train 40 images, test 12 (test/), 2 classes\n" in result.stderr
    assert said("eval", "o.safetensors", "--data-dir", "d")["images"] == 12
    rows = succeed("predict", "o.safetensors", "--data-dir", "d", "--top", 1).stdout.splitlines()
    assert len(rows) == 13
    assert all(row.startswith("d/test/") for row in rows[1:])


def test_a_training_folder_alone_is_not_tested_on() -> None:
    pets(train=4, test=4)
    succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    shutil.rmtree("d/test")
    for command in (("popup", *SMALL), ("eval", "o.safetensors"), ("predict", "o.safetensors")):
        line = refused(5, *command, "--data-dir", "d")
        assert "found train/" in line
        assert "test" in line


@pytest.mark.parametrize("name", ["valdation", "vla", "Validation set", "extra"])
def test_a_misspelt_folder_is_no_split_and_is_named(name: str) -> None:
    pets(**{"train": 4, name: 4})
    line = refused(5, "popup", *SMALL, "--data-dir", "d")
    assert f"found train/, {name}/" in line
    assert ("near: validation" in line) == (name in ("valdation", "Validation set"))


def test_a_file_tested_on_a_test_folder_is_not_tested_on_validation_images() -> None:
    pets(train=4, val=3, test=2)
    succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    assert said("eval", "o.safetensors", "--data-dir", "d")["images"] == 4
    assert said("eval", "o.safetensors", "--data-dir", "d", "--split", "val")["images"] == 6
    shutil.rmtree("d/test")
    line = refused(5, "eval", "o.safetensors", "--data-dir", "d")
    assert "tested on a test folder, so val/ is not taken for one" in line


@pytest.mark.parametrize("how", ["symlink", "folder", "hard link"])
def test_splits_that_share_a_file_are_refused(how: str) -> None:
    pets(train=4, test=3)
    if how == "folder":
        shutil.rmtree("d/test/cat")
        Path("d/test/cat").symlink_to("../train/cat")
    elif how == "symlink":
        Path("d/test/cat/9.png").symlink_to("../../train/cat/1.png")
    else:
        os.link("d/train/cat/1.png", "d/test/cat/9.png")
    line = refused(5, "popup", *SMALL, "--data-dir", "d")
    assert "train" in line
    assert "test" in line
    assert "cat/" in line


def test_hidden_files_are_no_classes_and_are_counted() -> None:
    pets(train=4, validation=3)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        write_images(Path("d/train"), {name: 2}, size=16)
    for name in (".DS_Store", "._0.png", "Thumbs.db", "notes.heic"):
        Path("d/train/cat", name).write_bytes(b"x")
    result = succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    assert rs.read_recipe("o.safetensors").members[0].classes == ("cat", "dog")
    line = next(line for line in result.stderr.splitlines() if line.startswith("train "))
    assert line.startswith("train 8 images, test 6 (validation/), 2 classes; 6 left out: ")
    for word in ("hidden", "__MACOSX", "Thumbs.db", ".heic"):
        assert word in line


def test_data_of_one_class_is_refused() -> None:
    write_images(Path("d/train"), {"images": 4}, size=16)
    write_images(Path("d/val"), {"images": 4}, size=16, seed=1)
    assert "one class" in refused(5, "popup", *SMALL, "--data-dir", "d")


# --- what is held out -----------------------------------------------------------------------------


def digits(count: int = 200) -> Resident:
    draw = np.random.default_rng(0)
    labels = torch.from_numpy(draw.choice(4, count, p=[0.6, 0.3, 0.07, 0.03]))
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    return Resident(images.contiguous(), labels, tuple("abcd"), look())


@pytest.mark.parametrize("share", ["0.1", "0.25", "0.5", "0.001"])
def test_each_class_gives_its_share(share: str) -> None:
    data = digits()
    train, held = hold_out(data, share, 3)
    numbers = [sorted(part.images[:, 0, 0, 0].tolist()) for part in (train, held)]  # type: ignore[attr-defined]
    assert sorted(numbers[0] + numbers[1]) == list(range(200))
    assert held.where
    slow = []
    for label in range(4):  # by hand: of each class those that its permutation brings first
        own = [i for i in range(200) if data.labels[i] == label]
        order = permutation(len(own), seed=3, stream=f"validation-{label}")
        count = max(1, int(Fraction(share) * len(own)))
        slow += [own[at] for at in order[:count]]
    assert numbers[1] == sorted(slow)
    again, other = hold_out(data, share, 3)[1], hold_out(data, share, 4)[1]
    assert torch.equal(again.images, held.images)  # type: ignore[attr-defined]
    assert not torch.equal(other.images, held.images)  # type: ignore[attr-defined]


@pytest.mark.parametrize("share", ["0", "1", "1.5", "-0.1", "x", "nan"])
def test_a_share_is_a_decimal_between_0_and_1(share: str) -> None:
    assert "--val-split" in refused(2, "train", *SMALL, "--val-split", share, "--dry-run")


def test_a_class_of_one_image_cannot_be_held_out() -> None:
    pets(train=4, test=3)
    write_images(Path("d/train"), {"emu": 1}, size=16)
    assert "class emu has 1 training image" in refused(
        5, "train", *SMALL, "--data-dir", "d", "--val-split", "0.5"
    )


@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_links_to_one_image_are_on_one_side(link: str) -> None:
    pets(train=12, test=3)
    for path in sorted(Path("d/train").glob("*/*.png")):
        other = path.with_name(f"zz{path.name}")
        if link == "symlink":
            other.symlink_to(path.name)
        else:
            os.link(path, other)
    for seed in range(5):
        found = open_for_training(asked(val_split="0.3", val_seed=seed))
        assert found.validation is not None
        sides = [{os.stat(path).st_ino for path in part.paths}
                 for part in (found.train, found.validation)]  # fmt: skip
        assert not sides[0] & sides[1]
        assert [len(side) for side in sides] == [18, 6]
        assert len(found.train) + len(found.validation) == 48


def test_what_was_held_out_is_known_again_or_refused() -> None:
    pets(train=10, test=4)
    shutil.copytree("d", "e")
    held = ("--val-split", "0.2")
    succeed("train", *SMALL, "--data-dir", "d", *held, "-o", "o.safetensors")
    metrics = provenance()["metrics"]
    for root in ("d", "e", "./e/"):
        found = said("eval", "o.safetensors", "--data-dir", root, "--split", "val")
        assert found["accuracy"] == metrics["val_accuracy"]
    write_images(Path("more"), {"cat": 40}, size=16, seed=9)
    shutil.copy("more/cat/0.png", "e/train/cat/new0.png")
    assert said("eval", "o.safetensors", "--data-dir", "e", "--split", "val")["images"] == 4
    assert "not those" in refused(
        4, "eval", "o.safetensors", "--data-dir", "e", "--split", "train"
    )  # the new one is none
    for path in Path("more/cat").iterdir():
        shutil.copy(path, f"e/train/cat/new{path.name}")
    for split in ("val", "train"):
        line = refused(4, "eval", "o.safetensors", "--data-dir", "e", "--split", split)
        assert "its training images are not those that the file was trained on" in line
    assert said("eval", "o.safetensors", "--data-dir", "e")["images"] == 8
    succeed("ensemble", "build", *SMALL, "--data-dir", "d", *held, "--members", 2, "--kind", "full",
            "-o", "b.safetensors")  # fmt: skip
    assert "not those" in refused(4, "ensemble", "calibrate", "b.safetensors", "--data-dir", "e")
    assert said("ensemble", "calibrate", "b.safetensors", "--data-dir", "d")["images"] == 4
    result = succeed("ensemble", "eval", "b.safetensors", "--data-dir", "d", "--split", "val")
    assert "too good" in result.stderr


def test_a_folders_test_images_that_fitted_a_temperature_are_left_out() -> None:
    pets(train=10, test=10)
    shutil.copytree("d", "e")
    write_images(Path("more"), {"cat": 1}, size=16, seed=9)
    shutil.copy("more/cat/0.png", "e/test/cat/new.png")
    succeed("ensemble", "build", *SMALL, "--data-dir", "d", "--members", 2, "--kind", "full",
            "-o", "b.safetensors")  # fmt: skip
    assert said("ensemble", "calibrate", "b.safetensors", "--data-dir", "d")["images"] == 4
    found = said("ensemble", "eval", "b.safetensors", "--data-dir", "d")
    assert (found["images"], found["left_out"]) == (16, 4)
    assert said("eval", "b.safetensors", "--member", "m0", "--data-dir", "d")["images"] == 16
    assert said("ensemble", "eval", "b.safetensors", "--data-dir", "e")["images"] == 21
    succeed("ensemble", "calibrate", "b.safetensors", "--data-dir", "d", "--share", "1")
    result = succeed("ensemble", "eval", "b.safetensors", "--data-dir", "d")
    assert "a temperature was fitted on these images: its figures are too good" in result.stderr
    result = succeed("ensemble", "eval", "b.safetensors", "--data-dir", "e")  # other images
    assert "too good" not in result.stderr


def test_validation_images_that_fitted_a_temperature_are_left_out() -> None:
    pets(train=20, test=4)
    succeed("ensemble", "build", *SMALL, "--data-dir", "d", "--val-split", "0.5", "--members", 2,
            "--kind", "full", "-o", "b.safetensors")  # fmt: skip
    found = said("ensemble", "calibrate", "b.safetensors", "--data-dir", "d", "--share", "0.5")
    assert (found["split"], found["images"]) == ("validation", 10)
    for command in (("ensemble", "eval"), ("eval", "--member", "m1")):
        shown_on = said(*command, "b.safetensors", "--data-dir", "d", "--split", "val")
        assert shown_on["images"] == 10
    assert said("eval", "b.safetensors", "--member", "m0", "--data-dir", "d")["images"] == 8


def test_skipped_images_are_counted_once() -> None:
    pets(train=10, test=4)
    Path("d/train/cat/3.png").write_bytes(b"")
    result = succeed("train", *SMALL, "--data-dir", "d", "--val-split", "0.2", "--skip-bad", "-o",
                     "o.safetensors")  # fmt: skip
    assert "; 1 unreadable skipped" in result.stderr
    assert provenance()["data"]["train_skipped"] == 1
    assert "validation_skipped" not in provenance()["data"]


def test_folders_beside_the_splits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pets(train=10, vall=3)
    result = succeed("train", *SMALL, "--data-dir", "d", "--val-split", "0.2", "--dry-run")
    assert "vall/ is not looked into" in result.stderr
    monkeypatch.setenv("HOME", str(Path().resolve()))
    result = succeed("train", *SMALL, "--data-dir", "~/d", "--val-split", "0.2", "--dry-run")
    assert "train 16 images" in result.stderr


def test_a_validation_folder_and_a_hold_out_exclude_each_other() -> None:
    pets(train=4, val=3, test=3)
    line = refused(2, "train", *SMALL, "--data-dir", "d", "--val-split", "0.5")
    assert "(val/)" in line


def test_a_validation_folder_beside_a_test_folder_is_validated_on() -> None:
    pets(train=6, Valid=3, test=3)
    result = succeed("train", *SMALL, "--data-dir", "d", "--keep", "best", "-o", "o.safetensors")
    assert "train 12 images, validation 6 (Valid/), test 6 (test/), 2 classes" in result.stderr
    assert "validation accuracy" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("test accuracy ")
    assert {"val_accuracy", "test_accuracy"} <= set(provenance()["metrics"])


def test_a_hold_out_without_test_images_has_a_validation_accuracy() -> None:
    pets(train=10)
    result = succeed(
        "train", *SMALL, "--data-dir", "d", "--val-split", "0.2", "-o", "o.safetensors"
    )
    assert result.stdout.splitlines()[-1].startswith("validation accuracy ")
    assert "test_accuracy" not in provenance()["metrics"]
    assert "found train/" in refused(5, "eval", "o.safetensors", "--data-dir", "d")
    found = said("eval", "o.safetensors", "--data-dir", "d", "--split", "validation")
    assert (found["images"], found["split"]) == (4, "validation")
    assert found["accuracy"] == provenance()["metrics"]["val_accuracy"]
    rest = said("eval", "o.safetensors", "--data-dir", "d", "--split", "train")
    assert rest["images"] == 16


HELD = ("train", "conv2", "--width", "0.1", "--img-size", "8", "-b", "64", "--val-split", "0.2",
        "--keep", "best", "--epochs", "6", "--lr", "0.05")  # fmt: skip


def records(file: str = "o") -> list[Json]:
    return [json.loads(line) for line in Path(f"{file}.metrics.jsonl").read_text().splitlines()]


def test_the_best_epoch_by_validation_is_kept_and_tested_once() -> None:
    succeed(*HELD, "-o", "o.safetensors")
    *epochs, last = records()
    assert [record["epoch"] for record in epochs] == list(range(1, 7))
    assert not any(key.startswith("test_") for record in epochs for key in record)
    best = max(record["val_accuracy"] for record in epochs)
    kept = next(record for record in epochs if record["val_accuracy"] == best)
    assert (last["epoch"], last["kept"]) == (kept["epoch"], "best")
    assert last["val_accuracy"] == best
    assert provenance()["metrics"]["test_accuracy"] == last["test_accuracy"]
    assert said("eval", "o.safetensors")["accuracy"] == last["test_accuracy"]
    assert said("eval", "o.safetensors", "--split", "val")["accuracy"] == best
    again = succeed(*HELD, "-o", "again.safetensors")
    assert Path("o.safetensors").read_bytes() == Path("again.safetensors").read_bytes()
    assert f"kept: epoch {kept['epoch']}, the best by validation accuracy" in again.stderr


def test_the_last_epoch_is_kept_unless_told_otherwise() -> None:
    plain = [one for one in HELD if one not in ("--keep", "best")]
    succeed(*plain, "-o", "o.safetensors")
    *epochs, last = records()
    assert (last["epoch"], last["kept"]) == (6, "last")
    assert last["val_accuracy"] == epochs[-1]["val_accuracy"]


def test_patience_ends_a_run() -> None:
    succeed(*HELD, "--epochs", 40, "--patience", 2, "-o", "o.safetensors")
    *epochs, last = records()
    accuracies = [record["val_accuracy"] for record in epochs]
    best = accuracies.index(max(accuracies))
    assert len(epochs) == best + 3 < 40
    assert (last["epoch"], last["epochs_run"]) == (best + 1, best + 3)


@pytest.mark.parametrize("option", [("--keep", "best"), ("--patience", "3")])
def test_the_test_images_never_choose(option: tuple[str, str]) -> None:
    line = refused(2, "popup", *SMALL, *option)
    assert "--val-split 0.1" in line
    pets(train=4, val=3)
    assert "--val-split 0.1" in refused(2, "popup", *SMALL, "--data-dir", "d", *option)


def test_members_of_a_build_hold_out_the_same_images_and_are_calibrated_on_them() -> None:
    build = ("ensemble", "build", "conv2", *TINY, "-b", 64, "--epochs", 1, "--kind", "full",
             "--members", 2)  # fmt: skip
    succeed(*build, "--val-split", "0.2", "-o", "e.safetensors")
    told = [m.provenance["settings"] for m in rs.read_recipe("e.safetensors").members]
    assert [(one["seed"], one["val_seed"]) for one in told] == [(0, 0), (1, 0)]
    found = said("ensemble", "calibrate", "e.safetensors")
    assert (found["split"], found["images"]) == ("validation", 283)
    assert said("ensemble", "eval", "e.safetensors")["left_out"] == 0
    shown_on = said("ensemble", "eval", "e.safetensors", "--split", "validation")
    assert (shown_on["split"], shown_on["images"]) == ("validation", 283)
    succeed(*build, "-o", "p.safetensors")
    found = said("ensemble", "calibrate", "p.safetensors")
    assert (found["split"], found["images"]) == ("test", 72)
    assert said("ensemble", "eval", "p.safetensors")["left_out"] == 72


# --- classes --------------------------------------------------------------------------------------


def test_other_class_names_are_refused_unless_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset_helpers.cifar10(Path("c"))
    dataset_helpers.without_checksums(monkeypatch)
    cifar = ("--dataset", "torch/cifar10", "--data-dir", "c")
    succeed("popup", *SMALL, "-o", "o.safetensors")
    for command in (("eval", "o.safetensors"), ("popup", "o.safetensors", "--epochs", 1),
                    ("train", "o.safetensors", "--epochs", 1)):  # fmt: skip
        line = refused(4, *command, *cifar)
        assert "class 0 is 'airplane', of the file '0'" in line
        assert "--any-classes" in line
    assert said("eval", "o.safetensors", *cifar, "--any-classes")["images"] == 20
    succeed("train", "o.safetensors", "--epochs", 1, *cifar, "--any-classes", "-o", "t.safetensors")
    assert rs.read_recipe("t.safetensors").members[0].classes == dataset_helpers.CIFAR10


def test_folders_of_other_classes_are_refused_unless_any_will_do() -> None:
    pets(train=4, test=3)
    pets("e", train=4, test=2)
    for split in ("train", "test"):
        Path("e", split, "dog").rename(Path("e", split, "eel"))
    succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    for command in (("eval",), ("train", "--epochs", 1)):
        line = refused(4 if command[0] == "train" else 5, command[0], "o.safetensors", *command[1:],
                       "--data-dir", "e")  # fmt: skip
        assert "'eel'" in line
    assert said("eval", "o.safetensors", "--data-dir", "e", "--any-classes")["images"] == 4


def test_some_of_the_files_classes_are_read_by_name() -> None:
    write_images(Path("d/train"), {"ant": 4, "bee": 4, "cat": 4}, size=16)
    write_images(Path("d/test"), {"ant": 2, "bee": 2, "cat": 2}, size=16, seed=1)
    succeed("popup", *SMALL, "--data-dir", "d", "-o", "o.safetensors")
    write_images(Path("e/train"), {"cat": 4, "bee": 4}, size=16, seed=2)
    write_images(Path("e/test"), {"cat": 2, "bee": 2}, size=16, seed=3)
    found = open_for_training(asked("e", known=("ant", "bee", "cat")))
    assert found.classes == ("ant", "bee", "cat")
    assert sorted(set(found.train.labels.tolist())) == [1, 2]  # type: ignore[union-attr]
    succeed("train", "o.safetensors", "--epochs", 1, "--data-dir", "e", "-o", "t.safetensors")
    assert rs.read_recipe("t.safetensors").members[0].classes == ("ant", "bee", "cat")


# --- images that cannot be read, or have no label -------------------------------------------------


@pytest.fixture
def damaged() -> None:
    pets(train=8, test=8)
    for split, index in (("train", 1), ("train", 3), ("test", 2)):
        path = Path(f"d/{split}/cat/{index}.png")
        path.write_bytes(path.read_bytes()[:60])
    Path("d/train/dog/2.png").write_bytes(b"<html>not found</html>")
    Path("d/train/dog/4.png").write_bytes(b"")


@pytest.mark.usefixtures("damaged")
def test_all_unreadable_images_are_listed_before_any_work() -> None:
    line = refused(5, "popup", *SMALL, "--data-dir", "d")
    assert line.startswith("error: 5 images cannot be read: d/train/cat/1.png (")
    for name in ("train/cat/3.png", "train/dog/2.png (not an image", "test/cat/2.png"):
        assert f"d/{name}" in line
    assert "--skip-bad" in line


@pytest.mark.usefixtures("damaged")
def test_images_are_skipped_counted_and_recorded_if_told_so() -> None:
    result = succeed("popup", *SMALL, "--data-dir", "d", "--skip-bad", "-o", "o.safetensors")
    assert "train 12 images, test 15 (test/), 2 classes; 5 unreadable skipped" in result.stderr
    data = provenance()["data"]
    assert (data["train_skipped"], data["test_skipped"]) == (4, 1)
    assert "d/test/cat/2.png" in refused(5, "eval", "o.safetensors", "--data-dir", "d")
    found = said("eval", "o.safetensors", "--data-dir", "d", "--skip-bad")
    assert (found["images"], found["skipped"]) == (15, 1)
    assert found["accuracy"] == provenance()["metrics"]["test_accuracy"]


def test_the_first_ten_are_named() -> None:
    pets(train=20, test=4)
    for index in range(15):
        Path(f"d/train/cat/{index}.png").write_bytes(b"")
    line = refused(5, "train", *SMALL, "--data-dir", "d")
    assert line.startswith("error: 15 images cannot be read: ")
    assert line.count("d/train/cat/") == 10
    assert "and 5 more" in line


def test_unlabelled_images_are_named() -> None:
    class Unlabelled(torch.utils.data.Dataset[Any]):
        transform: Any = None

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Any:
            return self.transform(Image.new("RGB", (16, 16))), 0 if index < 3 else -1

    from randsurgery.training.data import Streamed
    from randsurgery.training.evaluate import evaluate

    data = Streamed(Unlabelled(), ("a", "b"), look(), torch.device("cpu"))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2)).train()
    with pytest.raises(DataError, match=r"no label: image 3, image 4, .*image 11;"):
        evaluate(model, data)
    assert model.training
    known = Streamed(Unlabelled(), ("a", "b"), look(), torch.device("cpu"), known=np.array(
        [0] * 3 + [-1] * 9))  # fmt: skip
    with pytest.raises(DataError, match=r"no label: image 3, .*image 11;"):
        evaluate(model, known)


def test_evaluation_gives_every_part_its_mode_back() -> None:
    from randsurgery.training.evaluate import evaluate

    class Fails(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop = torch.nn.BatchNorm2d(3), torch.nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.drop.training
            raise RuntimeError("broken")

    model = Fails().train()
    model.norm.eval()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, digits())
    assert [module.training for module in model.modules()] == [True, False, True]


# --- torchvision's sets ---------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (32, 3), (1024, 1), (1024, 3)])
def test_cifar_has_the_channels_that_are_asked_for(
    size: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above some size it is streamed: at 1,024 pixels here, at 224 with all its images."""
    from randsurgery.training import datasets

    dataset_helpers.cifar10(Path("c"), each=6)
    dataset_helpers.without_checksums(monkeypatch)
    monkeypatch.setattr(datasets, "MAX_RESIDENT", 1 << 20)
    half = ((0.5).hex(),) * channels
    spec = InputSpec(size=(size, size), channels=channels, mean=half, std=half)
    data = datasets.open_data(DatasetSpec(name="torch/cifar10"), spec, "test", data_dir="c")
    assert isinstance(data, Resident) == (size == 32)
    images, labels = next(data.evaluation(4))
    assert images.shape == (4, channels, size, size)
    assert labels.tolist() == data.labels[:4].tolist()  # type: ignore[index]
    train, held = hold_out(datasets.open_data(
        DatasetSpec(name="torch/cifar10"), spec, "train", data_dir="c"), "0.4", 0)  # fmt: skip
    assert len(train) + len(held) == 30


def test_a_hold_out_needs_labels() -> None:
    from randsurgery.training.data import Streamed

    with pytest.raises(DataError, match="--val-split needs to know"):
        hold_out(Streamed([], (), look(), torch.device("cpu")), "0.1", 0)
    with pytest.raises(UsageError, match="below 1"):
        hold_out(digits(), "1", 0)
