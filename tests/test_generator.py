"""The generator against a slow second implementation, published vectors and its own golden ones."""

from __future__ import annotations

import hashlib
import itertools
import random

import format_helpers as slow
import numpy as np
import pytest

from randsurgery.format import generator
from randsurgery.format.generator import (
    BitStream,
    GeneratorError,
    expand_signs,
    generate,
    integers,
    normal_table,
    permutation,
    self_test,
    stream_key,
    torch_seed,
)

DISTRIBUTIONS = ("sign", "normal", "uniform")
SIZES = (0, 1, 7, 8, 9, 63, 1003, 65535, 65536, 65537)
ONES = (1 << 256) - 1

# Random123's published known answers for philox4x64-10: counter, key, block
KNOWN_ANSWERS = [
    (0, 0, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    (
        ONES,
        (1 << 128) - 1,
        "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    ),
]


@pytest.mark.parametrize(("counter", "key", "block"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: int, key: int, block: str) -> None:
    words = [int(word, 16) for word in block.split()]
    assert slow.philox_block(counter, key) == words
    # NumPy counts up before it makes a block
    assert list(np.random.Philox(key=key, counter=(counter - 1) & ONES).random_raw(4)) == words


def test_the_stream_starts_at_counter_one() -> None:
    first, second = stream_key(7, "golden", "weight")
    key = first | second << 64
    words = [int(word) for word in BitStream(7, "golden", "weight").words(8)]
    assert words == slow.philox_block(1, key) + slow.philox_block(2, key)


def test_numpy_rolls_the_counter_over_to_zero() -> None:
    words = np.random.Philox(key=5, counter=ONES).random_raw(8)
    assert [int(w) for w in words] == slow.philox_block(0, 5) + slow.philox_block(1, 5)


def test_golden_key_and_words() -> None:
    assert stream_key(7, "golden", "weight") == (0x952BA880B6606DEE, 0xB06120F7231D121D)
    first = [int(word) for word in BitStream(7, "golden", "weight").words(2)]
    assert first == [0xB2C89F693D537F16, 0xE997E9D7FE2E81FE]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_every_element_equals_the_slow_twin(distribution: str, size: int) -> None:
    scale = float(np.float32(0.1))
    made = generate(distribution, size, scale, seed=3, stream="layer1.conv.weight")
    wanted = slow.random_values(distribution, size, scale, 3, "layer1.conv.weight")
    assert made.dtype == np.float32
    assert made.shape == (size,)
    assert made.tobytes() == np.array(wanted, dtype=np.float32).tobytes()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_short_tensor_is_the_beginning_of_a_long_one(distribution: str) -> None:
    long = generate(distribution, 70000, 1.0, seed=0, stream="s")
    for size in (1, 13, 65536, 65541):
        assert generate(distribution, size, 1.0, seed=0, stream="s").tobytes() == (
            long[:size].tobytes()
        )


def test_values_depend_on_no_order_and_no_global_generator() -> None:
    names = [f"layer{i}" for i in range(6)]

    def make(order: list[str]) -> dict[str, bytes]:
        return {n: generate("normal", 100, 1.0, seed=1, stream=n).tobytes() for n in order}

    def numpy_state() -> bytes:
        return np.random.get_state()[1].tobytes()  # noqa: NPY002  the global one is meant

    before = numpy_state(), random.getstate()
    forwards, backwards = make(names), make(names[::-1])
    assert forwards == backwards
    assert (numpy_state(), random.getstate()) == before


def test_seed_stream_and_role_each_make_another_stream() -> None:
    streams = itertools.product((0, 1, 2**62), ("a", "b", "", "é", "a.b"), ("weight", "score"))
    made = [generate("uniform", 64, 1.0, seed=s, stream=n, role=r) for s, n, r in streams]
    assert len({values.tobytes() for values in made}) == len(made) == 30


def test_characters_beyond_ascii_are_escaped_in_the_key() -> None:
    text = b'["randsurgery.philox.1",7,"\\u00e9\\ud83d\\ude00","weight"]'
    raw = hashlib.sha256(text).digest()
    expected = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")
    assert stream_key(7, "é\U0001f600", "weight") == expected


def test_generate_fills_the_array_it_is_given() -> None:
    out = np.full(10, np.nan, dtype=np.float32)
    assert generate("normal", 10, 1.0, seed=1, stream="x", out=out) is out
    assert out.tobytes() == generate("normal", 10, 1.0, seed=1, stream="x").tobytes()


def test_signs_of_both_zeros_do_not_depend_on_which_came_first() -> None:
    packed = np.array([0b01], dtype=np.uint8)
    for order in ((0.0, -0.0), (-0.0, 0.0)):
        generator._sign_table.cache_clear()
        for scale in order:
            out = np.empty(2, dtype=np.float32)
            expand_signs(packed, scale, out)
            assert list(np.signbit(out)) == [bool(np.signbit(scale)), not np.signbit(scale)]


def test_normal_table_is_the_inverse_cdf_and_antisymmetric() -> None:
    table = normal_table()
    assert table.tobytes() == np.array(slow.normal_table(), dtype=np.float32).tobytes()
    assert np.array_equal(table, -table[::-1])
    assert np.all(np.diff(table) > 0)
    assert not table.flags.writeable
    digest = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == generator.NORMAL_TABLE_SHA256


def test_the_values_look_as_their_names_say() -> None:
    n = 200_000
    sign = generate("sign", n, 0.25, seed=2, stream="s")
    normal = generate("normal", n, 2.0, seed=2, stream="n").astype(np.float64)
    uniform = generate("uniform", n, 0.5, seed=2, stream="u").astype(np.float64)
    assert set(np.unique(sign)) == {-0.25, 0.25}
    assert abs(sign.mean()) < 0.25 * 5 / n**0.5
    assert abs(normal.mean()) < 2 * 5 / n**0.5
    assert normal.std() == pytest.approx(2.0, rel=0.01)
    assert np.mean(np.abs(normal) < 2) == pytest.approx(0.6827, abs=0.006)
    assert uniform.min() >= -0.5
    assert uniform.max() < 0.5
    assert uniform.std() == pytest.approx(1 / 12**0.5, rel=0.01)


@pytest.mark.parametrize("size", [0, 1, 2, 257, 5000])
def test_permutation_sorts_one_word_each(size: int) -> None:
    order = permutation(size, seed=4, stream="epoch-1")
    words = list(itertools.islice(slow.stream_words(4, "epoch-1", "order"), size))
    assert list(order) == sorted(range(size), key=lambda i: words[i])
    assert sorted(order) == list(range(size))


@pytest.mark.parametrize("high", [1, 2, 9, 1000, 2**31])
def test_integers_scale_32_bits(high: int) -> None:
    made = integers(1001, high, seed=4, stream="crop")
    raw = slow.stream_bytes(4004, 4, "crop", "augment")
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, 4004, 4)]
    assert list(made) == [word * high >> 32 for word in words]
    assert made.min() >= 0
    assert made.max() < high


def test_torch_seed_is_63_bits_of_its_own_stream() -> None:
    assert torch_seed(4, "init") == next(slow.stream_words(4, "init", "torch")) >> 1
    assert all(0 <= torch_seed(0, str(i)) < 2**63 for i in range(50))


def test_a_platform_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unwrapped = self_test.__wrapped__
    unwrapped()
    monkeypatch.setattr(generator, "GOLDEN_WORDS", (0, 0))
    with pytest.raises(GeneratorError, match="Philox stream differs"):
        unwrapped()
    monkeypatch.undo()
    monkeypatch.setitem(generator.GOLDEN_SHA256, "normal", "0" * 64)
    with pytest.raises(GeneratorError, match="normal values differ"):
        unwrapped()
