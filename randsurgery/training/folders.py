"""A folder of images as what it is: class folders, Tiny-ImageNet, or images with labels.csv.

A split is a folder with one of the names of ``SPLIT_NAMES``, or what a table calls it. Whatever can
be read in two ways is refused: no split is taken for another, and no folder for a class because
there is none better.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from randsurgery.errors import DataError, near
from randsurgery.training.layouts import SPLIT_NAMES as SPLIT_NAMES
from randsurgery.training.layouts import (
    Found,
    Split,
    near_splits,
    no_splits,
    part_of,
    read_folders,
    read_listed,
    split_folders,
    tables_in,
)  # fmt: skip
from randsurgery.training.layouts import Part as Part
from randsurgery.training.scan import Tree, counted, identity, listed, natural, repeated, scan

MAX_CLASS_NAME = 200
"""Characters of a class's name."""


@dataclass(frozen=True)
class Listing:
    """The images of one split: their paths, in timm's natural order, and the class of each.
    ``where``: the split as its user knows it, ``Val/`` or ``labels.csv (split test)``."""

    where: str
    paths: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Folder:
    """What a folder holds.

    ``layout``: "class folders", "Tiny-ImageNet" or "labels.csv", or two of them joined by "and".
    ``classes``: those of the train split, without one those of all splits, in natural order.
    ``left_out``: how many of each kind are in the folder and no images of a split. ``unlabelled``:
    how many images splits without labels have. ``folders``: the names of the folders that are
    splits. ``others``: folders beside them, which nothing was read of.
    """

    root: str
    layout: str
    splits: Mapping[Part, Listing]
    classes: tuple[str, ...]
    left_out: Mapping[str, int]
    unlabelled: Mapping[Part, int]
    folders: Mapping[Part, str]
    others: tuple[str, ...]

    def split(self, part: Part) -> Listing:
        """The images of a split. Raises DataError if it is not there, or has no labels or images;
        no other split ever takes its place."""
        if part in self.splits:
            return self.splits[part]
        name = self.folders.get(part)
        if name is None:
            raise self.no_split(part)
        if count := self.unlabelled.get(part):
            raise _error(self.root, _without_labels(name, count))
        raise _error(self.root, f"{name}/ has no images")

    def no_split(self, *parts: Part) -> DataError:
        """The error for a folder that has none of these splits: what it has, what was expected."""
        names = [name for part in parts for name in SPLIT_NAMES[part]]
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        if self.folders:
            found = listed([*self.folders.values(), *self.others], 20) + near_splits(
                self.others, names
            )
            remedy = f"expected a folder named {expected}"
            if "train" in self.folders and "validation" in parts:
                remedy += "; to train without one, --val-split 0.1 holds images out of train"
        else:
            found = ", ".join(listing.where for listing in self.splits.values())
            remedy = f"expected lines with {expected} in a column named split"
        return _error(self.root, f"no {' or '.join(parts)} split: found {found}; {remedy}")

    def left_out_text(self) -> str:
        """``3 left out: 2 hidden, 1 .heic``, or an empty text."""
        kinds = Counter(self.left_out)
        return _printable(f"{sum(kinds.values()):,} left out: {counted(kinds)}") if kinds else ""


def read_folder(root: str) -> Folder:
    """The splits of a folder, with the class of every image; nothing is opened but tables.

    Raises DataError, on one line, for what is none of the layouts, or two of them.
    """
    if not os.path.isdir(root):
        what = "not a folder" if os.path.lexists(root) else "no such folder"
        raise _error(root, f"{what}, expected one that holds train/CLASS/IMAGE")
    try:
        top = scan(root, only=part_of)
        folders = split_folders(top)
        others = _others(top) if folders else ()
        if not folders and not tables_in(top):
            raise no_splits(top)
        found = read_folders(top, folders) if folders else read_listed(root)
        if not found.splits:
            raise DataError(f"{root}: {_no_labels(found, folders)}")
        splits = {part: found.splits[part] for part in SPLIT_NAMES if part in found.splits}
        classes = _classes(root, splits)
        _check_files(root, splits)
    except DataError as error:
        raise DataError(_printable(str(error))) from None
    layouts = dict.fromkeys(split.layout for split in splits.values())
    if "Tiny-ImageNet" in layouts:  # whose train split is class folders
        layouts.pop("class folders", None)
    return Folder(
        root=root,
        layout=" and ".join(sorted(layouts)),
        splits={part: _listing(split) for part, split in splits.items()},
        classes=classes,
        left_out=dict(found.left_out),
        unlabelled=found.unlabelled,
        folders=folders,
        others=others,
    )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _error(root: str, message: str) -> DataError:
    return DataError(_printable(f"{root}: {message}"))


def _without_labels(name: str, count: int) -> str:
    return (
        f"{name}/ has {count:,} images without labels; sort them into class folders, {name}/CLASS, "
        f"or add {name}/labels.csv with the columns path and class"
    )


def _others(top: Tree) -> tuple[str, ...]:
    return tuple(sorted((name for name in top.folders if part_of(name) is None), key=natural))


def _no_labels(found: Found, folders: Mapping[Part, str]) -> str:
    """What to say of a folder without one labelled image."""
    for part, count in found.unlabelled.items():
        return _without_labels(folders[part], count)
    return f"no images in {listed(folders.values())}"


def _listing(split: Split) -> Listing:
    order = sorted(range(len(split.files)), key=lambda i: natural(split.files[i].path))
    paths = tuple(split.files[i].path for i in order)
    return Listing(split.where, paths, tuple(split.labels[i] for i in order))


# --- checks --------------------------------------------------------------------------------------


def _classes(root: str, splits: Mapping[Part, Split]) -> tuple[str, ...]:
    """The classes in natural order. Raises DataError for names that cannot be used, for those of
    other splits that the train split lacks, and for a single class."""
    named = {part: set(split.labels) for part, split in splits.items()}
    for part, names in named.items():
        for name in names:
            if not name.isprintable() or len(name) > MAX_CLASS_NAME:
                raise DataError(
                    f"{root}: {splits[part].where} has a class named {name[:60]!r}, expected at "
                    f"most {MAX_CLASS_NAME} printable characters of UTF-8; rename it"
                )
    known = named.get("train", set().union(*named.values()))
    if len(known) == 1:
        of = splits.get("train") or next(iter(splits.values()))
        what = {"class folders": f"the folders right in {of.where}"}.get(of.layout, of.where)
        raise DataError(
            f"{root}: all {len(of.labels):,} images of {of.where} are of one class, "
            f"{min(known)!r}; a classifier needs two (classes were taken from {what})"
        )
    for part, names in named.items():
        if strange := sorted(names - known, key=natural):
            raise DataError(
                f"{root}: {splits[part].where} has images of {strange[0]!r}, which is not one of "
                f"the {len(known):,} classes of {splits['train'].where}{near(strange[0], known)}"
            )
    return tuple(sorted(known, key=natural))


def _check_files(root: str, splits: Mapping[Part, Split]) -> None:
    """Raises DataError for a file in two splits or of two classes, by whatever links."""
    twice = repeated(file for split in splits.values() for file in split.files)
    first: dict[tuple[int, ...], tuple[str, str, str]] = {}
    for split in splits.values() if twice else ():
        for file, label in zip(split.files, split.labels, strict=True):
            if file.inode not in twice:
                continue
            path, where, other = first.setdefault(
                identity(file.path), (file.path, split.where, label)
            )
            if (where, other) != (split.where, label):
                kinds = (where, split.where) if where != split.where else (repr(other), repr(label))
                raise DataError(
                    f"{root}: {path} and {file.path} are one file, in {' and in '.join(kinds)}; "
                    "an image belongs to one split and one class"
                )
