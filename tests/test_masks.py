"""Masks: both encodings, what they cost, and every payload that must be refused."""

from __future__ import annotations

import tracemalloc

import format_helpers as slow
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randsurgery.errors import FileFormatError
from randsurgery.format.masks import (
    Mask,
    decode,
    encode,
    entropy_bytes,
    popcount,
    scatter,
    select,
)

runs = st.lists(st.tuples(st.integers(0, 800), st.booleans()), max_size=12)
single = st.lists(st.booleans(), max_size=70)
bit_lists = st.one_of(single, runs.map(lambda rs: [bit for n, bit in rs for _ in range(n)]))


def mask_of(bits: list[bool] | list[int]) -> Mask:
    return Mask.of(np.array(bits, dtype=np.bool_))


def edge_masks() -> list[list[int]]:
    full = [[b] * n for n in (0, 1, 7, 8, 9, 254, 255, 256, 510, 511, 2000) for b in (0, 1)]
    one_of = [[int(i == at) for i in range(n)] for n in (255, 256, 257, 511) for at in (0, n - 1)]
    return full + one_of + [[1 - b for b in bits] for bits in one_of]


# --- round trips ---------------------------------------------------------------------------------


@given(bit_lists)
@settings(max_examples=150, deadline=None)
def test_round_trip(bits: list[bool]) -> None:
    mask = mask_of(bits)
    encoding, payload = encode(mask)
    again = decode(payload, encoding, len(bits), sum(bits))
    assert list(again.unpack()) == bits
    assert again.packed.tobytes() == mask.packed.tobytes() == slow.pack_bits(bits)
    assert slow.mask_bits(payload, encoding, len(bits), sum(bits)) == bits


@given(bit_lists)
@settings(max_examples=150, deadline=None)
def test_either_encoding_is_read_whatever_compressor_wrote_it(bits: list[bool]) -> None:
    for encoding, data in (("bits", slow.pack_bits(bits)), ("gaps", slow.gap_bytes(bits))):
        mask = decode(slow.deflate(data), encoding, len(bits), sum(bits))
        assert list(mask.unpack()) == bits


@pytest.mark.parametrize("bits", edge_masks(), ids=lambda bits: f"{sum(bits)}of{len(bits)}")
def test_extremes_round_trip(bits: list[int]) -> None:
    encoding, payload = encode(mask_of(bits))
    assert list(decode(payload, encoding, len(bits), sum(bits)).unpack()) == bits
    for encoding, data in (("bits", slow.pack_bits(bits)), ("gaps", slow.gap_bytes(bits))):
        assert list(decode(slow.deflate(data), encoding, len(bits), sum(bits)).unpack()) == bits


def test_the_smaller_encoding_wins() -> None:
    rng = np.random.default_rng(0)
    assert encode(Mask.of(rng.random(20_000) < 0.5))[0] == "bits"
    assert encode(Mask.of(rng.random(20_000) < 0.05))[0] == "gaps"
    assert encode(Mask.of(rng.random(20_000) < 0.95))[0] == "gaps"


def test_the_same_mask_gives_the_same_bytes() -> None:
    bits = np.random.default_rng(1).random(10_000) < 0.3
    assert encode(Mask.of(bits)) == encode(Mask.of(bits.reshape(100, 100).copy()))


@pytest.mark.parametrize("kept", [0.5, 0.3, 0.15, 0.1, 0.05, 0.7, 0.9])
def test_independent_bits_cost_at_most_three_percent_over_their_entropy(kept: float) -> None:
    mask = Mask.of(np.random.default_rng(2).random(200_000) < kept)
    assert len(encode(mask)[1]) <= 1.03 * entropy_bytes(mask.size, mask.count)


def test_entropy_of_certain_and_even_bits() -> None:
    assert entropy_bytes(0, 0) == entropy_bytes(80, 0) == entropy_bytes(80, 80) == 0.0
    assert entropy_bytes(80, 40) == 10.0


@given(st.binary(max_size=100))
def test_popcount(data: bytes) -> None:
    assert popcount(np.frombuffer(data, dtype=np.uint8)) == sum(byte.bit_count() for byte in data)


def test_popcount_without_bitwise_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert popcount(np.array([255, 1, 0, 3] * 5, dtype=np.uint8)) == 55
    assert popcount(np.zeros(0, dtype=np.uint8)) == 0


# --- what is refused -----------------------------------------------------------------------------

BITS = [int(i % 11 == 3) for i in range(300)]
PACKED, GAPS = slow.pack_bits(BITS), slow.gap_bytes(BITS)
COUNT, SIZE = sum(BITS), len(BITS)


def refused(payload: bytes, encoding: str, size: int = SIZE, count: int = COUNT) -> str:
    with pytest.raises(FileFormatError) as caught:
        decode(payload, encoding, size, count, "main/fc.weight/0.mask")
    assert str(caught.value).startswith("main/fc.weight/0.mask: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "data"), [("bits", PACKED), ("gaps", GAPS)], ids=["bits", "gaps"]
)
def test_bytes_around_the_deflate_stream_are_refused(encoding: str, data: bytes) -> None:
    sound = slow.deflate(data)
    decode(sound, encoding, SIZE, COUNT)
    assert "does not end with its payload" in refused(sound + b"\0", encoding)
    assert "does not end with its payload" in refused(sound + sound, encoding)
    assert "does not end with its payload" in refused(b"", encoding)
    for cut in range(1, len(sound)):
        refused(sound[:cut], encoding)


def test_garbage_is_refused() -> None:
    assert "does not inflate" in refused(b"\xff" * 20, "bits")


@pytest.mark.parametrize("encoding", ["bits", "gaps"])
def test_inflating_stops_at_the_size_of_the_tensor(encoding: str) -> None:
    bomb = slow.deflate(bytes(50_000_000))
    tracemalloc.start()
    try:
        assert "inflates to more than" in refused(bomb, encoding)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert "inflates to more than" in refused(slow.deflate(PACKED + b"\0"), "bits")


def test_too_few_bytes_are_refused() -> None:
    assert "has 37 bytes, not 38" in refused(slow.deflate(PACKED[:-1]), "bits")


@pytest.mark.parametrize("encoding", ["bits", "gaps"])
@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1, 0, SIZE])
def test_a_wrong_count_is_refused(encoding: str, count: int) -> None:
    refused(slow.deflate(PACKED if encoding == "bits" else GAPS), encoding, count=count)


@pytest.mark.parametrize("count", [-1, SIZE + 1])
def test_an_impossible_count_is_refused(count: int) -> None:
    assert "cannot keep" in refused(slow.deflate(PACKED), "bits", count=count)


def test_padding_bits_must_be_zero() -> None:
    padded = PACKED[:-1] + bytes([PACKED[-1] | 0x80])
    assert "padding bits" in refused(slow.deflate(padded), "bits", count=COUNT + 1)


def test_a_trailing_escape_is_refused() -> None:
    refused(slow.deflate(GAPS + b"\xff"), "gaps")
    refused(slow.deflate(b"\xff"), "gaps", count=0)


def test_a_run_beyond_the_size_is_refused() -> None:
    bits = [0] * 299 + [1]
    sound = slow.gap_bytes(bits)
    assert sound == b"\xff\x2c"
    assert list(decode(slow.deflate(sound), "gaps", 300, 1).unpack()) == bits
    assert "beyond its 300 elements" in refused(slow.deflate(b"\xff\x2d"), "gaps", count=1)


def test_runs_that_sum_beyond_32_bits_do_not_wrap_around() -> None:
    count = 2**23 + 2**16
    payload = slow.deflate(b"\xfe" * count)
    assert "beyond its" in refused(payload, "gaps", size=2 * count, count=count)


@given(st.binary(max_size=40), st.sampled_from(["bits", "gaps"]), st.data())
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_the_promised_mask_or_an_error(
    data: bytes, encoding: str, draw: st.DataObject
) -> None:
    size = draw.draw(st.integers(0, 8 * len(data) + 20))
    count = draw.draw(st.integers(0, size))
    payload = slow.deflate(data) if draw.draw(st.booleans()) else data
    try:
        mask = decode(payload, encoding, size, count)
    except FileFormatError:
        return
    assert int(mask.unpack().sum()) == count
    assert (mask.size, mask.packed.size) == (size, -(-size // 8))


# --- select and scatter --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<u1", "<u2", "<u4", "<u8"])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 65535, 65536, 65537, 70001])
def test_select_and_scatter_equal_the_obvious(dtype: str, size: int) -> None:
    rng = np.random.default_rng(size)
    bits = rng.random(size) < 0.4
    words = rng.integers(0, 256, size * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
    kept = words.copy()
    select(kept, Mask.of(bits))
    assert np.array_equal(kept, np.where(bits, words, 0).astype(dtype))
    values = (np.arange(int(bits.sum())) + 1).astype(dtype)
    written = words.copy()
    scatter(written, Mask.of(bits), values)
    assert np.array_equal(written[bits], values)
    assert np.array_equal(written[~bits], words[~bits])


def test_what_is_masked_is_plus_zero_also_for_negative_and_not_finite_values() -> None:
    values = np.array([-1.5, -1.5, np.nan, -np.inf, -0.0, 2.0], dtype=np.float32)
    select(values.view("<u4"), mask_of([1, 0, 0, 0, 0, 1]))
    assert values.tobytes() == np.array([-1.5, 0.0, 0.0, 0.0, 0.0, 2.0], np.float32).tobytes()


def test_packed_bits_are_little_first() -> None:
    mask = mask_of([1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert mask.packed.tobytes() == b"\x01\x02"
    assert (mask.size, mask.count) == (10, 2)
