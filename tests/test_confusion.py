"""Rows by class and the confusion matrix: against slow twins and scikit-learn; tables read back,
pictures measured pixel by pixel, names of every kind."""

from __future__ import annotations

import csv
import json
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from randsurgery.errors import DataError, OutputError, UsageError
from randsurgery.inspection import confusion as module
from randsurgery.inspection.confusion import (
    COUNTED,
    MOST,
    MOST_DRAWN,
    NAMED,
    ClassRow,
    balanced_accuracy,
    check_target,
    confusion,
    drawn,
    per_class,
    to_json,
    write_confusion,
)
from randsurgery.inspection.pictures import save

pytestmark = pytest.mark.slow

SPLIT = "digits, test"
EVIL = [
    "\x1b[31mred[bold]\u202e\n.weight", "$x^2_$", "$\\frac{$", "_private_", '"quoted", twice',
    "it's", "a\rb", "a\r\nb", "tab\tbed", "日本語", "čeština", "🦆", "=1+1", "-", "+", "@home", " ",
    "", "#", "\\", "caf\udce9", "true \\ predicted",
]  # fmt: skip
"""What folders, datasets and files call classes, or could."""


def numbers(seed: int, classes: int, images: int) -> tuple[Any, Any]:
    """Labels and predictions, half of them right."""
    rng = np.random.Generator(np.random.Philox(seed))
    labels = rng.integers(0, classes, images)
    wild = rng.integers(0, classes, images)
    return labels, np.where(rng.random(images) < 0.5, labels, wild)


def plain(classes: int) -> list[str]:
    return [f"kind {i}" for i in range(classes)]


# --- twins ---------------------------------------------------------------------------------------


def slow_matrix(labels: Any, said: Any, classes: int) -> list[list[int]]:
    found = [[0] * classes for _ in range(classes)]
    for true, predicted in zip(labels, said, strict=True):
        found[true][predicted] += 1
    return found


def slow_share(part: int, whole: int) -> float | None:
    return None if whole == 0 else float(Fraction(part, whole))


def slow_rows(labels: Any, said: Any, names: list[str]) -> list[ClassRow]:
    pairs = list(zip(list(labels), list(said), strict=True))
    found = []
    for c, name in enumerate(names):
        images = sum(true == c for true, _ in pairs)
        told = sum(predicted == c for _, predicted in pairs)
        correct = sum(true == predicted == c for true, predicted in pairs)
        wrong = Counter(int(p) for true, p in pairs if true == c != p)
        most = max(wrong.values(), default=0)
        first = min((p for p, count in wrong.items() if count == most), default=None)
        found.append(
            ClassRow(
                name, images, correct, slow_share(correct, images), slow_share(correct, told),
                slow_share(2 * correct, images + told), None if first is None else names[first],
            )
        )  # fmt: skip
    return found


CASES = {
    "few": numbers(0, 3, 40),
    "many": numbers(1, 25, 400),
    "more classes than images": numbers(2, 60, 30),
    "two": numbers(3, 2, 50),
    "one image": ([4], [2]),
    "one class in all": ([0, 0], [0, 0]),
    "one class in the data": ([1, 1, 1], [0, 1, 2]),
    "one class predicted": ([0, 1, 2, 2], [1, 1, 1, 1]),
    "all right": ([0, 1, 2], [0, 1, 2]),
    "all wrong": ([0, 1, 2, 2], [1, 2, 0, 0]),
    "gaps": ([0, 5, 5, 9], [5, 0, 9, 9]),
}


@pytest.mark.parametrize("more", [0, 1, 7])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_matrix_are_those_of_the_slow_twins_and_of_scikit_learn(
    case: str, more: int
) -> None:
    labels, said = CASES[case]
    classes = int(max(*labels, *said)) + 1 + more
    names = plain(classes)
    rows = per_class(labels, said, names)
    assert rows == slow_rows(labels, said, names)
    matrix = confusion(labels, said, classes)
    assert (matrix.dtype, matrix.shape) == (np.int64, (classes, classes))
    assert matrix.tolist() == slow_matrix(labels, said, classes)
    if classes > 1:  # of one, it warns
        known = confusion_matrix(labels, said, labels=np.arange(classes))
        assert matrix.tolist() == known.tolist()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:(y_pred contains|The number of unique|A single label)")
def test_shares_are_scikit_learns_where_it_defines_them(case: str) -> None:
    labels, said = (np.asarray(found) for found in CASES[case])
    classes = int(max(labels.max(), said.max())) + 2
    rows = per_class(labels, said, plain(classes))
    known = precision_recall_fscore_support(
        labels, said, labels=np.arange(classes), zero_division=np.nan
    )
    ours = ("precision", "accuracy", "f1", "images")
    for name, values in zip(ours, known, strict=True):
        found = [np.nan if (v := getattr(row, name)) is None else v for row in rows]
        np.testing.assert_allclose(found, values, rtol=1e-15, atol=0)
    assert balanced_accuracy(rows) == pytest.approx(balanced_accuracy_score(labels, said))


def test_what_is_nothing_over_nothing_is_none() -> None:
    rows = per_class([0, 0, 1], [0, 2, 2], ["a", "b", "c", "d"])
    assert rows == [
        ClassRow("a", 2, 1, 0.5, 1.0, 2 / 3, "c"),
        ClassRow("b", 1, 0, 0.0, None, 0.0, "c"),  # never predicted
        ClassRow("c", 0, 0, None, 0.0, 0.0, None),  # without images
        ClassRow("d", 0, 0, None, None, None, None),  # neither
    ]
    assert balanced_accuracy(rows) == 0.25


def test_of_equal_mistakes_the_first_class_is_named() -> None:
    rows = per_class([1, 1, 1, 1, 1], [3, 2, 3, 2, 0], list("abcd"))
    assert rows[1].mistaken_for == "c"


def test_balanced_accuracy_counts_classes_not_images() -> None:
    labels = [0] * 98 + [1, 1]
    rows = per_class(labels, [0] * 100, ["common", "rare", "absent"])
    assert balanced_accuracy(rows) == 0.5
    with pytest.raises(DataError, match="found none"):
        balanced_accuracy(rows[2:])
    with pytest.raises(DataError, match="found none"):
        balanced_accuracy([])


def test_json_has_plain_values_and_no_nan() -> None:
    found = to_json(per_class(*CASES["gaps"], plain(12)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["balanced_accuracy", "classes"]
    assert len(found["classes"]) == 12
    assert found["classes"][0] == {
        "name": "kind 0", "images": 1, "correct": 0, "accuracy": 0.0, "precision": 0.0, "f1": 0.0,
        "mistaken_for": "kind 5",
    }  # fmt: skip
    assert found["classes"][1]["accuracy"] is None


@pytest.mark.parametrize("kind", ["u1", "i1", ">i2", "i4", "u8"])
def test_whole_numbers_of_every_width_will_do(kind: str) -> None:
    labels, said = (np.asarray(found, dtype=kind) for found in numbers(4, 100, 500))
    assert confusion(labels, said, 100).tolist() == slow_matrix(labels, said, 100)
    assert per_class(labels, said, plain(100)) == slow_rows(labels, said, plain(100))


def test_more_classes_than_a_matrix_has_room_for_have_rows() -> None:
    labels = np.array([0, 21_840, 21_840, 7])
    rows = per_class(labels, labels[::-1], plain(21_841))
    assert rows[21_840].mistaken_for is None
    assert rows[0].mistaken_for == "kind 7"


# --- refusals ------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, Any, str]] = {
    "no image": ([], [], "one label or more is needed, found none"),
    "no prediction": ([0], [], "one prediction or more is needed"),
    "label beyond": ([0, 3], [0, 0], r"labels must be 0 to 2, .* found 3 \(image 1\); name each"),
    "prediction beyond": ([0, 0], [9, 0], r"predictions must be 0 to 2, .* found 9 \(image 0\)"),
    "unlabelled": ([0, 1, -1], [0, 0, 0], r"found -1 \(image 2\); leave out images"),
    "lengths": ([0, 1], [0], "found 2 labels and 1 predictions"),
    "logits": ([0, 1], [[0, 1], [1, 0]], r"whole numbers, one an image, found int64 of shape"),
    "floats": ([0.0, 1.0], [0, 1], "whole numbers, one an image, found float64"),
    "truths": ([True, False], [0, 1], "found bool"),
    "one number": (1, 1, r"found int64 of shape \(\)"),
    "huge": (np.array([2**64 - 1], dtype="u8"), [0], "found 18446744073709551615"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_are_no_classes_is_refused_in_one_line(case: str) -> None:
    labels, said, message = WRONG[case]
    for count in (
        lambda: per_class(labels, said, ["a", "b", "c"]),
        lambda: confusion(labels, said, 3),
    ):
        with pytest.raises(DataError, match=message) as caught:
            count()
        assert "\n" not in str(caught.value)


def test_no_classes_and_too_many_are_refused() -> None:
    with pytest.raises(DataError, match="found none"):
        per_class([0], [0], [])
    with pytest.raises(DataError, match="found none"):
        confusion([0], [0], 0)
    with pytest.raises(UsageError, match=r"room for 10,000 classes, found 10,001; --per-class"):
        confusion([0], [0], MOST + 1)


def test_a_target_is_checked_before_any_work(tmp_path: Path) -> None:
    for suffix in (".csv", ".png", ".svg", ".pdf", ".PNG"):
        target = tmp_path / f"c{suffix}"
        assert check_target(target) == target
        assert check_target(str(target), classes=MOST_DRAWN) == target
    for name in ("c.jpg", "c", "c.csv.gz", ".png", ""):
        with pytest.raises(UsageError, match=r"must end in \.csv, \.png, \.svg or \.pdf, found"):
            check_target(tmp_path / name if name else "")
    with pytest.raises(OutputError, match=r"no such folder; .*--confusion"):
        check_target(tmp_path / "nowhere" / "c.csv")
    (tmp_path / "old.csv").write_text("old")
    with pytest.raises(OutputError, match="exists already; choose another --confusion or pass"):
        check_target(tmp_path / "old.csv")
    check_target(tmp_path / "old.csv", force=True)
    with pytest.raises(UsageError, match=r"room for 2,000 classes, found 2,001; a \.csv"):
        check_target(tmp_path / "c.png", classes=MOST_DRAWN + 1)
    check_target(tmp_path / "c.csv", classes=MOST)
    with pytest.raises(UsageError, match="room for 10,000 classes"):
        check_target(tmp_path / "c.csv", classes=MOST + 1)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    old = tmp_path / "old.png"
    old.write_text("old")
    empty: npt.NDArray[np.int64] = np.zeros((3, 3), np.int64)
    with pytest.raises(DataError, match="without images cannot be drawn"):
        write_confusion(empty, plain(3), old, SPLIT)
    with pytest.raises(DataError, match=r"found shape \(3, 3\) and 2 names"):
        write_confusion(empty, plain(2), old, SPLIT)
    with pytest.raises(UsageError, match="must end in"):
        write_confusion(empty, plain(3), tmp_path / "c.txt", SPLIT)
    large = np.broadcast_to(np.int64(1), (MOST_DRAWN + 1,) * 2)
    with pytest.raises(UsageError, match="room for 2,000 classes"):
        write_confusion(large, plain(MOST_DRAWN + 1), old, SPLIT)
    with pytest.raises(OutputError, match="cannot be written"):
        write_confusion(np.eye(3, dtype=np.int64), plain(3), tmp_path / "no" / "c.csv", SPLIT)
    assert old.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


# --- the table -----------------------------------------------------------------------------------


def test_a_table_is_read_back_by_the_csv_module(tmp_path: Path) -> None:
    names = [*EVIL, "kind", "kind", "x" * 5000]
    matrix = confusion(*numbers(5, len(names), 3000), len(names))
    path = tmp_path / "c.csv"
    write_confusion(matrix, names, path, SPLIT)
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    known = [name.replace("\udce9", "\\udce9") for name in names]  # which UTF-8 cannot hold
    assert head == ["true \\ predicted", *known]
    assert [row[0] for row in rows] == known
    assert [[int(count) for count in row[1:]] for row in rows] == matrix.tolist()


def test_the_bytes_of_a_small_table(tmp_path: Path) -> None:
    write_confusion(confusion([0, 0, 1], [0, 1, 1], 2), ["a,b", "=c"], tmp_path / "c.CSV", SPLIT)
    assert (tmp_path / "c.CSV").read_bytes() == b'true \\ predicted,"a,b",=c\n"a,b",1,1\n=c,0,1\n'


# --- the picture ---------------------------------------------------------------------------------

FORMATS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-"}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("classes", [1, 2, 10, COUNTED + 1])
def test_pictures_are_of_their_format(suffix: str, classes: int, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix.upper()}"
    write_confusion(confusion(*numbers(6, classes, 200), classes), plain(classes), path, SPLIT)
    assert path.read_bytes().startswith(FORMATS[suffix])
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def words(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, and where."""
    seen: list[Text] = []
    draw = Text.draw

    def note(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        draw(self, renderer, *args, **kwargs)

    canvas = FigureCanvasAgg(figure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        canvas.draw()
    shown = [text for text in seen if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]


@pytest.mark.parametrize(
    ("names", "images"),
    [
        (["only"], 3),
        (["cat", "dog"], 1000),
        (["a benign lesion of the skin, small", "m"], 10**6),
        (plain(10), 1000),
        (EVIL[:9], 500),
        ([f"{i} {'x' * 300}" for i in range(COUNTED)], 2 * 10**6),
        (plain(COUNTED + 1), 1000),
        (plain(NAMED), 2000),
        (plain(1000), 5000),
    ],
)
def test_no_word_is_cut_or_lies_on_another(names: list[str], images: int) -> None:
    matrix = confusion(*numbers(7, len(names), images), len(names))
    matrix[-1] *= 1 if len(names) == 1 else 0  # a class without images: two lines of title
    figure = drawn(matrix, names, SPLIT)
    boxes = words(figure)
    assert len(boxes) > 12
    for told, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, told
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, told
    for (told, box), (other, there) in combinations(boxes, 2):
        across = min(box.x1, there.x1) - max(box.x0, there.x0)
        along = min(box.y1, there.y1) - max(box.y0, there.y0)
        assert min(across, along) < 1, (told, other)


def test_every_name_is_text_and_all_are_told_apart() -> None:
    names = [*EVIL[:7], *EVIL[8:14], "kind", "kind", "x" * 300 + "a", "x" * 300 + "b"]
    matrix = confusion(*numbers(8, len(names), 300), len(names))
    figure = drawn(matrix, names, "$a_1$ \x1b[31m folder\n, test")
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert len({label.get_text() for label in labels}) == len(names)
        assert all(label.get_text().isprintable() for label in labels)
        assert not any(label.get_parse_math() for label in labels)
        assert {"$x^2_$", "_private_", '"quoted", twice'} <= {t.get_text() for t in labels}
    assert not axes.title.get_parse_math()
    assert axes.get_title() == "$a_1$ \\x1b[31m folder\\n, test, 300 images"


@pytest.mark.parametrize("suffix", FORMATS)
def test_names_of_every_kind_can_be_drawn(suffix: str, tmp_path: Path) -> None:
    matrix = confusion(*numbers(9, len(EVIL), 300), len(EVIL))
    write_confusion(matrix, EVIL, tmp_path / f"c{suffix}", EVIL[0])
    matrix = confusion(*numbers(9, 10, 300), 10)
    write_confusion(matrix, EVIL[:10], tmp_path / f"d{suffix}", EVIL[1])


def test_titles_count_images_and_classes_without() -> None:
    def title(labels: list[int], classes: int) -> str:
        return drawn(confusion(labels, labels, classes), plain(classes), SPLIT).axes[0].get_title()

    assert title([0], 1) == "digits, test, 1 image"
    assert title([0] * 1234, 1) == "digits, test, 1,234 images"
    assert title([0, 1], 3) == "digits, test, 2 images\ngrey: 1 class without images"
    assert title([0, 1], 4) == "digits, test, 2 images\ngrey: 2 classes without images"


def test_cells_say_their_counts_up_to_twenty_classes_and_names_stand_up_to_128() -> None:
    def counts(classes: int) -> list[str]:
        matrix = confusion(*numbers(10, classes, 1000), classes)
        axes = drawn(matrix, plain(classes), SPLIT).axes[0]
        named = [t.get_text() for t in axes.get_yticklabels()]
        assert (named[:2] == ["kind 0", "kind 1"]) == (classes <= NAMED)
        found = [text.get_text() for text in axes.texts]
        assert found in ([f"{count:,}" for count in matrix.flat], [])
        return found

    assert len(counts(2)) == 4
    assert len(counts(COUNTED)) == COUNTED**2
    assert counts(COUNTED + 1) == counts(NAMED) == counts(NAMED + 1) == []


def test_counts_can_be_read_on_their_cells() -> None:
    matrix = np.array([[3, 1], [0, 0]])
    axes = drawn(matrix, plain(2), SPLIT).axes[0]
    shades = {text.get_text(): text.get_color() for text in axes.texts}
    assert (shades["3"], shades["1"], shades["0"]) == ("white", "black", "0.55")


def colours_of(matrix: npt.NDArray[np.int64], names: list[str], path: Path) -> list[list[Any]]:
    """The colour of the middle of every cell in the picture on disk."""
    figures: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "save", lambda figure, to: (figures.append(figure), save(figure, to)))
        write_confusion(matrix, names, path, SPLIT)
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    frame = figures[0].axes[0].get_window_extent()
    left, top = round(frame.x0), pixels.shape[0] - round(frame.y1)
    assert (frame.x0, frame.y1) == pytest.approx((round(frame.x0), round(frame.y1)), abs=1e-6)
    cell, rest = divmod(round(frame.width), len(names))
    assert rest == 0
    found = pixels[top + cell // 2 :: cell, left + cell // 2 :: cell]
    return [[tuple(pixel) for pixel in row] for row in found[: len(names), : len(names)].tolist()]


@pytest.mark.parametrize("classes", [25, 100, 1500])
def test_no_cell_is_left_out_of_a_picture(classes: int, tmp_path: Path) -> None:
    """Rows with one image lie in one cell; which, can be read off the file."""
    rng = np.random.Generator(np.random.Philox(11))
    said = rng.permutation(classes)
    labels = np.delete(np.arange(classes), 7)
    matrix = confusion(labels, said[labels], classes)
    found = colours_of(matrix, plain(classes), tmp_path / "c.png")
    full, none, grey = (8, 48, 107), (247, 251, 255), (209, 209, 209)
    for row, predicted in enumerate(said.tolist()):
        expected = [none] * classes
        expected[predicted] = full
        assert found[row] == ([grey] * classes if row == 7 else expected), row


def test_the_colour_is_the_share_of_the_row(tmp_path: Path) -> None:
    """Twice the images, the same colour."""
    matrix = np.zeros((25, 25), np.int64)
    matrix[0, :3] = 10, 5, 5
    matrix[1, :3] = 200, 100, 100
    found = colours_of(matrix, plain(25), tmp_path / "c.png")
    assert found[0] == found[1]
    assert found[0][1] == found[0][2] != found[0][0]


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_vector_pictures_hold_every_cell(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"c{suffix}"
    write_confusion(np.eye(1000, dtype=np.int64), plain(1000), path, SPLIT)
    sizes = re.findall(rb"/Width (\d+)|<image [^>]*width=\"([\d.]+)\"", path.read_bytes())
    widest = max(float(a or b) * (1 if a else 150 / 72) for a, b in sizes)
    assert widest == pytest.approx(2000)


# --- what is left alone --------------------------------------------------------------------------


def test_global_generators_and_the_matrix_are_left_as_they_were(tmp_path: Path) -> None:
    matrix = confusion(*numbers(12, 5, 100), 5)
    before = random.getstate(), pickle.dumps(np.random.get_state()), matrix.tolist()  # noqa: NPY002
    for suffix in module.SUFFIXES:
        write_confusion(matrix, plain(5), tmp_path / f"c{suffix}", SPLIT)
    after = random.getstate(), pickle.dumps(np.random.get_state()), matrix.tolist()  # noqa: NPY002
    assert before == after


def test_counting_loads_no_library_but_numpy(tmp_path: Path) -> None:
    code = f"""
from randsurgery.inspection.confusion import *
write_confusion(confusion([0, 1], [1, 1], 2), ["a", "b"], {str(tmp_path / "c.csv")!r}, "test")
to_json(per_class([0, 1], [1, 1], ["a", "b"]))
import sys
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "timm", "torchvision", "sklearn", "scipy", "matplotlib"}
