"""Folders that others bring: each layout is read as what it is, all else refused on one line."""

from __future__ import annotations

import dataclasses
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from folder_helpers import CLASSES, COUNTS, LAYOUTS, Part, every_image, image, put, truth, write
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from randsurgery.errors import DataError
from randsurgery.training import labels, scan
from randsurgery.training.folders import SPLIT_NAMES, Folder, read_folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder ``photos`` in the working folder, so that messages are those that a user sees."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    return Path("photos")


def files(root: Path, *places: str, content: bytes | str = b"") -> None:
    """Empty files, by paths; a path that ends with a slash is a folder."""
    for place in places:
        if place.endswith("/"):
            (root / place).mkdir(parents=True)
        else:
            put(root / place, content)


def two_classes(root: Path, *parts: str) -> None:
    for part in parts or ("train", "test"):
        files(root, f"{part}/cat/{part}0.png", f"{part}/dog/{part}1.png")


def refused(root: Path | str, *fragments: str) -> str:
    """The message that a folder is refused with, which holds all of these."""
    with pytest.raises(DataError) as caught:
        read_folder(str(root))
    return checked(caught.value, *fragments)


def checked(error: DataError, *fragments: str) -> str:
    message = str(error)
    assert message.isprintable(), message
    for fragment in fragments:
        assert fragment in message
    return message


def pairs(folder: Folder, part: Part) -> dict[str, str]:
    """Path below the root -> class."""
    listing = folder.split(part)
    start = len(folder.root) + 1
    return {p[start:]: label for p, label in zip(listing.paths, listing.labels, strict=True)}


# --- layouts -------------------------------------------------------------------------------------

WITHOUT: dict[str, set[str]] = {
    "ImageNet": {"test"},
    "class folders with labels.csv": {"test"},
    "Tiny-ImageNet": {"test"},
    "Tiny-ImageNet sorted": {"test"},
    "Tiny-ImageNet sorted deeper": {"test"},
    "labels.csv in splits of subfolders": {"test"},
    "labels.csv without splits": {"validation", "test"},
    "labels.csv without header": {"validation", "test"},
    "metadata.csv": {"validation"},
}
"""Splits that a layout does not have, or not with labels."""

EVERY = pytest.mark.parametrize("name", LAYOUTS)


@EVERY
def test_every_image_has_its_split_and_class(root: Path, name: str) -> None:
    LAYOUTS[name](root)
    folder, known = read_folder("photos"), truth()
    parts = set(COUNTS) - WITHOUT.get(name, set())
    assert set(folder.splits) == parts
    assert list(folder.splits) == [part for part in SPLIT_NAMES if part in parts]
    assert folder.classes == CLASSES
    for part, listing in folder.splits.items():
        assert len(listing.paths) == len(set(listing.paths)) == sum(COUNTS[part])
        for path, label in zip(listing.paths, listing.labels, strict=True):
            assert known[Path(path).read_bytes()] == (part, label)
        assert [listing.labels.count(name) for name in CLASSES] == list(COUNTS[part])
        assert list(listing.paths) == sorted(listing.paths, key=natural_key)
    real = [os.path.realpath(path) for each in folder.splits.values() for path in each.paths]
    assert len(set(real)) == len(real)


@EVERY
def test_the_order_of_the_file_system_does_not_matter(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LAYOUTS[name](root)
    expected = read_folder("photos")
    draw, listed = random.Random(0), os.scandir

    class Shuffled:
        def __init__(self, path: str) -> None:
            with listed(path) as entries:
                self.entries = draw.sample(found := list(entries), len(found))

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Shuffled)
    for _ in range(3):
        assert read_folder("photos") == expected


@pytest.mark.parametrize(
    ("name", "layout", "where"),
    [
        ("class folders", "class folders", ["train/", "validation/", "test/"]),
        ("class folders of other names", "class folders", ["Training/", "VALID/", "testing/"]),
        ("Tiny-ImageNet", "Tiny-ImageNet", ["train/", "val/"]),
        ("Tiny-ImageNet sorted", "class folders", ["train/", "val/"]),
        ("labels.csv in the root", "labels.csv", ["train/", "validation/", "test/"]),
        ("metadata.csv", "labels.csv", ["train/", "test/"]),
        ("labels.csv without splits", "labels.csv", ["labels.csv"]),
        ("labels.csv with splits", "labels.csv",
         [f"labels.csv (split {part})" for part in COUNTS]),
    ],
)  # fmt: skip
def test_a_layout_says_what_it_is(root: Path, name: str, layout: str, where: list[str]) -> None:
    LAYOUTS[name](root)
    folder = read_folder("photos")
    assert folder.layout == layout
    assert [listing.where for listing in folder.splits.values()] == where


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("class folders", ""),
        ("class folders with labels.csv", "1 left out: 1 labels.csv (not used)"),
        ("Tiny-ImageNet", "3 left out: 3 .txt"),
        ("Tiny-ImageNet sorted", "4 left out: 3 .txt, 1 val_annotations.txt (not used)"),
        ("labels.csv from Windows", ""),
    ],
)
def test_a_layout_leaves_out_what_is_not_used(root: Path, name: str, text: str) -> None:
    LAYOUTS[name](root)
    assert read_folder("photos").left_out_text() == text


@pytest.mark.parametrize("given", ["photos", "photos/", ".", "./photos", "absolute"])
def test_class_folders_are_in_timms_order(
    root: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "train/{label}/{i}.png", parts=("train",))
    for name in ("a1/10.png", "a1/9.png", "A/b.PNG", "a/2.jpg", "Zoo/x.png", "a01b/x.png"):
        put(root / "train" / name)
    if given == ".":
        monkeypatch.chdir(root)
    given = str(root.resolve()) if given == "absolute" else given
    twin, index = find_images_and_targets(os.path.join(given, "train"), types=[".png", ".jpg"])
    folder = read_folder(given)
    ties = {"a", "A"}  # which timm orders by chance
    assert [name for name in folder.classes if name not in ties] == [
        name for name in sorted(index, key=lambda name: index[name]) if name not in ties
    ]
    assert [name for name in folder.classes if name in ties] == ["A", "a"]
    train = folder.split("train")
    assert list(train.paths) == [path for path, _ in twin]
    names = {number: name for name, number in index.items()}
    assert list(train.labels) == [names[number] for _, number in twin]


def test_what_timms_order_fails_at_is_ordered() -> None:
    names = ["10²", "9", "²", "x10y", "x9y", "X9y", "٣", ""]
    with pytest.raises(ValueError, match="²"):
        sorted(names, key=natural_key)
    for name in set(names) - {"10²", "²"}:
        assert scan.natural(name) == (natural_key(name), name)
    expected = ["", "٣", "9", "10²", "X9y", "x9y", "x10y", "²"]
    assert sorted(names, key=scan.natural) == expected


# --- splits are what they are called -------------------------------------------------------------


@pytest.mark.parametrize("name", [n for names in SPLIT_NAMES.values() for n in names])
@pytest.mark.parametrize("change", [str, str.upper, str.title])
def test_splits_by_any_name(root: Path, name: str, change: Callable[[str], str]) -> None:
    (part,) = (part for part, names in SPLIT_NAMES.items() if name in names)
    two_classes(root, change(name))
    folder = read_folder("photos")
    assert list(folder.splits) == [part]
    assert folder.split(part).where == f"{change(name)}/"
    assert folder.classes == ("cat", "dog")


def test_no_split_takes_the_place_of_another(root: Path) -> None:
    """timm takes the whole root for a test split that is not there."""
    two_classes(root, "train", "valdation", "extra")
    folder = read_folder("photos")
    assert folder.others == ("extra", "valdation")
    with pytest.raises(DataError) as caught:
        folder.split("validation")
    assert checked(caught.value) == (
        "photos: no validation split: found train/, extra/, valdation/ (near: validation); "
        "expected a folder named val, valid, validation, eval or evaluation; to train without one, "
        "--val-split 0.1 holds images out of train"
    )
    assert str(folder.no_split("validation", "test")) == (
        "photos: no validation or test split: found train/, extra/, valdation/ "
        "(near: validation); expected a folder named val, valid, validation, eval, evaluation, "
        "test or testing; to train without one, --val-split 0.1 holds images out of train"
    )
    with pytest.raises(DataError, match="no test split"):
        folder.split("test")


def test_train_and_test_alone_are_train_and_test(root: Path) -> None:
    two_classes(root, "train", "test")
    folder = read_folder("photos")
    assert pairs(folder, "test") == {"test/cat/test0.png": "cat", "test/dog/test1.png": "dog"}
    assert pairs(folder, "train") == {"train/cat/train0.png": "cat", "train/dog/train1.png": "dog"}
    with pytest.raises(DataError, match="no validation split: found train/, test/; expected"):
        folder.split("validation")


def test_a_table_without_the_split_says_what_it_has(root: Path) -> None:
    LAYOUTS["labels.csv without splits"](root)
    with pytest.raises(DataError) as caught:
        read_folder("photos").split("test")
    assert checked(caught.value) == (
        "photos: no test split: found labels.csv; expected lines with test or testing in a column "
        "named split"
    )


@pytest.mark.parametrize(
    ("images", "name"),
    [
        (["test/0.png", "test/1.png"], "test"),
        (["Test/images/0.png", "Test/images/1.png"], "Test"),
        (["test/0.png", "test/1.png", "test/notes/a.txt"], "test"),
    ],
)
def test_images_without_labels_are_told(root: Path, images: list[str], name: str) -> None:
    two_classes(root, "train")
    files(root, *images)
    folder = read_folder("photos")
    assert (set(folder.splits), folder.unlabelled) == ({"train"}, {"test": 2})
    with pytest.raises(DataError) as caught:
        folder.split("test")
    assert checked(caught.value) == (
        f"photos: {name}/ has 2 images without labels; sort them into class folders, {name}/CLASS, "
        f"or add {name}/labels.csv with the columns path and class"
    )


def test_imagenets_validation_images_as_they_come_have_no_labels(root: Path) -> None:
    two_classes(root, "train")
    files(root, *(f"val/ILSVRC2012_val_{i:08}.JPEG" for i in range(1, 4)))
    folder = read_folder("photos")
    assert folder.unlabelled == {"validation": 3}
    with pytest.raises(DataError, match="val/ has 3 images without labels; sort them into class"):
        folder.split("validation")


def test_a_class_may_be_called_images(root: Path) -> None:
    files(root, "train/images/0.png", "train/icons/0.png", "test/images/0.png")
    assert pairs(read_folder("photos"), "test") == {"test/images/0.png": "images"}


def test_a_train_split_without_labels_leaves_the_others(root: Path) -> None:
    two_classes(root, "test")
    files(root, "train/0.png")
    folder = read_folder("photos")
    assert (folder.classes, folder.unlabelled) == (("cat", "dog"), {"train": 1})
    with pytest.raises(DataError, match="train/ has 1 images without labels"):
        folder.split("train")


def test_an_empty_split_is_no_split(root: Path) -> None:
    two_classes(root, "train")
    files(root, "test/cat/", "val/notes.txt")
    folder = read_folder("photos")
    assert set(folder.splits) == {"train"}
    for part, name in (("test", "test"), ("validation", "val")):
        with pytest.raises(DataError, match=f"photos: {name}/ has no images"):
            folder.split(part)  # type: ignore[arg-type]


def test_classes_are_those_of_train_else_of_all(root: Path) -> None:
    two_classes(root, "train")
    files(root, "train/emu/0.png", "val/cat/0.png", "val/emu/", "test/nothing/readme.txt")
    folder = read_folder("photos")
    assert folder.classes == ("cat", "dog", "emu")
    assert pairs(folder, "validation") == {"val/cat/0.png": "cat"}
    other = root / "other"
    files(other, "val/cat/0.png", "val/dog/1.png", "test/emu/0.png")
    assert read_folder(str(other)).classes == ("cat", "dog", "emu")


def test_a_folder_is_frozen(root: Path) -> None:
    two_classes(root)
    folder = read_folder("photos")
    for what in (folder, folder.split("train")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(what, dataclasses.fields(what)[0].name, "other")


# --- what is left out ----------------------------------------------------------------------------


def test_what_systems_leave_behind_is_left_out_and_counted(root: Path) -> None:
    two_classes(root, "train", "test")
    files(
        root, ".DS_Store", "__MACOSX/train/cat/._0.png", "README.md", "cover.png",
        "train/.ipynb_checkpoints/0-checkpoint.png", "train/.ipynb_checkpoints/1-checkpoint.png",
        "train/__MACOSX/cat/0.png", "train/cat/._train0.png", "train/cat/.DS_Store",
        "train/cat/Thumbs.db", "train/cat/THUMBS.DB", "train/dog/Desktop.ini",
        "train/@eaDir/cat/SYNO.png", "train/$RECYCLE.BIN/x.png", "test/lost+found/",
        "test/cat/a.HEIC", "test/cat/b.heic", "test/cat/LICENSE", "test/dog/notes.txt",
        "test/cat/thumbs/.hidden/x.png", "val/.gitkeep",
    )  # fmt: skip
    folder = read_folder("photos")
    assert folder.classes == ("cat", "dog")
    assert {part: len(each.paths) for part, each in folder.splits.items()} == {
        "train": 2,
        "test": 2,
    }
    assert folder.others == ()
    assert folder.left_out == {
        "hidden": 6, "__MACOSX": 2, "Thumbs.db": 2, "desktop.ini": 1, "@eaDir": 1,
        "$RECYCLE.BIN": 1, "lost+found": 1, ".heic": 2, "without a suffix": 1, ".txt": 1,
        "in no split folder": 1,
    }  # fmt: skip
    assert folder.left_out_text() == (
        "19 left out: 6 hidden, 2 .heic, 2 Thumbs.db, 2 __MACOSX, 1 $RECYCLE.BIN, 1 .txt, "
        "1 @eaDir, 1 desktop.ini, 3 of other kinds"
    )


def test_a_kind_is_printable(root: Path) -> None:
    two_classes(root)
    files(root, "train/cat/a.\x1bb\n")
    assert read_folder("photos").left_out_text() == "1 left out: 1 .\\x1bb\\n"


def test_what_is_no_regular_file_is_left_out(root: Path) -> None:
    two_classes(root)
    os.mkfifo("photos/train/cat/pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("photos/train/cat/socket.png")
    assert read_folder("photos").left_out_text() == "2 left out: 2 not a regular file"
    files(root, "train/emu/")
    os.mkfifo("photos/train/emu/pipe.png")
    refused(root, "train/emu: a class folder without images, but 1 not a regular file")


# --- refusals ------------------------------------------------------------------------------------


def only_directly(root: Path) -> None:
    files(root, "cat/0.png", "dog/0.png")


def too_deep(root: Path) -> None:
    two_classes(root)
    files(root, "train/cat/" + "a/" * 60)


def one_class(root: Path) -> None:
    files(root, *(f"train/cat/{i}.png" for i in range(4)), "test/cat/0.png")


def one_class_in_a_table(root: Path) -> None:
    files(root, "0.png", "1.png")
    put(root / "labels.csv", "path,class\n0.png,cat\n1.png,cat\n")


def bad_class(name: str) -> Callable[[Path], None]:
    def written(root: Path) -> None:
        two_classes(root)
        try:
            files(root, f"train/{name}/0.png")
        except OSError:
            pytest.skip("a name that this file system does not take")

    return written


def bad_class_in_a_table(root: Path) -> None:
    files(root, "0.png", "1.png")
    put(root / "labels.csv", f"path,class\n0.png,{'x' * 5000}\n1.png,cat\n")


@pytest.mark.parametrize(
    ("places", "fragments"),
    [
        # no split folder
        ((), ["photos: no folder train/, and no images; put them into class folders, train/CLASS"]),
        (["0.png", "1.png"], ["photos: no folder train/, and 2 images without labels"]),
        (["cat/0.png", "dog/0.png"],
         ["no folder train/, validation/ or test/: found cat/, dog/; put the class folders under "
          "train/ (and test/ or validation/), or, to hold out a part of the training images, all "
          "under train/ with --val-split 0.1"]),
        (["cat/0.png", "dog/0.png", "labels.csv"], ["found cat/, dog/; put the class folders"]),
        (["trian/cat/0.png", "tst/dog/0.png"], ["found trian/, tst/ (near: train, test); put"]),
        (["photos/Train/cat/0.png", "photos/test/cat/0.png", "__MACOSX/x.png"],
         ["found photos/; photos/ holds Train/, test/: name photos/photos"]),
        ([f"c{i}/0.png" for i in range(40)],
         ["c8/, c9/, ... (40 in all); put the class folders"]),
        # splits
        (["val/cat/0.png", "valid/cat/0.png"],
         ["photos: val/ and valid/ may each be the validation split; rename one"]),
        (["train/cat/0.png", "Train/cat/0.png"], ["Train/ and train/ may each be the train split"]),
        (["train/"], ["photos/train: no images in it"]),
        (["train/", "test/cat/0.png", "test/dog/0.png"], ["photos/train: no images in it"]),
        (["train/cat/0.heic", "train/dog/0.heic"],
         ["photos/train: no images in it, but 2 .heic (known as images: ", " .jpg "]),
        (["val/"], ["photos: no images in val/"]),
        (["train/0.png", "train/1.png"],
         ["photos: train/ has 2 images without labels; sort them into class folders, train/CLASS"]),
        # class folders
        (["train/cat/0.png", "train/dog/0.png", "train/0.png"],
         ["photos/train/0.png lies beside class folders (cat/, dog/); move it into the folder of "
          "its class"]),
        (["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/0.png"],
         ["photos/val/0.png lies beside class folders (cat/)"]),
        (["train/cat/0.png", "train/dog/"],
         ["photos/train/dog: a class folder without images; add or convert them, or remove"]),
        (["train/cat/0.png", "train/dog/0.heic", "train/dog/a/1.heic", "train/dog/x.txt"],
         ["photos/train/dog: a class folder without images, but 2 .heic, 1 .txt (known as images"]),
        (["train/cat/0.png", "train/.dog/0.png", "train/dog/.0.png"],
         ["photos/train/dog: a class folder without images, but 1 hidden"]),
        (["train/pet/cat/0.png", "train/pet/dog/0.png", "train/wild/0.png"],
         ["photos/train/pet: images in cat/, dog/: is 'pet' the class, or is each folder in it "
          "one? put the images of a class right into its folder, SPLIT/CLASS/IMAGE"]),
        (["train/cat/0.png", "train/cat/more/1.png", "train/dog/0.png"],
         ["photos/train/cat: images in more/ beside 0.png: is 'cat' the class"]),
        (["train/cat/a/b/0.png", "train/cat/a/c/0.png", "train/dog/0.png"],
         ["photos/train/cat/a: images in b/, c/: is 'cat' the class"]),
        (["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/dgo/0.png"],
         ["photos: val/ has images of 'dgo', which is not one of the 2 classes of train/; near: "
          "dog"]),
        (["train/images/0.png", "train/images/1.png"],
         ["photos: all 2 images of train/ are of one class, 'images'; a classifier needs two "
          "(classes were taken from the folders right in train/)"]),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_or_none_is_refused(
    root: Path, places: list[str], fragments: list[str]
) -> None:
    files(root, *places)
    refused(root, *fragments)


@pytest.mark.parametrize(
    ("write_it", "fragments"),
    [
        (too_deep, ["50 folders deep; expected class folders"]),
        (one_class, ["all 4 images of train/ are of one class, 'cat'; a classifier needs two"]),
        (one_class_in_a_table,
         ["all 2 images of labels.csv are of one class, 'cat'", "(classes were taken from labels"]),
        (bad_class("a\nb"), ["train/ has a class named 'a\\nb', expected at most 200 printable"]),
        (bad_class("\x1b[31m"), ["a class named '\\x1b[31m'"]),
        (bad_class("caf\udce9"), ["a class named 'caf\\udce9', expected", "UTF-8; rename it"]),
        (bad_class("x" * 201), ["a class named 'xxxx"]),
        (bad_class_in_a_table, ["labels.csv has a class named 'xxxx"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(
    root: Path, write_it: Callable[[Path], None], fragments: list[str]
) -> None:
    write_it(root)
    refused(root, *fragments)


def test_what_is_no_folder_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files(root, "file")
    refused("photos/file", "photos/file: not a folder, expected one that holds train/CLASS/IMAGE")
    refused("none", "none: no such folder")
    refused("a\nb", "a\\nb: no such folder")
    refused("a\0b", "no such folder")
    two_classes(root, "train")
    refused("photos/train", "found cat/, dog/; train/ may itself be a split: name the folder that")
    monkeypatch.chdir(root / "train")
    refused(".", "train/ may itself be a split")


def test_a_folder_that_cannot_be_searched_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_classes(root)
    listed = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert refused(root) == "photos/train/dog: cannot be searched (Permission denied)" or (
        refused(root) == "photos/test/dog: cannot be searched (Permission denied)"
    )


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["..", "../..", ".", "../../../photos"])
def test_a_link_back_up_is_refused(root: Path, target: str) -> None:
    two_classes(root)
    (root / "train/cat/up").symlink_to(target)
    refused(root, "train/cat/up: a link back to a folder that holds it; remove the link")


def test_a_link_to_nothing_is_an_image_or_refused(root: Path) -> None:
    """As git-annex leaves them for what was not fetched."""
    two_classes(root)
    (root / "note").symlink_to("nothing")  # beside the splits it does not matter
    assert read_folder("photos").classes == ("cat", "dog")
    (root / "train/cat/2.png").symlink_to("../../.git/annex/x.png")
    # an image that cannot be read, like others: its reader lists them all, or skips them
    assert "photos/train/cat/2.png" in read_folder("photos").split("train").paths
    (root / "train/dag").symlink_to("/mnt/disk/dog")
    refused(root, "photos/train/dag: a link to nothing")
    (root / "train/dag").unlink()
    (root / "val").symlink_to("elsewhere")
    refused(root, "photos/val: a link to nothing")
    (root / "val").unlink()
    (root / "train/dag").symlink_to("dag")
    refused(root, "photos/train/dag: cannot be searched (Too many levels of symbolic links)")


def same_name(root: Path) -> None:
    (root / "test/cat/again.png").symlink_to("../../train/cat/train0.png")


def link_behind_a_file(root: Path) -> None:
    (root / "test/cat/zebra.png").symlink_to("../../train/cat/train0.png")


def hard_link(root: Path) -> None:
    os.link(root / "train/cat/train0.png", root / "test/cat/again.png")


def link_to_a_hard_link(root: Path) -> None:
    os.link(root / "train/cat/train0.png", root / "elsewhere")
    (root / "test/cat/again.png").symlink_to("../../elsewhere")


def class_link(root: Path) -> None:
    (root / "val").mkdir()
    (root / "val/cat").symlink_to("../train/cat")


def split_link(root: Path) -> None:
    (root / "val").symlink_to("test")


def through_another_name(root: Path) -> None:
    (root / "../store").mkdir()
    (root / "train").rename(root / "../store/train")
    (root / "train").symlink_to("../store/train")
    (root / "val").symlink_to(root.absolute() / "../store/train")


def in_a_table(root: Path) -> None:
    files(root, "val/x.png")
    os.link(root / "train/cat/train0.png", root / "val/y.png")
    put(root / "val/labels.csv", "path,class\nx.png,cat\ny.png,cat\n")


@pytest.mark.parametrize(
    ("share", "paths"),
    [
        (same_name, ["train/cat/train0.png", "test/cat/again.png", "in train/ and in test/"]),
        (link_behind_a_file, ["train/cat/train0.png", "test/cat/zebra.png"]),
        (hard_link, ["train/cat/train0.png", "test/cat/again.png", "in train/ and in test/"]),
        (link_to_a_hard_link, ["train/cat/train0.png", "test/cat/again.png"]),
        (class_link, ["train/cat/train0.png", "val/cat/train0.png", "in train/ and in val/"]),
        (split_link, ["test/cat/test0.png", "val/cat/test0.png", "in val/ and in test/"]),
        (through_another_name, ["train/cat/train0.png", "val/cat/train0.png"]),
        (in_a_table, ["train/cat/train0.png", "val/y.png", "in train/ and in val/"]),
    ],
)
@pytest.mark.parametrize("numbers", ["true", "made up"])
def test_splits_that_share_a_file_are_refused(
    root: Path, share: Callable[[Path], None], paths: list[str], numbers: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    two_classes(root, "train", "test")
    read_folder("photos")
    share(root)
    if numbers == "made up":
        make_up_numbers(monkeypatch)
    refused(root, *paths, " are one file, in ", "; an image belongs to one split and one class")


class Entry:
    """An entry as some network file systems give it, all with the same inode number."""

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self.entry, name)

    def inode(self) -> int:
        return 0xFFFFFFFF


class Entries:
    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __enter__(self) -> Iterator[Any]:
        return iter(self.entries)

    def __exit__(self, *error: object) -> None:
        pass


def make_up_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Entries([*map(Entry, listed(path))]))


@EVERY
def test_made_up_inode_numbers_make_no_two_files_one(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    LAYOUTS[name](root)
    expected = read_folder("photos")
    make_up_numbers(monkeypatch)
    assert read_folder("photos") == expected


def test_numbers_that_repeat_are_looked_at_closely(root: Path) -> None:
    """As they do where several file systems are shown as one."""
    paths = [put(root / f"{i}.png") for i in range(3)]
    os.link(paths[0], root / "3.png")
    made = [scan.File(str(root / f"{i}.png"), 7) for i in range(4)]
    assert scan.repeated(made) == {7}
    assert scan.repeated([file._replace(inode=i) for i, file in enumerate(made)]) == set()
    same = [[a for a in made if scan.identity(a.path) == scan.identity(b.path)] for b in made]
    assert [len(each) for each in same] == [2, 1, 1, 2]


def test_a_regular_file_costs_no_call(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Costly(Entry):
        def stat(self) -> os.stat_result:
            raise AssertionError("a call for a regular file")

        def inode(self) -> int:
            return self.entry.inode()

    LAYOUTS["class folders"](root)
    expected, listed, stat, asked = read_folder("photos"), os.scandir, os.stat, []
    monkeypatch.setattr(os, "scandir", lambda path: Entries([*map(Costly, listed(path))]))
    monkeypatch.setattr(os, "stat", lambda path, **more: asked.append(path) or stat(path, **more))
    assert read_folder("photos") == expected
    assert len([path for path in asked if str(path).endswith(".png")]) == 9  # one a class folder


def test_one_image_twice_in_a_class_is_fine_and_in_two_classes_is_not(root: Path) -> None:
    two_classes(root)
    (root / "train/cat/again.png").symlink_to("train0.png")
    os.link(root / "train/cat/train0.png", root / "train/cat/more.png")
    assert len(read_folder("photos").split("train").paths) == 4
    (root / "train/kitty").symlink_to("cat")
    refused(root, "train/cat/again.png and ", "/kitty/", "are one file, in 'cat' and in 'kitty'")


# --- Tiny-ImageNet -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda text: text.replace("val_3.JPEG", "val_33.JPEG"),
         ["photos/val/val_annotations.txt: 1 of 6 files are not in photos/val/images: val_33.JPEG "
          "(line 4); near: val_3.JPEG"]),
        (lambda text: text.partition("\n")[2],
         ["val_annotations.txt: 1 of 6 images are not in it, the first val_0.JPEG; add"]),
        (lambda text: text + text.partition("\n")[0] + "\n",
         ["val_annotations.txt: lines 1 and 7 both name val_0.JPEG; keep one of them"]),
        (lambda text: text.replace("\t62\n", "\n", 1),
         ["val_annotations.txt, line 1: expected file, class, x, y, width and height, separated "
          "by tabs, found 'val_0.JPEG\\tn2 ant"]),
        (lambda text: text.replace("\t", ",", 5), ["line 1: expected file, class, x, y"]),
        (lambda text: text.replace("\tn9 bee", "\t", 1), ["line 3: expected file, class, x, y"]),
        (lambda text: text.replace("n9 bee", "n9 bea", 1),
         ["val_annotations.txt, line 3: 'n9 bea' is not one of the 3 classes of the train split; "
          "near: n9 bee"]),
        (lambda text: text.replace("bee", "bée").encode("latin-1"), ["annotations.txt: not UTF-8"]),
    ],
)  # fmt: skip
def test_annotations_that_do_not_fit_are_refused(
    root: Path, change: Callable[[str], str], fragments: list[str]
) -> None:
    LAYOUTS["Tiny-ImageNet"](root)
    table = root / "val/val_annotations.txt"
    put(table, change(table.read_text()))
    refused(root, *fragments)


def test_annotations_with_other_line_ends_and_images_right_in_the_split(root: Path) -> None:
    LAYOUTS["Tiny-ImageNet"](root)
    expected = read_folder("photos").split("validation").labels
    table = root / "val/val_annotations.txt"
    put(table, table.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert read_folder("photos").split("validation").labels == expected
    for path in (root / "val/images").iterdir():
        path.rename(root / "val" / path.name)
    folder = read_folder("photos")
    assert (folder.layout, folder.split("validation").labels) == ("Tiny-ImageNet", expected)


def test_half_sorted_validation_images_are_refused(root: Path) -> None:
    LAYOUTS["Tiny-ImageNet"](root)
    put(root / "val" / CLASSES[0] / "val_0.JPEG", b"x")
    refused(root, "val/ has images of 'images', which is not one of the 3 classes of train/")


# --- labels.csv ----------------------------------------------------------------------------------


def read_table(root: Path, text: str | bytes) -> dict[str, str]:
    """What is read of two images, a.png and in/b.png, and a table."""
    files(root, "a.png", "in/b.png")
    put(root / "labels.csv", text)
    return pairs(read_folder("photos"), "train")


BOTH = {"a.png": "cat", "in/b.png": "dog"}


@pytest.mark.parametrize("path", labels.PATH_COLUMNS)
@pytest.mark.parametrize("label", labels.CLASS_COLUMNS)
@pytest.mark.parametrize("change", [str, str.upper])
def test_columns_by_any_name(
    root: Path, path: str, label: str, change: Callable[[str], str]
) -> None:
    header = change(f"id,{label},{path},width")
    assert read_table(root, f"{header}\n0,cat,a.png,5\n1,dog,in/b.png,\n") == BOTH


@pytest.mark.parametrize("split", labels.SPLIT_COLUMNS)
def test_a_column_of_splits_by_any_name(root: Path, split: str) -> None:
    files(root, *(f"{i}.png" for i in range(6)))
    rows = zip(("cat", "dog") * 3, ("train", "Train", "val", "VAL", "testing", "testing"))  # noqa: B905
    lines = [f"{i}.png,{label},{part}" for i, (label, part) in enumerate(rows)]
    put(root / "labels.csv", "\n".join([f"path,class,{split}", *lines]))
    folder = read_folder("photos")
    assert {part: pairs(folder, part) for part in folder.splits} == {
        "train": {"0.png": "cat", "1.png": "dog"},
        "validation": {"2.png": "cat", "3.png": "dog"},
        "test": {"4.png": "cat", "5.png": "dog"},
    }
    assert folder.split("validation").where == "labels.csv (split val)"


@pytest.mark.parametrize(
    "text",
    [
        "path,class\na.png,cat\nin/b.png,dog",
        "path;class\r\na.png;cat\r\nin/b.png;dog\r\n",
        "path\tclass\ra.png\tcat\rin/b.png\tdog\r",
        "\ufeffpath,class\na.png,cat\nin/b.png,dog\n",
        '\ufeff"path","class"\n"a.png","cat"\n"in/b.png","dog"\n',
        '"path";"class"\n"a.png";"cat"\n"in/b.png";"dog"\n',
        "\n , \npath,class\n\na.png,cat\n,,\n\nin/b.png,dog\n\n",
        "path,class\n a.png , cat \n./in//b.png,dog\n",
        "path,class\na.png,cat\nin\\b.png,dog\n",
        "path,class\nin/../a.png,cat\n.\\in\\b.png,dog\n",
        "a.png,cat\nin/b.png,dog\n",
        "a.png;cat\r\nin\\b.png;dog\r\n",
        "in/b.png\tdog\na.png\tcat\n",
        ",path,class\n0,a.png,cat\n1,in/b.png,dog\n",
        "Image-Path,Class Name\na.png,cat\nin/b.png,dog\n",
        "path,class,weight;unit\na.png,cat,1;kg\nin/b.png,dog,\n",
    ],
)
def test_tables_as_other_programs_write_them(root: Path, text: str) -> None:
    assert read_table(root, text.encode()) == BOTH


@pytest.mark.parametrize("name", ["labels.csv", "Labels.CSV", "metadata.csv"])
def test_a_table_by_name(root: Path, name: str) -> None:
    files(root, "a.png", "in/b.png")
    put(root / name, "file_name,label\na.png,cat\nin/b.png,dog\n")
    folder = read_folder("photos")
    assert (pairs(folder, "train"), folder.split("train").where) == (BOTH, name)


def test_names_that_need_care(root: Path) -> None:
    names = {"a,b.png": "x, y", 'a"b.png': 'the "cat"', " c .png": "z", "back\\slash.png": "z"}
    files(root, *names)
    quoted = [[cell.replace('"', '""') for cell in pair] for pair in names.items()]
    put(root / "labels.csv", "path,class\n" + "".join('"{}","{}"\n'.format(*q) for q in quoted))
    assert pairs(read_folder("photos"), "train") == names


@pytest.mark.parametrize(("disk", "table"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_accents_are_found_however_they_are_encoded(root: Path, disk: str, table: str) -> None:
    """macOS and archives made there take letters and accents apart."""
    names = [f"{letter}.png" for letter in "éö"]
    files(root, *(normalize(disk, name) for name in names))  # type: ignore[arg-type]
    lines = [f"{normalize(table, name)},{i}\n" for i, name in enumerate(names)]  # type: ignore[arg-type]
    put(root / "labels.csv", "path,class\n" + "".join(lines))
    assert sorted(read_folder("photos").split("train").labels) == ["0", "1"]


def test_images_that_a_table_does_not_name_are_left_out(root: Path) -> None:
    files(root, "more/c.png", "d.png", ".hidden.png", "notes.txt", "train.csv")
    assert read_table(root, "path,class\na.png,cat\nin/b.png,dog\n") == BOTH
    assert read_folder("photos").left_out == {
        "not in labels.csv": 2, "hidden": 1, ".txt": 1, ".csv": 1,
    }  # fmt: skip
    other = root / "other"
    files(other, "train/a.png", "train/b.png", "train/c.png", "test/d.png", "test/e.png")
    put(other / "labels.csv", "path,class\ntrain/a.png,cat\ntrain/b.png,dog\ntest/d.png,dog\n")
    folder = read_folder(str(other))
    assert folder.left_out == {"not in labels.csv": 2}
    assert pairs(folder, "test") == {"test/d.png": "dog"}


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("path,class\na.png,cat\nin/b.png,\n", ["photos/labels.csv, line 3: no class; fill"]),
        ("path,class\na.png,cat\nin/b.png, \n", ["labels.csv, line 3: no class"]),
        ("path,class\n\n,cat\n", ["labels.csv, line 3: no path"]),
        ("path,class,split\na.png,cat,\n", ["labels.csv, line 2: no split"]),
        ("path,class\na.png,cat,1\n", ["labels.csv, line 2: 3 cells, expected 2 as in the first"]),
        ("path,class\na.png\n", ["labels.csv, line 2: 1 cells, expected 2"]),
        ("path,class\na.png,cat\na.png,cat\n",
         ["labels.csv: lines 2 and 3 both name a.png; keep one of them"]),
        ("path,class\na.png,cat\n./a.png,dog\n",
         ["labels.csv: lines 2 and 3 both name a.png, as 'cat' and 'dog'; keep one"]),
        ("path,class\na.png,cat\nb.png,dog\n",
         ["labels.csv: 1 of 2 files are not in photos: b.png (line 3); near: a.png, in/b.png; "
          "expected paths from there, with their suffixes"]),
        ("path,class\n" + "".join(f"{i}x,cat\n" for i in range(12)),
         ["labels.csv: 12 of 12 files are not in photos: 0x (line 2), 1x (line 3), ",
          "9x (line 11), ..."]),
        ("path,class\n/photos/a.png,cat\n", ["line 2: /photos/a.png leaves photos; expected "]),
        ("path,class\n../photos/a.png,cat\n", ["line 2: ../photos/a.png leaves photos"]),
        ("path,class\nin/../../a.png,cat\n", ["line 2: in/../../a.png leaves photos"]),
        ("path,class\nC:\\photos\\a.png,cat\n", ["line 2: C:\\photos\\a.png leaves photos"]),
        ("path,class\n..\\a.png,cat\n", ["line 2: ..\\a.png leaves photos"]),
        ("path,class\nlabels.csv,cat\n", ["line 2: labels.csv is no image by its name"]),
        ("path,class\nin,cat\n", ["line 2: in is no image by its name"]),
        ("path,class\na.png\0,cat\n", ["labels.csv"]),
        ("key,kind\na,cat\n",
         ["labels.csv: expected a header with a column of paths (path, file, filename, file_name, "
          "name, image, image_path) and one of classes (class, label, category, class_name, "
          "target), found 'key', 'kind'"]),
        ("ab.png,cat\n", ["labels.csv: expected a header", "found 'ab.png', 'cat'"]),
        ("a.png,cat,1\n", ["labels.csv: expected a header", "found 'a.png', 'cat', '1'"]),
        ("path|class\na.png|cat\n", ["found 'path|class'"]),
        ("name,file,label\nx,a.png,cat\n",
         ["labels.csv: name and file may each be the column of the path; rename all but one"]),
        ("path,label,class_name\na.png,0,cat\n",
         ["labels.csv: label and class_name may each be the column of the class"]),
        ("", ["labels.csv: expected a header", "found none"]),
        ("path,class\n", ["labels.csv: no line below the header, expected one an image"]),
        ('path,class\n"a.png,cat\n', ["labels.csv, after line 1: unexpected end of data; mend"]),
        ('path,class\n"a".png,cat\n', ["labels.csv, after line 1: "]),
        ("path,class\na.png,k\u00e4fer\n".encode("latin-1"),
         ["photos/labels.csv: not UTF-8 (at byte 18); save it with that encoding"]),
        ("path,class\na.png,cat\n".encode("utf-16"), ["photos/labels.csv: not UTF-8 (at byte 0)"]),
        ("path,class,split\na.png,cat,train\nin/b.png,dog,tain\n",
         ["photos/labels.csv, line 3: unknown split 'tain', expected one of train, training, val, "
          "valid, validation, eval, evaluation, test, testing; near: train"]),
        ("path,class,split\na.png,cat,val\nin/b.png,dog,valid\n",
         ["labels.csv, line 3: 'val' and 'valid' may each be the validation split; rename one"]),
        ("path,class,split\na.png,cat,train\nin/b.png,dog,test\n",
         ["all 1 images of labels.csv (split train) are of one class, 'cat'"]),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_used_are_refused(
    root: Path, text: str | bytes, fragments: list[str]
) -> None:
    files(root, "a.png", "in/b.png")
    put(root / "labels.csv", text)
    refused(root, *fragments)


def test_a_table_that_cannot_be_opened_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    files(root, "a.png", "labels.csv")
    monkeypatch.setattr("builtins.open", denied)
    refused(root, "photos/labels.csv: cannot be read (Permission denied)")


def test_two_tables_are_refused(root: Path) -> None:
    files(root, "a.png", "labels.csv", "metadata.csv")
    refused(root, "photos: labels.csv and metadata.csv may each hold the labels; move one away")
    other = root / "other"
    files(other, "train/a.png", "train/b.png")
    put(other / "labels.csv", "path,class\ntrain/a.png,cat\ntrain/b.png,dog\n")
    put(other / "train/labels.csv", "path,class\na.png,dog\nb.png,cat\n")
    refused(other, "photos/other: two tables name images in photos/other/train; remove one")


def test_a_table_and_folders_of_splits_must_agree(root: Path) -> None:
    files(root, "train/a.png", "train/b.png", "test/c.png", "images/d.png")
    table = root / "labels.csv"
    put(
        table, "path,class,split\ntrain/a.png,cat,train\ntrain/b.png,dog,val\ntest/c.png,dog,test\n"
    )
    refused(
        root, "photos/labels.csv, line 3: train/b.png lies in the train split's folder, but its "
        "split is 'val'; move the image, or remove the column",
    )  # fmt: skip
    put(table, table.read_text().replace(",val", ",Train"))
    assert pairs(read_folder("photos"), "test") == {"test/c.png": "dog"}
    put(table, "path,class\ntrain/a.png,cat\nimages/d.png,dog\n")
    refused(
        root, "labels.csv, line 3: images/d.png lies in no split's folder, or in a hidden one; move"
    )


# --- labels.csv beside class folders -------------------------------------------------------------


def sorted_images(root: Path) -> None:
    files(root, *(f"train/{c}/{i}.png" for c in ("cat", "dog") for i in range(2)))


@pytest.mark.parametrize(
    "text",
    [
        "id,name\n0,cat\n1,dog\n",  # of something else
        "ClassId,Name\n0,cat\n",
        "name,label\ncat,0\ndog,1\n",
        "path,class\n",
        "",
        "name,label\ntrain/cat/0.png,3\ntrain/cat/1.png,3\ntrain/dog/0.png,7\ntrain/dog/1.png,7\n",
        "name,label\ntrain/cat/0.png,cat\ntrain/dog/0.png,dog\n",
        "name,label\ntrain/cat/0.png,cat\n",
        "name,label\ntrain/cat/0.png,3\n",
    ],
)
def test_class_folders_win_over_a_table_that_says_no_more(root: Path, text: str) -> None:
    sorted_images(root)
    put(root / "labels.csv", text)
    folder = read_folder("photos")
    assert (folder.layout, folder.classes) == ("class folders", ("cat", "dog"))
    assert folder.left_out == {"labels.csv (not used)": 1}
    assert len(folder.split("train").paths) == 4


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("train/cat/0.png,cat\ntrain/cat/1.png,dog\n",
         ["labels.csv, line 3: train/cat/1.png is of class 'dog', but lies in a folder named as "
          "the class 'cat'; mend or remove the table, or move the image"]),
        ("train/cat/0.png,dog\ntrain/dog/1.png,cat\n", ["2: train/cat/0.png is of class 'dog'"]),
        ("train/cat/0.png,cat\ntrain/cat/9.png,cat\n",
         ["labels.csv: 1 of 2 files are not in photos: train/cat/9.png (line 3)"]),
    ],
)  # fmt: skip
def test_a_table_that_contradicts_class_folders_is_refused(
    root: Path, text: str, fragments: list[str]
) -> None:
    sorted_images(root)
    put(root / "labels.csv", f"name,label\n{text}")
    refused(root, *fragments)


def test_folders_that_mix_the_classes_of_a_table_are_no_classes(root: Path) -> None:
    """Images stored by hundreds, or by patient."""
    sorted_images(root)
    put(root / "train/labels.csv", "path,class\ncat/0.png,a\ncat/1.png,b\ndog/0.png,b\n")
    folder = read_folder("photos")
    assert (folder.layout, folder.classes) == ("labels.csv", ("a", "b"))
    assert folder.left_out == {"not in labels.csv": 1}
    put(
        root / "train/labels.csv",
        "path,class\ncat/0.png,a\ncat/1.png,a\ndog/0.png,a\ndog/1.png,a\n",
    )
    refused(root, "all 4 images of train/ are of one class, 'a'")


def test_a_split_may_have_a_table_where_another_has_class_folders(root: Path) -> None:
    sorted_images(root)
    files(root, "test/0.png", "test/1.png", "train/cat/labels.csv")
    put(root / "test/labels.csv", "path,class\n0.png,dog\n1.png,cat\n")
    folder = read_folder("photos")
    assert folder.layout == "class folders and labels.csv"
    assert pairs(folder, "test") == {"test/0.png": "dog", "test/1.png": "cat"}
    assert folder.left_out == {"labels.csv (not used)": 1}


def test_the_helpers_write_the_whole_set() -> None:
    assert len(truth()) == 2 * len(list(every_image())) == 2 * 30


# --- tables of Kaggle and others -----------------------------------------------------------------


def table_of(root: Path, text: str) -> None:
    for index in range(4):
        content = image("train", CLASSES[index % 2], index // 2)
        put(root / f"pictures/im{index}.png", content)
    put(root / "labels.csv", text)


@pytest.mark.parametrize("header", ["id,breed", "image_id,label", "id,class"])
def test_ids_without_a_suffix_are_images(root: Path, header: str) -> None:
    lines = "".join(f"pictures/im{i},{'ab'[i % 2]}\n" for i in range(4))
    table_of(root, f"{header}\n{lines}")
    found = read_folder("photos").split("train")
    assert [os.path.basename(path) for path in found.paths] == [f"im{i}.png" for i in range(4)]
    assert found.labels == ("a", "b", "a", "b")


def test_an_id_beside_a_path_is_no_path(root: Path) -> None:
    lines = "".join(f"{i},pictures/im{i}.png,{'ab'[i % 2]}\n" for i in range(4))
    table_of(root, f"id,filename,class\n{lines}")
    assert len(read_folder("photos").split("train").paths) == 4


def test_absolute_paths_into_the_folder_are_read(root: Path) -> None:
    lines = "".join(f"{root.resolve()}/pictures/im{i}.png,{'ab'[i % 2]}\n" for i in range(4))
    table_of(root, f"path,class\n{lines}")
    assert len(read_folder("photos").split("train").paths) == 4


@pytest.mark.parametrize("name", ["is_train", "fold", "Phase", "is_valid"])
def test_columns_that_may_be_splits_are_refused(root: Path, name: str) -> None:
    lines = "".join(f"pictures/im{i}.png,{'ab'[i % 2]},{i % 2}\n" for i in range(4))
    table_of(root, f"path,class,{name}\n{lines}")
    refused(root, f"the column {name} may say which image is of which split; rename it to split")
