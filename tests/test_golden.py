"""Golden files: every file of version 1 that was ever written is read for ever, to the same bits.

The files in ``golden/`` never change. A test that fails here means that a promise was broken, not
that a file is to be made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import format_helpers as slow
import pytest
from golden import make
from safetensors.torch import load_file
from test_read_format import reader

import randsurgery as rs
from randsurgery.errors import FileFormatError
from randsurgery.format.checkpoint import METADATA_KEY, Checkpoint, identity, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.derivation import payload_names
from randsurgery.format.recipe import MaskOverlay, RandomSource, Recipe, ScatterOverlay
from randsurgery.format.tensors import DTYPES, RawTensor
from randsurgery.format.writing import verify, write_checkpoint
from randsurgery.surgery.tensors import from_torch

FOLDER = Path(__file__).parent / "golden"
SAID: dict[str, Any] = json.loads((FOLDER / make.DIGESTS).read_text("utf-8"))
FILES = sorted(name for name in SAID if name != make.BASE)
OTHERWISE = f"{make.OTHERWISE}.safetensors"
MEMBERS = [(name, member) for name in FILES for member in SAID[name]["members"]]


def recipe_of(name: str) -> Recipe:
    return rs.read_recipe(FOLDER / name)


def described(tensors: dict[str, RawTensor]) -> dict[str, str]:
    return {name: make.described(raw) for name, raw in tensors.items()}


# --- the files themselves ------------------------------------------------------------------------


def test_every_file_is_in_the_book_and_has_a_maker() -> None:
    assert {path.name for path in FOLDER.glob("*.safetensors")} == set(SAID)
    made = {f"{name}.safetensors" for name in make.MAKERS} | {make.BASE, OTHERWISE}
    assert set(SAID) == made


@pytest.mark.parametrize("name", SAID)
def test_a_golden_file_is_never_changed(name: str) -> None:
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == SAID[name]["sha256"]


def test_golden_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 250_000


@pytest.mark.parametrize("name", make.SEEDS)
def test_files_of_seeds_alone_are_still_written_alike(name: str, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    write_checkpoint(path, make.SEEDS[name]())
    assert path.read_bytes() == (FOLDER / f"{name}.safetensors").read_bytes()


def steps() -> Iterator[Any]:
    """Every overlay of every file."""
    for name in FILES:
        recipe = recipe_of(name)
        for _, _, entry in recipe.entries():
            yield from entry.overlays
        for member in recipe.members:
            for own in member.tensors.values():
                yield from own.overlays


def test_every_word_of_the_format_occurs() -> None:
    recipes = [recipe_of(name) for name in FILES]
    entries = [entry for recipe in recipes for _, _, entry in recipe.entries()]
    members = [member for recipe in recipes for member in recipe.members]
    parts = [part for m in members if m.plan for part in m.plan.tensors.values()]
    assert {entry.dtype for entry in entries} == set(DTYPES)
    assert {entry.source.kind for entry in entries} == {
        "random", "constant", "hadamard", "signs", "base", "stored",
    }  # fmt: skip
    drawn = [entry.source for entry in entries if isinstance(entry.source, RandomSource)]
    assert {source.distribution for source in drawn} == {"sign", "normal", "uniform"}
    assert {source.stream is None for source in drawn} == {True, False}
    assert {step.kind for step in steps()} == {"mask", "scatter", "slice", "replace", "scale"}
    for kind in (MaskOverlay, ScatterOverlay):
        found = {step.encoding for step in steps() if isinstance(step, kind)}
        assert found == {"bits", "gaps"}, kind
    assert {part.part for part in parts} == {"whole", "slice", "survivors"}
    assert {part.dim for part in parts} == {None, 0, 1}
    assert {part.start is None for part in parts} == {True, False}
    assert {m.head.kind for m in members if m.head} == {"linear", "orthonormal", "hadamard"}
    assert {m.head.scale for m in members if m.head} == {"learned", "given"}
    assert {(m.algorithm, m.rescaled) for m in members if m.scores} == {
        ("edge-popup", False), ("supermask", True),
    }  # fmt: skip
    for field in ("input", "classes", "dataset", "calibration", "provenance"):
        assert any(getattr(member, field) for member in members), field
    for field in ("model", "input", "bases", "notes"):
        assert {bool(getattr(recipe, field)) for recipe in recipes} == {True, False}, field


@pytest.mark.parametrize("name", SAID)
def test_the_safetensors_library_reads_them_too(name: str) -> None:
    found = load_file(FOLDER / name)
    with Container(FOLDER / name) as container:
        for key in container.infos:
            raw = from_torch(found.pop(key), key)
            assert raw.same_bits(container.read(key)), key
    assert not found


# --- read for ever -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_every_tensor_is_what_it_was(name: str, member: str) -> None:
    said = SAID[name]["members"][member]
    with read_checkpoint(FOLDER / name) as checkpoint:
        assert described(checkpoint.tensors(member)) == said["tensors"]
        kept = checkpoint.member(member).scores
        scores = {n: RawTensor("F32", checkpoint.scores(n, member)) for n in kept}
    assert described(scores) == said.get("scores", {})


@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_the_reader_in_the_docs_agrees(name: str, member: str) -> None:
    found = reader.read(FOLDER / name, member)
    tensors = {n: RawTensor(dtype, array) for n, (dtype, array) in found.items()}
    assert described(tensors) == SAID[name]["members"][member]["tensors"]


@pytest.mark.parametrize("name", FILES)
def test_no_digest_differs(name: str) -> None:
    with read_checkpoint(FOLDER / name) as checkpoint:
        checks = verify(checkpoint)
        names = [member.name for member in checkpoint.recipe.members]
    assert [check for check in checks if not check.ok] == []
    assert names == list(SAID[name]["members"])


def test_the_base_is_what_it_was() -> None:
    with Container(FOLDER / make.BASE) as container:
        found = {name: container.read(name) for name in container.infos}
        known = identity(container.infos, container)
    assert described(found) == SAID[make.BASE]["tensors"]
    bases = [ref for name in FILES for ref in recipe_of(name).bases.values()]
    assert len(bases) == 2
    assert {(ref.file, ref.identity) for ref in bases} == {(make.BASE, known)}


WITH_MODEL = [(name, member) for name, member in MEMBERS if recipe_of(name).model is not None]


@pytest.mark.parametrize(("name", "member"), WITH_MODEL)
def test_networks_are_built_with_these_bits(name: str, member: str) -> None:
    model = rs.load(FOLDER / name, member=member)
    state = {key: from_torch(tensor, key) for key, tensor in model.state_dict().items()}
    said = SAID[name]["members"][member]["tensors"]
    assert dict(sorted(described(state).items())) == said
    head = recipe_of(name).member(member).head
    assert head is not None
    assert model.num_classes == head.classes


def test_a_file_without_a_model_asks_for_one() -> None:
    with pytest.raises(rs.IncompatibleError, match="model="):
        rs.load(FOLDER / "sources.safetensors")


# --- written again -------------------------------------------------------------------------------


def same_payloads(one: Checkpoint, two: Checkpoint) -> bool:
    names = sorted(payload_names(one.recipe))
    return names == sorted(payload_names(two.recipe)) and all(
        one.payloads.read(name).same_bits(two.payloads.read(name)) for name in names
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_file_written_again_is_the_same(name: str, finished: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    (tmp_path / make.BASE).write_bytes((FOLDER / make.BASE).read_bytes())
    with read_checkpoint(FOLDER / name) as checkpoint:
        write_checkpoint(path, checkpoint, finished=finished)
        with read_checkpoint(path) as again:
            assert again.recipe == checkpoint.recipe
            assert same_payloads(again, checkpoint)
    # the other program's spelling is read, not kept
    assert (path.read_bytes() == (FOLDER / name).read_bytes()) == (name != OTHERWISE)


# --- other versions ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 2])
def test_other_versions_are_refused(version: int, tmp_path: Path) -> None:
    name = "init-signed-constant.safetensors"
    data = (FOLDER / name).read_bytes()
    old, new = rb"\"version\":1}", rb"\"version\":%d}" % version
    assert data.count(old) == 1
    path = tmp_path / name
    path.write_bytes(data.replace(old, new))
    metadata, _ = slow.read_file(path)
    assert json.loads(metadata[METADATA_KEY])["version"] == version
    for read in (rs.read_recipe, rs.load, read_checkpoint):
        with pytest.raises(FileFormatError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{name}: ")
        assert f"version {version}," in message
        assert "reads 1" in message
        assert "\n" not in message
    with pytest.raises(ValueError, match="version"):
        reader.read(path)
