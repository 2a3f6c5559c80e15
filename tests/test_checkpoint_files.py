"""What a file is by its content, and that nothing in a pickle is ever run."""

from __future__ import annotations

import argparse
import builtins
import collections
import dataclasses
import datetime
import enum
import functools
import io
import os
import pickle
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_helpers import dense
from torch import nn

from randsurgery.errors import FileFormatError
from randsurgery.format.container import Container
from randsurgery.format.recognise import recognise
from randsurgery.surgery.bases import map_state, read_base
from randsurgery.surgery.pickles import Skipped, read_pickle

# --- classes that are stood in for ----------------------------------------------------------------

RAN: list[str] = []
"""What of this test's own classes was run."""


class Loud:
    """Runs code whenever it is made, filled or restored."""

    def __init__(self, *_: object) -> None:
        self.value = 3

    def __setstate__(self, _: object) -> None:
        RAN.append("setstate")

    def __reduce__(self) -> Any:
        return (loud, (1,), {"value": 3})


def loud(*_: object) -> Loud:
    RAN.append("called")
    return Loud()


class LoudDict(dict[str, Any]):
    """A dict of one's own, as configurations are, that runs code when it is filled."""

    def __setitem__(self, key: str, value: Any) -> None:
        RAN.append("item")
        super().__setitem__(key, value)


class LoudList(list[Any]):
    """The same of a list."""

    def append(self, value: Any) -> None:
        RAN.append("append")
        super().append(value)

    def extend(self, values: Any) -> None:
        RAN.append("extend")
        super().extend(values)


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


def filled(kind: Any) -> Any:
    found = kind()
    if isinstance(found, list):
        found += [1, 2]
    else:
        dict.__setitem__(found, "a", 1)
        dict.__setitem__(found, "b", [2])
        found.more = 1  # a dict of one's own has attributes, too
    return found


THINGS: dict[str, Callable[[], Any]] = {
    "argparse.Namespace": lambda: argparse.Namespace(lr=0.1, path=Path("x")),
    "pathlib": lambda: Path("a/b"),
    "numpy number": lambda: np.float64(3),
    "numpy array": lambda: np.arange(3),
    "numpy dtype": lambda: np.dtype("f4"),
    "numpy generator": lambda: np.random.default_rng(0).bit_generator.state,
    "torch.Size": lambda: torch.Size([2, 3]),
    "torch.dtype": lambda: torch.float16,
    "enum": lambda: Colour.RED,
    "dataclass": Settings,
    "slots": Slots,
    "datetime": lambda: datetime.datetime(2020, 1, 1),
    "defaultdict": lambda: collections.defaultdict(list, {"a": [1]}),
    "OrderedDict": lambda: collections.OrderedDict(a=1),
    "Counter": lambda: collections.Counter("abc"),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "set": lambda: {1, 2},
    "frozenset": lambda: frozenset([1]),
    "complex": lambda: 1j,
    "bytes": lambda: b"abc",
    "large number": lambda: 1 << 70,
    "slice": lambda: slice(1, 2),
    "partial": lambda: functools.partial(max, 1),
    "function": lambda: os.path.join,
    "class": lambda: nn.Linear,
    "module": lambda: nn.Linear(2, 2),
    "device": lambda: torch.device("cpu"),
    "own class": Loud,
    "own dict": lambda: filled(LoudDict),
    "own list": lambda: filled(LoudList),
    "nested": lambda: {"a": [argparse.Namespace(b=(Path("x"), Colour.RED))]},
}


@pytest.mark.parametrize("old", [False, True], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("thing", THINGS)
def test_what_lies_beside_the_weights_is_skipped_and_never_run(
    thing: str, old: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.pth"
    saved = {"before": 1, "thing": THINGS[thing](), "state_dict": {"w": torch.arange(4.0)}}
    torch.save({**saved, "after": 2}, path, _use_new_zipfile_serialization=not old)
    RAN.clear()
    if old and thing in ("class", "module"):  # saved with its source text, in a way of its own
        with pytest.raises(FileFormatError, match="does not open safely"):
            read_base(path)
        return
    base = read_base(path)
    assert not RAN
    assert base.names == ("w",)
    assert base.tensors.read("w").array.tolist() == [0, 1, 2, 3]
    assert (base.about["before"], base.about["after"]) == (1, 2)
    map_state(path).tensors["w"]()
    assert not RAN


def test_stand_ins_know_their_names_and_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"args": argparse.Namespace(lr=1), "w": torch.ones(2)}, path)
    before = torch.serialization.get_safe_globals()
    found = read_pickle(path)
    assert isinstance(found["args"], Skipped)
    assert found["args"].name == "argparse.Namespace"
    assert not hasattr(found["args"], "lr")
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_what_others_let_torch_take_is_not_run_either(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"thing": Loud(), "w": torch.ones(2)}, path)
    RAN.clear()
    with torch.serialization.safe_globals([Loud, loud]):
        assert isinstance(read_base(path).about["thing"], Skipped)
        assert loud in torch.serialization.get_safe_globals()
    assert not RAN


def test_a_tensor_of_an_unknown_class_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"a": torch.ones(2), "b": Loud()}}, path)
    with pytest.raises(
        FileFormatError, match=r"'b' is a test_checkpoint_files\.loud, where a tens"
    ):
        read_base(path)


# --- attacks --------------------------------------------------------------------------------------

MARK = "it-ran"


class Attack:
    """Reduces to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


ATTACKS: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Attack(os.system, f"touch {MARK}"),
    "subprocess": lambda: Attack(subprocess.call, ["touch", MARK]),
    "eval": lambda: Attack(eval, f"open({MARK!r}, 'w')"),
    "exec": lambda: Attack(exec, f"open({MARK!r}, 'w')"),
    "open": lambda: Attack(builtins.open, MARK, "w"),
    "mkdir": lambda: Attack(os.mkdir, MARK),
    "pathlib": lambda: Attack(Path.touch, Path(MARK)),
    "torch.load": lambda: Attack(torch.load, "inner.pth"),
    "torch.save": lambda: Attack(torch.save, [1], MARK),
    "zipfile": lambda: Attack(zipfile.ZipFile, MARK, "w"),
    "pickle.loads": lambda: Attack(pickle.loads, pickle.dumps(Attack(os.mkdir, MARK))),
    "getattr": lambda: Attack(getattr, Attack(__import__, "os"), "mkdir"),
    "functools": lambda: Attack(functools.reduce, os.mkdir, [MARK, 0o777]),
}


@pytest.mark.parametrize("forced", [False, True], ids=["", "with torch's switch for unsafe loads"])
@pytest.mark.parametrize("old", [False, True], ids=["archive", "before 1.6"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_or_does_nothing(
    attack: str, old: bool, forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved = {"state_dict": {"w": torch.ones(2)}, "evil": ATTACKS[attack]()}
    torch.save(saved, "evil.pth", _use_new_zipfile_serialization=not old)
    try:
        base = read_base("evil.pth")
    except FileFormatError:
        base = None
    assert base is None or isinstance(base.about["evil"], Skipped)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.pth"]


@pytest.mark.parametrize("attack", ["os.system", "subprocess", "eval", "exec", "open", "getattr"])
def test_what_no_checkpoint_needs_is_named(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"w": torch.ones(2), "evil": ATTACKS[attack]()}, path)
    with pytest.raises(FileFormatError, match="which could run commands"):
        read_base(path)


def test_no_module_is_imported_on_a_files_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nclass Thing: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import evil_module  # type: ignore[import-not-found]

    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(2), "thing": evil_module.Thing()}, path)
    monkeypatch.delitem(sys.modules, "evil_module")
    (tmp_path / "imported").unlink()
    assert isinstance(read_base(path).about["thing"], Skipped)
    assert "evil_module" not in sys.modules
    assert not (tmp_path / "imported").exists()


def test_a_name_that_was_not_listed_is_refused_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(2), "thing": Loud()}, path)
    monkeypatch.setattr("randsurgery.surgery.pickles._named", lambda _: {})
    RAN.clear()
    with pytest.raises(FileFormatError, match="in a way that torch does not open safely"):
        read_base(path)
    assert not RAN


def test_another_protocol_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.ones(2), "args": argparse.Namespace()}, path, pickle_protocol=4)
    with pytest.raises(FileFormatError, match=r"torch\.save\(model\.state_dict\(\), FILE\)"):
        read_base(path)


# --- what is no checkpoint ------------------------------------------------------------------------


def archive(*names: str) -> bytes:
    """A zip archive of files of those names."""
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return into.getvalue()


def scripted() -> bytes:
    into = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), into)
    return into.getvalue()


def numpy_archive() -> bytes:
    into = io.BytesIO()
    np.savez(into, a=np.ones(3), b=np.ones(2))
    return into.getvalue()


def numpy_array() -> bytes:
    into = io.BytesIO()
    np.save(into, np.ones(3))
    return into.getvalue()


def tarred() -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as file:
        file.addfile(tarfile.TarInfo("storages"))
    return into.getvalue()


def onnx_model() -> bytes:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    found: bytes = onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()
    return found


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "an empty file": (lambda: b"", "is empty"),
    "a git-lfs pointer": (lambda: LFS, "git lfs pull"),
    "an HTML page": (lambda: b"\n<!DOCTYPE html><html>Not found", "an HTML or XML page"),
    "an XML error": (lambda: b"<?xml version='1.0'?><Error>", "an HTML or XML page"),
    "TorchScript": (scripted, "a TorchScript archive"),
    "torch.export": (lambda: archive("m/archive_format"), "a program of torch.export"),
    "ONNX": (onnx_model, "an ONNX file"),
    "NumPy `.npz`": (numpy_archive, "a NumPy archive"),
    "NumPy `.npy`": (numpy_array, "a NumPy array"),
    "Keras, TensorFlow `.h5`": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
    "Keras `.keras`": (lambda: archive("config.json", "model.weights.h5"), "a Keras archive"),
    "TensorFlow `.ckpt`": (
        lambda: bytes(99) + bytes.fromhex("57fb808b247547db"), "a TensorFlow checkpoint",
    ),
    "GGUF": (lambda: b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file"),
    "a pickle of other programs": (lambda: pickle.dumps({"a": 1}), "that torch.save did not write"),
    "a tar archive": (tarred, "a tar archive; unpack it"),
    "a gzip archive": (lambda: b"\x1f\x8b\x08" + bytes(99), "a gzip archive; unpack it"),
    "another zip archive": (lambda: archive("a.txt"), "a zip archive, but not one of torch"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["weights.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("what", CONTENTS)
def test_what_is_no_checkpoint_is_named(what: str, name: str, tmp_path: Path) -> None:
    make, words = CONTENTS[what]
    path = tmp_path / name
    path.write_bytes(make())
    openers: list[Callable[[Any], Any]] = [recognise, read_base]
    if name.endswith(".safetensors"):
        openers.append(Container)
    for opener in openers:
        with pytest.raises(FileFormatError, match=words) as caught:
            opener(path)
        assert str(caught.value).startswith(f"{name}: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


def test_what_is_one_is_known_whatever_it_is_called(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = dense().state_dict()
    torch.save(state, tmp_path / "a.safetensors.bak")
    torch.save(state, tmp_path / "b", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.pth")
    (tmp_path / "d").write_text(' {"a": 1}')
    (tmp_path / "e").write_text("nothing")
    kinds = [recognise(path) for path in sorted(tmp_path.iterdir())]
    assert kinds == ["torch.save", "torch.save", "safetensors", "json", "unknown"]


def test_a_damaged_checkpoint_is_no_traceback(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for old in (False, True):
        torch.save(
            {"state_dict": dense().state_dict(), "args": argparse.Namespace()}, path,
            _use_new_zipfile_serialization=not old,
        )  # fmt: skip
        whole = path.read_bytes()
        for size in (5, 20, 200, len(whole) // 2, len(whole) - 10):
            path.write_bytes(whole[:size])
            with pytest.raises(FileFormatError, match=r"^x\.pth: ") as caught:
                read_base(path)
            assert "\n" not in str(caught.value)
