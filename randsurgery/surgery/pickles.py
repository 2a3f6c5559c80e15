"""What torch.save wrote, read without running a line of it.

torch's own restricted unpickler reads it. That one knows tensors and plain values, and refuses a
file that names anything else, such as the ``argparse.Namespace`` of timm's training script or a
NumPy number that a schedule left in the optimiser. So the names in the pickle are listed first,
without unpickling, and torch is given a stand-in for each that it does not know: a class made
here, which keeps nothing of what the file hands it. The package that a name belongs to is never
imported, and a name that was not listed is refused by torch as ever.
"""

from __future__ import annotations

import _compat_pickle
import contextlib
import io
import pickle
import pickletools
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch

from randsurgery.errors import FileFormatError, reason
from randsurgery.format.recognise import SAVE_STATE, recognise

_HOSTILE = frozenset(
    ("os", "posix", "nt", "sys", "subprocess", "pty", "socket", "runpy", "importlib", "ctypes")
)  # fmt: skip
_HOSTILE_NAMES = frozenset(
    f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open", "breakpoint")
) | {"io.open"}
_PARTS = 4
"""Pickles at the start of a file of torch before 1.6: magic number, version, system, object."""


class Skipped:
    """Stands for an object of a class that is not read, and keeps nothing but the class's name."""

    name: ClassVar[str] = ""

    def __new__(cls, *_: object, **__: object) -> Any:
        """Takes and drops whatever the class takes."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _SkippedDict(Skipped):
    """Stands for a kind of dict, which a pickle fills item by item."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return OrderedDict()


class _SkippedList(Skipped):
    """Stands for a kind of list."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return []


_KINDS: dict[str, type[Skipped]] = {"dict": _SkippedDict, "list": _SkippedList}


def read_pickle(path: Path, *, mapped: bool = False) -> Any:
    """The object that torch.save wrote: tensors on the CPU, plain values, and ``Skipped``.

    ``mapped``: the tensors' bytes stay in the file until they are used. Raises FileFormatError.
    """
    if recognise(path) != "torch.save":
        raise FileFormatError(f"{path.name}: not a checkpoint of torch.save")
    names = _named(path)
    if hostile := sorted(name for name in names if _is_hostile(name)):
        raise FileFormatError(
            f"{path.name}: refers to {hostile[0]}, which no checkpoint needs and which could run "
            "commands, so it is not opened; ask where the file comes from"
        )
    try:
        with _known_alone(names), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of formats that are old or seldom
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise FileFormatError(
            f"{path.name}: is pickled in a way that torch does not open safely; save its state "
            f"dict alone: {SAVE_STATE}"
        ) from None
    except Exception as error:  # truncated archives, foreign files
        why = reason(error).split(":")[0]
        cut_off = isinstance(error, OSError) or "PytorchStreamReader" in why
        told = f" ({why})" if any(c.isalpha() for c in why) and "EOF" not in why else ""
        raise FileFormatError(
            f"{path.name}: truncated or damaged; fetch it again"
            if cut_off
            else f"{path.name}: damaged, or not a checkpoint of torch.save{told}"
        ) from None


def _is_hostile(name: str) -> bool:
    return name in _HOSTILE_NAMES or name.partition(".")[0] in _HOSTILE


@contextlib.contextmanager
def _known_alone(names: dict[str, str]) -> Iterator[None]:
    """torch takes our stand-ins for these names, and nothing that others have let it take."""
    stand_ins: list[Any] = [
        (type("Skipped", (_KINDS.get(kind, Skipped),), {"name": name}), name)
        for name, kind in names.items()
    ]
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(stand_ins):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


# --- the names in a pickle ------------------------------------------------------------------------


def _named(path: Path) -> dict[str, str]:
    """Every class and function that the file names, and what its objects are filled as: "dict",
    "list" or "object". What is damaged is left to torch to tell."""
    found: dict[str, str] = {}
    with path.open("rb") as file, contextlib.suppress(ValueError, IndexError, KeyError):
        if file.read(2) == b"PK":
            found = _named_in(io.BytesIO(_record(path)))
        else:
            file.seek(0)
            for _ in range(_PARTS):
                found |= _named_in(file)
    return found


def _record(path: Path) -> bytes:
    """The pickle in an archive. Raises ValueError if it has none, or one that is blown up."""
    try:
        with zipfile.ZipFile(path) as archive:
            places = [i for i in archive.infolist() if i.filename.endswith("/data.pkl")]
            if len(places) == 1 and places[0].file_size <= path.stat().st_size:
                return archive.read(places[0])
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(str(error)) from None
    raise ValueError("no pickle")


_FILLS = {
    "SETITEM": "dict", "SETITEMS": "dict", "APPEND": "list", "APPENDS": "list",
}  # fmt: skip
_KEEPS = {"REDUCE", "NEWOBJ", "BUILD", *_FILLS}
"""What leaves on the stack an object that came from the lowest one it took."""


def _named_in(stream: BinaryIO) -> dict[str, str]:
    """The same of one pickle, by following its stack without making an object."""
    kinds: dict[str, str] = {}
    stack: list[Any] = []  # the name that an object comes of, else None; marks
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(stream):
        taken, given = list(code.stack_before), len(code.stack_after)
        if pickletools.markobject in taken:
            while stack.pop() is not pickletools.markobject:
                pass
            taken = taken[: taken.index(pickletools.markobject)]
        origin = stack[-len(taken)] if taken else None
        if taken:
            del stack[-len(taken) :]
        if code.name == "GLOBAL":
            origin = _modern(str(argument))
            kinds.setdefault(origin, "object")
        elif code.name in ("BINGET", "LONG_BINGET", "GET"):
            origin = memo.get(argument)
        elif code.name == "MARK":
            origin = pickletools.markobject
        elif code.name not in (*_KEEPS, "BINPUT", "LONG_BINPUT", "PUT"):
            origin = None
        if code.name in _FILLS and isinstance(origin, str):
            kinds[origin] = _FILLS[code.name]
        if code.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        stack += [origin] * given
    return kinds


def _modern(text: str) -> str:
    """``module.name`` of a global as pickle has it, names of Python 2 as those of Python 3."""
    module, _, name = text.partition(" ")
    if (module, name) in _compat_pickle.NAME_MAPPING:
        module, name = _compat_pickle.NAME_MAPPING[(module, name)]
    else:
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
    return f"{module}.{name}"
