"""Whole checkpoints: rebuilt bit for bit as a naive reader does, refused when anything is off."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import format_helpers as slow
import numpy as np
import pytest

from randsurgery.errors import FileFormatError, IncompatibleError, OutputError, UsageError
from randsurgery.format import masks
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    Memory,
    identity,
    parse_recipe,
    read_checkpoint,
)
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.derivation import payload_names
from randsurgery.format.generator import NORMAL_TABLE_SHA256, generate, stream_key
from randsurgery.format.hadamard import hadamard_rows
from randsurgery.format.recipe import Recipe
from randsurgery.format.tensors import STORAGE, RawTensor, from_f32
from randsurgery.format.writing import (
    backbone_id,
    finish,
    verify,
    write_checkpoint,
)

Json = dict[str, Any]


def hexf(value: float) -> str:
    return float(np.float32(value)).hex()


def floats(dtype: str, shape: tuple[int, ...], seed: int) -> RawTensor:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return RawTensor(dtype, from_f32(dtype, values))


class Builder:
    """Collects payloads under their names and returns the JSON that speaks of them."""

    def __init__(self) -> None:
        self.payloads = Memory()

    def put(self, owner: str, tensor: str, slot: str, value: RawTensor) -> str:
        self.payloads[f"{owner}/{tensor}/{slot}"] = value
        return digest(value.array)

    def stored(self, owner: str, tensor: str, value: RawTensor) -> Json:
        return {"kind": "stored", "digest": self.put(owner, tensor, "source", value)}

    def mask(
        self, owner: str, tensor: str, index: int, bits: list[int], encoding: str | None = None
    ) -> Json:
        data = {"bits": slow.pack_bits, "gaps": slow.gap_bytes}
        if encoding is None:
            encoding, packed = masks.encode(masks.Mask.of(np.array(bits, dtype=np.bool_)))
        else:
            packed = slow.deflate(data[encoding](bits))
        value = RawTensor("U8", np.frombuffer(packed, dtype=np.uint8))
        found = self.put(owner, tensor, f"{index}.mask", value)
        return {"kind": "mask", "encoding": encoding, "count": sum(bits), "digest": found}

    def scatter(
        self, owner: str, tensor: str, index: int, bits: list[int], values: RawTensor
    ) -> Json:
        found = self.put(owner, tensor, f"{index}.values", values)
        mask = self.mask(owner, tensor, index, bits)
        return {**mask, "kind": "scatter", "values_digest": found}

    def slice(self, owner: str, tensor: str, index: int, dim: int, value: RawTensor) -> Json:
        found = self.put(owner, tensor, f"{index}.slice", value)
        return {"kind": "slice", "dim": dim, "count": value.shape[dim], "digest": found}

    def replace(self, owner: str, tensor: str, index: int, value: RawTensor) -> Json:
        found = self.put(owner, tensor, f"{index}.tensor", value)
        return {"kind": "replace", "digest": found}


def random_source(distribution: str, scale: float, **more: Any) -> Json:
    kind = {"kind": "random", "distribution": distribution, "seed": 11, "scale": hexf(scale)}
    return {**kind, **more}


def constant(value: float) -> Json:
    return {"kind": "constant", "value": float(value).hex()}


def entry(dtype: str, shape: tuple[int, ...], source: Json, *overlays: Json) -> Json:
    whole: Json = {"dtype": dtype, "shape": list(shape), "source": source}
    return {**whole, "overlays": list(overlays)} if overlays else whole


def some_bits(size: int, share: float, seed: int) -> list[int]:
    return [int(b) for b in np.random.default_rng(seed).random(size) < share]


def base_tensors() -> Memory:
    return Memory({"w": floats("F16", (5, 7), 50), "b": floats("F32", (4,), 51)})


def everything() -> tuple[Json, Memory]:
    """A recipe with every source and every overlay, two members, three float dtypes."""
    b = Builder()
    base = base_tensors()
    tensors = {
        "conv.weight": entry(
            "F32", (6, 3, 5), random_source("sign", 0.1),
            b.mask("shared", "conv.weight", 0, some_bits(90, 0.3, 1)),
            {"kind": "scale", "factor": hexf(1.7)},
        ),
        "half.weight": entry("F16", (9, 5), random_source("normal", 0.3)),
        "brain.weight": entry(
            "BF16", (1111,), random_source("uniform", 0.7, stream="another name"),
            b.mask("shared", "brain.weight", 0, some_bits(1111, 0.02, 2)),
        ),
        "wide.weight": entry("F32", (300, 250), random_source("normal", 0.05)),
        "fc.weight": entry("F32", (30, 12), {"kind": "hadamard", "scale": hexf(0.3)}),
        "signs.weight": entry(
            "BF16", (3, 7),
            {"kind": "signs", "scale": hexf(0.2), "digest": b.put(
                "shared", "signs.weight", "source",
                RawTensor("U8", np.array([0x35, 0xA7, 0x0B], dtype=np.uint8)))},
            b.scatter("shared", "signs.weight", 0, some_bits(21, 0.3, 3),
                      floats("BF16", (sum(some_bits(21, 0.3, 3)),), 4)),
        ),
        "emb": entry(
            "BF16", (6, 4), b.stored("shared", "emb", floats("BF16", (6, 4), 5)),
            b.slice("shared", "emb", 0, 1, floats("BF16", (6, 2), 6)),
            {"kind": "scale", "factor": hexf(-0.37)},
        ),
        "old": entry(
            "F16", (5, 7), {"kind": "base", "base": "pre", "tensor": "w"},
            b.mask("shared", "old", 0, some_bits(35, 0.8, 7)),
            {"kind": "scale", "factor": hexf(3.3)},
        ),
        "norm.weight": entry("F32", (6,), constant(1.0)),
        "norm.bias": entry("F16", (6,), constant(-0.25)),
        "norm.mean": entry("F32", (6,), constant(0.0)),
        "norm.count": entry("I64", (), constant(-7.0)),
        "index": entry("U8", (2, 2), constant(255.0)),
        "flag": entry("BOOL", (3,), constant(1.0)),
        "scalar": entry("F32", (), random_source("normal", 1.0),
                        {"kind": "scale", "factor": hexf(0.5)}),
        "empty": entry("F32", (0, 3), random_source("sign", 1.0), b.mask("shared", "empty", 0, [])),
    }  # fmt: skip
    first: Json = {
        "name": "first",
        "tensors": {
            "conv.weight": {"overlays": [
                b.mask("first", "conv.weight", 0, some_bits(90, 0.5, 8)),
                b.slice("first", "conv.weight", 1, 0, floats("F32", (2, 3, 5), 9)),
            ]},
            "half.weight": {"overlays": [
                b.slice("first", "half.weight", 0, 1, floats("F16", (9, 1), 10)),
            ]},
            "norm.weight": {"overlays": [
                b.replace("first", "norm.weight", 0, floats("F32", (6,), 11)),
            ]},
        },
        "scores": {
            "conv.weight": b.put("first", "conv.weight", "scores", floats("F32", (6, 3, 5), 12))
        },
        "classes": ["cat", "dog"],
        "provenance": {"accuracy": 0.5, "versions": {"torch": [2, 6]}},
    }  # fmt: skip
    own = entry(
        "F16", (3, 4), b.stored("second", "fc.weight", floats("F16", (3, 4), 13)),
        b.mask("second", "fc.weight", 0, some_bits(12, 0.5, 14)),
    )  # fmt: skip
    second: Json = {
        "name": "second",
        "tensors": {
            "fc.weight": {"entry": own},
            "fc.bias": {"entry": entry("F32", (3,), constant(0.5))},
            "norm.mean": {"overlays": [
                b.scatter("second", "norm.mean", 0, [0, 1, 0, 0, 1, 1], floats("F32", (3,), 15)),
                {"kind": "scale", "factor": hexf(-2.0)},
            ]},
        },
    }  # fmt: skip
    recipe = {
        "format": "randsurgery",
        "version": 1,
        "tensors": tensors,
        "members": [first, second],
        "bases": {"pre": {
            "identity": identity(base, base), "file": "pre.safetensors",
            "origin": "hf-hub:timm/some_net", "revision": "abc123",
        }},
        "notes": {"free": [1, 2.5, None, {"deep": "é"}]},
    }  # fmt: skip
    return recipe, b.payloads


def assemble(recipe: Json, payloads: Memory, bases: dict[str, Memory] | None = None) -> Checkpoint:
    return Checkpoint(parse_recipe(json.dumps(recipe), "memory"), payloads, bases or {})


def write_base(folder: Path) -> None:
    tensors = base_tensors()
    write_atomically(folder / "pre.safetensors", pack(tensors, {"format": "pt"}))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    recipe, payloads = everything()
    write_base(folder)
    path = folder / "all.safetensors"
    write_checkpoint(path, assemble(recipe, payloads, {"pre": base_tensors()}))
    return path


def tiny(**more: Any) -> Json:
    """A small sound recipe: one masked random tensor, needing the payloads of ``tiny_payloads``."""
    mask = Builder().mask("shared", "w", 0, [1, 0, 1, 1, 0])
    whole = {"w": entry("F32", (5,), random_source("sign", 1.0), mask)}
    return {"format": "randsurgery", "version": 1, "tensors": whole, **more}


def tiny_payloads() -> Memory:
    b = Builder()
    b.mask("shared", "w", 0, [1, 0, 1, 1, 0])
    return b.payloads


def write_raw(path: Path, recipe: Json, payloads: Memory) -> Path:
    """A file whose recipe nobody has checked."""
    write_atomically(path, pack(payloads, {METADATA_KEY: json.dumps(recipe)}))
    return path


def with_metadata(source: Path, target: Path, change: Callable[[Json], None]) -> Path:
    """A copy of a file with another recipe, its payload bytes untouched."""
    with Container(source) as container:
        recipe = json.loads(container.metadata[METADATA_KEY])
        payloads = Memory({name: container.read(name) for name in container.infos})
    change(recipe)
    return write_raw(target, recipe, payloads)


# --- the sentence --------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["first", "second"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_tensor_equals_the_naive_reader(written: Path, member: str, threads: int) -> None:
    metadata, payloads = slow.read_file(written)
    recipe = json.loads(metadata["randsurgery"])
    base = slow.read_file(written.with_name("pre.safetensors"))[1]
    with read_checkpoint(written) as checkpoint:
        tensors = checkpoint.tensors(member, threads=threads)
    expected = set(recipe["tensors"]) | ({"fc.bias"} if member == "second" else set())
    assert list(tensors) == sorted(expected)
    for name, tensor in tensors.items():
        dtype, shape, raw = slow.naive_tensor(recipe, payloads, member, name, {"pre": base})
        assert tensor.dtype == dtype, name
        assert list(tensor.shape) == shape, name
        assert tensor.array.tobytes() == raw, name


def test_a_tensor_alone_equals_the_tensor_among_all(written: Path) -> None:
    with read_checkpoint(written) as checkpoint:
        among_all = checkpoint.tensors("first")
        for name in reversed(list(among_all)):
            assert checkpoint.tensor(name, "first").same_bits(among_all[name])


def test_members_share_what_they_do_not_change(written: Path) -> None:
    with read_checkpoint(written) as checkpoint:
        first, second = checkpoint.tensors("first"), checkpoint.tensors("second")
    assert first["emb"].same_bits(second["emb"])
    assert not first["conv.weight"].same_bits(second["conv.weight"])
    assert (first["fc.weight"].shape, second["fc.weight"].shape) == ((30, 12), (3, 4))


def test_a_resolved_entry_has_the_shared_overlays_before_the_members() -> None:
    recipe = parse_recipe(json.dumps(everything()[0]), "f")
    first = recipe.member("first")
    kinds = [o.kind for o in recipe.resolved(first, "conv.weight").overlays]
    assert kinds == ["mask", "scale", "mask", "slice"]
    assert recipe.resolved(recipe.member("second"), "fc.weight").shape == (3, 4)
    assert recipe.resolved(first, "fc.weight").shape == (30, 12)


def test_masked_elements_are_plus_zero(written: Path) -> None:
    with read_checkpoint(written) as checkpoint:
        values = checkpoint.tensor("brain.weight", "first").array
    assert np.count_nonzero(values == 0) > 1000
    assert np.count_nonzero(values == 0x8000) == 0


def test_tensors_in_memory_are_never_changed_in_place() -> None:
    recipe, payloads = everything()
    base = base_tensors()
    before = {name: t.array.tobytes() for name, t in [*payloads.items(), *base.items()]}
    checkpoint = assemble(recipe, payloads, {"pre": base})
    for member in ("first", "second"):
        checkpoint.tensors(member)
    assert {n: t.array.tobytes() for n, t in [*payloads.items(), *base.items()]} == before


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rounding_to_16_bits_takes_ties_to_even(dtype: str) -> None:
    rng = np.random.default_rng(0)
    # every bit pattern of the upper half within F16's range, with lower halves around the ties
    high = np.concatenate([rng.integers(0x3300, 0x4700, 300), rng.integers(0xB300, 0xC700, 300)])
    low = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    values = (high[:, None] << 16 | low).astype("<u4").view("<f4").reshape(-1)
    expected = b"".join(slow.round_to(dtype, float(value)) for value in values)
    assert from_f32(dtype, values).tobytes() == expected


def test_scaling_gives_one_nan_and_infinities_without_a_warning() -> None:
    b = Builder()
    words = np.array([0x7F800000, 0xFFC12345, 0x7F7FFFFF, 0xFF7FFFFF], dtype="<u4")
    tensors = {
        name: entry("F32", (4,), b.stored("shared", name, RawTensor("F32", words.view("<f4"))),
                    {"kind": "scale", "factor": hexf(factor)})
        for name, factor in (("zero", 0.0), ("two", 2.0))
    }  # fmt: skip
    checkpoint = assemble({"format": "randsurgery", "version": 1, "tensors": tensors}, b.payloads)
    zero, two = (checkpoint.tensor(n).array.view("<u4").tolist() for n in ("zero", "two"))
    assert zero == [0x7FC00000, 0x7FC00000, 0, 0x80000000]
    assert two == [0x7F800000, 0x7FC00000, 0x7F800000, 0xFF800000]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("F16", 0.1), ("BF16", 1.001), ("F32", 1e300), ("BF16", 1e300), ("F16", 1e6), ("I8", 128.0),
     ("I8", 0.5), ("U8", -1.0), ("U64", 2.0**64), ("I64", 2.0**63), ("BOOL", 2.0),
     ("F8_E4M3", 1.0)],
)  # fmt: skip
def test_a_constant_that_is_no_value_of_its_dtype_is_refused(dtype: str, value: float) -> None:
    recipe = tiny(tensors={"w": entry(dtype, (2,), constant(value))})
    with pytest.raises(FileFormatError, match="w: "):
        assemble(recipe, Memory()).tensor("w")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("F64", 0.1), ("F16", -0.5), ("BF16", -0.0), ("I8", -128.0), ("U64", 2.0**63), ("BOOL", 0.0),
     ("F32", -0.0), ("I64", -(2.0**63))],
)  # fmt: skip
def test_a_constant_fills_every_element(dtype: str, value: float) -> None:
    recipe = tiny(tensors={"w": entry(dtype, (2, 3), constant(value))})
    made = assemble(recipe, Memory()).tensor("w")
    assert (made.dtype, made.shape) == (dtype, (2, 3))
    if dtype == "BF16":
        assert made.array.tolist() == [[0x8000] * 3] * 2
    else:
        assert made.array.tobytes() == np.full((2, 3), value, dtype=STORAGE[dtype]).tobytes()


def test_parts_that_do_not_fit_the_dtype_or_shape_are_refused() -> None:
    wrong = {
        "random": entry("I32", (2,), random_source("sign", 1.0)),
        "hadamard": entry("F32", (2, 2, 2), {"kind": "hadamard", "scale": hexf(1.0)}),
        "scale": entry("I64", (2,), constant(1.0), {"kind": "scale", "factor": hexf(2.0)}),
        "double": entry("F32", (2,), {**random_source("sign", 1.0), "scale": (0.1).hex()}),
    }
    checkpoint = assemble(tiny(tensors=wrong), Memory())
    for name in wrong:
        with pytest.raises(FileFormatError, match=f"{name}: "):
            checkpoint.tensor(name)


@pytest.mark.parametrize(("dim", "count"), [(0, 3), (2, 1)])
def test_a_slice_beyond_the_tensor_is_refused(dim: int, count: int) -> None:
    overlay = {"kind": "slice", "dim": dim, "count": count, "digest": "0" * 32}
    recipe = tiny(tensors={"w": entry("F32", (2, 2), constant(0.0), overlay)})
    with pytest.raises(FileFormatError, match=r"no slice of .* in \[2, 2\]"):
        assemble(recipe, Memory()).tensor("w")


def test_a_payload_of_another_shape_or_dtype_is_refused() -> None:
    b = Builder()
    recipe = tiny(
        tensors={"w": entry("F32", (4,), b.stored("shared", "w", floats("F32", (4,), 0)))}
    )
    for value in (floats("F32", (2, 2), 0), floats("F16", (4,), 0)):
        with pytest.raises(FileFormatError, match=r"the recipe needs F32 \[4\]"):
            assemble(recipe, Memory({"shared/w/source": value})).tensor("w")
    with pytest.raises(FileFormatError, match="'shared/w/source' is missing"):
        assemble(recipe, Memory()).tensor("w")


# --- writing -------------------------------------------------------------------------------------


def test_writing_twice_gives_identical_bytes(written: Path, tmp_path: Path) -> None:
    recipe, payloads = everything()
    backwards = {key: recipe[key] for key in reversed(recipe)}
    backwards["tensors"] = dict(reversed(recipe["tensors"].items()))
    again = tmp_path / "again.safetensors"
    shuffled = Memory(reversed(payloads.items()))
    size = write_checkpoint(again, assemble(backwards, shuffled, {"pre": base_tensors()}))
    assert again.read_bytes() == written.read_bytes()
    assert size == again.stat().st_size


def test_reading_and_writing_again_gives_identical_bytes(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    with read_checkpoint(written) as checkpoint:
        write_checkpoint(again, checkpoint)
    assert again.read_bytes() == written.read_bytes()


def test_metadata_is_canonical_json(written: Path) -> None:
    metadata, _ = slow.read_file(written)
    text = metadata["randsurgery"]
    assert metadata["format"] == "pt"
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert text.isascii()


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    checkpoint = assemble(tiny(), tiny_payloads())
    with pytest.raises(OutputError, match="--force"):
        write_checkpoint(path, checkpoint)
    assert path.read_bytes() == b"old"
    write_checkpoint(path, checkpoint, force=True)
    assert path.read_bytes() != b"old"


def test_a_write_that_reads_back_differently_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    honest = Container.read

    def lie(self: Container, name: str) -> RawTensor:
        tensor = honest(self, name)
        tensor.array[-1] ^= 1
        return tensor

    monkeypatch.setattr(Container, "read", lie)
    with pytest.raises(FileFormatError, match="corrupt"):
        write_checkpoint(path, assemble(tiny(), tiny_payloads()), force=True)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_names_of_the_greatest_length_can_be_written(tmp_path: Path) -> None:
    name, member = "n" * 400, "m" * 64
    b = Builder()
    own = {"overlays": [b.replace(member, name, 0, floats("F32", (2,), 0))]}
    recipe = tiny(
        tensors={name: entry("F32", (2,), constant(0.0))},
        members=[{"name": member, "tensors": {name: own}}],
    )
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, assemble(recipe, b.payloads))
    with read_checkpoint(path) as checkpoint:
        assert checkpoint.tensor(name).same_bits(floats("F32", (2,), 0))


# --- corruption ----------------------------------------------------------------------------------


def test_verify_agrees_with_a_sound_file(written: Path) -> None:
    with read_checkpoint(written) as checkpoint:
        checks = verify(checkpoint)
        payloads = set(payload_names(checkpoint.recipe))
    assert all(check.ok and not check.detail for check in checks)
    names = {check.what for check in checks}
    assert {"shared/conv.weight", "first/conv.weight", "second/fc.bias", "backbone_id"} <= names
    assert payloads <= names


def test_a_bit_flipped_in_any_payload_is_refused(written: Path, tmp_path: Path) -> None:
    (tmp_path / "pre.safetensors").symlink_to(written.with_name("pre.safetensors"))
    data = written.read_bytes()
    with Container(written) as container:
        start, infos = container.header_bytes, dict(container.infos)
    path = tmp_path / "flipped.safetensors"
    for name, info in infos.items():
        for at in {info.start, (info.start + info.stop) // 2, info.stop - 1}:
            broken = bytearray(data)
            broken[start + at] ^= 1 << at % 8
            path.write_bytes(broken)
            with (
                read_checkpoint(path) as checkpoint,
                pytest.raises(FileFormatError, match=f"'{re.escape(name)}' is corrupt"),
            ):
                ask_for_everything(checkpoint)


def ask_for_everything(checkpoint: Checkpoint) -> None:
    for member in checkpoint.recipe.members:
        checkpoint.tensors(member.name)
        for name in member.scores:
            checkpoint.scores(name, member.name)


def test_verify_lists_what_fails_and_goes_on(written: Path, tmp_path: Path) -> None:
    (tmp_path / "pre.safetensors").symlink_to(written.with_name("pre.safetensors"))
    data = bytearray(written.read_bytes())
    with Container(written) as container:
        data[container.header_bytes + container.infos["shared/emb/source"].start] ^= 4
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with read_checkpoint(path) as checkpoint:
        checks = verify(checkpoint)
    assert {c.what for c in checks if not c.ok} == {"shared/emb", "shared/emb/source"}
    assert all("is corrupt" in c.detail for c in checks if not c.ok)
    assert len([c for c in checks if c.ok]) > 20


def test_verify_finds_a_fault_under_a_replacement(tmp_path: Path) -> None:
    b = Builder()
    overlays = (
        b.mask("shared", "w", 0, [1, 0, 1, 1, 0]),
        b.replace("shared", "w", 1, floats("F32", (5,), 0)),
    )
    recipe = tiny(tensors={"w": entry("F32", (5,), constant(1.0), *overlays)})
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, assemble(recipe, b.payloads))
    data = bytearray(path.read_bytes())
    with Container(path) as container:
        data[container.header_bytes + container.infos["shared/w/0.mask"].start] ^= 1
    path.write_bytes(data)
    with read_checkpoint(path) as checkpoint:
        assert checkpoint.tensor("w").same_bits(floats("F32", (5,), 0))
        assert "shared/w/0.mask" in {c.what for c in verify(checkpoint) if not c.ok}


@pytest.mark.parametrize("what", ["shared/conv.weight", "second/fc.weight", "backbone_id"])
def test_verify_compares_finished_digests(written: Path, tmp_path: Path, what: str) -> None:
    def change(recipe: Json) -> None:
        if what == "backbone_id":
            recipe["backbone_id"] = "0" * 32
        elif what == "shared/conv.weight":
            recipe["tensors"]["conv.weight"]["digest"] = "0" * 32
        else:
            recipe["members"][1]["tensors"]["fc.weight"]["entry"]["digest"] = "0" * 32

    path = with_metadata(written, tmp_path / "changed.safetensors", change)
    with read_checkpoint(path, base=base_tensors()) as checkpoint:
        assert [c.what for c in verify(checkpoint) if not c.ok] == [what]


def test_another_seed_is_noticed_by_verify(written: Path, tmp_path: Path) -> None:
    def change(recipe: Json) -> None:
        recipe["tensors"]["wide.weight"]["source"]["seed"] += 1

    path = with_metadata(written, tmp_path / "changed.safetensors", change)
    with read_checkpoint(path, base=base_tensors()) as checkpoint:
        failed = {c.what for c in verify(checkpoint) if not c.ok}
    assert failed == {"shared/wide.weight", "backbone_id"}


def test_missing_and_foreign_payloads_are_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", tiny(), Memory())
    with pytest.raises(FileFormatError, match=r"payload 'shared/w/0\.mask' is missing"):
        read_checkpoint(path)
    extra = Memory({**tiny_payloads(), "shared/w/0.values": floats("F32", (1,), 0)})
    path = write_raw(tmp_path / "b.safetensors", tiny(), extra)
    with pytest.raises(FileFormatError, match=r"'shared/w/0\.values' belongs to no part"):
        read_checkpoint(path)


def test_dtypes_of_other_programs_are_refused_in_a_file_of_ours(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.safetensors", tiny(), tiny_payloads())
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["shared/w/0.mask"]["dtype"] = "F8_E8M0"  # of the same size
    path.write_bytes(slow.raw_file(header, content[end:]))
    with pytest.raises(FileFormatError, match="has dtype F8_E8M0, not one of F64"):
        read_checkpoint(path)


def test_another_safetensors_file_is_named_as_such(tmp_path: Path) -> None:
    write_base(tmp_path)
    with pytest.raises(FileFormatError, match="a safetensors file, but not one of randsurgery"):
        read_checkpoint(tmp_path / "pre.safetensors")


# --- the recipe ----------------------------------------------------------------------------------


def member_with(**more: Any) -> Json:
    return tiny(members=[{"name": "m", **more}])


CALIBRATION: Json = {"temperature": hexf(1.5), "dataset": "digits", "share": "0.2", "seed": 7}
INPUT: Json = {
    "size": [8, 6], "channels": 1, "mean": [hexf(0.5)], "std": [hexf(0.25)],
    "interpolation": "bilinear",
}  # fmt: skip


def without(whole: Json, field: str) -> Json:
    return {key: value for key, value in whole.items() if key != field}


def calibrated(**more: Any) -> Json:
    return member_with(calibration={**CALIBRATION, **more})


def seeing(**more: Any) -> Json:
    return member_with(input={**INPUT, **more})


def changed(path: list[str | int], value: Any) -> Json:
    recipe = tiny()
    target: Any = recipe
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return recipe


W: list[str | int] = ["tensors", "w"]
REFUSED: dict[str, Json] = {
    "unknown field of the recipe": changed(["surprise"], 1),
    "unknown field of an entry": changed([*W, "surprise"], 1),
    "unknown field of a source": changed([*W, "source", "surprise"], 1),
    "unknown field of an overlay": changed([*W, "overlays", 0, "surprise"], 1),
    "unknown field of a member": member_with(surprise=1),
    "unknown field of a member's tensor": member_with(tensors={"w": {"surprise": 1}}),
    "unknown field of a base": tiny(bases={"b": {"identity": "0" * 32, "surprise": 1}}),
    "unknown field of the model": tiny(model={"name": "resnet18", "surprise": 1}),
    "unknown source": changed([*W, "source"], {"kind": "url", "value": "x"}),
    "unknown overlay": changed([*W, "overlays", 0], {"kind": "add"}),
    "unknown distribution": changed([*W, "source", "distribution"], "cauchy"),
    "unknown encoding": changed([*W, "overlays", 0, "encoding"], "lzma"),
    "unknown dtype": changed([*W, "dtype"], "F31"),
    "a number as text": changed([*W, "source", "seed"], "7"),
    "a float as seed": changed([*W, "source", "seed"], 7.0),
    "a boolean as seed": changed([*W, "source", "seed"], True),
    "a negative seed": changed([*W, "source", "seed"], -1),
    "a seed of 64 bits": changed([*W, "source", "seed"], 2**63),
    "a decimal scale": changed([*W, "source", "scale"], "0.5"),
    "a scale that is not canonical": changed([*W, "source", "scale"], "0x1p-1"),
    "an infinite scale": changed([*W, "source", "scale"], "inf"),
    "a scale beyond float64": changed([*W, "source", "scale"], "0x1.0000000000000p+99999"),
    "a scale that is NaN": changed([*W, "source", "scale"], "nan"),
    "a negative dimension": changed([*W, "shape"], [-5]),
    "a fractional dimension": changed([*W, "shape"], [5.0]),
    "a digest in capitals": changed([*W, "overlays", 0, "digest"], "A" * 32),
    "a short digest": changed([*W, "overlays", 0, "digest"], "a" * 31),
    "a digest and a newline": changed([*W, "overlays", 0, "digest"], "a" * 32 + "\n"),
    "no members": tiny(members=[]),
    "two members of one name": tiny(members=[{"name": "a"}, {"name": "a"}]),
    "a member named shared": tiny(members=[{"name": "shared"}]),
    "a member with a slash": tiny(members=[{"name": "a/b"}]),
    "a member with dots": tiny(members=[{"name": "a..b"}]),
    "a member's tensor without content": member_with(tensors={"w": {}}),
    "overlays on nothing": member_with(
        tensors={"x": {"overlays": [{"kind": "scale", "factor": hexf(1.0)}]}}
    ),
    "overlays beside an entry": member_with(
        tensors={"w": {"overlays": [{"kind": "scale", "factor": hexf(1.0)}],
                       "entry": entry("F32", (1,), constant(0.0))}}
    ),
    "scores of nothing": member_with(scores={"x": "0" * 32}),
    "unknown field of a calibration": calibrated(surprise=1),
    "a calibration without a temperature": member_with(
        calibration=without(CALIBRATION, "temperature")
    ),
    "a calibration without a dataset": member_with(calibration=without(CALIBRATION, "dataset")),
    "a calibration without a share": member_with(calibration=without(CALIBRATION, "share")),
    "a temperature of 0": calibrated(temperature=hexf(0.0)),
    "a temperature of -0": calibrated(temperature=hexf(-0.0)),
    "a temperature below 0": calibrated(temperature=hexf(-1.5)),
    "a temperature that is NaN": calibrated(temperature="nan"),
    "an infinite temperature": calibrated(temperature="inf"),
    "a decimal temperature": calibrated(temperature="1.5"),
    "a temperature as a number": calibrated(temperature=1.5),
    "a share above 1": calibrated(share="1.5"),
    "a share of 0": calibrated(share="0.0"),
    "a share below 0": calibrated(share="-0.5"),
    "a share of 1 with a point": calibrated(share="1.0"),
    "a share without digits": calibrated(share="0."),
    "a share that starts with a point": calibrated(share=".5"),
    "a share of 18 digits": calibrated(share="0." + "1" * 18),
    "a share in digits of another script": calibrated(share="0.\u0665"),
    "a share with an exponent": calibrated(share="1e-1"),
    "a share and a newline": calibrated(share="0.5\n"),
    "a share as a number": calibrated(share=0.5),
    "a calibration's seed below 0": calibrated(seed=-1),
    "a calibration's seed of 64 bits": calibrated(seed=2**63),
    "a calibration of the whole file": tiny(calibration=CALIBRATION),
    "unknown field of a member's input": seeing(surprise=1),
    "a member's input of one side": seeing(size=[8]),
    "a member's input of three sides": seeing(size=[8, 8, 3]),
    "a member's input of a fraction of a pixel": seeing(size=[8, 6.5]),
    "a member's input without channels": member_with(input=without(INPUT, "channels")),
    "a member's input without a mean": member_with(input=without(INPUT, "mean")),
    "a member's input with a decimal mean": seeing(mean=["0.5"]),
    "a member's input with another interpolation": seeing(interpolation="lanczos"),
    "a member's input as a size": member_with(input=[8, 6]),
    "a base that is not declared": changed([*W, "source"],
                                           {"kind": "base", "base": "b", "tensor": "w"}),
    "a base at a path": tiny(bases={"b": {"identity": "0" * 32, "file": "../b.safetensors"}}),
    "a base on a drive": tiny(bases={"b": {"identity": "0" * 32, "file": "C:b.safetensors"}}),
    "a tensor name with ..": tiny(tensors={"../w": entry("F32", (1,), constant(0.0))}),
    "a tensor name with a newline": tiny(tensors={"w\n": entry("F32", (1,), constant(0.0))}),
    "a version of another kind": tiny(version=True),
    "a version as a float": tiny(version=1.0),
    "an earlier version": tiny(version=0),
    "a later version": tiny(version=2),
    "another format": tiny(format="other"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_recipe_that_says_more_or_other_is_refused(fault: str) -> None:
    with pytest.raises(FileFormatError, match=r"^f\.safetensors: "):
        parse_recipe(json.dumps(REFUSED[fault]), "f.safetensors")


@pytest.mark.parametrize("field", ["format", "version"])
def test_format_and_version_must_be_said(field: str) -> None:
    recipe = tiny()
    del recipe[field]
    with pytest.raises(FileFormatError, match=field):
        parse_recipe(json.dumps(recipe), "f")


@pytest.mark.parametrize(
    "text",
    ["", "1", "[]", "null", '{"format":"randsurgery","format":"randsurgery","version":1}',
     '{"format":"randsurgery","version":1,"notes":{"x":NaN}}',
     '{"format":"randsurgery","version":1,"notes":{"x":1e999}}',
     '{"format":"randsurgery","version":1,"notes":{"x":1,"x":2}}',
     '{"format":"randsurgery","version":1,"notes":{"x":"\\ud800"}}',
     '{"format":"randsurgery","version":1,"notes":{"x":"\ud800"}}',
     '{"format":"randsurgery","version":1,"notes":' + '{"x":' * 5000 + "1" + "}" * 5001],
)  # fmt: skip
def test_text_that_is_not_a_strict_json_recipe_is_refused(text: str) -> None:
    with pytest.raises(FileFormatError, match=r"^f: "):
        parse_recipe(text, "f")


def test_notes_and_provenance_are_free() -> None:
    free = {"any": [1, 2.5, None, True, {"nested": {"é": "\U0001f600"}}]}
    recipe = tiny(notes=free, members=[{"name": "m", "provenance": free}])
    parsed = parse_recipe(json.dumps(recipe), "f")
    assert parsed.notes == free
    assert parsed.members[0].provenance == free


@pytest.mark.parametrize("share", ["1", "0.5", "0.50", "0.00000000000000001", "0." + "9" * 17])
def test_a_member_has_its_own_input_and_calibration(share: str) -> None:
    member = {"name": "m", "input": INPUT, "calibration": {**CALIBRATION, "share": share}}
    recipe = parse_recipe(json.dumps(tiny(members=[{"name": "other"}, member])), "f")
    assert recipe.to_json()["members"][1] == member
    assert recipe.member("other").input is None
    assert recipe.member("other").calibration is None
    assert recipe.member("m").calibration.share == share


def test_the_members_own_input_and_classes_supersede_the_recipes() -> None:
    shared, head = {**INPUT, "size": [4, 4]}, {"name": "fc", "classes": 3}
    model = {"name": "conv2", "args": {"num_classes": 10, "img_size": 8}}
    members = [{"name": "a"}, {"name": "b", "input": INPUT, "head": head}]
    recipe = parse_recipe(json.dumps(tiny(model=model, input=shared, members=members)), "f")
    a, b = recipe.members
    assert recipe.input_of(a).size == (4, 4)
    assert recipe.input_of(b).size == (8, 6)
    assert recipe.model_of(a) == recipe.model
    assert recipe.model_of(b).args == {"num_classes": 3, "img_size": 8}


def test_fields_at_their_defaults_are_left_out() -> None:
    assert Recipe().to_json() == {"format": "randsurgery", "version": 1}
    assert canonical_json(parse_recipe(json.dumps(tiny()), "f").to_json()) == canonical_json(tiny())


def test_members_are_named_in_the_message() -> None:
    checkpoint = assemble(tiny(members=[{"name": "one"}, {"name": "two"}]), tiny_payloads())
    with pytest.raises(UsageError, match=r"2 members \(one, two\)"):
        checkpoint.tensors()
    with pytest.raises(UsageError, match="near: one"):
        checkpoint.tensor("w", "ones")
    assert assemble(tiny(), tiny_payloads()).tensor("w").shape == (5,)


# --- bases ---------------------------------------------------------------------------------------


def move(written: Path, folder: Path) -> Path:
    path = folder / "all.safetensors"
    path.write_bytes(written.read_bytes())
    return path


def test_a_base_beside_the_file_is_found(written: Path, tmp_path: Path) -> None:
    path = move(written, tmp_path)
    write_base(tmp_path)
    with read_checkpoint(path) as here, read_checkpoint(written) as there:
        assert here.tensor("old", "first").same_bits(there.tensor("old", "first"))


def test_a_base_may_be_given_as_file_or_tensors(written: Path, tmp_path: Path) -> None:
    path = move(written, tmp_path)
    for base in (written.with_name("pre.safetensors"), base_tensors()):
        with read_checkpoint(path, base=base) as checkpoint:
            assert checkpoint.tensor("old", "first").dtype == "F16"


def test_a_missing_base_is_named_with_its_origin(written: Path, tmp_path: Path) -> None:
    path = move(written, tmp_path)
    with pytest.raises(IncompatibleError) as caught:
        read_checkpoint(path)
    for part in ("hf-hub:timm/some_net", "abc123", "pre.safetensors", "--base"):
        assert part in str(caught.value)
    with read_checkpoint(path, need_bases=False) as checkpoint:
        assert checkpoint.tensor("emb", "first").dtype == "BF16"
        with pytest.raises(IncompatibleError, match="--base"):
            checkpoint.tensor("old", "first")


@pytest.mark.parametrize("beside", [True, False])
def test_another_base_is_refused_and_both_identities_are_named(
    written: Path, tmp_path: Path, beside: bool
) -> None:
    path = move(written, tmp_path)
    right, wrong = base_tensors(), base_tensors()
    wrong["b"] = floats("F32", (4,), 99)
    if beside:
        write_atomically(tmp_path / "pre.safetensors", pack(wrong, {}))
    with pytest.raises(IncompatibleError) as caught:
        read_checkpoint(path, base=None if beside else wrong)
    assert identity(right, right) in str(caught.value)
    assert identity(wrong, wrong) in str(caught.value)


def test_a_base_that_the_file_does_not_build_on_is_refused(written: Path, tmp_path: Path) -> None:
    path, wrong = move(written, tmp_path), base_tensors()
    write_base(tmp_path)  # the right one lies beside
    wrong["b"] = floats("F32", (4,), 99)
    with pytest.raises(IncompatibleError, match="another base") as caught:
        read_checkpoint(path, base=wrong)
    assert identity(wrong, wrong) in str(caught.value)
    zero = entry("F32", (3,), {"kind": "constant", "value": "0x0.0p+0"})
    plain = write_raw(tmp_path / "plain.safetensors", tiny(tensors={"w": zero}), Memory())
    with pytest.raises(IncompatibleError, match="builds on no base"):
        read_checkpoint(plain, base=wrong)


def test_two_bases_one_given_and_one_beside(tmp_path: Path) -> None:
    one, two = Memory({"w": floats("F32", (3,), 1)}), Memory({"w": floats("F32", (3,), 2)})
    write_atomically(tmp_path / "two.safetensors", pack(two, {}))
    recipe = tiny(
        tensors={
            key: entry("F32", (3,), {"kind": "base", "base": key, "tensor": "w"})
            for key in ("one", "two")
        },
        bases={
            "one": {"identity": identity(one, one)},
            "two": {"identity": identity(two, two), "file": "two.safetensors"},
        },
    )
    path = write_raw(tmp_path / "a.safetensors", recipe, Memory())
    with read_checkpoint(path, base=one) as checkpoint:
        assert checkpoint.tensor("one").same_bits(one["w"])
        assert checkpoint.tensor("two").same_bits(two["w"])
    with pytest.raises(IncompatibleError, match="pass --base"):
        read_checkpoint(path)


def test_a_base_tensor_that_does_not_fit_is_refused() -> None:
    base = base_tensors()
    for source, shape in (("w", (7, 5)), ("none", (5, 7))):
        recipe = tiny(
            tensors={"w": entry("F16", shape, {"kind": "base", "base": "b", "tensor": source})},
            bases={"b": {"identity": identity(base, base)}},
        )
        with pytest.raises(IncompatibleError, match=source):
            assemble(recipe, Memory(), {"b": base}).tensor("w")


def test_identity_covers_names_dtypes_shapes_and_bytes() -> None:
    words = np.arange(6, dtype="<u2")
    variants = [
        Memory({"w": RawTensor("BF16", words)}),
        Memory({"v": RawTensor("BF16", words)}),
        Memory({"w": RawTensor("F16", words.view("<f2"))}),
        Memory({"w": RawTensor("BF16", words.reshape(2, 3))}),
        Memory({"w": RawTensor("BF16", words[::-1].copy())}),
    ]
    assert len({identity(v, v) for v in variants}) == len(variants)


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [[2**43], [2**40, 0], [2**47, 2**47, 2**47, 0], [2**47] * 16])
@pytest.mark.parametrize("masked", [True, False])
def test_terabytes_on_the_word_of_a_recipe_are_refused_before_they_are_allocated(
    tmp_path: Path, shape: list[int], masked: bool
) -> None:
    b = Builder()
    overlays = (b.mask("shared", "w", 0, []),) if masked else ()
    recipe = tiny(tensors={"w": entry("F32", tuple(shape), random_source("sign", 1.0), *overlays)})
    path = write_raw(tmp_path / "a.safetensors", recipe, b.payloads)
    with read_checkpoint(path) as checkpoint:
        for ask in (checkpoint.tensors, lambda: checkpoint.tensor("w")):
            with pytest.raises(IncompatibleError, match=r"asks for .* GB"):
                ask()
        faults = {check.what: check.detail for check in verify(checkpoint) if not check.ok}
    assert "asks for" in faults["shared/w"]
    if masked and math.prod(shape):
        assert "asks for" in faults["backbone_id"]


# --- the backbone --------------------------------------------------------------------------------


def backbone(recipe: Json, payloads: Memory, bases: dict[str, Memory] | None = None) -> str:
    checkpoint = assemble(recipe, payloads, bases)
    return backbone_id(checkpoint.recipe, checkpoint.payloads)


def masked_recipe(encoding: str, bits: list[int], **source: Any) -> tuple[Json, Memory]:
    b = Builder()
    mask = b.mask("shared", "w", 0, bits, encoding)
    return tiny(tensors={"w": entry("F32", (5,), random_source("sign", 1.0, **source), mask)}), (
        b.payloads
    )


def test_backbone_id_does_not_depend_on_the_encoding_of_a_mask() -> None:
    bits = [1, 0, 1, 1, 0]
    assert backbone(*masked_recipe("bits", bits)) == backbone(*masked_recipe("gaps", bits))
    assert backbone(*masked_recipe("bits", bits)) != backbone(*masked_recipe("bits", bits[::-1]))


def test_backbone_id_knows_the_default_stream() -> None:
    bits = [1, 0, 1, 1, 0]
    default = backbone(*masked_recipe("bits", bits))
    assert backbone(*masked_recipe("bits", bits, stream="w")) == default
    assert backbone(*masked_recipe("bits", bits, stream="")) != default
    assert backbone(*masked_recipe("bits", bits, seed=12)) != default


def test_backbone_id_does_not_depend_on_members_or_the_name_of_a_base(written: Path) -> None:
    with read_checkpoint(written) as checkpoint:
        whole = checkpoint.recipe.backbone_id
    recipe, payloads = everything()
    recipe["members"] = [{"name": "other", "classes": ["x"]}]
    recipe["notes"] = {}
    recipe["bases"]["renamed"] = recipe["bases"].pop("pre")
    recipe["tensors"]["old"]["source"]["base"] = "renamed"
    assert backbone(recipe, payloads) == whole
    recipe["tensors"]["norm.bias"]["source"]["value"] = (0.5).hex()
    assert backbone(recipe, payloads) != whole


def test_finish_fills_in_every_digest() -> None:
    recipe, payloads = everything()
    done = finish(assemble(recipe, payloads, {"pre": base_tensors()})).recipe
    assert done.backbone_id is not None
    assert all(whole.digest is not None for _, _, whole in done.entries())
    assert done.members[0].tensors["conv.weight"].digest is not None
    tensor = assemble(recipe, payloads).tensor("emb", "first")
    text = b'["BF16",[6,4]]\0'
    assert done.tensors["emb"].digest == digest(text + tensor.array.tobytes())


# --- the document --------------------------------------------------------------------------------


def test_the_vectors_in_the_document() -> None:
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text("utf-8")
    said = json.loads(text.split("```json\n")[1].split("```")[0])
    golden = {"seed": 7, "stream": "golden", "role": "weight"}
    made = {
        kind: generate(kind, 1003, 0.5, **golden).astype("<f4", copy=False)
        for kind in ("sign", "normal", "uniform")
    }
    assert said["key"] == [f"{word:016x}" for word in stream_key(**golden)]
    words = slow.stream_words(**golden)
    assert said["words"] == [f"{next(words):016x}" for _ in range(4)]
    assert said["bytes"] == slow.stream_bytes(8, **golden).hex()
    for kind, values in made.items():
        first = values[: len(said[kind])]
        signs = "".join("+" if v > 0 else "-" for v in first)
        assert said[kind] == (signs if kind == "sign" else [float(v).hex() for v in first])
        assert said["sha256_of_1003"][kind] == hashlib.sha256(values.tobytes()).hexdigest()
    three = {d: from_f32(d, made["normal"][:3]) for d in ("F16", "BF16")}
    assert said["normal_f16"] == three["F16"].tobytes().hex()
    assert said["normal_bf16"] == three["BF16"].tobytes().hex()
    table = slow.normal_table()
    assert said["normal_table"] == [table[i].hex() for i in (0, 32767, 32768)]
    assert NORMAL_TABLE_SHA256 in text
    for shape in ("13x12", "28x28"):
        rows = hadamard_rows(*map(int, shape.split("x")))
        for index, signs in said[f"hadamard_{shape}"].items():
            assert signs == "".join("+" if v > 0 else "-" for v in rows[int(index)])

    mask = said["mask"]
    payload = bytes.fromhex(mask["gaps"])
    for encoding in ("bits", "gaps"):
        read = masks.decode(bytes.fromhex(mask[encoding]), encoding, mask["size"], mask["count"])
        assert np.flatnonzero(read.unpack()).tolist() == mask["ones"]
    assert slow.gap_bytes(read.unpack().astype(int).tolist()).hex() == mask["gaps_inflated"]

    finished = RawTensor("F32", made["sign"][:4].reshape(2, 2))
    base = Memory({"b": RawTensor("F16", three["F16"]), "a": finished})
    assert said["payload_digest_of_gaps"] == digest(payload)
    assert said["finished_digest"] == finished.digest()
    assert said["base_identity"] == identity(base, base)
    source = {**random_source("sign", 0.5), "seed": 7}
    overlay = {"kind": "mask", "encoding": "gaps", "count": 3, "digest": digest(payload)}
    recipe = tiny(tensors={"golden": entry("F32", (300,), source, overlay)})
    payloads = Memory({"shared/golden/0.mask": RawTensor("U8", np.frombuffer(payload, np.uint8))})
    assert said["backbone_id"] == backbone(recipe, payloads)
    assert said["backbone_id"] == digest(said["backbone_text"].encode())
