"""What makes a tensor: steps, their payloads, what lies before one, what is kept, moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from randsurgery.format import masks
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.derivation import Derivation, entry_derivation, payload_names
from randsurgery.format.rebuild import kept
from randsurgery.format.recipe import (
    ConstantSource,
    Entry,
    Member,
    MemberTensor,
    Overlay,
    RandomSource,
    Recipe,
    ReplaceOverlay,
    ScaleOverlay,
)
from randsurgery.format.tensors import RawTensor, hex_float
from randsurgery.surgery.sentences import mask_overlay, scatter_overlay, slice_overlay

SHAPE = (5, 3)
KINDS = ("mask", "scatter", "slice", "replace", "scale")


def values(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def overlay(kind: str, seed: int, owner: str, index: int, payloads: Memory) -> Overlay:
    raw = RawTensor("F32", values(seed))
    mask = masks.Mask.of(np.random.default_rng(seed).random(15) < 0.5)
    if kind == "mask":
        return mask_overlay(mask, owner, "w", index, payloads)
    if kind == "scatter":
        return scatter_overlay(raw, mask, owner, "w", index, payloads)
    if kind == "slice":
        return slice_overlay(raw, seed % 2, 1 + seed % 3, owner, "w", index, payloads)
    if kind == "scale":
        return ScaleOverlay(factor=hex_float(2.0))
    payloads[f"{owner}/w/{index}.tensor"] = raw
    from randsurgery.format.canonical import digest

    return ReplaceOverlay(digest=digest(raw.array))


def checkpoint(shared: list[str], own: list[str], zero: bool = False) -> Checkpoint:
    payloads = Memory()
    source = (
        ConstantSource(value=hex_float(0.0))
        if zero
        else RandomSource(distribution="normal", seed=1, scale=hex_float(1.0))
    )
    made = {
        owner: tuple(overlay(k, 10 * i + len(owner), owner, i, payloads) for i, k in enumerate(ks))
        for owner, ks in (("shared", shared), ("m", own))
    }
    entry = Entry(dtype="F32", shape=SHAPE, source=source, overlays=made["shared"])
    tensors = {"w": MemberTensor(overlays=made["m"])} if own else {}
    recipe = Recipe(tensors={"w": entry}, members=(Member(name="m", tensors=tensors),))
    return Checkpoint(recipe, payloads)


def slowly(net: Checkpoint, made: Derivation) -> list[float]:
    """The tensor element by element, step by step."""
    entry = Entry(dtype="F32", shape=SHAPE, source=made.source)
    array = net.made(entry_derivation("shared", "w", entry)).array.copy().reshape(-1)
    for step in made.steps:
        one = step.overlay
        read = {name.rpartition(".")[2]: net.payloads.read(name).array for name, _ in step.payloads}
        if step.mask is not None:
            count, encoding = step.mask.count, step.mask.encoding
            bits = masks.decode(read["mask"].data, encoding, 15, count, "w").unpack()
        at = 0
        for i in range(15):
            if one.kind == "mask":
                array[i] = array[i] if bits[i] else 0.0
            elif one.kind == "scatter" and bits[i]:
                array[i], at = read["values"][at], at + 1
            elif one.kind == "replace":
                array[i] = read["tensor"].reshape(-1)[i]
            elif one.kind == "scale":
                array[i] *= 2
            elif one.kind == "slice" and (i // 3, i % 3)[one.dim] < one.count:
                array[i] = read["slice"][i // 3, i % 3]
    return list(array)


sentences = st.tuples(
    st.lists(st.sampled_from(KINDS), max_size=3),
    st.lists(st.sampled_from(KINDS), max_size=3),
    st.booleans(),
)


@given(sentences)
def test_steps_say_what_they_need_and_what_lies_before_them(words: Any) -> None:
    net = checkpoint(*words)
    made = net.derivation(net.member(), "w")
    assert [step.overlay.kind for step in made.steps] == [*words[0], *words[1]]
    assert {name for name, _ in made.payloads} == set(payload_names(net.recipe))
    owned = [name for owner in ("shared", "m") for name, _ in made.owned_by(owner)]
    assert owned == [name for name, _ in made.payloads]
    for what in (made, *(made.before(step) for step in made.steps)):
        expected = slowly(net, what)
        for form in (what, what.needed()):
            found = net.made(form).array.reshape(-1)
            np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))
    unscaled = made.without(lambda step: step.overlay.kind == "scale")
    np.testing.assert_array_equal(net.made(unscaled).array.reshape(-1), slowly(net, unscaled))


@given(sentences)
def test_a_derivation_moves_to_another_owner_with_its_payloads(words: Any) -> None:
    net = checkpoint(*words)
    made = net.derivation(net.member(), "w").needed()
    moved = made.moved("other")
    assert moved.entry.overlays == made.overlays
    assert all(step.owner == "other" for step in moved.steps)
    places = zip(made.payloads, moved.payloads, strict=True)
    payloads = Memory({after: net.payloads.read(before) for (before, _), (after, _) in places})
    assert net.made(made).same_bits(Checkpoint(net.recipe, payloads).made(moved))


@given(sentences)
def test_what_is_kept(words: Any) -> None:
    net = checkpoint(*words)
    made = net.derivation(net.member(), "w").needed()
    found = kept(made, net.payloads)
    kinds = [step.overlay.kind for step in made.steps]
    if not {"mask", "scatter"} & set(kinds):
        assert found is None
        return
    assert found is not None
    alive = ["mask" in kinds and not made.from_zero] * 15
    for step in made.steps:
        if step.mask is not None:
            payload = net.payloads.read(step.payload("mask")).array
            bits = masks.decode(payload.data, step.mask.encoding, 15, step.mask.count, "w").unpack()
        for i in range(15):
            one = step.overlay
            if one.kind == "mask":
                alive[i] = alive[i] and bool(bits[i])
            elif one.kind == "scatter":
                alive[i] = alive[i] or bool(bits[i])
            elif one.kind == "slice" and (i // 3, i % 3)[one.dim] < one.count:
                alive[i] = True
    assert found.unpack().tolist() == alive
    if made.from_zero or "mask" in kinds:
        tensor = net.made(made).array.reshape(-1)
        assert not tensor[~found.unpack()].any()


def test_samples_of_a_supermask_keep_what_follows_the_mask(tmp_path: Path) -> None:
    """A mask that is left out does not rename the payloads of what comes after it."""
    net = checkpoint([], ["mask", "slice"])
    made = net.derivation(net.member(), "w")
    bare = made.without(lambda step: step.overlay.kind == "mask")
    assert [name for name, _ in bare.payloads] == ["m/w/1.slice"]
    np.testing.assert_array_equal(net.made(bare).array.reshape(-1), slowly(net, bare))


def test_an_unknown_tensor_is_a_key_error() -> None:
    net = checkpoint([], [])
    with pytest.raises(KeyError):
        net.derivation(net.member(), "v")
