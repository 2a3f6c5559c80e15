"""The container: headers that must be refused, files others can read, writes that leave nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from format_helpers import raw_file, tensor_header

from randsurgery.errors import FileFormatError, OutputError
from randsurgery.format.container import Container, TensorInfo, check_output, pack, write_atomically
from randsurgery.format.tensors import STORAGE, RawTensor


def refusal(folder: Path, content: bytes) -> str:
    path = folder / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        Container(path)
    assert "hostile.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


# --- headers that are refused --------------------------------------------------------------------

SOUND = tensor_header("F32", [2], 0, 8)

MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty (0 bytes)"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "no header": (raw_file(b""), "not a JSON object"),
    "header beyond the file": (raw_file({}, length=1000), "truncated"),
    "length of 2^63": (raw_file({}, length=2**63), "claims 9223372036854775808 bytes"),
    "cut within the header": (raw_file({"a": SOUND}, bytes(8))[:40], "truncated"),
    "cut within the data": (raw_file({"a": SOUND}, bytes(7)), "truncated or padded"),
    "trailing byte": (raw_file({"a": SOUND}, bytes(9)), "truncated or padded"),
    "not JSON": (raw_file(b"{not json}"), "not valid JSON"),
    "a list": (raw_file([]), "not a JSON object"),
    "leading space": (raw_file(b" {}"), "not a JSON object"),
    "two objects": (raw_file(b"{}{}"), "not valid JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not UTF-8"),
    "NaN": (raw_file(b'{"a": NaN}'), "NaN is not JSON"),
    "nested without end": (raw_file(b'{"a":' * 100_000), "not valid JSON"),
    "an integer of many digits": (
        raw_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,0]}}'),
        "beyond float64",
    ),
    "tensor twice": (
        raw_file(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
        "duplicate key 'a'",
    ),
    "metadata key twice": (
        raw_file(b'{"__metadata__":{"format":"pt","format":"np"}}'),
        "duplicate key 'format'",
    ),
    "metadata twice": (
        raw_file(b'{"__metadata__":{},"__metadata__":{}}'),
        "duplicate key '__metadata__'",
    ),
    "field twice": (
        raw_file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        "duplicate key 'dtype'",
    ),
    "metadata not strings": (raw_file({"__metadata__": {"a": 1}}), "not an object of strings"),
    "metadata a list": (raw_file({"__metadata__": []}), "not an object of strings"),
    "tensor named __metadata__": (
        raw_file({"__metadata__": tensor_header("U8", [0], 0, 0)}),
        "not an object of strings",
    ),
    "absurd shape hidden by a zero": (
        raw_file({"a": tensor_header("F32", [2**40, 0], 0, 0)}),
        "absurd",
    ),
    "absurd shape": (raw_file({"a": tensor_header("F32", [2**50], 0, 2**52)}), "absurd"),
    "seventeen dimensions": (
        raw_file({"a": tensor_header("F32", [1] * 17, 0, 4)}, bytes(4)),
        "not a list of counts",
    ),
    "unknown field": (
        raw_file({"a": tensor_header("F32", [2], 0, 8, strides=[1])}, bytes(8)),
        "only these",
    ),
    "missing field": (raw_file({"a": {"dtype": "F32", "shape": [2]}}), "only these"),
    "tensor not an object": (raw_file({"a": [1]}), "only these"),
    "unknown dtype": (raw_file({"a": tensor_header("F31", [2], 0, 8)}, bytes(8)), "'F31'"),
    "dtype not a string": (raw_file({"a": tensor_header([], [2], 0, 8)}, bytes(8)), "dtype '[]'"),
    "negative dimension": (
        raw_file({"a": tensor_header("F32", [-2], 0, 8)}, bytes(8)),
        "not a list of counts",
    ),
    "fractional dimension": (
        raw_file({"a": tensor_header("F32", [2.0], 0, 8)}, bytes(8)),
        "not a list of counts",
    ),
    "boolean dimension": (
        raw_file({"a": tensor_header("F32", [True], 0, 4)}, bytes(4)),
        "not a list of counts",
    ),
    "shape a string": (raw_file({"a": tensor_header("F32", "2", 0, 8)}, bytes(8)), "shape of 'a'"),
    "negative offset": (
        raw_file({"a": tensor_header("F32", [2], -8, 0)}, bytes(8)),
        "not two counts",
    ),
    "fractional offset": (
        raw_file({"a": tensor_header("F32", [2], 0, 8.0)}, bytes(8)),
        "not two counts",
    ),
    "three offsets": (
        raw_file({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, bytes(8)),
        "not two counts",
    ),
    "offsets too long for the shape": (
        raw_file({"a": tensor_header("F32", [2], 0, 12)}, bytes(12)),
        "has 12 bytes, its dtype and shape need 8",
    ),
    "offsets backwards": (
        raw_file({"a": tensor_header("F32", [2], 8, 0)}, bytes(8)),
        "has -8 bytes",
    ),
    "overlap": (
        raw_file({"a": SOUND, "b": tensor_header("F32", [2], 4, 12)}, bytes(12)),
        "overlaps another tensor",
    ),
    "the same bytes twice": (raw_file({"a": SOUND, "b": SOUND}, bytes(8)), "overlaps another"),
    "gap": (
        raw_file({"a": SOUND, "b": tensor_header("F32", [2], 12, 20)}, bytes(20)),
        "leaves a gap",
    ),
    "gap at the start": (raw_file({"a": tensor_header("F32", [2], 4, 12)}, bytes(12)), "gap"),
    "empty tensor inside another": (
        raw_file({"a": SOUND, "b": tensor_header("U8", [0], 4, 4)}, bytes(8)),
        "overlaps another",
    ),
}

for bad in ("", "a\nb", "a\0b", "a\x7f", "\x1b[31m", "../a", "a/../b", "/etc/x", "a\\b",
            "x" * 501, "\ud800", "\u202eabc"):  # fmt: skip
    MALFORMED[f"name {ascii(bad)[:20]}"] = (
        raw_file({bad: tensor_header("U8", [0], 0, 0)}),
        "is not a tensor name",
    )


@pytest.mark.parametrize(
    ("dtype", "size"), [("C64", 72), ("F8_E8M0", 9), ("F6_E2M3", 7), ("F4", 5), ("F8_E4M3FNUZ", 9)]
)
def test_dtypes_and_names_of_other_programs_are_told_and_not_read(
    dtype: str, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.safetensors"
    path.write_bytes(raw_file({"网.é": tensor_header(dtype, [3, 3], 0, size)}, bytes(size)))
    with Container(path) as file:
        assert file.infos["网.é"] == TensorInfo(dtype, (3, 3), 0, size)
        for read in (lambda: file.read("网.é"), lambda: file.read_part("网.é", 0, 1)):
            with pytest.raises(FileFormatError, match=f"of {dtype}, whose values are not read"):
                read()
    wrong = raw_file({"a": tensor_header(dtype, [3, 3], 0, size + 1)}, bytes(size + 1))
    assert f"its dtype and shape need {size}" in refusal(tmp_path, wrong)


def test_a_json_text_is_told(tmp_path: Path) -> None:
    assert "a JSON text" in refusal(tmp_path, b'{"metadata": {}, "weight_map": {}}')


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused(fault: str, tmp_path: Path) -> None:
    content, message = MALFORMED[fault]
    assert message in refusal(tmp_path, content)


@pytest.mark.parametrize("byte", [2, 255])
def test_bool_bytes_other_than_0_and_1_are_refused(byte: int, tmp_path: Path) -> None:
    path = tmp_path / "flags.safetensors"
    path.write_bytes(raw_file({"a": tensor_header("BOOL", [3], 0, 3)}, bytes([0, 1, byte])))
    with (
        Container(path) as container,
        pytest.raises(FileFormatError, match="'a' has BOOL bytes other than 0 and 1"),
    ):
        container.read("a")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        Container(tmp_path / "none.safetensors")
    with pytest.raises(FileFormatError, match="cannot be opened"):
        Container(tmp_path)


def test_a_file_cut_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file({"a": SOUND}, bytes(8)))
    with Container(path) as container:
        os.truncate(path, path.stat().st_size - 3)
        with pytest.raises(FileFormatError, match="became shorter"):
            container.read("a")


def test_spaces_after_the_header_and_any_tensor_order_are_read(tmp_path: Path) -> None:
    header = b'{"b":{"shape":[1],"data_offsets":[4,5],"dtype":"U8"}, "a":' + (
        b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   '
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header, np.float32(1.5).tobytes() + b"\x07"))
    with Container(path) as container:
        assert container.metadata == {}
        assert container.read("a").array[()] == 1.5
        assert container.read("b").array.tolist() == [7]


# --- what we write -------------------------------------------------------------------------------


def some_tensors() -> dict[str, RawTensor]:
    rng = np.random.default_rng(0)
    native = ("<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "i1", "<u8", "<u4", "<u2", "u1")
    tensors = {
        f"t.{np.dtype(kind).name}": RawTensor.of(rng.integers(0, 100, (3, 5)).astype(kind))
        for kind in native
    }
    tensors["flag"] = RawTensor.of(np.array([True, False, True]))
    tensors["scalar"] = RawTensor.of(np.array(2.5, dtype=np.float32))
    tensors["empty"] = RawTensor.of(np.zeros((0, 4), dtype=np.float32))
    return tensors


def write(path: Path, tensors: dict[str, RawTensor], metadata: dict[str, str] | None = None) -> int:
    return write_atomically(path, pack(tensors, metadata or {}))


def test_every_dtype_survives(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        dtype: RawTensor(dtype, rng.integers(0, 2, 7 * kind.itemsize, np.uint8).view(kind))
        for dtype, kind in STORAGE.items()
    }
    path = tmp_path / "a.safetensors"
    assert write(path, tensors, {"k": "v é \n"}) == path.stat().st_size
    with Container(path) as container:
        assert container.metadata == {"k": "v é \n"}
        assert set(container.infos) == set(tensors)
        assert all(container.read(name).same_bits(tensors[name]) for name in tensors)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_all_sixteen_bit_patterns_survive(dtype: str, tmp_path: Path) -> None:
    words = np.arange(65536, dtype="<u2")
    tensor = RawTensor(dtype, words.view(STORAGE[dtype]))
    path = tmp_path / "a.safetensors"
    write(path, {"w": tensor})
    with Container(path) as container:
        again = container.read("w")
    assert again.dtype == dtype
    assert again.array.tobytes() == words.tobytes()


def test_the_safetensors_library_reads_our_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    write(path, tensors, {"format": "pt"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(tensors)
    for name, array in loaded.items():
        assert array.shape == tensors[name].shape
        assert RawTensor.of(array).same_bits(tensors[name])


def test_we_read_the_files_of_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3)}
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    with Container(path) as container:
        assert container.metadata == {"format": "pt"}
        assert container.read("w").same_bits(RawTensor.of(arrays["w"]))
        assert container.read("n").shape == ()


def test_bytes_depend_on_content_and_not_on_order() -> None:
    tensors, metadata = some_tensors(), {"b": "1", "a": "2"}
    forwards = b"".join(pack(tensors, metadata))
    backwards = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    assert b"".join(pack(*backwards)) == forwards
    assert int.from_bytes(forwards[:8], "little") % 8 == 0


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, some_tensors())
    with Container(path) as container:
        assert container.header_bytes % 8 == 0
        for info in container.infos.values():
            assert info.start % STORAGE[info.dtype].itemsize == 0


def test_reading_without_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = some_tensors()
    path = tmp_path / "a.safetensors"
    write(path, tensors)
    monkeypatch.delattr(os, "preadv", raising=False)
    with Container(path) as container:
        assert all(container.read(name).same_bits(tensors[name]) for name in tensors)


# --- atomic writing ------------------------------------------------------------------------------


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no such folder"):
        check_output(tmp_path / "none" / "a.safetensors")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "none" / "a.safetensors", {})


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="--force"):
        check_output(path)
    assert check_output(path, force=True) == path
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, force=True)


def test_a_failing_verification_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    seen: list[Path] = []

    def verify(written: Path) -> None:
        seen.append(written)
        assert written.parent == tmp_path
        assert Container(written).__exit__() is None
        raise FileFormatError("read back differently")

    with pytest.raises(FileFormatError, match="read back differently"):
        write_atomically(path, pack(some_tensors(), {}), verify)
    assert len(seen) == 1
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def pieces() -> Any:
        yield b"new"
        raise error

    with pytest.raises(error):
        write_atomically(path, pieces())
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["a.safetensors"]


def test_a_good_write_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    size = write(path, some_tensors())
    assert files(tmp_path) == ["a.safetensors"]
    assert path.stat().st_size == size > 100
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


FULL_DISK = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from randsurgery.errors import OutputError
from randsurgery.format.container import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomically(sys.argv[1], iter([bytes(1000), bytes(1 << 20)]))
except OutputError as error:
    print(error)
    sys.exit(6)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX resource limits")
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "cannot be written" in done.stdout
    assert "nothing was changed" in done.stdout
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["a.safetensors"]
