"""The chart of a file's members can be read, for few members and many, small and large."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from randsurgery.inspection.members import MOST, MemberRow, MembersReport, drawn

pytestmark = pytest.mark.slow

DENSE = 1_078_464
KINDS = {  # bytes shared, and added by a member
    "a slice": (DENSE, 110_000),
    "full": (DENSE, DENSE),
    "a mask": (1_580, 36_040),
    "a mask of a large network": (1_580, 99_990_000),
}


def report(count: int, shared: int, added: int, name: str = "m{}") -> MembersReport:
    rows = tuple(
        MemberRow(name.format(i), added + 10 * i, added, DENSE, 5, 10, None, None, "test", None)
        for i in range(count)
    )
    size = shared + sum(row.bytes for row in rows)
    return MembersReport("e.safetensors", "conv2", None, size, 1000, shared, rows)


def words(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, and where."""
    drawn_now: list[Text] = []
    draw = Text.draw

    def note(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        drawn_now.append(self)
        draw(self, renderer, *args, **kwargs)

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # which lays it out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        canvas.draw()
    shown = [text for text in drawn_now if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in shown]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5, 10, 2 * MOST])
def test_no_word_is_cut_or_lies_on_another(kind: str, count: int) -> None:
    figure = drawn(report(count, *KINDS[kind]))
    found = words(figure)
    assert len(found) > 10
    for told, box in found:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, told
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, told
    for (told, box), (other, there) in combinations(found, 2):
        assert not box.overlaps(there), (told, other)


def test_what_a_bar_says_lies_within_the_frame() -> None:
    for shared, added in KINDS.values():
        figure = drawn(report(5, shared, added))
        frame = figure.axes[1].get_window_extent()
        sizes = [box for told, box in words(figure) if told.endswith(("kB", "MB"))]
        right = [box for box in sizes if box.x0 > frame.x0]
        assert len(right) == 7
        assert all(box.x1 < frame.x1 for box in right)


def test_many_members_share_a_bar() -> None:
    told = [word for word, _ in words(drawn(report(MOST + 3, 1_580, 36_040)))]
    assert f"m{MOST - 1}" in told
    assert f"m{MOST}" not in told
    assert "3 more, each" in told


def test_names_that_begin_alike_have_a_bar_each() -> None:
    figure = drawn(report(3, 1_580, 36_040, name="a-name-of-forty-characters-or-even-more-{}"))
    assert len(figure.axes[1].patches) == 5
    assert len([word for word, _ in words(figure) if word.startswith("a-name-of")]) == 3


def test_the_lines_end_where_the_legend_says() -> None:
    told = [word for word, _ in words(drawn(report(5, DENSE, 110_000)))]
    assert "dense files: 5.39 MB" in told
    assert "this file: 1.63 MB" in told
