"""What lies in a folder: images, folders, what is left out, and which files are one file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from randsurgery.errors import DataError
from randsurgery.training.images import suffixes

TABLES = ("labels.csv", "metadata.csv")
"""Names of a table of labels, in any case of letters; the second is Hugging Face's."""

ANNOTATIONS = "val_annotations.txt"
"""The name of Tiny-ImageNet's table."""

HIDDEN = "hidden"
"""The kind of what starts with a dot: ``.DS_Store``, ``.ipynb_checkpoints``, ``._cat.png``."""

SYSTEM = (
    "__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "lost+found", "@eaDir",
)  # fmt: skip
"""Files and folders that systems put beside a user's, in any case of letters."""

MAX_DEPTH = 50
"""Folders within folders; more are a mistake, and too many would end the interpreter."""

_SYSTEM = {name.casefold(): name for name in SYSTEM}


class File(NamedTuple):
    """An image file: its path, and its inode number (of a link, that of the file it leads to)."""

    path: str
    inode: int


@dataclass
class Tree:
    """A folder: the images right in it, the folders in it by name, the tables of labels in it
    (names), and how many others of each kind; ``count``: the images in it and below."""

    path: str
    images: list[File] = field(default_factory=list)
    folders: dict[str, Tree] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def files(self) -> Iterator[File]:
        """Its images, and those of all folders below."""
        yield from self.images
        for folder in self.folders.values():
            yield from folder.files()

    def places(self) -> dict[str, File]:
        """The same by their path within this folder, its parts joined by a slash."""
        start = len(os.path.join(self.path, ""))
        return {file.path[start:].replace(os.sep, "/"): file for file in self.files()}

    def left_out(self) -> Counter[str]:
        """How many of each kind are no images, in it and below. Its own tables do not count: they
        may be of use."""
        found = Counter(self.others)
        for folder in self.folders.values():
            found += folder.left_out() + not_used(folder.tables)
        return found

    def holding(self) -> list[str]:
        """The names of the folders that hold images, in them or below."""
        return [name for name, folder in self.folders.items() if folder.count]


def not_used(tables: Iterable[str]) -> Counter[str]:
    """Tables as what is left out."""
    return Counter(f"{table} (not used)" for table in tables)


def system_kind(name: str) -> str | None:
    """What a name is counted as if it is left out whatever it holds: hidden, or a system's."""
    return HIDDEN if name.startswith(".") else _SYSTEM.get(name.casefold())


def natural(text: str) -> tuple[list[int | str], str]:
    """A key for timm's natural order, by which classes have always been numbered; of two that are
    equal there, as ``Cat`` and ``cat``, by the text. (timm's own fails at ``10²``.)"""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdecimal() else part for part in parts], text


def listed(names: Iterable[str], limit: int = 10) -> str:
    """``cat/, dog/`` or, of more than ``limit``, the first and how many there are."""
    every = list(names)
    more = f", ... ({len(every):,} in all)" if len(every) > limit else ""
    return ", ".join(f"{name}/" for name in every[:limit]) + more


def counted(kinds: Counter[str], limit: int = 8) -> str:
    """``2 hidden, 1 .heic``, the most first."""
    order = sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    if rest := sum(count for _, count in order[limit:]):
        order = [*order[:limit], ("of other kinds", rest)]
    return ", ".join(f"{count:,} {kind}" for kind, count in order)


def scan(
    path: str, only: Callable[[str], object] | None = None, above: tuple[str, ...] = ()
) -> Tree:
    """Everything in a folder, links followed. ``only``: which of the folders right in it are
    searched, by name; all by default. ``above``: the real paths of the folders around it.

    Raises DataError for a folder that cannot be searched, a link back up, and a link
    to nothing that is not named as an image.
    """
    real = os.path.realpath(path)
    if real in above:
        raise DataError(f"{path}: a link back to a folder that holds it; remove the link")
    if len(above) == MAX_DEPTH:
        raise DataError(f"{path}: {MAX_DEPTH} folders deep; expected class folders of images")
    tree, inner = Tree(path), []
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=attrgetter("name")):
                if (kind := system_kind(entry.name)) is not None:
                    tree.others[kind] += 1
                elif entry.is_dir():
                    inner.append(entry.name)
                else:
                    _add(tree, entry, only is None or bool(only(entry.name)))
        tree.images = _numbered(tree.images)
    except OSError as error:
        where = error.filename or path
        raise DataError(f"{where}: cannot be searched ({error.strerror})") from None
    for name in inner:
        below = os.path.join(path, name)
        wanted = only is None or only(name)
        tree.folders[name] = scan(below, None, (*above, real)) if wanted else Tree(below)
    tree.count = len(tree.images) + sum(folder.count for folder in tree.folders.values())
    return tree


def _add(tree: Tree, entry: os.DirEntry[str], wanted: bool) -> None:
    """Enter what is no folder. No call of the system for a regular file."""
    suffix = os.path.splitext(entry.name)[1].lower()
    gone = entry.is_symlink() and not os.path.exists(entry.path)
    if gone and suffix in suffixes():  # an image that cannot be read, as its reader will say
        tree.images.append(File(entry.path, entry.inode()))
    elif not entry.is_file():
        if gone and wanted:
            raise DataError(
                f"{entry.path}: a link to nothing; fetch what it leads to or remove the link"
            )
        tree.others["not a regular file"] += 1
    elif suffix in suffixes():
        number = entry.stat().st_ino if entry.is_symlink() else entry.inode()
        tree.images.append(File(entry.path, number))
    elif entry.name.casefold() in (*TABLES, ANNOTATIONS):
        tree.tables.append(entry.name)
    else:
        tree.others[suffix or "without a suffix"] += 1


def _numbered(files: list[File]) -> list[File]:
    """The files with true inode numbers: those that come with the names of a folder are made up by
    some network file systems, which one of them shows."""
    if not files or _stat(files[0].path).st_ino == files[0].inode:
        return files
    return [File(path, _stat(path).st_ino) for path, _ in files]


def _stat(path: str) -> os.stat_result:
    """Of what a link leads to; of the link itself, if that is nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return os.lstat(path)


def identity(path: str) -> tuple[int, ...]:
    """What two paths have in common if and only if they lead to one file. The size and the time
    are for file systems without inode numbers, on which all files would be one."""
    found = _stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def repeated(files: Iterable[File]) -> set[int]:
    """The inode numbers that occur more than once: few, as a rule, need a closer look."""
    seen: set[int] = set()
    twice: set[int] = set()
    for file in files:
        (twice if file.inode in seen else seen).add(file.inode)
    return twice
