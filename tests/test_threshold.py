"""The exact top-k selection against a slow, obvious twin, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_helpers import same_bits

from randsurgery.errors import DivergedError
from randsurgery.surgery import threshold
from randsurgery.surgery.threshold import BLOCK, Bracket, _select_by_sorting, select

pytestmark = pytest.mark.slow


def twin(scores: torch.Tensor, weight: torch.Tensor, zeroed: int) -> torch.Tensor:
    """A stable sort of |score|: the first ``zeroed`` go, so of equal ones the lower index."""
    flat = weight.detach().numpy().flatten()  # a copy in C order, whatever the strides
    order = np.argsort(np.abs(scores.detach().numpy().flatten()), kind="stable")
    flat[order[:zeroed]] = 0.0
    return torch.from_numpy(flat.reshape(tuple(weight.shape)))


def check(scores: torch.Tensor, weight: torch.Tensor, zeroed: int, bracket: Bracket) -> None:
    before = scores.clone(), weight.clone()
    expected = twin(scores, weight, zeroed)
    assert same_bits(select(scores, weight, zeroed, bracket, "layer"), expected)
    assert same_bits(_select_by_sorting(scores, weight, zeroed, "layer"), expected)
    assert same_bits(scores, before[0])
    assert same_bits(weight, before[1])


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(size: int) -> list[int]:
    """Numbers of zeroed weights from none to all but one (k = 1/n)."""
    return sorted({0, 1, size // 10, size // 2, size * 7 // 10, size - 1} & set(range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, BLOCK - 1, BLOCK, BLOCK + 1])
def test_selects_the_twins_set_at_every_size_across_block_edges(size: int) -> None:
    scores, weight = torch.randn(size, generator=draw(size)), torch.randn(size, generator=draw(1))
    for zeroed in counts(size):
        bracket = Bracket()
        for _ in range(3):
            check(scores, weight, zeroed, bracket)


def test_selects_the_twins_set_over_several_blocks_with_a_ragged_end() -> None:
    size = 3 * BLOCK + 5
    scores, weight = torch.randn(size, generator=draw(0)), torch.randn(size, generator=draw(1))
    bracket = Bracket()
    for step in range(4):
        scores += 1e-3 * torch.randn(size, generator=draw(10 + step))
        check(scores, weight, size * 7 // 10, bracket)


def test_all_zeroed_leaves_nothing() -> None:
    scores, weight = torch.randn(50, generator=draw(0)), torch.randn(50, generator=draw(1))
    bracket = Bracket()
    for _ in range(3):
        check(scores, weight, 50, bracket)


@pytest.mark.parametrize("jump", [0.0, 1e-7, 1e-4, 1e-2, 1.0, 1e6])
def test_follows_scores_that_move_between_steps(jump: float) -> None:
    size = 5000
    scores, weight = torch.randn(size, generator=draw(0)), torch.randn(size, generator=draw(1))
    bracket = Bracket()
    for step in range(8):
        check(scores, weight, 3500, bracket)
        scores = scores + jump * torch.randn(size, generator=draw(100 + step))


def test_follows_scores_that_jump_far_up_and_down() -> None:
    base, weight = torch.randn(4000, generator=draw(0)), torch.randn(4000, generator=draw(1))
    bracket = Bracket()
    for factor in (1.0, 1.01, 30.0, 1e-3, 1e-30, 1e30, 1.0, 0.0, 1.0, 0.99, 1e-42, 1e38):
        check(base * factor, weight, 1200, bracket)


def test_follows_a_count_that_changes_between_steps() -> None:
    scores, weight = torch.randn(300, generator=draw(0)), torch.randn(300, generator=draw(1))
    bracket = Bracket()
    for zeroed in (0, 299, 1, 150, 151, 150, 0, 300, 10):
        check(scores, weight, zeroed, bracket)


@pytest.mark.parametrize("levels", [1, 2, 3, 10])
def test_of_equal_scores_the_lower_index_goes_first(levels: int) -> None:
    size = BLOCK + 100
    scores = torch.randint(-levels, levels + 1, (size,), generator=draw(levels)).float() / 8
    weight = torch.randn(size, generator=draw(1))
    for zeroed in counts(size):
        bracket = Bracket()
        for _ in range(2):
            check(scores, weight, zeroed, bracket)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -1.5, 1e-45, float("inf"), 3e38])
def test_all_scores_equal(value: float) -> None:
    scores, weight = torch.full((257,), value), torch.randn(257, generator=draw(1))
    for zeroed in (0, 1, 100, 256, 257):
        bracket = Bracket()
        for _ in range(3):
            check(scores, weight, zeroed, bracket)


def test_scores_of_both_signs_of_zero_are_equal() -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -0.0])
    out = select(scores, torch.arange(1.0, 7.0), 3, Bracket(), "layer")
    assert out.tolist() == [0, 0, 0, 4, 5, 6]


def test_infinite_scores_rank_highest() -> None:
    scores = torch.randn(1000, generator=draw(0))
    scores[::7], scores[3::11] = float("inf"), float("-inf")
    weight = torch.randn(1000, generator=draw(1))
    for zeroed in (0, 100, 700, 800, 900, 999):
        bracket = Bracket()
        for _ in range(3):
            check(scores, weight, zeroed, bracket)


def test_subnormal_scores_are_ordered() -> None:
    scores = torch.arange(1, 200).flip(0).to(torch.int32).view(torch.float32)
    assert float(scores.max()) < 1e-40
    for _ in range(2):
        check(scores, torch.ones(199), 77, Bracket())


@pytest.mark.parametrize("path", [select, _select_by_sorting], ids=["bracket", "sorting"])
@pytest.mark.parametrize("where", [0, 5, BLOCK, BLOCK + 40])
def test_a_nan_score_names_the_tensor(path: object, where: int) -> None:
    scores, weight = torch.randn(BLOCK + 41, generator=draw(0)), torch.ones(BLOCK + 41)
    bracket = Bracket()
    select(scores, weight, 100, bracket, "layer")  # a bracket that has been seen
    scores[where] = float("nan")
    for seen in (Bracket(), bracket):
        arguments = (seen, "block.3.weight") if path is select else ("block.3.weight",)
        with pytest.raises(DivergedError, match=r"block\.3\.weight.*NaN"):
            path(scores, weight, 100, *arguments)  # type: ignore[operator]


def test_a_negative_nan_is_a_nan_too() -> None:
    scores = torch.ones(10)
    scores[4] = torch.tensor(-1).to(torch.int32).view(torch.float32)  # all bits 1
    with pytest.raises(DivergedError, match="layer"):
        select(scores, torch.ones(10), 3, Bracket(), "layer")


def test_removed_weights_are_plus_zero_and_kept_ones_keep_their_bits() -> None:
    weight = torch.tensor([-1.5, -0.0, -float("inf"), float("nan"), -2.0, 1e-45])
    out = select(torch.tensor([1.0, 2.0, 3.0, 9.0, 8.0, 7.0]), weight, 3, Bracket(), "layer")
    assert same_bits(out[:3], torch.zeros(3))
    assert same_bits(out[3:], weight[3:])
    out = _select_by_sorting(torch.tensor([1.0, 2, 3, 9, 8, 7]), weight, 3, "layer")
    assert same_bits(out[:3], torch.zeros(3))
    assert same_bits(out[3:], weight[3:])


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("scored", LAYOUTS)
@pytest.mark.parametrize("weighted", LAYOUTS)
def test_strides_do_not_change_the_logical_order(scored: str, weighted: str) -> None:
    scores = torch.randint(-3, 4, (6, 5, 3, 2), generator=draw(0)).float()  # many ties
    weight = torch.randn(6, 5, 3, 2, generator=draw(1))
    bracket = Bracket()
    for _ in range(2):
        check(LAYOUTS[scored](scores), LAYOUTS[weighted](weight), 100, bracket)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_select_the_same_set(dtype: torch.dtype) -> None:
    scores = torch.randint(-20, 21, (400,), generator=draw(0)).to(dtype)
    weight = torch.randn(400, generator=draw(1)).to(dtype)
    out = select(scores, weight, 150, Bracket(), "layer")
    expected = twin(scores.float(), torch.ones(400), 150)
    assert out.dtype == dtype
    assert same_bits(out, torch.where(expected == 1, weight, torch.zeros((), dtype=dtype)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_sequence_of_scores_selects_the_twins_set(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 40))
    value = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, float("inf"), 1e-45]),
        st.floats(width=32, allow_nan=False),
    )
    weight = torch.arange(1, size + 1).float() * -1
    bracket = Bracket()
    for _ in range(data.draw(st.integers(1, 4))):
        scores = torch.tensor(data.draw(st.lists(value, min_size=size, max_size=size)))
        check(scores, weight, data.draw(st.integers(0, size)), bracket)


def test_a_bracket_that_still_holds_needs_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    whole = threshold._mask_from
    monkeypatch.setattr(threshold, "_mask_from", lambda *args: (passes.append(1), whole(*args))[1])
    monkeypatch.setattr(threshold, "_rank", _counted(threshold._rank, passes, 100))
    scores, weight = torch.randn(10_000, generator=draw(0)), torch.ones(10_000)
    bracket = Bracket()
    select(scores, weight, 7000, bracket, "layer")
    assert sum(passes) == 101  # the first time the threshold is searched
    passes.clear()
    for step in range(5):
        scores += 1e-6 * torch.randn(10_000, generator=draw(step))
        select(scores, weight, 7000, bracket, "layer")
    assert sum(passes) == 5


def _counted(function: object, log: list[int], price: int) -> object:
    def wrapped(*args: object) -> object:
        log.append(price)
        return function(*args)  # type: ignore[operator]

    return wrapped
