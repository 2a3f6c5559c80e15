"""Tables that say of which class an image is: labels.csv, and Tiny-ImageNet's annotations."""

from __future__ import annotations

import csv
import io
import ntpath
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple
from unicodedata import normalize

from randsurgery.errors import DataError, near, reason
from randsurgery.training.images import suffixes
from randsurgery.training.scan import Tree

PATH_COLUMNS = ("path", "file", "filename", "file_name", "name", "image", "image_path")
CLASS_COLUMNS = ("class", "label", "category", "class_name", "target")
SPLIT_COLUMNS = ("split", "set", "subset")
SECOND_BEST = (("id", "image_id", "img"), ("breed", "species", "label_name"), ())
"""Columns that are of paths, classes and splits if no other is: Kaggle's tables."""
LIKE_SPLITS = (
    "is_train", "is_training", "is_test", "is_valid", "is_val", "train", "test", "valid", "fold",
    "partition", "phase",
)  # fmt: skip
"""Columns that may say a split, in words of their own."""

_DELIMITERS = (",", ";", "\t")
_FEW = 10_000
"""Names among which near ones are looked for, which takes a second for so many."""


class Row(NamedTuple):
    """A line of a table. ``split`` is None where there is no such column."""

    line: int
    path: str
    label: str
    split: str | None = None


class Columns(NamedTuple):
    """Which cell of a line is what, of how many."""

    path: int
    label: int
    split: int | None
    width: int


class NoTable(DataError):
    """A .csv file without one column of paths and one of classes."""


def read_table(table: str, known: Collection[str]) -> list[Row]:
    """The lines of a .csv file with a header of any of the column names above, or of two columns
    without one, separated by commas, semicolons or tabs.

    ``known``: the images by their paths from the table's folder. Raises NoTable for other columns,
    DataError for a line that lacks something.
    """
    text = _text(table)
    first = {delimiter: _first(text, delimiter) for delimiter in _DELIMITERS}
    for delimiter, cells in first.items():
        if (columns := _columns(table, cells)) is not None:
            if rows := list(_rows(table, text, delimiter, columns, header=True)):
                return rows
            raise NoTable(f"{table}: no line below the header, expected one an image")
    for delimiter, cells in first.items():
        if len(cells) == 2 and find(cells[0], known) is not None:
            return list(_rows(table, text, delimiter, Columns(0, 1, None, 2), header=False))
    cells = max(first.values(), key=len)
    raise NoTable(
        f"{table}: expected a header with a column of paths ({', '.join(PATH_COLUMNS)}) and one of "
        f"classes ({', '.join(CLASS_COLUMNS)}), found {', '.join(map(repr, cells[:8])) or 'none'}"
    )


def read_annotations(table: str) -> list[Row]:
    """The lines of Tiny-ImageNet's table: file, class, and a box (x, y, width, height), separated
    by tabs. Raises DataError for any other line."""
    rows = []
    for number, line in enumerate(_text(table).split("\n"), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 6 or not cells[0] or not cells[1]:
            raise DataError(
                f"{table}, line {number}: expected file, class, x, y, width and height, separated "
                f"by tabs, found {line.strip()[:60]!r}"
            )
        rows.append(Row(number, cells[0], cells[1]))
    return rows


# --- which image is meant ------------------------------------------------------------------------


def find(path: str, known: Collection[str]) -> str | None:
    """The image that a table's path means: as it is written, without spaces around it, with
    backslashes between folders, or with accents as other systems encode them in names. None if
    there is no such image."""
    plain = path.strip()
    slashes = plain.replace("\\", "/")
    for text in (path, plain, slashes, normalize("NFC", slashes), normalize("NFD", slashes)):
        if (place := posixpath.normpath(text)) in known:
            return place
    return None


def match(table: str, rows: Sequence[Row], folder: str, known: Collection[str]) -> dict[str, Row]:
    """The lines by the image that each means, out of ``known`` in ``folder``.

    Raises DataError for an image that is not there, that is named twice, or that is none.
    """
    found: dict[str, Row] = {}
    missing: list[Row] = []
    stems = _stems(known)
    for row in rows:
        place = find(row.path, known) or stems.get(row.path.strip()) or _inside(row, folder, known)
        if place is None:
            _check_place(table, row, folder)
            missing.append(row)
        elif (other := found.setdefault(place, row)) is not row:
            as_what = "" if other.label == row.label else f", as {other.label!r} and {row.label!r}"
            raise DataError(
                f"{table}: lines {other.line} and {row.line} both name {place}{as_what}; "
                "keep one of them"
            )
    if missing:
        names = ", ".join(f"{row.path} (line {row.line})" for row in missing[:10])
        more = ", ..." if len(missing) > 10 else ""
        hint = near(missing[0].path, known) if len(known) <= _FEW else ""
        raise DataError(
            f"{table}: {len(missing):,} of {len(rows):,} files are not in {folder}: {names}{more}"
            f"{hint}; expected paths from there, with their suffixes"
        )
    return found


def _stems(known: Collection[str]) -> dict[str, str]:
    """The images by their paths without the suffix, as Kaggle's ids; those that are one image's."""
    found: dict[str, list[str]] = {}
    for place in known:
        found.setdefault(os.path.splitext(place)[0], []).append(place)
    return {stem: places[0] for stem, places in found.items() if len(places) == 1}


def _inside(row: Row, folder: str, known: Collection[str]) -> str | None:
    """The image that an absolute path means, if that leads into the folder."""
    path = row.path.strip()
    if not os.path.isabs(path):
        return None
    place = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return find(place, known)


def _check_place(table: str, row: Row, folder: str) -> None:
    """Raises DataError for a path that leaves the folder, and for a file that is no image."""
    path = row.path.strip().replace("\\", "/")
    place = posixpath.normpath(path)
    if posixpath.isabs(path) or ntpath.splitdrive(path)[0] or place.split("/")[0] == "..":
        raise DataError(
            f"{table}, line {row.line}: {row.path} leaves {folder}; expected paths from there"
        )
    if os.path.lexists(os.path.join(folder, place)):
        named = os.path.splitext(place)[1].lower() in suffixes()
        what = (
            "lies in no split's folder, or in a hidden one" if named else "is no image by its name"
        )
        raise DataError(f"{table}, line {row.line}: {row.path} {what}; move it or remove the line")


# --- a table beside class folders ----------------------------------------------------------------


class Said(NamedTuple):
    """What a table says: by the name of a folder, by an image's path in it, the line. ``repeats``:
    it is no more than class folders say already."""

    rows: Mapping[str, Mapping[str, Row]]
    repeats: bool


def read_labels(folder: str, table: str, trees: Mapping[str, Tree]) -> Said | None:
    """What a table in ``folder`` says of the images in ``trees``: folders in it by name, or itself,
    named by an empty text.

    None if there are class folders, and the table is of something else. Raises DataError for a
    table that cannot be used, and for one that contradicts class folders.
    """
    prefixes = {name: f"{name}/" if name else "" for name in trees}
    known = {prefixes[name] + place for name, tree in trees.items() for place in tree.places()}
    sorted_in = any(is_sorted(tree) for tree in trees.values())
    path = os.path.join(folder, table)
    try:
        rows = read_table(path, known)
    except NoTable:
        if sorted_in:
            return None
        raise
    if sorted_in and not any(find(row.path, known) for row in rows):
        return None
    said: dict[str, dict[str, Row]] = {name: {} for name in trees}
    for place, row in match(path, rows, folder, known).items():
        name = place.partition("/")[0] if "" not in trees else ""
        said[name][place.removeprefix(prefixes[name])] = row
    return Said(said, _repeats(path, said, trees))


def is_sorted(tree: Tree) -> bool:
    """Whether images are sorted into folders, which may be classes: into more than one, and all."""
    return not tree.images and len(tree.holding()) > 1


def _repeats(table: str, said: Mapping[str, Mapping[str, Row]], trees: Mapping[str, Tree]) -> bool:
    """Whether a table gives the images of each folder that it names a class of their own. Raises
    DataError for an image in a folder that bears the name of another of its classes."""
    if not all(is_sorted(trees[name]) for name, rows in said.items() if rows):
        return False
    classes: dict[str, set[str]] = {}
    named = [(place, row) for rows in said.values() for place, row in rows.items()]
    for place, row in named:
        classes.setdefault(place.partition("/")[0], set()).add(row.label)
    labels = {row.label for _, row in named}
    for place, row in named:
        inside = place.partition("/")[0]
        if inside in labels and inside != row.label:
            raise DataError(
                f"{table}, line {row.line}: {row.path} is of class {row.label!r}, but lies in a "
                f"folder named as the class {inside!r}; mend or remove the table, or move the image"
            )
    return len(labels) == len(classes) == sum(map(len, classes.values()))


# --- reading -------------------------------------------------------------------------------------


def _text(table: str) -> str:
    try:
        with open(table, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{table}: not UTF-8 (at byte {error.start:,}); save it with that encoding"
        ) from None
    except OSError as error:
        raise DataError(f"{table}: cannot be read ({error.strerror})") from None


def _lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The lines that are not blank, each with its number. Raises csv.Error."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield reader.line_num, cells


def _first(text: str, delimiter: str) -> list[str]:
    try:
        return next(_lines(text, delimiter), (0, []))[1]
    except csv.Error:  # as a quoted name is if the delimiter is another
        return []


def _columns(table: str, header: Sequence[str]) -> Columns | None:
    """Which column is what; None if paths or classes are missing."""
    names = [name.strip().casefold().replace(" ", "_").replace("-", "_") for name in header]
    kinds = (PATH_COLUMNS, CLASS_COLUMNS, SPLIT_COLUMNS)
    found = [
        [i for i, name in enumerate(names) if name in kind]
        or [i for i, name in enumerate(names) if name in others]
        for kind, others in zip(kinds, SECOND_BEST, strict=True)
    ]
    paths, labels, splits = found
    if not paths or not labels:
        return None
    if not splits and (told := [i for i, name in enumerate(names) if name in LIKE_SPLITS]):
        raise DataError(
            f"{table}: the column {header[told[0]].strip()} may say which image is of which split; "
            "rename it to split, with train, validation and test in it, or remove it"
        )
    for places, what in zip(found, ("path", "class", "split"), strict=True):
        if len(places) > 1:
            raise NoTable(
                f"{table}: {' and '.join(header[i].strip() for i in places)} may each be the "
                f"column of the {what}; rename all but one"
            )
    return Columns(paths[0], labels[0], splits[0] if splits else None, len(header))


def _rows(table: str, text: str, delimiter: str, columns: Columns, header: bool) -> Iterator[Row]:
    lines = _lines(text, delimiter)
    line = 1
    try:
        if header:
            line, _ = next(lines)
        for line, cells in lines:
            yield _row(table, line, cells, columns)
    except csv.Error as error:
        raise DataError(f"{table}, after line {line}: {reason(error)}; mend the line") from None


def _row(table: str, line: int, cells: Sequence[str], columns: Columns) -> Row:
    if len(cells) != columns.width:
        raise DataError(
            f"{table}, line {line}: {len(cells)} cells, expected {columns.width} as in the first "
            "line; quote names that hold the delimiter"
        )
    split = None if columns.split is None else cells[columns.split].strip()
    row = Row(line, cells[columns.path], cells[columns.label].strip(), split)
    for what, cell in (("path", row.path.strip()), ("class", row.label), ("split", split)):
        if cell == "":
            raise DataError(f"{table}, line {line}: no {what}; fill the cell or remove the line")
    return row
