"""``inspect diff``: every figure as slow loops over single elements find it."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import format_helpers as slow
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint import Builder, assemble, constant, entry, floats, random_source, some_bits
from typer.testing import CliRunner, Result

from randsurgery.cli.app import app
from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.tensors import STORAGE, RawTensor
from randsurgery.format.writing import write_checkpoint
from randsurgery.inspection.diff import DiffReport, TensorDiff, diff, distances

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
Json = dict[str, Any]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", "diff", *map(str, arguments)])


def shown(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert result.stderr == ""
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line[:7] for line in lines] == ["error: "]
    return lines[0]


def golden(name: str) -> Path:
    return GOLDEN / f"{name}.safetensors"


def write(path: Path, tensors: Json, b: Builder, **more: Any) -> Path:
    recipe = {"format": "randsurgery", "version": 1, "tensors": tensors, **more}
    write_checkpoint(path, assemble(recipe, b.payloads))
    return path


def dense(path: Path, tensors: dict[str, RawTensor]) -> Path:
    write_atomically(path, pack(tensors, {"format": "pt"}))
    return path


# --- the twin ------------------------------------------------------------------------------------


def finished(path: Path, member: str | None) -> dict[str, slow.Raw]:
    """Every tensor of a network, element by element."""
    metadata, payloads = slow.read_file(path)
    if "randsurgery" not in metadata:
        return payloads
    recipe = {"members": [{}], "tensors": {}, **json.loads(metadata["randsurgery"])}
    bases = {
        key: slow.read_file(path.parent / ref["file"])[1]
        for key, ref in recipe.get("bases", {}).items()
    }
    who = next(m for m in recipe["members"] if member in (None, m.get("name", "main")))
    names = {*recipe["tensors"], *who.get("tensors", {})}
    name_of = who.get("name", "main")
    return {n: slow.naive_tensor(recipe, payloads, name_of, n, bases) for n in sorted(names)}


def elements(raw: slow.Raw) -> list[tuple[bytes, float]]:
    dtype, _, data = raw
    width = slow.WIDTH[dtype]
    cells = [data[i : i + width] for i in range(0, len(data), width)]
    if dtype in ("F32", "F16", "BF16"):
        return [(cell, slow.value_of(dtype, cell)) for cell in cells]
    if dtype == "F64":
        return [(cell, struct.unpack("<d", cell)[0]) for cell in cells]
    return [(cell, int.from_bytes(cell, "little", signed=dtype[0] == "I")) for cell in cells]


def twin(a: slow.Raw, b: slow.Raw) -> Json | None:
    """What is said of two tensors of one shape; None if they are equal."""
    if a == b:
        return None
    shape, one, two = a[1], elements(a), elements(b)
    if a[0] == b[0]:
        changed = [x[0] != y[0] for x, y in zip(one, two, strict=True)]
        bits = sum(bin(p ^ q).count("1") for p, q in zip(a[2], b[2], strict=True))
    else:
        changed = [
            x[1] != y[1] and not (math.isnan(x[1]) and math.isnan(y[1]))
            for x, y in zip(one, two, strict=True)
        ]
        bits = None
    apart = [
        float(abs(Fraction(x[1]) - Fraction(y[1])))
        for x, y in zip(one, two, strict=True)
        if math.isfinite(x[1]) and math.isfinite(y[1])
    ]
    filters = shape[0] if shape else 1
    across = len(one) // filters if filters else 0
    rows = [i for i in range(filters) if any(changed[i * across : (i + 1) * across])]
    runs: list[tuple[int, int]] = []
    for i in rows:
        runs = [*runs[:-1], (runs[-1][0], i)] if runs and runs[-1][1] == i - 1 else [*runs, (i, i)]
    said: Json = {
        "state": "values" if a[0] == b[0] else "kind", "size": len(one), "elements": sum(changed),
        "bits": bits, "filters": filters, "filters_differ": len(rows), "filters_at": tuple(runs),
        "finite": len(apart), "max_abs": max(apart, default=None),
        "mean_abs": pytest.approx(math.fsum(apart) / len(apart), rel=1e-12) if apart else None,
    }  # fmt: skip
    for side, cells in (("a", one), ("b", two)):
        said[f"nan_{side}"] = sum(math.isnan(value) for _, value in cells)
        said[f"infinite_{side}"] = sum(math.isinf(value) for _, value in cells)
    return said


def assert_twin(
    report: DiffReport, a: Path, b: Path, member_a: str | None, member_b: str | None
) -> None:
    one, two = finished(a, member_a), finished(b, member_b)
    said = {row.name: row for row in report.differences}
    assert report.tensors == len({*one, *two})
    for name in sorted({*one, *two}):
        if name not in one or name not in two:
            assert said.pop(name).state == ("only_a" if name in one else "only_b")
            continue
        if one[name][1] != two[name][1]:
            row = said.pop(name)
            assert (row.state, row.compared, row.elements) == ("kind", False, 0)
            continue
        expected = twin(one[name], two[name])
        if expected is None:
            assert name not in said
            continue
        row = said.pop(name)
        for key, value in expected.items():
            assert getattr(row, key) == value, (name, key)
    assert not said


PAIRS = [
    ("popup", None, "popup-scores", None),
    ("popup", None, "popup-random", None),
    ("popup", None, "survivors", None),
    ("popup", None, "supermask", None),
    ("ensemble-masks", "seed-0", "ensemble-masks", "seed-2"),
    ("ensemble-slices", None, "ensemble-slices", None),
    ("slices-in", None, "slices-out", None),
    ("plan", None, "plan-zero", None),
    ("on-base", None, "base", None),
    ("base", None, "on-base-popup", None),
    ("on-base", None, "converted", None),
    ("init-signed-constant", None, "init-kaiming-normal", None),
    ("init-xavier-normal", None, "written-otherwise", "z"),
    ("written-otherwise", "a", "written-otherwise", "z"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-{pair[2]}")
def test_golden_files_differ_as_a_slow_reader_finds(
    pair: tuple[str, str | None, str, str | None],
) -> None:
    a, b = golden(pair[0]), golden(pair[2])
    member_a, member_b = pair[1], pair[3]
    if pair[0] == "ensemble-slices":
        with Container(a) as file:
            members = json.loads(file.metadata["randsurgery"])["members"]
        member_a, member_b = members[0]["name"], members[1]["name"]
    assert_twin(diff(a, b, member_a=member_a, member_b=member_b), a, b, member_a, member_b)


@pytest.mark.parametrize(("name", "member"), [("popup", None), ("on-base", None), ("base", None),
                                              ("dtypes", "a"), ("sources", None)])  # fmt: skip
def test_a_file_does_not_differ_from_itself(name: str, member: str | None) -> None:
    path = golden(name)
    report = diff(path, path, member_a=member, member_b=member)
    assert report.same
    assert report.same_backbone is (None if name == "base" else True)
    assert "no difference in" in shown(0, path, path, *(
        ("--member-a", member, "--member-b", member) if member else ()
    ))  # fmt: skip


def of_every_dtype(seed: int) -> dict[str, RawTensor]:
    """Any bytes, so any NaN and infinity; and shapes without elements or dimensions."""
    rng, found = np.random.default_rng(seed), {}
    for dtype, storage in STORAGE.items():
        if dtype in slow.WIDTH:
            size = 7 * 300 * storage.itemsize
            raw = rng.integers(0, 2 if dtype == "BOOL" else 256, size, dtype=np.uint8)
            array = raw.view(storage).reshape(7, 300)
            if storage.kind == "f":
                array[:, :4] = [np.nan, np.inf, -np.inf, -0.0]
                array[2:4] = 1.0
                array[seed % 7, 5] = np.nan
            found[dtype] = RawTensor(dtype, array)
    found["scalar"] = RawTensor.of(np.array(float(seed)))
    found["empty"] = RawTensor.of(np.zeros((0, 3)))
    found["none"] = RawTensor.of(np.zeros((3, 0), dtype=np.float32 if seed else np.float64))
    found["cast"] = RawTensor.of(np.array([1, np.nan, 3], dtype=np.float32 if seed else np.float64))
    return found


def test_dense_files_of_every_dtype(tmp_path: Path) -> None:
    a = dense(tmp_path / "a.safetensors", of_every_dtype(0))
    b = dense(tmp_path / "b.safetensors", of_every_dtype(1))
    report = diff(a, b)
    assert_twin(report, a, b, None, None)
    rows = {row.name: row for row in report.differences}
    assert rows["F32"].filters_at == ((0, 1), (4, 6))
    assert rows["none"].state == rows["cast"].state == "kind"
    assert (rows["none"].elements, rows["cast"].elements, rows["cast"].bits) == (0, 0, None)
    assert rows["F32"].nan_a >= 6
    text = shown(1, a, b, "--depth", 1)
    assert "not finite:\n  BF16: A has " in text
    assert "of another dtype:\n  cast: F64 3, F32 3\n" in text
    json.dumps(report.to_json(), allow_nan=False)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))))
def test_distances_of_integers_are_exact(pairs: list[tuple[int, int]]) -> None:
    left = np.array([a for a, _ in pairs], dtype=np.int64)
    right = np.array([b for _, b in pairs], dtype=np.int64)
    assert distances(left, right).tolist() == [float(abs(a - b)) for a, b in pairs]


@given(st.lists(st.tuples(st.floats(), st.floats())))
def test_distances_of_floats_are_of_those_finite_in_both(pairs: list[tuple[float, float]]) -> None:
    left, right = (np.array([pair[i] for pair in pairs], dtype=np.float64) for i in (0, 1))
    expected = [
        float(min(abs(Fraction(a) - Fraction(b)), Fraction(sys.float_info.max)))
        for a, b in pairs
        if math.isfinite(a) and math.isfinite(b)
    ]
    assert distances(left, right).tolist() == expected


def test_blocks_of_a_tensor_are_no_seams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = dense(tmp_path / "a.safetensors", of_every_dtype(0))
    b = dense(tmp_path / "b.safetensors", of_every_dtype(1))
    monkeypatch.setattr("randsurgery.inspection.diff._BLOCK", 97)
    assert_twin(diff(a, b), a, b, None, None)


def test_thousands_of_runs_are_counted_alone(tmp_path: Path) -> None:
    one = np.zeros(10_002, dtype=np.int8)
    two = one.copy()
    two[::2] = 1
    paths = [
        dense(tmp_path / f"{i}.safetensors", {"w": RawTensor.of(v), "v": RawTensor.of(v[:9_999])})
        for i, v in enumerate((one, two))
    ]
    short, long = diff(*paths).differences
    assert (long.filters_differ, long.filters_at) == (5001, None)
    assert short.filters_at == tuple((i, i) for i in range(0, 9_999, 2))


def test_the_sum_of_huge_distances_stays_a_number(tmp_path: Path) -> None:
    top = sys.float_info.max
    a = dense(tmp_path / "a.safetensors", {"w": RawTensor.of(np.full(4, top))})
    b = dense(tmp_path / "b.safetensors", {"w": RawTensor.of(np.full(4, -top))})
    (row,) = diff(a, b).differences
    assert row.max_abs == top
    assert row.mean_abs == top / 4  # the sum is cut
    json.dumps(row.to_json(), allow_nan=False)
    shown(1, a, b)


# --- masks and backbones -------------------------------------------------------------------------


def test_mask_bits_are_those_kept_in_one_alone(tmp_path: Path) -> None:
    bits = [some_bits(60, share, seed) for seed, share in enumerate((0.5, 0.3, 0.9))]
    paths = []
    for number in range(3):
        b = Builder()
        over = [b.mask("shared", "w", 0, bits[0])] if number else []
        own = b.mask("main", "w", 0, bits[number])
        tensors = {"w": entry("F32", (5, 12), random_source("sign", 1.0), *over)}
        members = [{"name": "main", "tensors": {"w": {"overlays": [own]}}}]
        path = tmp_path / f"{number}.safetensors"
        paths.append(write(path, tensors, b, members=members))
    alive = [bits[0], *([x & y for x, y in zip(bits[0], own, strict=True)] for own in bits[1:])]
    for (a, b), (one, two) in zip(pairwise(paths), pairwise(alive), strict=True):
        (row,) = diff(a, b).differences
        assert row.mask_bits == sum(x != y for x, y in zip(one, two, strict=True))
        assert row.to_json()["mask_share"] == row.mask_bits / 60
    assert diff(paths[0], paths[1]).same_backbone is False
    assert diff(paths[1], paths[2]).same_backbone is True
    (row,) = diff(golden("popup"), golden("init-signed-constant")).differences[:1]
    assert row.mask_bits is None


def test_dense_against_ours_compares_finished_tensors(tmp_path: Path) -> None:
    tensors = {
        name: RawTensor(dtype, np.frombuffer(data, dtype=STORAGE[dtype]).reshape(shape))
        for name, (dtype, shape, data) in finished(golden("popup"), None).items()
    }
    path = dense(tmp_path / "dense.safetensors", tensors)
    report = diff(golden("popup"), path)
    assert report.same
    assert report.same_backbone is None
    assert report.rebuilt == 5
    assert "backbone" not in shown(0, path, golden("popup"))


# --- what the headers prove ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two"),
    [("popup", "popup-scores"), ("popup", "popup"), ("dtypes", "dtypes"), ("on-base", "on-base"),
     ("sources", "sources"), ("written-otherwise", "written-otherwise")],
)  # fmt: skip
def test_equal_headers_need_no_payload(one: str, two: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> RawTensor:
        raise AssertionError("read")

    monkeypatch.setattr(Container, "read", read)
    member = "a" if one in ("dtypes", "written-otherwise") else None
    report = diff(golden(one), golden(two), member_a=member, member_b=member)
    assert report.same
    assert report.rebuilt == 0


def test_each_proof_of_equality_is_one(tmp_path: Path) -> None:
    """Other words for the same bits, and nearly the same words for others."""
    ones = RawTensor("F32", np.ones((2, 4), dtype=np.float32))

    def file(name: str, source: Json, *overlays: Json, builder: Builder | None = None) -> Path:
        tensors = {"w": entry("F32", (2, 4), source, *overlays)}
        return write(tmp_path / f"{name}.safetensors", tensors, builder or Builder())

    b, c = Builder(), Builder()
    stored = file("stored", b.stored("shared", "w", ones), builder=b)
    replaced = file("replaced", random_source("sign", 2.0), c.replace("shared", "w", 0, ones),
                    builder=c)  # fmt: skip
    filled = file("filled", constant(1.0))
    scaled = file("scaled", constant(2.0), {"kind": "scale", "factor": (0.5).hex()})
    drawn = file("drawn", random_source("sign", 1.0))
    named = file("named", random_source("sign", 1.0, stream="w"))
    other = file("other", random_source("sign", 1.0, stream="v"))
    for one, two, rebuilt in (
        (stored, replaced, 0),  # one payload's digest
        (filled, scaled, 0),  # the finished digest
        (drawn, named, 0),
        (stored, filled, 1),  # headers that cannot be compared
    ):
        report = diff(one, two)
        assert (report.same, report.rebuilt) == (True, rebuilt)
        assert report.same_backbone is (one == drawn)
    assert not diff(drawn, other).same
    assert not diff(drawn, filled).same


def test_equal_sentences_are_equal_tensors_without_a_digest_too(tmp_path: Path) -> None:
    def file(name: str, source: Json, *overlays: Json, **more: Any) -> Path:
        tensors = {"w": entry("F32", (5, 7), source, *overlays)}
        recipe = {"format": "randsurgery", "version": 1, "tensors": tensors, **more}
        path = tmp_path / f"{name}.safetensors"
        write_atomically(path, pack(b.payloads, {"randsurgery": json.dumps(recipe)}))
        return path

    def based(name: str, key: str, identity: str, *overlays: Json) -> Path:
        source = {"kind": "base", "base": key, "tensor": "w"}
        return file(name, source, *overlays, bases={key: {"identity": identity * 32}})

    b = Builder()
    drawn = file("drawn", random_source("sign", 1.0))
    named = file("named", random_source("sign", 1.0, stream="w"))
    other = file("other", random_source("sign", 1.0, stream="v"))
    assert (diff(drawn, named).same, diff(drawn, named).rebuilt) == (True, 0)
    assert (diff(drawn, other).same, diff(drawn, other).rebuilt) == (False, 1)
    one, two, three = based("one", "x", "0"), based("two", "y", "0"), based("three", "x", "1")
    assert (diff(one, two).same, diff(one, two).rebuilt) == (True, 0)
    for path in (three, drawn):
        with pytest.raises(IncompatibleError, match="pass --base FILE"):
            diff(one, path)
    over = b.replace("shared", "w", 0, floats("F32", (5, 7), 1))
    replaced = based("replaced", "x", "0", over)
    assert diff(replaced, based("other", "x", "1", over)).rebuilt == 0
    assert diff(replaced, drawn).rebuilt == 1  # nothing is left of the base
    masked = (over, b.mask("shared", "w", 1, some_bits(35, 0.5, 2)))
    report = diff(based("a", "x", "0", *masked), file("b", constant(1.0), *masked))
    assert (report.same, report.rebuilt) == (True, 0)


def test_a_base_is_needed_only_where_headers_do_not_suffice(tmp_path: Path) -> None:
    alone = tmp_path / "net.safetensors"
    alone.write_bytes(golden("on-base").read_bytes())
    assert diff(alone, golden("on-base")).same
    with pytest.raises(IncompatibleError, match="pass --base FILE"):
        diff(alone, golden("on-base-popup"))
    base = golden("base")
    assert not diff(alone, golden("on-base-popup"), base=base).same
    assert not diff(alone, base, base=base).same
    assert "builds on a base" in refused(2, golden("popup"), golden("plan"), "--base", base)
    assert "another base" in refused(4, alone, base, "--base", golden("popup"))


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    names = [f"l{i}.weight" for i in range(40)]
    paths = []
    for seed in range(2):
        source = {**random_source("uniform", 1.0), "seed": seed}
        tensors = {name: entry("F32", (256, 256), source) for name in names}
        paths.append(write(tmp_path / f"{seed}.safetensors", tensors, Builder()))
    diff(*paths)  # imports and tables
    tracemalloc.start()
    report = diff(*paths)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(report.differences) == 40
    assert peak < 40 * 256 * 256 * 4 / 2  # half of one network


# --- what headers say differently ----------------------------------------------------------------


def test_recorded_facts_differ(tmp_path: Path) -> None:
    """Equal tensors, other words about them; provenance and notes may differ."""
    tensors = {"w": entry("F32", (4, 3), constant(1.0)), "v": entry("F32", (4,), constant(1.0))}
    look = {"size": [8, 8], "channels": 1, "mean": [(0.5).hex()], "std": [(0.25).hex()]}
    one: Json = {
        "name": "one", "classes": ["a\x1b[31m", "[red]b"], "provenance": {"when": 1},
        "head": {"name": "fc", "classes": 2},
        "plan": {"tensors": {"w": {"part": "slice", "dim": 0, "count": 2}, "v": {}}},
    }  # fmt: skip
    two: Json = {
        "name": "two", "classes": ["a", "b"], "head": {"name": "fc", "classes": 2},
        "plan": {"tensors": {"w": {"part": "slice", "dim": 0, "count": 1}}, "statistics": "frozen"},
    }  # fmt: skip
    model = {"name": "conv2", "args": {"num_classes": 2}}
    a = write(
        tmp_path / "a.safetensors", tensors, Builder(), members=[one], input=look, model=model
    )
    b = write(tmp_path / "b.safetensors", tensors, Builder(), members=[two],
              input={**look, "mean": [(0.0).hex()]}, notes={"x": 1})  # fmt: skip
    report = diff(a, b)
    assert not report.same
    assert report.differences == ()
    assert report.same_backbone is True
    assert {fact.what: (fact.a, fact.b) for fact in report.facts} == {
        "classes": (["a\x1b[31m", "[red]b"], ["a", "b"]),
        "input.mean": ([(0.5).hex()], [(0.0).hex()]),
        "model.name": ("conv2", None),
        "model.args.num_classes": (2, None),
        "plan.statistics": ("tracked", "frozen"),
        "plan.v": ({"part": "whole"}, None),
        "plan.w": ({"part": "slice", "dim": 0, "count": 2},
                   {"part": "slice", "dim": 0, "count": 1}),
    }  # fmt: skip
    text = shown(1, a, b)
    assert "\x1b" not in text
    assert "\\x1b[31m, [red]b" in text
    assert "0 of 2 tensors differ, and 7 recorded facts; the same backbone" in text
    assert "0.5" in text
    assert {fact["what"] for fact in json.loads(shown(1, a, b, "--json"))["facts"]} == {
        fact.what for fact in report.facts
    }


# --- refusals ------------------------------------------------------------------------------------


def test_members_are_named_or_the_only_one(tmp_path: Path) -> None:
    many, one = golden("ensemble-masks"), golden("popup")
    assert "name one with --member-a" in refused(2, many, one)
    assert "name one with --member-b" in refused(2, one, many)
    assert "--member-b: ensemble-masks" in refused(2, one, many, "--member-b", "seed-7")
    assert "members: seed-0" in refused(2, one, many, "--member-b", "zebra")
    assert "leave --member-a out" in refused(2, golden("base"), one, "--member-a", "main")
    assert "ensemble-masks.safetensors:seed-1" in shown(1, one, many, "--member-b", "seed-1")


def test_damaged_files_end_with_3(tmp_path: Path) -> None:
    data, bad = golden("popup").read_bytes(), tmp_path / "bad.safetensors"
    with Container(golden("popup")) as file:
        at = file.header_bytes
    for content in (b"", data[:-1], data[:100], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
        bad.write_bytes(content)
        refused(3, bad, golden("popup-random"))
        refused(3, golden("base"), bad)
    refused(3, tmp_path / "missing.safetensors", bad)
    with pytest.raises(FileFormatError):
        diff(golden("popup-random"), bad)
    with pytest.raises(UsageError):
        diff(golden("popup"), golden("ensemble-masks"))


def test_files_without_tensors(tmp_path: Path) -> None:
    empty = dense(tmp_path / "empty.safetensors", {})
    ours = write(tmp_path / "ours.safetensors", {}, Builder())
    assert "no difference in 0 tensors" in shown(0, empty, ours)
    report = diff(empty, golden("popup"))
    assert [row.state for row in report.differences] == ["only_b"] * 5
    assert shown(1, empty, golden("popup")).startswith(
        "in B alone:\n  features.0.weight: F32 3x3x3x3\n"
    )


# --- what is shown -------------------------------------------------------------------------------


def many(path: Path, seed: int) -> Path:
    rng, tensors = np.random.default_rng(seed), {}
    for stage in range(4):
        for number in range(25):
            for kind in ("conv", "norm", "mlp"):
                values = rng.standard_normal((4, 4)).astype(np.float32)
                tensors[f"stages.{stage}.blocks.{number}.{kind}.weight"] = RawTensor.of(values)
    tensors["stem.weight"] = RawTensor.of(np.ones(3))
    return dense(path, tensors)


def test_three_hundred_layers_fit_a_terminal(tmp_path: Path) -> None:
    a, b = many(tmp_path / "a.safetensors", 0), many(tmp_path / "b.safetensors", 1)
    text = shown(1, a, b)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 50
    assert "300 of 301 tensors differ" in text
    assert "stem" not in text
    deep = shown(1, a, b, "--depth", 0)
    assert max(map(len, deep.splitlines())) <= 80
    assert len(deep.splitlines()) >= 300
    assert "mask" not in text  # no column without figures
    nothing = dense(tmp_path / "c.safetensors", {})
    text = shown(1, a, nothing)
    assert len(text.splitlines()) < 20
    assert "and 291 more; --json has all" in text


def test_a_block_adds_its_tensors_up(tmp_path: Path) -> None:
    a = {"x.a": np.zeros((2, 2)), "x.b": np.zeros(4), "x.c": np.full(2, np.nan)}
    b = {"x.a": np.array([[0, 0], [0, 4.0]]), "x.b": np.full(4, 2.0), "x.c": np.zeros(2)}
    paths = [
        dense(tmp_path / f"{i}.safetensors", {n: RawTensor.of(t) for n, t in side.items()})
        for i, side in enumerate((a, b))
    ]
    row = shown(1, *paths, "--depth", 1).splitlines()[3]
    # 1 + 4 + 2 of 10 elements; 2 + 4 + 24 of 640 bits; filters 1 of 2, 4 of 4, 2 of 2; (4 + 8) / 8
    assert row.split() == ["x", "3", "70.0%", "4.7%", "7", "of", "8", "4", "1.5"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [([0], "0-0 of 6"), ([2, 3, 4], "2-4 of 6"), ([0, 2], "2 of 6"), (range(6), "6 of 6")],
)
def test_filters_that_lie_side_by_side_are_named(
    changed: list[int], told: str, tmp_path: Path
) -> None:
    other = np.zeros((6, 2), np.float32)
    other[list(changed)] = 1.0
    paths = [
        dense(tmp_path / f"{i}.safetensors", {"w": RawTensor.of(array)})
        for i, array in enumerate((np.zeros((6, 2), np.float32), other))
    ]
    assert f" {told} " in shown(1, *paths)


def test_a_row_is_a_line_in_a_pipe(tmp_path: Path) -> None:
    name = ".".join(["a_long_part_of_a_name"] * 9)
    paths = [
        dense(tmp_path / f"{i}.safetensors", {name: RawTensor.of(np.full(2, float(i)))})
        for i in range(2)
    ]
    (row,) = (line for line in shown(1, *paths).splitlines() if line.startswith("a_long"))
    assert row.split()[:2] == [name, "1"]
    assert all(line == line.rstrip() for line in shown(1, *paths).splitlines())


def test_names_are_shown_as_they_stand(tmp_path: Path) -> None:
    names = ("[red]w[/red]", ":smile:", "[/]", "[link=http://x]y")
    sides = []
    for number in range(2):
        tensors = {name: RawTensor.of(np.full(2, float(number))) for name in names}
        tensors |= {f"{number} {name}": RawTensor.of(np.zeros(1)) for name in names}
        tensors["[b]s"] = RawTensor.of(np.zeros(1 + number))
        sides.append(dense(tmp_path / f"{number}\x1b[31m.safetensors", tensors))
    text = shown(1, *sides)
    assert "\x1b" not in text
    for name in names:
        assert text.count(name) == 3
    assert "[b]s: F64 1, F64 2" in text
    assert "0\\x1b[31m.safetensors" in text


def test_json_is_what_the_report_says() -> None:
    found = json.loads(shown(1, golden("popup"), golden("survivors"), "--json"))
    report = diff(golden("popup"), golden("survivors"))
    assert found == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["same"] is False
    assert found["differences"][0]["dtype_a"] == "F32"
    bare = TensorDiff("x", "only_a", ("F32", (2,)), None).to_json()
    assert (bare["shape_a"], bare["shape_b"], bare["element_share"]) == ((2,), None, None)


@pytest.mark.parametrize("option", ["--json", "--depth=2"])
def test_the_program_needs_no_torch_and_writes_no_colour(option: str) -> None:
    code = """
import sys
from randsurgery.cli.app import app
code = app(["inspect", "diff", *sys.argv[1:]], standalone_mode=False)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "timm", "torchvision", "sklearn", "matplotlib"}, loaded
assert code == 1
"""
    command = [sys.executable, "-c", code, str(golden("popup")), str(golden("base")), option]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert "fc1.weight" in done.stdout


# --- files of other programs ---------------------------------------------------------------------


def in_shards(folder: Path, tensors: dict[str, RawTensor]) -> Path:
    """Each tensor in a part of its own."""
    places = {name: f"part-{i}.safetensors" for i, name in enumerate(tensors)}
    for name, part in places.items():
        dense(folder / part, {name: tensors[name]})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def test_shards_and_pickles_are_their_tensors(tmp_path: Path) -> None:
    values = {name: np.arange(6, dtype=np.float32).reshape(2, 3) + i for i, name in enumerate("ab")}
    tensors = {name: RawTensor.of(array) for name, array in values.items()}
    whole = dense(tmp_path / "whole.safetensors", tensors)
    index = in_shards(tmp_path, tensors)
    assert shown(0, whole, index).splitlines()[-1] == "no difference in 2 tensors"
    values["b"][1, 2] = 9
    pickled = tmp_path / "changed.pth"
    torch.save({name: torch.from_numpy(array) for name, array in values.items()}, pickled)
    result = run("--json", index, pickled)
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)["differences"]
    assert (row["name"], row["elements"], row["filters_differ"], row["max_abs"]) == ("b", 1, 1, 3)
    assert "has no members" in refused(2, whole, index, "--member-b", "x")
    (tmp_path / "part-1.safetensors").unlink()
    assert "is missing" in refused(3, whole, index)


def test_an_architecture_is_no_file(tmp_path: Path) -> None:
    whole = dense(tmp_path / "whole.safetensors", {})
    assert "`randsurgery init resnet18` writes one" in refused(3, whole, "resnet18")


@pytest.mark.parametrize("name", ["0x1p+99999", "0x1.0.0p+1", "0x1.8000000000000p+1"])
def test_a_class_may_look_like_a_number(name: str, tmp_path: Path) -> None:
    b = Builder()
    one = write(tmp_path / "a.safetensors", {}, b, members=[{"name": "m"}])
    two = write(
        tmp_path / "b.safetensors", {}, b, members=[{"name": "m", "classes": [name, "other"]}]
    )
    assert f"{name}, other"[:25] in shown(1, one, two)


def test_recorded_floats_are_shown_as_numbers_and_others_as_they_are(tmp_path: Path) -> None:
    args = {"drop": "0x1.0000000000000p-1", "far": "0x1.0p+99999", "odd": "0x1.0.0p+1"}
    b = Builder()
    one = write(tmp_path / "a.safetensors", {}, b)
    two = write(tmp_path / "b.safetensors", {}, b, model={"name": "conv2", "args": args})
    rows = [line.split() for line in shown(1, one, two).splitlines()]
    assert ["model.args.drop", "-", "0.5"] in rows
    assert ["model.args.far", "-", "0x1.0p+99999"] in rows
    assert ["model.args.odd", "-", "0x1.0.0p+1"] in rows
