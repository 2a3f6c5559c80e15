"""What a file is by its content, not by its name: checkpoints, and what is taken for one."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Literal

from randsurgery.errors import FileFormatError

Kind = Literal["safetensors", "torch.save", "json", "unknown"]

SAVE_STATE = "torch.save(model.state_dict(), FILE)"
_ELSEWHERE = f"load it with the program that wrote it into a torch model, and {SAVE_STATE}"
_AGAIN = "fetch the file again"

# first bytes, what begins so, and what to do about it
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer that stands for the weights",
        "git lfs pull fetches them",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras and TensorFlow write weights", _ELSEWHERE),
    (b"GGUF", "a GGUF file, as llama.cpp writes weights", "take the original checkpoint"),
    (b"\x93NUMPY", "a NumPy array (.npy)", _ELSEWHERE),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
)
_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch's magic number, pickled
_ONNX_NEXT = b"\x12\x1a\x22\x3a\x42"  # the fields that may follow the version of the format
_TABLE_END = bytes.fromhex("57fb808b247547db")  # the last bytes of TensorFlow's tables


def recognise(path: str | os.PathLike[str]) -> Kind:
    """What the file is: "safetensors", "torch.save" (of any release), "json", or "unknown".

    Raises FileFormatError for a file that is missing, a folder or empty, and for what is known to
    be no checkpoint of torch, naming it.
    """
    file = Path(path)
    start = _start(file)
    if told := foreign(file):
        raise FileFormatError(f"{file.name}: {told}")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and _OLD_TORCH in start[:64]):
        return "torch.save"
    if start[8:9] == b"{":
        return "safetensors"
    return "json" if start.lstrip()[:1] == b"{" else "unknown"


def foreign(path: Path) -> str | None:
    """What a file is that is no checkpoint of torch and no safetensors file, and the remedy; None
    if it may be one of these. Raises FileFormatError for one that cannot be opened."""
    start = _start(path)
    if not start:
        return f"is empty (0 bytes); {_AGAIN}"
    if start[8:9] == b"{":
        return None
    for first, what, remedy in _STARTS:
        if start.startswith(first):
            return f"is {what}; {remedy}"
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _archive(path)
    if start[:1] == b"\x80" and len(start) > 1:
        return None if _OLD_TORCH in start[:64] or not 2 <= start[1] <= 5 else _pickle()
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return f"is an HTML or XML page, which a failed download leaves; {_AGAIN}"
    if start[257:262] == b"ustar":
        return "is a tar archive; unpack it"
    if start[:1] == b"\x08" and len(start) > 2 and start[1] < 32 and start[2] in _ONNX_NEXT:
        return f"is an ONNX file; take the checkpoint that it was exported from, or {_ELSEWHERE}"
    if ".data-" in path.name or _end(path) == _TABLE_END:
        return f"is a part of a TensorFlow checkpoint; {_ELSEWHERE}"
    return None


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        raise FileFormatError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise FileFormatError(f"{path}: is a folder, a checkpoint file is needed") from None
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be opened ({error.strerror})") from None


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
        return file.read(8)


def _pickle() -> str:
    return (
        "is a pickle that torch.save did not write, which is not opened; where it is trusted, load "
        f"it and {SAVE_STATE}"
    )


def _archive(path: Path) -> str | None:
    """The same of a zip archive; None for one of torch.save, or one too damaged to tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    leaves = {name.rpartition("/")[2] for name in names}
    if {"data.pkl", "constants.pkl"} <= leaves:
        return (
            "is a TorchScript archive (torch.jit.save), which holds code; where it is trusted: "
            "torch.save(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    if "data.pkl" in leaves:
        return None
    if leaves & {"archive_format", "serialized_exported_program.json"}:
        return f"is a program of torch.export, no checkpoint; {_ELSEWHERE}"
    if names and all(name.endswith(".npy") for name in names):
        return f"is a NumPy archive (.npz), as JAX models are published; {_ELSEWHERE}"
    if "model.weights.h5" in leaves:
        return f"is a Keras archive; {_ELSEWHERE}"
    return "is a zip archive, but not one of torch.save; if it holds a checkpoint, unpack it"
