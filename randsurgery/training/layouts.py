"""How the images of a folder are laid out: class folders, Tiny-ImageNet, or a table of labels.

Whatever can be read in two ways is refused: no split is taken for another, and no folder for a
class because there is none better.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

from randsurgery.errors import DataError, near
from randsurgery.training.images import suffixes
from randsurgery.training.labels import (
    NoTable,
    Row,
    is_sorted,
    match,
    read_annotations,
    read_labels,
    read_table,
)  # fmt: skip
from randsurgery.training.scan import (
    ANNOTATIONS,
    HIDDEN,
    SYSTEM,
    TABLES,
    File,
    Tree,
    counted,
    listed,
    natural,
    not_used,
    scan,
)  # fmt: skip

Part = Literal["train", "validation", "test"]

SPLIT_NAMES: Mapping[Part, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""What a split may be called, as a folder and in a table, in any case of letters."""

PARTS: Mapping[str, Part] = {name: part for part, names in SPLIT_NAMES.items() for name in names}


class Split(NamedTuple):
    """The images and classes of a split, in no order. ``where``: what its user calls it."""

    where: str
    layout: str
    files: Sequence[File]
    labels: Sequence[str]


class Found(NamedTuple):
    """The splits with labels, how many images those without have, and what is left out."""

    splits: dict[Part, Split]
    unlabelled: dict[Part, int]
    left_out: Counter[str]


def part_of(name: str) -> Part | None:
    """The split that a folder's or a table's name means; None if it means none."""
    return PARTS.get(name.casefold())


def split_folders(top: Tree) -> dict[Part, str]:
    """The splits' folders by name, train first. Raises DataError for two of one split."""
    names: dict[Part, list[str]] = {part: [] for part in SPLIT_NAMES}
    for name in top.folders:
        if (part := part_of(name)) is not None:
            names[part].append(name)
    for part, several in names.items():
        if len(several) > 1:
            raise DataError(
                f"{top.path}: {several[0]}/ and {several[1]}/ may each be the {part} split; rename "
                "one, or move it away"
            )
    return {part: several[0] for part, several in names.items() if several}


def tables_in(tree: Tree) -> list[str]:
    """The name of the table of labels in a folder, if any. Raises DataError for two."""
    tables = [name for name in tree.tables if name.casefold() in TABLES]
    if len(tables) > 1:
        raise DataError(
            f"{tree.path}: {' and '.join(tables)} may each hold the labels; move one away"
        )
    return tables


def read_folders(top: Tree, folders: Mapping[Part, str]) -> Found:
    """Splits that are folders, each with a table's labels or in its own way."""
    kinds = {kind: n for kind, n in top.others.items() if kind in (HIDDEN, *SYSTEM)}
    found = Found({}, {}, Counter(kinds))
    if top.images:
        found.left_out["in no split folder"] = len(top.images)
    _read_tables(top, folders, found)
    for part, name in folders.items():
        tree = top.folders[name]
        found.left_out.update(tree.left_out())
        if part in found.splits:
            continue
        train = found.splits.get("train")
        known = set(train.labels) if train else set()
        table = [name for name in tree.tables if name.casefold() == ANNOTATIONS]
        inner = _only_images(tree)
        if not tree.count and part == "train":
            raise DataError(f"{tree.path}: no images in it{_instead(tree)}")
        if table and inner:
            found.splits[part] = _read_tiny_imagenet(tree, table[0], inner, known)
            continue
        found.left_out.update(not_used(table))
        if inner is tree or (inner and part != "train" and "images" not in known):
            found.unlabelled[part] = tree.count
        elif tree.count:
            found.splits[part] = _read_class_folders(tree, part)
    return found


def _only_images(tree: Tree) -> Tree | None:
    """The folder with all images if they are not sorted: a split's own, or ``images`` in it."""
    holding = tree.holding()
    if tree.images and not holding:
        return tree
    return tree.folders["images"] if not tree.images and holding == ["images"] else None


def _read_tables(top: Tree, folders: Mapping[Part, str], found: Found) -> None:
    """What tables say: the root's of all splits, and a split's own. Enters splits and what is left
    out. Raises DataError for two tables of one split, and for one that contradicts folders."""
    parts: dict[str, Part] = {name: part for part, name in folders.items()}
    scopes = [(top, {name: top.folders[name] for name in parts}, parts)]
    scopes += [(top.folders[name], {"": top.folders[name]}, {"": parts[name]}) for name in parts]
    for holder, trees, parts_of in scopes:
        for table in tables_in(holder):
            said = read_labels(holder.path, table, trees)
            for name, rows in said.rows.items() if said else ():
                _check_split(os.path.join(holder.path, table), parts_of[name], rows)
            if said is None or said.repeats:
                found.left_out.update(not_used([table]))
                continue
            for name, rows in said.rows.items():
                if rows and parts_of[name] in found.splits:
                    raise DataError(
                        f"{top.path}: two tables name images in {trees[name].path}; remove one"
                    )
                if rows:
                    found.splits[parts_of[name]] = _labelled(trees[name], rows)
                    left = Counter({f"not in {table}": trees[name].count - len(rows)})
                    found.left_out.update(+left)


def _labelled(tree: Tree, rows: Mapping[str, Row]) -> Split:
    """A split's folder as a table has it."""
    places, labels = tree.places(), [row.label for row in rows.values()]
    files = [places[place] for place in rows]
    return Split(f"{os.path.basename(tree.path)}/", "labels.csv", files, labels)


def _check_split(table: str, part: Part, rows: Mapping[str, Row]) -> None:
    for row in rows.values():
        if row.split is not None and part_of(row.split) != part:
            raise DataError(
                f"{table}, line {row.line}: {row.path} lies in the {part} split's folder, but its "
                f"split is {row.split!r}; move the image, or remove the column"
            )


def read_listed(root: str) -> Found:
    """Images anywhere in a folder without split folders, with a table: its column of splits, or
    all are of the train split."""
    top = scan(root)
    table, known = tables_in(top)[0], top.places()
    path = os.path.join(root, table)
    try:
        rows = match(path, read_table(path, known), root, known)
    except NoTable as error:
        raise (no_splits(top) if is_sorted(top) else error) from None
    left_out = top.left_out()
    if rest := top.count - len(rows):
        left_out[f"not in {table}"] = rest
    parts = _parts(path, rows)
    splits: dict[Part, Split] = {}
    for part in dict.fromkeys(parts.values()):
        chosen = {place: row for place, row in rows.items() if parts[place] == part}
        name = next(iter(chosen.values())).split
        files, labels = [known[place] for place in chosen], [row.label for row in chosen.values()]
        where = table if name is None else f"{table} (split {name})"
        splits[part] = Split(where, "labels.csv", files, labels)
    return Found(splits, {}, left_out)


def _parts(table: str, rows: Mapping[str, Row]) -> dict[str, Part]:
    """The split of each image by a table's column; all are of the train split if there is none.
    Raises DataError for a name that means no split, and for two that mean one."""
    parts: dict[str, Part] = {}
    names: dict[Part, str] = {}
    for place, row in rows.items():
        name = "train" if row.split is None else row.split
        if (part := part_of(name)) is None:
            raise DataError(
                f"{table}, line {row.line}: unknown split {name!r}, expected one of "
                f"{', '.join(PARTS)}{near(name.lower(), PARTS)}"
            )
        if (other := names.setdefault(part, name)).casefold() != name.casefold():
            raise DataError(
                f"{table}, line {row.line}: {other!r} and {name!r} may each be the {part} split; "
                "rename one"
            )
        parts[place] = part
    return parts


# --- one split -----------------------------------------------------------------------------------


def _read_tiny_imagenet(tree: Tree, table: str, inner: Tree, classes: Collection[str]) -> Split:
    """Tiny-ImageNet's validation split: images in one folder, and a table of their classes."""
    path, known = os.path.join(tree.path, table), inner.places()
    rows = match(path, read_annotations(path), inner.path, known)
    for row in rows.values():
        if classes and row.label not in classes:
            raise DataError(
                f"{path}, line {row.line}: {row.label!r} is not one of the {len(classes):,} "
                f"classes of the train split{near(row.label, classes)}"
            )
    if rest := sorted(known.keys() - rows.keys(), key=natural):
        raise DataError(
            f"{path}: {len(rest):,} of {len(known):,} images are not in it, the first {rest[0]}; "
            "add their lines, or remove the images"
        )
    where = f"{os.path.basename(tree.path)}/"
    files, labels = [known[place] for place in rows], [row.label for row in rows.values()]
    return Split(where, "Tiny-ImageNet", files, labels)


def _read_class_folders(tree: Tree, part: Part) -> Split:
    """A folder a class. Raises DataError for images beside them, and for a train split's folder
    without images."""
    if tree.images:
        raise DataError(
            f"{tree.images[0].path} lies beside class folders ({listed(tree.holding())}); move it "
            "into the folder of its class"
        )
    files: list[File] = []
    labels: list[str] = []
    for name, folder in tree.folders.items():
        if folder.count:
            images = _images_of_class(folder)
            files += images
            labels += [name] * len(images)
        elif part == "train":
            raise DataError(
                f"{folder.path}: a class folder without images{_instead(folder)}; add or convert "
                "them, or remove the folder"
            )
    return Split(f"{os.path.basename(tree.path)}/", "class folders", files, labels)


def _images_of_class(folder: Tree) -> list[File]:
    """The images in a class folder, or at the end of a chain of single folders in it. Raises
    DataError where its folders may be classes themselves, as they are for some programs."""
    inner = folder
    while holding := inner.holding():
        if inner.images or len(holding) > 1:
            beside = f" beside {os.path.basename(inner.images[0].path)}" if inner.images else ""
            raise DataError(
                f"{inner.path}: images in {listed(holding, 4)}{beside}: is "
                f"{os.path.basename(folder.path)!r} the class, or is each folder in it one? put "
                "the images of a class right into its folder, SPLIT/CLASS/IMAGE"
            )
        inner = inner.folders[holding[0]]
    return inner.images


def _instead(tree: Tree) -> str:
    """What a folder without images holds, and what is known as an image."""
    kinds, known = tree.left_out(), " ".join(sorted(suffixes()))
    return f", but {counted(kinds)} (known as images: {known})" if kinds else ""


# --- no split ------------------------------------------------------------------------------------


def near_splits(names: Sequence[str], splits: Collection[str] = tuple(PARTS)) -> str:
    """`` (near: validation)`` for folders whose names are nearly those of splits."""
    close = [near(name.lower(), splits, 1).removeprefix("; near: ") for name in names]
    hints = ", ".join(dict.fromkeys(name for name in close if name))
    return f" (near: {hints})" if hints else ""


def no_splits(top: Tree) -> DataError:
    """The error for a folder without split folders and tables: what it may be instead."""
    names = sorted(top.folders, key=natural)
    above, own = os.path.split(os.path.abspath(top.path))
    inside = {name: _splits_inside(top.folders[name]) for name in names[:3] if len(names) <= 3}
    deeper = next((name for name, splits in inside.items() if splits), None)
    if not names:
        what = f"{len(top.images):,} images without labels" if top.images else "no images"
        remedy = (
            "put them into class folders, train/CLASS/IMAGE, or add labels.csv with the columns "
            "path and class"
        )
        return DataError(f"{top.path}: no folder train/, and {what}; {remedy}")
    if deeper is not None:
        remedy = f"{deeper}/ holds {listed(inside[deeper])}: name {os.path.join(top.path, deeper)}"
    elif part_of(own):
        remedy = f"{own}/ may itself be a split: name the folder that holds it, {above}"
    else:
        remedy = (
            "put the class folders under train/ (and test/ or validation/), or, to hold out a part "
            "of the training images, all under train/ with --val-split 0.1"
        )
    return DataError(
        f"{top.path}: no folder train/, validation/ or test/: found {listed(names)}"
        f"{near_splits(names)}; {remedy}"
    )


def _splits_inside(folder: Tree) -> list[str]:
    return [name for name in scan(folder.path, only=lambda name: False).folders if part_of(name)]
