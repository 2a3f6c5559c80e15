"""Which classes are told right, and what the others are taken for: one row a class, and the
confusion matrix as a table or a picture."""

from __future__ import annotations

import csv
import io
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from randsurgery.errors import DataError, UsageError
from randsurgery.format.container import check_output, write_atomically
from randsurgery.inspection.pictures import legible, save, told_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Integers = npt.NDArray[np.int64]

OPTION = "--confusion"
SUFFIXES = (".csv", ".png", ".svg", ".pdf")
MOST = 10_000
"""Classes of a matrix: 10^8 counts, 0.8 GB."""
MOST_DRAWN = 2000
"""Classes of a picture, at a pixel each."""


# --- one row a class -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassRow:
    """One class: counts of images, shares in [0, 1]. What is 0 / 0 is None.

    ``images``: how many are of the class (its support). ``accuracy``: the share of these that are
    told right, which is the recall. ``precision``: the share of what is told to be of the class
    that is. ``f1``: their harmonic mean, 2 correct / (images + predictions), so 0 for a class that
    is never told right, and None only for one that has no image and is never predicted.
    ``mistaken_for``: what its images are called most often instead; of equal counts the first
    class; None if none is wrong.
    """

    name: str
    images: int
    correct: int
    accuracy: float | None
    precision: float | None
    f1: float | None
    mistaken_for: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def per_class(labels: npt.ArrayLike, said: npt.ArrayLike, names: Sequence[str]) -> list[ClassRow]:
    """A row for every class of ``names``, in their order, from true ``labels`` and predictions
    ``said``: whole numbers of classes, both of shape (images,).

    Raises DataError if there is no image, or a number that is no class's.
    """
    true, predicted = _checked(labels, said, len(names))
    right = true == predicted
    images, told, correct = (
        np.bincount(found, minlength=len(names)).tolist()
        for found in (true, predicted, true[right])
    )
    instead = _mistakes(true[~right], predicted[~right], len(names))
    return [
        ClassRow(
            name=name,
            images=images[i],
            correct=correct[i],
            accuracy=_share(correct[i], images[i]),
            precision=_share(correct[i], told[i]),
            f1=_share(2 * correct[i], images[i] + told[i]),
            mistaken_for=names[instead[i]] if i in instead else None,
        )
        for i, name in enumerate(names)
    ]


def balanced_accuracy(rows: Iterable[ClassRow]) -> float:
    """The mean of the classes' accuracies, of those that have images: each class counts the same,
    however many images it has. Raises DataError if none has any."""
    found = [row.accuracy for row in rows if row.accuracy is not None]
    if not found:
        raise DataError("a balanced accuracy needs a class with images, found none")
    return math.fsum(found) / len(found)


def to_json(rows: Sequence[ClassRow]) -> dict[str, Any]:
    """Plain values: the balanced accuracy, and every class. Raises DataError as it does."""
    return {
        "balanced_accuracy": balanced_accuracy(rows),
        "classes": [row.to_json() for row in rows],
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mistakes(true: Integers, predicted: Integers, classes: int) -> dict[int, int]:
    """Of images that are told wrong: for each class among them, what it is called most often.

    Pairs that occur are counted, not those that could: a matrix of 20,000 classes has 3 GB.
    """
    pairs, counts = np.unique(true * classes + predicted, return_counts=True)
    most: dict[int, tuple[int, int]] = {}
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        who, other = divmod(pair, classes)
        if who not in most or count > most[who][0]:  # pairs come in order: the first one stays
            most[who] = count, other
    return {who: other for who, (_, other) in most.items()}


def _checked(labels: npt.ArrayLike, said: npt.ArrayLike, classes: int) -> tuple[Integers, Integers]:
    """Both as int64, shape (images,). Raises DataError."""
    if classes < 1:
        raise DataError("one class or more is needed, found none; name the network's classes")
    true = _numbers("label", labels, classes)
    predicted = _numbers("prediction", said, classes)
    if len(true) != len(predicted):
        raise DataError(
            f"every image needs a label and a prediction, found {len(true):,} labels and "
            f"{len(predicted):,} predictions"
        )
    return true, predicted


def _numbers(what: str, given: npt.ArrayLike, classes: int) -> Integers:
    found = np.asarray(given)
    if found.size == 0:
        raise DataError(f"one {what} or more is needed, found none; choose a split with images")
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(
            f"{what}s must be whole numbers, one an image, found {found.dtype} of shape "
            f"{found.shape}"
        )
    outside = np.flatnonzero((found < 0) | (found >= classes))
    if len(outside):
        first = int(found[outside[0]])
        remedy = "name each of them" if first > 0 else "leave out images that have none"
        raise DataError(
            f"{what}s must be 0 to {classes - 1}, the numbers of the classes, found {first} (image "
            f"{outside[0]}); {remedy}"
        )
    return found.astype(np.int64)


# --- the matrix ----------------------------------------------------------------------------------


def confusion(labels: npt.ArrayLike, said: npt.ArrayLike, classes: int) -> Integers:
    """How many images of each class are called what: int64 of shape (classes, classes), the true
    class by row, the predicted one by column; for ``labels`` and ``said`` see ``per_class``.

    Raises DataError as ``per_class`` does, and UsageError for more than ``MOST`` classes.
    """
    _check_classes(classes, MOST, "--per-class gives a row a class")
    true, predicted = _checked(labels, said, classes)
    counts = np.bincount(true * classes + predicted, minlength=classes * classes)
    return counts.astype(np.int64, copy=False).reshape(classes, classes)


def check_target(
    path: str | os.PathLike[str], *, force: bool = False, classes: int | None = None
) -> Path:
    """Refuse before any work what ``write_confusion`` would refuse after it, and an existing file.
    ``classes``: how many there will be, if that is known.

    Raises UsageError for an ending that is none of ``SUFFIXES`` and for more classes than fit, and
    OutputError.
    """
    suffix = _suffix(path)
    if classes is not None:
        _check_fits(classes, suffix)
    return check_output(path, force=force, option=OPTION)


def write_confusion(
    matrix: Integers, names: Sequence[str], path: str | os.PathLike[str], split: str
) -> None:
    """A matrix of ``confusion`` to a file, whole or not at all: a table (.csv) or a picture (.png,
    .svg, .pdf). ``names``: of the classes, in order; ``split``: of what images, for the title.

    The table has one row a true class and one column a predicted one, after a row and a column of
    names; they stand there as they are, as in the CSV of predictions, to which they can then be
    matched. That holds for names such as ``-``, ``+`` and ``=``, too: datasets of handwritten
    formulas have such classes, and spreadsheets should be told to read columns as text.

    Raises UsageError for another ending or too many classes, DataError if the names are of other
    classes or a picture would be empty, OutputError if the disk refuses.
    """
    suffix = _suffix(path)
    if matrix.shape != (len(names), len(names)):
        raise DataError(
            f"a confusion matrix has a row and a column a class, found shape {matrix.shape} and "
            f"{len(names):,} names"
        )
    _check_fits(len(names), suffix)
    if suffix == ".csv":
        write_atomically(path, _lines(matrix, names))
    else:
        save(drawn(matrix, names, split), path)


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{OPTION} must end in .csv, .png, .svg or .pdf, found {str(path)!r}")
    return suffix


def _check_fits(classes: int, suffix: str) -> None:
    if suffix != ".csv":
        _check_classes(classes, MOST_DRAWN, "a .csv file takes more")
    _check_classes(classes, MOST, "--per-class gives a row a class")


def _check_classes(classes: int, most: int, remedy: str) -> None:
    if classes > most:
        raise UsageError(f"{OPTION} has room for {most:,} classes, found {classes:,}; {remedy}")


def _lines(matrix: Integers, names: Sequence[str]) -> Iterator[bytes]:
    yield _line(["true \\ predicted", *names])
    for name, row in zip(names, matrix, strict=True):
        yield _line([name, *row.tolist()])


def _line(row: list[Any]) -> bytes:
    # written with \r\n, so that the csv module of every Python quotes a lone \r; ended with \n
    text = io.StringIO(newline="")
    csv.writer(text).writerow(row)
    # a folder's name may hold bytes that are no UTF-8, which Python knows as lone surrogates
    return (text.getvalue().removesuffix("\r\n") + "\n").encode("utf-8", "backslashreplace")


# --- the picture ---------------------------------------------------------------------------------

DPI = 150
"""Pixels an inch, as ``save`` writes them: each cell is a whole number of pixels, so that none is
left out or lies across two."""
COUNTED = 20
"""Classes up to which cells say their counts."""
NAMED = 128
"""Classes up to which the axes say their names; above, their numbers."""
LONGEST = 32
"""Letters of a class's name on an axis."""
GREY = "0.82"


def drawn(matrix: Integers, names: Sequence[str], split: str) -> Figure:
    """The heat map: by colour the share of a row, so that rare classes are seen like common ones,
    on a scale that shows small shares, too. Raises DataError if there is no image."""
    from matplotlib.figure import Figure

    images, classes = matrix.sum(axis=1, keepdims=True), len(names)
    if not images.any():
        raise DataError("a confusion matrix without images cannot be drawn; choose another split")
    counts = [f"{count:,}" for count in matrix.flat] if classes <= COUNTED else []
    side = classes * _pixels(classes, max(map(len, counts), default=0)) / DPI
    zoom = max(1.0, side / 8)  # a large picture is looked at from farther away
    figure = Figure(figsize=(side, side), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: a box stands for them
        image = _heat_map(axes, matrix, images)
        _draw_scale(
            figure, image, axes.inset_axes((1 + 0.15 / side, 0, 0.15 * zoom / side, 1)), zoom
        )
        if counts:
            _write_counts(axes, image, counts)
        _write_names(axes, names, side / classes, zoom)
        axes.set_title(_title(split, images), fontsize=10 * zoom, parse_math=False)
        _fit(figure, axes, side)
    return figure


def _pixels(classes: int, digits: int) -> int:
    """The side of a cell: room for its count, or for a line of its class's name, if they are
    shown."""
    if classes <= COUNTED:
        return max(57, 360 // classes, 12 * digits + 9)
    if classes <= NAMED:
        return max(18, 1140 // classes)
    return max(1, 2000 // classes)


def _heat_map(axes: Axes, matrix: Integers, images: Integers) -> AxesImage:
    """The cells; rows without images are grey."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    with np.errstate(invalid="ignore"):
        shares = np.ma.masked_invalid(matrix / images)
    colours = colormaps["Blues"].copy()
    colours.set_bad(GREY)
    norm = PowerNorm(0.5 if len(matrix) <= NAMED else 0.25, 0, 1)  # small cells need contrast
    axes.spines[:].set_zorder(-1)  # else the frame lies on the outer cells
    return axes.imshow(shares, cmap=colours, norm=norm, interpolation="nearest")


def _draw_scale(figure: Figure, image: AxesImage, axes: Axes, zoom: float) -> None:
    """What share of a row a colour is."""
    bar = figure.colorbar(image, cax=axes, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    bar.ax.tick_params(labelsize=8 * zoom)
    bar.set_label("share of the true class", fontsize=9 * zoom)


def _write_counts(axes: Axes, image: AxesImage, counts: Sequence[str]) -> None:
    """The count of each cell, where it can be read on its colour."""
    shares: Any = image.get_array()
    colours = image.to_rgba(shares).reshape(-1, 4)
    for place, (count, colour) in enumerate(zip(counts, colours.tolist(), strict=True)):
        row, column = divmod(place, shares.shape[1])
        dark = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] < 0.5
        shade = "white" if dark else "0.55" if count == "0" else "black"
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": shade}
        axes.text(column, row, count, **look)


def _write_names(axes: Axes, names: Sequence[str], cell: float, zoom: float) -> None:
    """Names along both axes if they fit, else numbers."""
    axes.set_xlabel("predicted class", fontsize=10 * zoom)
    axes.set_ylabel("true class", fontsize=10 * zoom)
    if len(names) > NAMED:
        axes.tick_params(labelsize=8 * zoom)
        axes.locator_params(nbins=20, integer=True)
        axes.set_xlabel(f"predicted class, by number (0 to {len(names) - 1})", fontsize=10 * zoom)
        return
    words, size = told_apart(names, LONGEST), 8.0 if cell >= 0.15 else 6.5
    axes.set_yticks(range(len(words)), words, fontsize=size, parse_math=False)
    axes.set_xticks(range(len(words)), words, fontsize=size, parse_math=False)
    widths = (text.get_window_extent().width / DPI for text in axes.get_xticklabels())
    if any(width > 0.9 * cell for width in widths):
        axes.tick_params(axis="x", labelrotation=90)


def _title(split: str, images: Integers) -> str:
    count, empty = int(images.sum()), int((images == 0).sum())
    title = f"{legible(split, 60)}, {count:,} image{'' if count == 1 else 's'}"
    if empty:
        title += f"\ngrey: {empty:,} class{'' if empty == 1 else 'es'} without images"
    return title


def _fit(figure: Figure, axes: Axes, side: float) -> None:
    """Make room for all that is written around the cells, which keep their size in pixels."""
    box, margin = figure.get_tightbbox(), 0.1
    left, below = (math.ceil((margin - start) * DPI) / DPI for start in (box.x0, box.y0))
    width, height = (
        math.ceil((start + stop + margin) * DPI) / DPI
        for start, stop in ((left, box.x1), (below, box.y1))
    )
    figure.set_size_inches(width, height)
    axes.set_position((left / width, below / height, side / width, side / height))
