"""safetensors files, header and payload bytes: read strictly, written atomically.

Reading and writing of the header are ours: the library writes metadata keys in random order,
cannot read bfloat16 into NumPy, and accepts files that must be refused (docs/format.md section 1).
A file opened here never runs code, opens another path or reaches the network, and nothing is
allocated on the word of a header alone: every size is checked against the file's own length.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from randsurgery.errors import FileFormatError, OutputError, UsageError
from randsurgery.format.canonical import strict_json
from randsurgery.format.fields import MAX_PAYLOAD_NAME, check_tensor_name
from randsurgery.format.recognise import foreign
from randsurgery.format.tensors import (
    DTYPES,
    FOREIGN_BITS,
    KNOWN_DTYPES,
    STORAGE,
    RawTensor,
    byte_count,
    claimed_bytes,
)

MAX_HEADER = 100_000_000  # the safetensors library's own limit, in bytes
MAX_BYTES = 1 << 40
ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie, from the start of the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Container:
    """A safetensors file whose header has been read and checked; payloads are read on demand.

    Use as a context manager. ``path`` is the file, ``infos`` its tensors in file order,
    ``metadata`` its ``__metadata__`` strings.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BufferedReader = self.path.open("rb")
        except FileNotFoundError:
            raise FileFormatError(f"{self.path}: no such file") from None
        except OSError as error:
            raise FileFormatError(f"{self.path}: cannot be opened ({error.strerror})") from None
        self._lock = threading.Lock()
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            header, self._data = _read_header(self._file, self.size, self.path.name)
            self.metadata, self.infos = _parse_header(
                header, self.size - self._data, self.path.name
            )
        except FileFormatError:
            self._file.close()
            if told := foreign(self.path):
                raise FileFormatError(f"{self.path.name}: {told}") from None
            raise
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def header_bytes(self) -> int:
        """Bytes before the data section: length field, JSON and padding."""
        return self._data

    def read(self, name: str) -> RawTensor:
        """The tensor's bytes, in memory of their own."""
        info = self._readable(name)
        array = self._bytes(info.start, info.stop)
        self._check(name, array)
        return RawTensor(info.dtype, array.view(STORAGE[info.dtype]).reshape(info.shape))

    def read_part(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements ``start`` to ``stop`` of a tensor in C order, in memory of their own. Shape
        (stop - start,), dtype ``STORAGE[dtype]``."""
        info = self._readable(name)
        width = STORAGE[info.dtype].itemsize
        array = self._bytes(info.start + start * width, info.start + stop * width)
        self._check(name, array)
        return array.view(STORAGE[info.dtype])

    def _readable(self, name: str) -> TensorInfo:
        info = self.infos[name]
        if info.dtype in FOREIGN_BITS:
            raise FileFormatError(
                f"{self.path.name}: {name!r} is of {info.dtype}, whose values are not read"
            )
        return info

    def _check(self, name: str, array: npt.NDArray[np.uint8]) -> None:
        if self.infos[name].dtype == "BOOL" and array.size and int(array.max()) > 1:
            raise FileFormatError(f"{self.path.name}: {name!r} has BOOL bytes other than 0 and 1")

    def _bytes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes of the data section. Shape (stop - start,)."""
        array = np.empty(stop - start, dtype=np.uint8)
        done = 0
        while done < array.size:
            try:
                part = self._read_at(self._data + start + done, array[done:].data)
            except OSError as error:
                raise FileFormatError(
                    f"{self.path.name}: cannot be read ({error.strerror})"
                ) from None
            if part == 0:
                raise FileFormatError(f"{self.path.name}: the file became shorter while read")
            done += part
        return array

    def _read_at(self, position: int, into: memoryview) -> int:
        """Read some bytes at a position; several threads may rebuild from one open file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [into], position)
        with self._lock:
            self._file.seek(position)
            return self._file.readinto(into)


def _read_header(file: BufferedReader, size: int, name: str) -> tuple[str, int]:
    if size < 8:
        raise FileFormatError(f"{name}: not a safetensors file ({size} bytes, at least 8 needed)")
    start = file.read(8)
    if start[:4] == b"PK\x03\x04":
        if name.endswith(".safetensors"):
            raise FileFormatError(
                f"{name}: written by torch.save, no safetensors file; rename it to .pth"
            )
        raise FileFormatError(
            f"{name}: a PyTorch checkpoint, no safetensors file; make one of it with randsurgery "
            f"convert {name} --arch ARCH, or pass it as --checkpoint with an architecture"
        )
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER and start[:1] == b"{":
        raise FileFormatError(
            f"{name}: a JSON text, no safetensors file; the index of a sharded one goes to inspect "
            "storage, model, weights and diff"
        )
    if length > MAX_HEADER or 8 + length > size:
        raise FileFormatError(
            f"{name}: truncated or not a safetensors file (its header claims {length} bytes, "
            f"{size - 8} follow)"
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise FileFormatError(f"{name}: not a safetensors file (its header is not a JSON object)")
    try:
        return raw.decode("utf-8"), 8 + length
    except UnicodeDecodeError:
        raise FileFormatError(f"{name}: the header is not UTF-8") from None


def _parse_header(
    text: str, data_size: int, name: str
) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    try:
        header = strict_json(text)
    except ValueError as error:
        raise FileFormatError(f"{name}: the header is not valid JSON ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(f"{name}: __metadata__ is not an object of strings")
    infos = {key: _parse_info(key, value, name) for key, value in header.items()}
    position = 0
    for key, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != position:
            raise FileFormatError(f"{name}: {key!r} overlaps another tensor or leaves a gap")
        position = info.stop
    if position != data_size:
        raise FileFormatError(
            f"{name}: truncated or padded (the tensors need {position} bytes, {data_size} follow)"
        )
    return metadata, infos


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _parse_info(key: str, value: Any, name: str) -> TensorInfo:
    try:
        check_tensor_name(key, limit=MAX_PAYLOAD_NAME, ascii_only=False)
    except ValueError as error:
        raise FileFormatError(f"{name}: {error}") from None
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{name}: {key!r} must have dtype, shape, data_offsets, only these")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in KNOWN_DTYPES:
        raise FileFormatError(
            f"{name}: {key!r} has dtype {str(dtype)[:60]!r}, not one of {', '.join(DTYPES)}"
        )
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise FileFormatError(f"{name}: the shape of {key!r} is not a list of counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FileFormatError(f"{name}: the data_offsets of {key!r} are not two counts")
    if claimed_bytes(dtype, shape) >= MAX_BYTES:
        raise FileFormatError(
            f"{name}: the shape {shape} of {key!r} is absurd (2^40 bytes or more)"
        )
    if offsets[1] - offsets[0] != byte_count(dtype, shape):
        raise FileFormatError(
            f"{name}: {key!r} has {offsets[1] - offsets[0]} bytes, its dtype and shape need "
            f"{byte_count(dtype, shape)}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def pack(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The file's bytes, piece by piece: length, header padded to 8, tensors.

    Wider elements come first, so that each is aligned; names break ties. Equal input gives
    equal bytes.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].array.dtype.itemsize, n))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name in order:
        tensor = tensors[name]
        header[check_tensor_name(name, limit=MAX_PAYLOAD_NAME)] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield _bytes_of(tensors[name].array)


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def check_output(
    path: str | os.PathLike[str], *, force: bool = False, option: str = "--output"
) -> Path:
    """Refuse early what would fail late: a missing or read-only folder, an existing file.

    Raises OutputError, which names the option. Call it before hours of training, too.
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it or choose another {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{folder}: the folder may not be written; choose another {option}")
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, a file name is needed")
    if target.exists() and not force:
        raise OutputError(f"{target}: exists already; choose another {option} or pass --force")
    return target


def check_picture(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """``check_output`` for --plot. Raises UsageError for an ending that is no picture's, too."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot must end in .png, .svg or .pdf, found {str(path)!r}")
    check_output(path, force=force, option="--plot")


def check_network(path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """``check_output`` for files that commands are to read again, which they know by the ending.

    Raises UsageError, too.
    """
    if Path(path).suffix != ".safetensors" and not Path(path).is_dir():
        raise UsageError(f"--output must end in .safetensors, found {str(path)!r}")
    return check_output(path, force=force)


def write_atomically(
    path: str | os.PathLike[str],
    pieces: Iterator[Any],
    verify: Callable[[Path], None] | None = None,
) -> int:
    """Write beside the target, sync, verify, rename; the old file stays until the new is proven.

    Returns the file's size in bytes. Raises OutputError if the disk refuses; then, and on an
    interruption, the temporary file is removed and an old file is untouched.
    """
    target = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        if verify is not None:
            verify(Path(temporary))
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
        return size
    except OSError as error:
        raise OutputError(
            f"{target}: cannot be written ({error.strerror or error}); nothing was changed"
        ) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def clear_unfinished(path: str | os.PathLike[str]) -> None:
    """Remove what a killed writer of this file left beside it."""
    target = Path(path)
    for found in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        found.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot sync a folder
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
