"""The hadamard source: orthogonal where an order exists, distinct beyond it, stable throughout."""

from __future__ import annotations

import format_helpers as slow
import numpy as np
import pytest

from randsurgery.errors import IncompatibleError
from randsurgery.format.hadamard import MAX_ORDER, hadamard_rows, order_for
from randsurgery.surgery.heads import coherence

WIDTHS = (1, 2, 4, 12, 20, 28, 192, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_orthogonal_signs(width: int) -> None:
    rows = hadamard_rows(width, width)
    assert order_for(width) == width
    assert rows.shape == (width, width)
    assert set(np.unique(rows)) <= {-1, 1}
    # float32 sums of up to 2048 signs are exact integers
    gram = rows.astype(np.float32) @ rows.T.astype(np.float32)
    assert np.array_equal(gram, width * np.eye(width, dtype=np.float32))
    assert width < 2 or width > 64 or coherence(rows) == 0.0


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (2, 2), (4, 4), (12, 12), (20, 20), (28, 28), (36, 36), (40, 40), (52, 52), (96, 96),
     (3, 12), (5, 7), (30, 12), (100, 20), (33, 28), (7, 3), (9, 6), (13, 10)],
)  # fmt: skip
def test_rows_equal_the_slow_twin(rows: int, columns: int) -> None:
    assert [tuple(row) for row in hadamard_rows(rows, columns).tolist()] == (
        slow.hadamard_rows(rows, columns)
    )


def test_sylvester_entry_is_the_parity_of_common_bits() -> None:
    rows = hadamard_rows(64, 64)
    for i in range(64):
        for j in range(64):
            assert rows[i, j] == (-1) ** (i & j).bit_count()


@pytest.mark.parametrize(("rows", "columns"), [(100, 64), (1000, 512), (200, 12), (4096, 20)])
def test_more_rows_than_columns_are_distinct(rows: int, columns: int) -> None:
    made = hadamard_rows(rows, columns)
    assert made.shape == (rows, columns)
    assert len({row.tobytes() for row in made}) == rows
    assert np.array_equal(made[:columns], hadamard_rows(columns, columns))
    assert columns < 64 or coherence(made[:200]) < 0.7


@pytest.mark.parametrize(("columns", "order"), [(3, 4), (5, 8), (25, 28), (89, 96), (1000, 1000)])
def test_widths_without_a_matrix_are_cut_from_the_next_order(columns: int, order: int) -> None:
    assert order_for(columns) == order
    made = hadamard_rows(columns, columns)
    assert made.shape == (columns, columns)
    assert np.array_equal(made, hadamard_rows(order, order)[:columns, :columns])


def test_no_rows_is_an_empty_matrix() -> None:
    assert hadamard_rows(0, 12).shape == (0, 12)


@pytest.mark.parametrize(("rows", "columns"), [(3, 1), (2**30, 4), (2**40, 20)])
def test_more_rows_than_there_are_sign_vectors_is_refused_at_once(rows: int, columns: int) -> None:
    with pytest.raises(IncompatibleError, match=r"no .* distinct hadamard rows"):
        hadamard_rows(rows, columns)


@pytest.mark.parametrize("columns", [0, MAX_ORDER + 1, 10**12])
def test_widths_out_of_range_are_refused(columns: int) -> None:
    with pytest.raises(IncompatibleError, match=f"1 to {MAX_ORDER} columns"):
        hadamard_rows(1, columns)


def test_coherence_is_the_largest_cosine_between_rows() -> None:
    assert coherence(np.array([[1, 1, 1, 1], [1, 1, 1, -1]], dtype=np.int8)) == 0.5
    assert coherence(np.ones((1, 4), dtype=np.int8)) == 0.0
