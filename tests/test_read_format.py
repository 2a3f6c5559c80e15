"""The reader in docs/, written from the document alone, and the package agree bit for bit."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import format_helpers as slow
import numpy as np
import pytest
import torch
from surgery_helpers import conv2
from test_checkpoint import (
    Builder,
    Json,
    ask_for_everything,
    assemble,
    base_tensors,
    constant,
    entry,
    everything,
    floats,
    hexf,
    random_source,
    some_bits,
    tiny,
    tiny_payloads,
    with_metadata,
    write_base,
    write_raw,
)

import randsurgery as rs
from randsurgery.errors import FileFormatError, IncompatibleError
from randsurgery.format.checkpoint import Memory, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.tensors import DTYPES, RawTensor
from randsurgery.format.writing import write_checkpoint

SOURCE = Path(__file__).parents[1] / "docs" / "read_format.py"
MOST_CODE_LINES = 150


def load_reader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("read_format", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reader: Any = load_reader()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    recipe, payloads = everything()
    write_base(folder)
    path = folder / "all.safetensors"
    write_checkpoint(path, assemble(recipe, payloads, {"pre": base_tensors()}))
    return path


def assert_same(path: Path, member: str | None = None) -> None:
    found = reader.read(path, member)
    with read_checkpoint(path) as checkpoint:
        expected = checkpoint.tensors(member)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        dtype, array = found[name]
        assert (dtype, array.shape) == (tensor.dtype, tensor.shape), name
        assert array.tobytes() == tensor.array.tobytes(), name


def assert_both_refuse(path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        reader.read(path)
    with (
        pytest.raises((FileFormatError, IncompatibleError)),
        read_checkpoint(path) as checkpoint,
    ):
        ask_for_everything(checkpoint)


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["first", "second"])
def test_every_source_and_overlay(written: Path, member: str) -> None:
    assert_same(written, member)


def test_the_base_may_be_given(written: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(written.read_bytes())
    with pytest.raises(ValueError, match="pre"):
        reader.read(alone, "first")
    base, _ = reader.load(written.with_name("pre.safetensors"))
    found = reader.read(alone, "first", {"pre": base})
    beside = reader.read(written, "first")
    assert all(found[name][1].tobytes() == beside[name][1].tobytes() for name in beside)
    dtype, array = base["w"]
    with pytest.raises(ValueError, match="identity"):
        reader.read(alone, "first", {"pre": {**base, "w": (dtype, array + 1)}})


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_rounding_of_every_distribution_and_of_products(tmp_path: Path, dtype: str) -> None:
    scales = {"plain": 0.3, "large": 3e38, "tiny": 1e-41, "half": 65519.0, "negative": -1.7}
    tensors = {
        f"{distribution}.{name}": entry(
            dtype, (1003,), random_source(distribution, scale),
            {"kind": "scale", "factor": hexf(1.3)}, {"kind": "scale", "factor": hexf(0.0)},
        ) if name == "large" else entry(
            dtype, (1003,), random_source(distribution, scale),
            {"kind": "scale", "factor": hexf(1.3)},
        )
        for distribution in ("sign", "normal", "uniform")
        for name, scale in scales.items()
    }  # fmt: skip
    path = tmp_path / "rounding.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), Memory()))
    assert_same(path)


def test_hadamard_of_every_construction(tmp_path: Path) -> None:
    shapes = [(1, 1), (4, 2), (8, 3), (13, 12), (40, 20), (28, 28), (70, 28), (5, 33), (9, 92)]
    shapes += [(0, 5), (37, 36), (300, 64), (3, 1000), (530, 512), (65, 52), (3, 8192)]
    source = {"kind": "hadamard", "scale": hexf(-0.3)}
    tensors = {f"{r}x{c}": entry("BF16", (r, c), source) for r, c in shapes}
    path = tmp_path / "hadamard.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), Memory()))
    assert_same(path)


def test_constants_of_every_dtype(tmp_path: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if not dtype.startswith("F8")]
    values = {"one": 1.0, "zero": 0.0, "negative zero": -0.0}
    tensors = {
        f"{dtype} {name}": entry(dtype, (2, 3), constant(value))
        for dtype in dtypes
        for name, value in values.items()
    }
    path = tmp_path / "constants.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), Memory()))
    assert_same(path)


@pytest.mark.parametrize("encoding", ["bits", "gaps"])
def test_masks_of_every_density(tmp_path: Path, encoding: str) -> None:
    b = Builder()
    tensors = {}
    for size in (0, 1, 8, 255, 256, 511, 3000):
        for share in (0.0, 0.003, 0.5, 0.997, 1.0):
            name, bits = f"{size}@{share}", some_bits(size, share, size)
            mask = b.mask("shared", name, 0, bits, encoding)
            tensors[name] = entry("F16", (size,), random_source("sign", 1.0), mask)
    path = tmp_path / "masks.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), b.payloads))
    assert_same(path)


def test_dtypes_that_are_only_stored(tmp_path: Path) -> None:
    b = Builder()
    raw = 37 * np.arange(6, dtype="u1").reshape(2, 3)
    tensors = {
        dtype: entry(
            dtype, (2, 3), b.stored("shared", dtype, RawTensor(dtype, raw & top)),
            b.mask("shared", dtype, 0, [1, 0, 1, 0, 1, 1]),
            b.slice("shared", dtype, 1, 1, RawTensor(dtype, raw[:, :1] & top)),
        )
        for dtype, top in {"F8_E4M3": 255, "F8_E5M2": 255, "U8": 255, "BOOL": 1}.items()
    }  # fmt: skip
    path = tmp_path / "stored.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), b.payloads))
    assert_same(path)


def test_an_own_empty_stream_is_not_the_tensors_name(tmp_path: Path) -> None:
    tensors = {
        "w": entry("F32", (64,), random_source("sign", 1.0, stream="")),
        "v": entry("F32", (64,), random_source("sign", 1.0, stream='é\U0001f600\x7f\n"\\')),
    }
    path = tmp_path / "stream.safetensors"
    write_checkpoint(path, assemble(tiny(tensors=tensors), Memory()))
    assert_same(path)


# --- refused by both -----------------------------------------------------------------------------


def test_a_bit_flipped_in_any_payload(written: Path, tmp_path: Path) -> None:
    write_base(tmp_path)
    data = written.read_bytes()
    with Container(written) as container:
        start, infos = container.header_bytes, dict(container.infos)
    path = tmp_path / "flipped.safetensors"
    for name, info in infos.items():
        if not info.stop > info.start:
            continue
        at = start + info.stop - 1
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        path.write_bytes(broken)
        with pytest.raises(FileFormatError), read_checkpoint(path) as checkpoint:
            ask_for_everything(checkpoint)
        if not name.endswith("/scores"):  # these are no part of a tensor
            with pytest.raises(ValueError, match="digest of payload"):
                reader.read(path, "second" if name.startswith("second/") else "first")


def test_a_changed_base(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "all.safetensors"
    path.write_bytes(written.read_bytes())
    data = bytearray(written.with_name("pre.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "pre.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="identity"):
        reader.read(path, "first")
    with pytest.raises(IncompatibleError):
        read_checkpoint(path)


def test_truncated_padded_and_damaged_containers(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "whole.safetensors", tiny(), tiny_payloads())
    assert_same(path)
    data = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    length = int.from_bytes(data[:8], "little")
    cases = [data[:cut] for cut in (0, 7, 8, 20, len(data) - 1)]
    cases += [data + b"\0", data[:8] + b"[" + data[9:], data[:8] + b"{\xff" + data[10:]]
    cases += [(1 << 62).to_bytes(8, "little") + data[8:]]
    for old, new in (
        (b'"U8"', b'"I8"'),
        (b'"U8"', b'"X8"'),
        (b'"shape":[', b'"shapf":['),
        (b"shared/w/0.mask", b"shared/w/1.mask"),
        (b"shared/w/0.mask", b"shared/../.mask"),
        (b'"data_offsets":[0', b'"data_offsets":[1'),
        (b'"format":"pt"', b'"format":1234'),
    ):
        cases += [data[:8] + data[8 : 8 + length].replace(old, new) + data[8 + length :]]
    for case in cases:
        if case == data:
            continue
        broken.write_bytes(case)
        assert_both_refuse(broken)


def test_a_finished_digest_that_differs(written: Path, tmp_path: Path) -> None:
    write_base(tmp_path)

    def change(recipe: Json) -> None:
        recipe["members"][0]["tensors"]["conv.weight"]["digest"] = "0" * 32

    path = with_metadata(written, tmp_path / "changed.safetensors", change)
    with pytest.raises(ValueError, match=r"finished digest of conv\.weight"):
        reader.read(path, "first")


@pytest.mark.parametrize(("dim", "count"), [(2, 1), (0, 3), (1, 4)])
def test_a_slice_beyond_the_tensor(tmp_path: Path, dim: int, count: int) -> None:
    b = Builder()
    overlay = {**b.slice("shared", "w", 0, 0, floats("F32", (2, 3), 1)), "dim": dim, "count": count}
    tensors = {"w": entry("F32", (2, 3), constant(0.0), overlay)}
    assert_both_refuse(write_raw(tmp_path / "x.safetensors", tiny(tensors=tensors), b.payloads))


@pytest.mark.parametrize("fault", ["count", "encoding", "tail", "head", "bomb", "padding"])
def test_a_mask_that_is_not_what_it_says(tmp_path: Path, fault: str) -> None:
    b = Builder()
    bits = some_bits(300, 0.1, 1)
    payload = slow.deflate(slow.pack_bits(bits))
    overlay = {"kind": "mask", "encoding": "bits", "count": sum(bits)}
    if fault == "count":
        overlay["count"] += 1
    elif fault == "encoding":
        overlay["encoding"] = "gaps"
    elif fault == "tail":
        payload += b"\0"
    elif fault == "head":
        payload = payload[:-1]
    elif fault == "bomb":
        payload = slow.deflate(bytes(10**6))
    else:
        payload = slow.deflate(slow.pack_bits([*bits, 0, 0, 0, 1]))
    raw = RawTensor("U8", np.frombuffer(payload, np.uint8))
    overlay["digest"] = b.put("shared", "w", "0.mask", raw)
    tensors = {"w": entry("F32", (300,), random_source("sign", 1.0), overlay)}
    assert_both_refuse(write_raw(tmp_path / "x.safetensors", tiny(tensors=tensors), b.payloads))


# --- plans and heads -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "orthonormal", "hadamard"])
@pytest.mark.parametrize("zero", [False, True])
def test_learned_plans_and_fixed_heads(tmp_path: Path, kind: Any, zero: bool) -> None:
    start = conv2()
    if kind != "linear":
        start = rs.fix_head(start, kind)
    start = rs.freeze(start, rs.Freeze(fraction="0.5"), zero=zero)
    model = rs.attach(rs.build(start), start)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    rs.save(tmp_path / "plan.safetensors", start)
    rs.save(tmp_path / "learned.safetensors", start, model)
    for name in ("plan", "learned"):
        assert_same(tmp_path / f"{name}.safetensors")


def test_plans_that_do_not_fit_their_tensors(tmp_path: Path) -> None:
    b = Builder()
    tensors = {"w": entry("F32", (3, 4), random_source("sign", 1.0))}
    for part in (
        {"part": "slice", "dim": 2, "count": 1},
        {"part": "slice", "dim": 0, "count": 4},
        {"part": "slice", "dim": 0},
        {"dim": 0, "count": 1},
        {"part": "some"},
        {"start": {"kind": "random", "distribution": "sign", "seed": 0, "scale": (1.0).hex()}},
    ):
        recipe = tiny(tensors=tensors, members=[{"plan": {"tensors": {"w": part}}}])
        with pytest.raises(FileFormatError):
            read_checkpoint(write_raw(tmp_path / "x.safetensors", recipe, b.payloads))
    recipe = tiny(tensors=tensors, members=[{"plan": {"tensors": {"v": {}}}}])
    with pytest.raises(FileFormatError, match="plans to learn no tensor"):
        read_checkpoint(write_raw(tmp_path / "x.safetensors", recipe, b.payloads))


# --- the document and the file -------------------------------------------------------------------


def test_the_vectors_in_the_document() -> None:
    said = json.loads(SOURCE.with_name("format.md").read_text("utf-8").split("```json\n")[1]
                      .split("```")[0])  # fmt: skip
    half = (0.5).hex()
    golden = (7, "golden", "weight")
    key = reader.digest(["randsurgery.philox.1", *golden])
    words = np.frombuffer(bytes.fromhex(key), "<u8")
    assert said["key"] == [f"{word:016x}" for word in words]
    values = {
        kind: reader.scaled(reader.stream(kind, 1003, *golden), half, "F32")
        for kind in ("sign", "normal", "uniform")
    }
    for kind, array in values.items():
        first = array[: len(said[kind])]
        signs = "".join("+" if v > 0 else "-" for v in first)
        assert said[kind] == (signs if kind == "sign" else [float(v).hex() for v in first])
        assert said["sha256_of_1003"][kind] == hashlib.sha256(array.tobytes()).hexdigest()
    three = {dtype: reader.scaled(values["normal"][:3], "1", dtype) for dtype in ("F16", "BF16")}
    assert said["normal_f16"] == three["F16"].tobytes().hex()
    assert said["normal_bf16"] == three["BF16"].tobytes().hex()
    assert said["normal_table"] == [float(reader.NORMAL[i]).hex() for i in (0, 32767, 32768)]
    for shape in ("13x12", "28x28"):
        rows, columns = map(int, shape.split("x"))
        matrix = reader.head(rows, columns).reshape(rows, columns)
        for index, signs in said[f"hadamard_{shape}"].items():
            assert signs == "".join("+" if v > 0 else "-" for v in matrix[int(index)])
    mask = said["mask"]
    for encoding in ("bits", "gaps"):
        payload = np.frombuffer(bytes.fromhex(mask[encoding]), "u1")
        bits = reader.mask(payload, {**mask, "encoding": encoding}, mask["size"])
        assert np.flatnonzero(bits).tolist() == mask["ones"]
    assert said["payload_digest_of_gaps"] == reader.digest(payload.tobytes())
    tensor = values["sign"][:4].reshape(2, 2)
    assert said["finished_digest"] == reader.digest(["F32", [2, 2]], b"\0", tensor.tobytes())
    rows = (["a", "F32", [2, 2]], b"\0", tensor.tobytes(), ["b", "F16", [3]], b"\0")
    assert said["base_identity"] == reader.digest(*rows, three["F16"].tobytes())
    assert said["backbone_id"] == reader.digest(said["backbone_text"].encode())
    assert said["backbone_id"] == reader.digest(json.loads(said["backbone_text"]))
    assert reader.digest(bits_of(bits)) in said["backbone_text"]


def bits_of(bits: np.ndarray[Any, Any]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def test_the_reader_is_short_and_needs_numpy_alone() -> None:
    text = SOURCE.read_text("utf-8")
    lines = enumerate(text.splitlines(), 1)
    code = {number for number, line in lines if line.strip() and not line.strip().startswith("#")}
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node):
            docstring = node.body[0]
            code -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).split(".")[0])
    assert len(code) <= MOST_CODE_LINES
    assert names - {"numpy"} <= sys.stdlib_module_names


def test_it_lists_the_tensors_of_a_file(written: Path) -> None:
    done = subprocess.run(
        [sys.executable, SOURCE, written, "second"], capture_output=True, text=True, check=True
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines["norm.count"].startswith("I64 [] ")
    with read_checkpoint(written) as checkpoint:
        for name, tensor in checkpoint.tensors("second").items():
            assert lines[name] == f"{tensor.dtype} {list(tensor.shape)} {tensor.digest()}"
