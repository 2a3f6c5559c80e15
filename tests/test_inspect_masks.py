"""``inspect masks``: every figure as slow loops over single elements find it."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import format_helpers as slow
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inspect_helpers import in_terminal
from test_checkpoint import (
    Builder,
    assemble,
    base_tensors,
    constant,
    entry,
    everything,
    floats,
    random_source,
    some_bits,
    write_base,
)
from typer.testing import CliRunner, Result

from randsurgery.cli.app import app
from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.canonical import digest
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.tensors import RawTensor
from randsurgery.format.writing import write_checkpoint
from randsurgery.inspection.floats import nonfinite, numbers
from randsurgery.inspection.grouping import (
    MOST,
    block,
    fitting_depth,
    grouped,
    natural,
    place,
    selected,
)
from randsurgery.inspection.masks import LayerMask, MasksReport, masks, summary

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
FILES = (
    "popup", "popup-random", "popup-scores", "ensemble-masks", "survivors", "supermask",
    "converted", "on-base-popup",
)  # fmt: skip

Json = dict[str, Any]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", "masks", *map(str, arguments)])


def shown(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line[:7] for line in lines] == ["error: "]
    return lines[0]


def write(path: Path, tensors: Json, b: Builder, members: list[Json] | None = None) -> Path:
    recipe = {"format": "randsurgery", "version": 1, "tensors": tensors}
    if members is not None:
        recipe["members"] = members
    write_checkpoint(path, assemble(recipe, b.payloads))
    return path


# --- the twin ------------------------------------------------------------------------------------


def sentence(recipe: Json, member: str, name: str) -> tuple[Json, list[tuple[str, int, Json]]]:
    """(entry, steps from the last replacement on) of one tensor."""
    who = next(m for m in recipe["members"] if m.get("name", "main") == member)
    own = who.get("tensors", {}).get(name, {})
    entry = own.get("entry") or recipe["tensors"][name]
    owner = member if "entry" in own else "shared"
    steps = [(owner, i, o) for i, o in enumerate(entry.get("overlays", []))]
    steps += [(member, i, o) for i, o in enumerate(own.get("overlays", []))]
    while any(o["kind"] == "replace" for _, _, o in steps[1:]):
        steps = steps[1:]
    return entry, steps


def without_masks(recipe: Json, member: str, name: str) -> Json:
    """The recipe in which the tensor's sentence ends before its first mask."""
    _, steps = sentence(recipe, member, name)
    owner, index = next((w, i) for w, i, o in steps if o["kind"] in ("mask", "scatter"))
    cut = copy.deepcopy(recipe)
    tensors = next(m for m in cut["members"] if m.get("name", "main") == member).get("tensors", {})
    if owner == "shared":
        tensors.pop(name, None)
        cut["tensors"][name]["overlays"] = cut["tensors"][name]["overlays"][:index]
        return cut
    part = tensors[name].get("entry") or tensors[name]
    part["overlays"] = part["overlays"][:index]
    return cut


def values(raw: slow.Raw) -> list[float]:
    dtype, _, data = raw
    width = slow.WIDTH[dtype]
    return [slow.value_of(dtype, data[i : i + width]) for i in range(0, len(data), width)]


def twin(path: Path, member: str, name: str) -> Json | None:
    """What is said of one tensor's mask, element by element; None if it has none."""
    metadata, payloads = slow.read_file(path)
    recipe = {"members": [{}], **json.loads(metadata["randsurgery"])}
    bases = {
        key: slow.read_file(path.parent / ref["file"])[1]
        for key, ref in recipe.get("bases", {}).items()
    }
    entry, steps = sentence(recipe, member, name)
    shape, source = entry["shape"], entry["source"]
    size, kinds = math.prod(shape), [o["kind"] for _, _, o in steps]
    replaced = "replace" in kinds
    zero = source["kind"] == "constant" and float.fromhex(source["value"]) == 0 and not replaced
    if "mask" not in kinds and not (zero and "scatter" in kinds):
        return None
    kept, found = [not zero] * size, []
    for who, index, overlay in steps:
        if overlay["kind"] in ("mask", "scatter"):
            data = payloads[f"{who}/{name}/{index}.mask"][2]
            found.append((len(data), overlay["count"]))
            bits = slow.mask_bits(data, overlay["encoding"], size, overlay["count"])
            for i, bit in enumerate(bits):
                kept[i] = kept[i] and bool(bit) if overlay["kind"] == "mask" else kept[i] or bit
        if overlay["kind"] == "slice":
            inner = math.prod(shape[overlay["dim"] + 1 :])
            for i in range(size):
                index = i // inner % shape[overlay["dim"]]
                kept[i] = kept[i] or index < overlay["count"]
    after = values(slow.naive_tensor(recipe, payloads, member, name, bases))
    alive = [value for value, keep in zip(after, kept, strict=True) if keep]
    drawn = None
    if not zero:
        cut = without_masks(recipe, member, name)
        before = values(slow.naive_tensor(cut, payloads, member, name, bases))
        drawn = sum(value > 0 for value in before)
    filters = (shape[0] if shape else 1) if size else 0
    inputs = shape[1] if len(shape) > 1 and size else 0
    across, inner = (size // filters if filters else 0), math.prod(shape[2:])
    by_filter = [sum(kept[f * across : (f + 1) * across]) for f in range(filters)]
    dead = [
        j for j in range(inputs)
        if not any(keep for i, keep in enumerate(kept) if i // inner % inputs == j)
    ]  # fmt: skip
    entropy = 0.0
    for _, count in found:
        for share in (count / size, 1 - count / size) if size else ():
            entropy -= size * share * math.log2(share) / 8 if share else 0
    return {
        "shape": shape, "size": size, "kept": sum(map(bool, kept)), "filter_kept": by_filter,
        "inputs": inputs, "dead_inputs": len(dead),
        "positive": sum(value > 0 for value in alive), "positive_before": drawn,
        "nan": sum(map(math.isnan, alive)), "infinite": sum(map(math.isinf, alive)),
        "payload_bytes": sum(count for count, _ in found),
        "entropy_bytes": pytest.approx(entropy), "bits": [bool(keep) for keep in kept],
    }  # fmt: skip


def assert_twin(report: MasksReport, folder: Path) -> None:
    for network in report.networks:
        path = folder / network.file
        names = {name.split("/", 1)[1].rsplit("/", 1)[0] for name in slow.read_file(path)[1]}
        said = {row.name: row for row in network.layers}
        for name in sorted(names | set(said)):
            try:
                expected = twin(path, network.member, name)
            except KeyError:  # a tensor of another member's
                expected = None
            if expected is None:
                assert name not in said
                continue
            for key, value in expected.items():
                if key != "bits":
                    found = getattr(said[name], key)
                    assert (list(found) if isinstance(found, tuple) else found) == value, (
                        name,
                        key,
                    )
    for overlap in report.overlaps:
        sides = [n for label in (overlap.first, overlap.second)
                 for n in report.networks if n.label == label]  # fmt: skip
        both = either = 0
        expected_both = 0.0
        for row in overlap.layers:
            one, two = (twin(folder / n.file, n.member, row.name) for n in sides)
            assert one is not None
            assert two is not None
            pairs = list(zip(one["bits"], two["bits"], strict=True))
            assert row.both == sum(a and b for a, b in pairs)
            assert (row.first, row.second) == (one["kept"], two["kept"])
            both += row.both
            either += sum(a or b for a, b in pairs)
            if one["size"]:
                expected_both += one["kept"] / one["size"] * two["kept"]
        total = sum(row.first + row.second for row in overlap.layers)
        assert overlap.jaccard == both / either
        assert overlap.chance == pytest.approx(expected_both / (total - expected_both))


@pytest.mark.parametrize("name", FILES)
def test_golden_files_are_as_a_slow_reader_finds_them(name: str) -> None:
    report = masks([GOLDEN / f"{name}.safetensors"])
    assert report.notes == ()
    assert all(network.layers for network in report.networks)
    assert len(report.overlaps) == math.comb(len(report.networks), 2)
    assert_twin(report, GOLDEN)


@pytest.fixture(scope="module")
def all_sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two members, with masks of one's own, shared, both, under slices, and over no element."""
    folder = tmp_path_factory.mktemp("all")
    recipe, payloads = everything()
    write_base(folder)
    path = folder / "all.safetensors"
    write_checkpoint(path, assemble(recipe, payloads, {"pre": base_tensors()}))
    return path


def test_every_sentence_is_as_a_slow_reader_finds_it(all_sentences: Path) -> None:
    report = masks([all_sentences])
    assert_twin(report, all_sentences.parent)
    names = {n.label: {row.name for row in n.layers} for n in report.networks}
    assert names["first"] == {"conv.weight", "brain.weight", "old", "empty"}
    assert names["second"] == names["first"] | {"fc.weight", "norm.mean"}
    assert [overlap.left_out for overlap in report.overlaps] == [2]


def odd(path: Path) -> Path:
    """Sentences that ``everything`` lacks."""
    b = Builder()
    strange = np.array([np.nan, np.inf, -np.inf, np.nan, 1, -1, 0, -0.0, np.nan], dtype="<f4")
    strange = strange.reshape(3, 3)
    bits = [1, 1, 1, 0, 1, 1, 1, 1, 0]
    keep = some_bits(24, 0.5, 1)
    tensors = {
        "nan": entry("F32", (3, 3), b.stored("shared", "nan", RawTensor("F32", strange)),
                     b.mask("shared", "nan", 0, bits)),
        "scalar": entry("F32", (), random_source("sign", 1.0), b.mask("shared", "scalar", 0, [1])),
        "vector": entry("F32", (5,), random_source("sign", 1.0),
                        b.mask("shared", "vector", 0, [0, 1, 1, 0, 0])),
        "none": entry("F32", (4, 6), random_source("sign", 1.0),
                      b.mask("shared", "none", 0, [0] * 24)),
        "no.filters": entry("F32", (0, 3), constant(1.0), b.mask("shared", "no.filters", 0, [])),
        "no.inputs": entry("F32", (3, 0), constant(1.0), b.mask("shared", "no.inputs", 0, [])),
        "twice": entry("F32", (4, 6), random_source("normal", 1.0),
                       {"kind": "scale", "factor": (-2.0).hex()},
                       b.mask("shared", "twice", 1, keep)),
        "replaced": entry("F32", (4, 6), constant(0.0),
                          b.mask("shared", "replaced", 0, keep),
                          b.replace("shared", "replaced", 1, floats("F32", (4, 6), 2)),
                          b.mask("shared", "replaced", 2, some_bits(24, 0.7, 3))),
        "undone": entry("F32", (4, 6), random_source("sign", 1.0),
                        b.mask("shared", "undone", 0, keep),
                        b.replace("shared", "undone", 1, floats("F32", (4, 6), 4))),
        "changed": entry("F32", (4, 6), random_source("sign", 1.0),
                         b.scatter("shared", "changed", 0, keep, floats("F32", (sum(keep),), 5))),
        "grown": entry("F32", (4, 6), constant(0.0),
                       b.scatter("shared", "grown", 0, keep, floats("F32", (sum(keep),), 6)),
                       b.slice("shared", "grown", 1, 1, floats("F32", (4, 2), 7))),
    }  # fmt: skip
    own: Json = {"name": "main", "tensors": {
        "twice": {"overlays": [{"kind": "scale", "factor": (0.5).hex()},
                               b.mask("main", "twice", 1, some_bits(24, 0.5, 8))]},
        "vector": {"overlays": [b.mask("main", "vector", 0, [0, 0, 1, 1, 1])]},
    }}  # fmt: skip
    return write(path, tensors, b, [own])


def test_odd_sentences_too(tmp_path: Path) -> None:
    report = masks([odd(tmp_path / "odd.safetensors")])
    assert_twin(report, tmp_path)
    rows = {row.name: row for row in report.networks[0].layers}
    assert not {"undone", "changed"} & set(rows)
    assert (rows["nan"].nan, rows["nan"].infinite) == (1, 2)
    assert (rows["none"].dead_filters, rows["none"].dead_inputs) == (4, 6)
    for name in ("no.inputs", "no.filters"):
        assert (rows[name].filters, rows[name].inputs, rows[name].dead_inputs) == (0, 0, 0)
    text = shown(tmp_path / "odd.safetensors")
    assert "kept and not finite: 1 NaN, 2 infinite, in nan" in text
    found = json.loads(shown(tmp_path / "odd.safetensors", "--json"))
    assert found["networks"][0]["all"]["nan"] == 1
    assert shown(tmp_path / "odd.safetensors", "--filter", "no.*", "--per-filter").count("no.") == 0


def layer(name: str, size: int, filter_kept: tuple[int, ...], positive: int | None) -> LayerMask:
    return LayerMask(name, (len(filter_kept), size), size * len(filter_kept), sum(filter_kept),
                     filter_kept, size, 1, positive, positive, 0, 0, 10, 8.0)  # fmt: skip


def test_a_summary_adds_up_and_leaves_unknown_signs_out() -> None:
    found = summary([layer("a", 4, (1, 0), 1), layer("b", 6, (6, 3), None)])
    assert (found.size, found.kept, found.density) == (20, 10, 0.5)
    assert (found.lowest, found.highest) == (0.0, 1.0)
    assert (found.filters, found.dead_filters, found.dead_inputs) == (4, 1, 2)
    assert (found.positive_kept, found.positive_all) == (1.0, 1 / 8)
    assert (found.payload_bytes, found.bound) == (20, 1.25)
    nothing = summary([])
    assert (nothing.density, nothing.lowest, nothing.positive_kept, nothing.bound) == (None,) * 4


# --- numbers and names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "kind", "bits"),
    [("F8_E4M3", torch.float8_e4m3fn, 8), ("F8_E5M2", torch.float8_e5m2, 8),
     ("BF16", torch.bfloat16, 16), ("F16", torch.float16, 16)],
)  # fmt: skip
def test_every_small_float_is_torchs(dtype: str, kind: torch.dtype, bits: int) -> None:
    words = np.arange(1 << bits, dtype=f"u{bits // 8}")
    raw = words.view("<f2") if dtype == "F16" else words
    expected = torch.from_numpy(words.copy()).view(kind).to(torch.float32).numpy()
    found = numbers(dtype, raw)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))
    counts = [np.count_nonzero(np.isnan(expected)), np.count_nonzero(np.isinf(expected))]
    assert list(nonfinite(found)) == counts
    assert nonfinite(np.arange(3)) == (0, 0)


def test_names_sort_as_people_count() -> None:
    names = ["b.10.w", "b.2.w", "a", "b.2.a", "b", "1", "10", "9"]
    assert sorted(names, key=natural) == ["1", "9", "10", "a", "b", "b.2.a", "b.2.w", "b.10.w"]


@given(st.lists(st.text("ab.1²", min_size=1, max_size=12), max_size=60), st.integers(1, 9))
def test_blocks_hold_every_row_once_and_fit(names: list[str], depth: int) -> None:
    found = grouped(names, str, depth)
    assert sorted(name for rows in found.values() for name in rows) == sorted(names)
    assert all(block(name, depth) == key for key, rows in found.items() for name in rows)
    assert grouped(names, str, 0).keys() == set(names)
    fitting = fitting_depth(names, 5)
    count = {d: len({".".join(name.split(".")[:d]) for name in names}) for d in range(1, 20)}
    whole = len(set(names))
    if whole <= 5:
        assert fitting == 0
    elif fitting == 0:  # no blocks to speak of, or nearly as few rows with all names
        assert count[1] == whole or whole <= MOST
    else:
        fits = [depth for depth in count if count[depth] <= 5] or [1]
        assert fitting in fits or (fitting - 1 in fits and count[fitting] <= MOST)


def test_patterns_match_tensors_and_their_layers() -> None:
    names = ["a.weight", "a.bias", "b.0.weight", "W"]
    assert selected(names, []) == names
    assert selected(names, ["a"]) == ["a.weight", "a.bias"]
    assert selected(names, ["b.*", "*.bias"]) == ["a.bias", "b.0.weight"]
    with pytest.raises(UsageError, match=r"'zz' matches no tensor; there are W, a.bias, a.weight"):
        selected(names, ["zz"])


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["popup", "popup-scores", "ensemble-masks", "supermask"])
def test_of_a_popup_file_the_masks_payloads_are_read_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    read = Container.read

    def noted(self: Container, name: str) -> RawTensor:
        seen.append(name)
        return read(self, name)

    monkeypatch.setattr(Container, "read", noted)
    masks([GOLDEN / f"{name}.safetensors"])
    assert seen
    assert {name.rpartition(".")[2] for name in seen} == {"mask"}


def test_a_missing_base_leaves_signs_out_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes((GOLDEN / "on-base-popup.safetensors").read_bytes())
    whole = masks([path], base=GOLDEN / "base.safetensors")
    assert (
        whole.to_json()["networks"][0]["all"]
        == (masks([GOLDEN / "on-base-popup.safetensors"]).to_json()["networks"][0]["all"])
    )
    bare = masks([path])
    assert len(bare.notes) == 1
    assert "--base FILE" in bare.notes[0]
    rows = {row.name: row.positive for row in bare.networks[0].layers}
    assert rows["fc1.weight"] is None
    assert rows["fc.weight"] is not None  # drawn, not of the base
    result = run(path)
    assert result.exit_code == 0
    assert result.stderr.startswith("no signs: ")
    assert run(path, "-q").stderr == ""
    assert "another base" in refused(4, path, "--base", GOLDEN / "popup.safetensors")
    with pytest.raises(UsageError, match="no file builds on a base"):
        masks([GOLDEN / "popup.safetensors"], base=GOLDEN / "base.safetensors")


# --- refusals ------------------------------------------------------------------------------------


def test_a_file_without_masks_says_so(tmp_path: Path) -> None:
    for name in ("init-scaled", "slices-out"):
        path = GOLDEN / f"{name}.safetensors"
        assert f"{name}.safetensors has no masks" in refused(4, path)
        with pytest.raises(IncompatibleError):
            masks([GOLDEN / "popup.safetensors", path])
    assert "base.safetensors has no masks" in refused(4, GOLDEN / "base.safetensors")
    b = Builder()
    one: Json = {"name": "one", "tensors": {"w": {"overlays": [b.mask("one", "w", 0, [1, 0])]}}}
    tensors = {"w": entry("F32", (2,), random_source("sign", 1.0))}
    path = write(tmp_path / "two.safetensors", tensors, b, [one, {"name": "two"}])
    assert [len(network.layers) for network in masks([path]).networks] == [1, 0]
    assert "two.safetensors has no masks in two" in refused(4, path, "--member", "two")
    assert "two  " in shown(path)
    empty = write(tmp_path / "empty.safetensors", {}, Builder())
    assert "has no masks" in refused(4, empty)


def test_names_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    many = GOLDEN / "ensemble-masks.safetensors"
    assert "near: seed-" in refused(2, many, "--member", "seed-9")
    assert "members: seed-0, seed-1, seed-2" in refused(2, many, "--member", "zebra")
    assert "--filter 'nope' matches no tensor" in refused(2, many, "--filter", "nope")
    assert "unknown --sort 'weight'" in refused(2, many, "--sort", "weight")
    assert "is named twice" in refused(2, many, many)


def test_damaged_files_end_with_3(tmp_path: Path) -> None:
    data = (GOLDEN / "popup.safetensors").read_bytes()
    with Container(GOLDEN / "popup.safetensors") as file:
        name = next(iter(sorted(file.infos)))
        at = file.header_bytes + file.infos[name].start
    bad = tmp_path / "bad.safetensors"
    for content in (b"", data[:-1], data[:100], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
        bad.write_bytes(content)
        refused(3, bad)
    refused(3, tmp_path / "missing.safetensors")


def test_a_slice_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    b = Builder()
    tensors = {
        "w": entry("F32", (4,), random_source("sign", 1.0), b.mask("shared", "w", 0, [1, 0, 0, 1]),
                   b.slice("shared", "w", 1, 0, floats("F32", (2,), 1)))
    }  # fmt: skip
    path = write(tmp_path / "net.safetensors", tensors, b)
    with Container(path) as file:
        text = file.metadata["randsurgery"]
        payloads = {name: file.read(name) for name in file.infos}
    for old, new in (('"count":2,"digest"', '"count":9,"digest"'), ('"dim":0', '"dim":3')):
        assert text.count(old) == 1 + (old[1:6] == "count")  # the mask keeps two as well
        changed = new.join(text.rsplit(old, 1))
        write_atomically(path, pack(payloads, {"randsurgery": changed}))
        with pytest.raises(FileFormatError, match="no slice of"):
            masks([path])


# --- what is shown -------------------------------------------------------------------------------


def many_layers(path: Path, seed: int = 0) -> Path:
    b, tensors = Builder(), {}
    for stage in range(4):
        for number in range(25):
            for kind in ("conv_pw", "conv_dw", "conv_pwl"):
                name = f"stages.{stage}.blocks.{number}.{kind}.weight"
                bits = some_bits(48, 0.3, seed * 1000 + len(tensors))
                tensors[name] = entry(
                    "F32", (4, 4, 3), random_source("sign", 1.0), b.mask("shared", name, 0, bits)
                )
    return write(path, tensors, b)


def test_three_hundred_layers_fit_a_terminal(tmp_path: Path) -> None:
    path = many_layers(tmp_path / "many.safetensors")
    other = many_layers(tmp_path / "more.safetensors", 1)
    text = shown(path)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) < 50
    assert [line.split()[0] for line in text.splitlines() if line.startswith("stages")] == [
        f"stages.{stage}.blocks" for stage in range(4)
    ]
    deep = in_terminal("inspect", "masks", path, "--depth", 0)
    assert max(map(len, deep.splitlines())) <= 80
    assert len(deep.splitlines()) > 300
    assert shown(path, "--depth", 1).splitlines()[3].split()[1] == "14K"
    both = shown(path, other)
    assert max(map(len, both.splitlines())) <= 80
    assert len(both.splitlines()) < 60


def first_column(text: str) -> list[str]:
    lines = text.splitlines()
    rule = next(i for i, line in enumerate(lines) if line.startswith("─"))
    return [line.split()[0] for line in lines[rule + 1 :] if line.split()[1:2] and ":" not in line]


@pytest.mark.parametrize(
    ("sort", "key"),
    [("size", lambda s: s.size), ("density", lambda s: s.density), ("bound", lambda s: s.bound),
     ("dead", lambda s: s.dead_filters + s.dead_inputs), ("signs", lambda s: s.positive_kept)],
)  # fmt: skip
def test_rows_are_sorted_largest_first(sort: str, key: Any) -> None:
    path = GOLDEN / "popup.safetensors"
    rows = sorted(
        masks([path]).networks[0].layers, key=lambda row: place(row.name.removesuffix(".weight"))
    )
    expected = sorted(rows, key=lambda row: -key(summary([row])))
    found = first_column(shown(path, "--sort", sort))[:5]
    assert found == [row.name.removesuffix(".weight") for row in expected]


def test_files_and_members_are_labelled_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        many_layers(tmp_path / folder / "net.safetensors", folder == "b")
    report = masks([tmp_path / f / "net.safetensors" for f in ("a", "b")])
    assert len({network.label for network in report.networks}) == 2
    names = ("popup", "ensemble-masks")
    report = masks([GOLDEN / f"{name}.safetensors" for name in names], members=["main", "seed-1"])
    assert [network.label for network in report.networks] == ["popup", "ensemble-masks:seed-1"]


def test_masks_of_other_shapes_are_not_compared(tmp_path: Path) -> None:
    paths = []
    for number, shape in enumerate(((4, 6), (6, 4), (4, 6))):
        b = Builder()
        tensors = {
            name: entry("F32", shape if name == "w" else (5,), random_source("sign", 1.0),
                        b.mask("shared", name, 0, some_bits(24 if name == "w" else 5, 0.5, number)))
            for name in ("w", "v")
        }  # fmt: skip
        paths.append(write(tmp_path / f"{number}.safetensors", tensors, b))
    report = masks(paths)
    assert [[row.name for row in overlap.layers] for overlap in report.overlaps] == [
        ["v"], ["v", "w"], ["v"],
    ]  # fmt: skip
    assert [overlap.left_out for overlap in report.overlaps] == [1, 0, 1]
    assert_twin(report, tmp_path)
    assert "2 masks have no counterpart of their shape" in shown(*paths)


def test_many_pairs_are_cut_to_the_extremes(tmp_path: Path) -> None:
    b = Builder()
    tensors = {"w": entry("F32", (40,), random_source("sign", 1.0))}
    members = [
        {"name": f"m{i}", "tensors": {
            "w": {"overlays": [b.mask(f"m{i}", "w", 0, some_bits(40, 0.5, i))]}}}
        for i in range(9)
    ]  # fmt: skip
    path = write(tmp_path / "nine.safetensors", tensors, b, members)
    report = masks([path])
    assert [(o.first, o.second) for o in report.overlaps] == list(
        combinations([f"m{i}" for i in range(9)], 2)
    )
    assert_twin(report, tmp_path)
    assert "the five largest and the five smallest of 36 pairs" in shown(path)
    assert "smallest" not in shown(path, *(a for i in range(8) for a in ("--member", f"m{i}")))


def test_the_csv_has_a_row_a_mask_or_a_filter(tmp_path: Path) -> None:
    path, table = GOLDEN / "ensemble-masks.safetensors", tmp_path / "masks.csv"
    report = masks([path])
    shown(path, "--csv", table)
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert [(r["member"], r["tensor"], int(r["kept"])) for r in rows] == [
        (n.member, row.name, row.kept) for n in report.networks for row in n.layers
    ]
    assert [float(r["density"]) for r in rows] == [
        row.kept / row.size for n in report.networks for row in n.layers
    ]
    assert "exists already" in refused(6, path, "--csv", table)
    shown(path, "--csv", table, "--force", "--per-filter", "--filter", "fc")
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    assert [(r["member"], int(r["filter"]), int(r["kept"])) for r in rows] == [
        (n.member, i, kept)
        for n in report.networks for row in n.layers if row.name == "fc.weight"
        for i, kept in enumerate(row.filter_kept)
    ]  # fmt: skip
    copied = tmp_path / "net.safetensors"
    copied.write_bytes(path.read_bytes())
    assert "is read by this command" in refused(6, copied, "--csv", copied, "--force")
    assert copied.read_bytes() == path.read_bytes()


def test_names_are_shown_as_they_stand(tmp_path: Path) -> None:
    b = Builder()
    names = ("[red]w[/red]", ":smile:", "[/]", "[link=http://x]y")
    tensors = {
        name: entry("F32", (2,), random_source("sign", 1.0), b.mask("shared", name, 0, [1, 0]))
        for name in names
    }
    path = write(tmp_path / "a\x1b[31m.safetensors", tensors, b)
    other = tmp_path / "b\x1b[31m.safetensors"
    other.write_bytes(path.read_bytes())
    for arguments in ((path,), (path, other), (path, "--per-filter")):
        text = shown(*arguments)
        assert "\x1b" not in text
        assert all(name in text for name in names)
    plain = tmp_path / "c\x1b[31m.safetensors"
    write_atomically(plain, pack({}, {}))
    assert "\x1b" not in refused(4, plain)


@pytest.mark.parametrize("options", [[], ["--json"], ["--csv", os.devnull, "--force"]])
def test_the_program_needs_no_torch_and_writes_no_colour(
    options: list[str], tmp_path: Path
) -> None:
    if options[:1] == ["--csv"]:
        options = ["--csv", str(tmp_path / "out.csv")]
    code = """
import sys
from randsurgery.cli.app import app
app(["inspect", "masks", *sys.argv[1:]], standalone_mode=False)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "timm", "torchvision", "sklearn", "matplotlib"}, loaded
"""
    command = [sys.executable, "-c", code, str(GOLDEN / "popup.safetensors"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert "features.0" in done.stdout


def test_json_is_what_the_report_says(all_sentences: Path) -> None:
    found = json.loads(shown(all_sentences, "--json"))
    assert found == json.loads(json.dumps(masks([all_sentences]).to_json(), allow_nan=False))
    row = found["networks"][0]["layers"][0]
    assert row["density"] == row["kept"] / row["size"]
    assert found["overlaps"][0]["jaccard"] is not None


def test_a_lie_about_a_count_is_found(tmp_path: Path) -> None:
    b = Builder()
    lie = {**b.mask("shared", "w", 0, [1, 0, 1]), "count": 2**40}
    tensors = {"w": entry("F32", (3,), random_source("sign", 1.0), lie)}
    recipe = {"format": "randsurgery", "version": 1, "tensors": tensors}
    path = tmp_path / "lie.safetensors"
    write_atomically(path, pack(b.payloads, {"randsurgery": json.dumps(recipe)}))
    assert digest(b.payloads["shared/w/0.mask"].array) == lie["digest"]
    assert "cannot keep" in refused(3, path)


def test_an_absurd_dimension_beside_a_0_costs_nothing(tmp_path: Path) -> None:
    b = Builder()
    tensors = {"w": entry("F32", (2**46, 0), constant(1.0), b.mask("shared", "w", 0, []))}
    recipe = {"format": "randsurgery", "version": 1, "tensors": tensors}
    path = tmp_path / "absurd.safetensors"
    write_atomically(path, pack(b.payloads, {"randsurgery": json.dumps(recipe)}))
    report = masks([path])
    assert (report.networks[0].layers[0].size, report.networks[0].layers[0].filters) == (0, 0)
    assert "asks for" in report.notes[0]
    shown(path)
