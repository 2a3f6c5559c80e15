"""``inspect storage``: a file's bytes, from headers alone, in a terminal, a pipe and a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_helpers import raw_file, tensor_header
from inspect_helpers import fails, in_pty, in_terminal, run, succeed, watched
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from surgery_helpers import save_dense

from randsurgery.cli.tables import bar
from randsurgery.errors import FileFormatError
from randsurgery.format.container import Container, pack
from randsurgery.format.derivation import split_payload_name
from randsurgery.format.tensors import RawTensor
from randsurgery.inspection.headers import MemberBytes
from randsurgery.inspection.members import list_members
from randsurgery.inspection.pictures import legible
from randsurgery.inspection.storage import SHOWN, StorageReport, drawn, storage

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
OURS = sorted(p for p in GOLDEN.glob("*.safetensors") if p.name != "base.safetensors")
SEVERAL = sorted(GOLDEN.glob("ensemble-*.safetensors"))
BARS = set("▏▎▍▌▋▊▉█#")


def sparse(path: Path, layers: int, size: int, recipe: bool = False) -> Path:
    """A file of ``layers`` F32 tensors, ``size`` bytes together, that takes no room on the disk."""
    rows = size // layers // 4096
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    entries, at = {}, 0
    for index in range(layers):
        name = f"blocks.{index // 6}.part{index % 6}.weight"
        slot = f"shared/{name}/source" if recipe else name
        header[slot] = tensor_header("F32", [rows, 1024], at, at + rows * 4096)
        source = {"kind": "stored", "digest": "0" * 32}
        entries[name] = {"dtype": "F32", "shape": [rows, 1024], "source": source}
        at += rows * 4096
    if recipe:
        told = {"format": "randsurgery", "version": 1, "tensors": entries, "members": [{}]}
        header["__metadata__"]["randsurgery"] = json.dumps(told)
    start = raw_file(header)
    path.write_bytes(start)
    os.truncate(path, len(start) + at)
    return path


# --- the figures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_byte_is_counted_once(path: Path) -> None:
    """Against the payloads' own names and sizes, member by member."""
    report = storage(path)
    assert report.bytes == path.stat().st_size
    with Container(path) as file:
        sizes = {name: info.stop - info.start for name, info in file.infos.items()}
        assert report.header_bytes == file.header_bytes
    by_owner: dict[str, int] = {}
    for name, size in sizes.items():
        owner = split_payload_name(name)[0]
        by_owner[owner] = by_owner.get(owner, 0) + size
    assert report.shared_bytes == by_owner.pop("shared", 0)
    assert {m.name: m.payload_bytes for m in report.members if m.payload_bytes} == by_owner
    adds = sum(member.bytes for member in report.members)
    assert report.shared_bytes + report.shared_header_bytes + adds == report.bytes
    assert 0 < report.shared_header_bytes < report.header_bytes
    assert sum(size for _, size in report.breakdown()) == report.bytes
    assert sum(member.dense_bytes for member in report.members) == report.dense_bytes


@pytest.mark.parametrize("path", SEVERAL, ids=lambda path: path.stem)
def test_members_cost_what_ensemble_list_says(path: Path) -> None:
    listed = list_members(path)
    found = storage(path)
    assert [(m.name, m.bytes, m.payload_bytes, m.dense_bytes) for m in found.members] == [
        (m.name, m.bytes, m.payload_bytes, m.dense_bytes) for m in listed.members
    ]
    assert found.shared_bytes == listed.shared_bytes
    told = json.loads(succeed("inspect", "storage", path, "--json"))
    assert [m["bytes"] for m in told["members"]] == [m.bytes for m in listed.members]


def test_a_members_header_text_is_what_the_file_loses_without_it(tmp_path: Path) -> None:
    path = GOLDEN / "ensemble-masks.safetensors"
    out = tmp_path / "less.safetensors"
    succeed("ensemble", "remove", path, "seed-1", "-o", out, "-q")
    lost = next(m for m in storage(path).members if m.name == "seed-1").bytes
    assert abs(path.stat().st_size - out.stat().st_size - lost) <= 64  # padding, digits of offsets


def made(members: int) -> StorageReport:
    rows = tuple(MemberBytes(f"m{i}", 1000 + i, 900, 5000, 3) for i in range(members))
    total = sum(row.bytes for row in rows) + 500
    header = sum(row.header_bytes for row in rows) + 200
    return StorageReport("f", "randsurgery", total, 5000 * members, header, 0, 300, (), rows)


def test_a_chart_shows_the_largest_members_and_of_the_rest_the_mean() -> None:
    few, many = made(SHOWN).parts_held(), made(SHOWN + 30).parts_held()
    assert [name for name, _, _ in few] == ["shared", *(f"m{i}" for i in range(SHOWN))]
    assert len(many) == SHOWN + 2
    assert many[1] == (f"m{SHOWN + 29}", 1000 + SHOWN + 29, 1)
    mean = round(sum(1000 + i for i in range(30)) / 30)
    assert many[-1] == ("30 more, each", mean, 30)
    for parts, report in ((few, made(SHOWN)), (many, made(SHOWN + 30))):
        assert abs(sum(size * count for _, size, count in parts) - report.bytes) <= 30
    assert made(SHOWN + 30).breakdown()[-1] == ("30 more, each", mean)


@pytest.mark.parametrize("members", [3, SHOWN + 6])
def test_every_bar_of_the_chart_has_its_name_and_its_figure(members: int) -> None:
    figure = drawn(made(members))
    whole, parts = figure.axes
    assert [text.get_text() for text in whole.get_yticklabels()] == [
        f"{members} dense files", "this file"
    ]  # fmt: skip
    names = [text.get_text() for text in parts.get_yticklabels()]
    told = [text.get_text() for text in parts.texts]
    assert len(names) == len(told) == len(parts.patches)
    widths = [bar.get_width() for bar in parts.patches]
    if members == 3:
        assert names == ["shared", "m0", "m1", "m2"]
        assert told[1:] == ["1.00", "1.00", "1.00"]
    else:
        assert (names[-1], told[-1]) == ("6 more, each", "6 x 1.00")
        assert widths[-1] == pytest.approx(1.002)
    no_word_lies_on_another(figure)


def test_long_names_of_members_fit_beside_their_bars() -> None:
    rows = tuple(
        MemberBytes(f"{'long-' * 11}{i}-{'long' * 4}", 1000, 900, 5000, 3) for i in range(5)
    )
    figure = drawn(StorageReport("f" * 90, "randsurgery", 5500, 1, 700, 0, 300, (), rows))
    assert len({text.get_text() for text in figure.axes[1].get_yticklabels()}) == 6
    no_word_lies_on_another(figure)


def no_word_lies_on_another(figure: Figure) -> None:
    """What names and figures of bars take, in the figure and apart."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for axes in figure.axes
        for text in [*axes.get_yticklabels(), *axes.texts, axes.title, axes.xaxis.label]
    ]
    for told, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, told
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, told
    for (told, box), (other, there) in combinations(boxes, 2):
        assert not box.overlaps(there), (told, other)


# --- headers alone -------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak stands in /proc")
@pytest.mark.parametrize("command", ["storage", "model"])
@pytest.mark.parametrize("ours", [False, True], ids=["dense", "ours"])
def test_a_gigabyte_is_not_read(tmp_path: Path, command: str, ours: bool) -> None:
    path = sparse(tmp_path / "big.safetensors", 300, 1 << 30, ours)
    peak, heavy = watched("inspect", command, path)
    assert peak < 120_000
    assert not heavy


def test_verify_imports_no_torch() -> None:
    _, heavy = watched("inspect", "verify", GOLDEN / "popup.safetensors")
    assert not heavy


# --- other files ---------------------------------------------------------------------------------


def sharded(folder: Path, weight_map: dict[str, Any] | None = None) -> Path:
    save_dense(folder / "model-1.safetensors", {"a.weight": torch.ones(3, 2)})
    save_dense(folder / "model-2.safetensors", {"b.weight": torch.ones(5), "b.bias": torch.ones(5)})
    places = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors",
              "b.bias": "model-2.safetensors"}  # fmt: skip
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places if weight_map is None else weight_map}))
    return path


def test_a_sharded_file_is_read_by_its_index(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    report = storage(path)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert report.dense_bytes == 64
    assert report.bytes == report.header_bytes + 64
    assert report.parts == 2
    assert "in 2 parts" in succeed("inspect", "storage", path)
    assert "a      " in succeed("inspect", "model", path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"a.weight": "../model-1.safetensors"}, "not a bare name ending in .safetensors"),
        ({"a.weight": "/etc/passwd"}, "not a bare name ending in .safetensors"),
        ({"a.weight": "model-1.bin"}, "its part"),
        ({"a.weight": "model-3.safetensors"}, "its part model-3.safetensors is missing"),
        ({"a.bias": "model-1.safetensors"}, "'a.bias' is not in model-1.safetensors"),
        ({"a.weight": 3}, "weight_map"),
    ],
)
def test_an_index_that_names_what_is_not_there_is_refused(
    tmp_path: Path, index: dict[str, Any], words: str
) -> None:
    path = sharded(tmp_path, index)
    with pytest.raises(FileFormatError, match=words):
        storage(path)
    assert words in fails(3, "inspect", "storage", path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": "b", "a": "c"}}', "\x00"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    fails(3, "inspect", "storage", path)
    fails(3, "inspect", "model", path)


def test_two_parts_with_one_tensor_are_refused(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes((tmp_path / "model-1.safetensors").read_bytes())
    assert "lies in two parts" in fails(3, "inspect", "storage", path)


def test_a_pth_is_read_with_torch_and_it_is_said(tmp_path: Path) -> None:
    path = tmp_path / "[red]w\x1b[31m.pth"
    state = {"b\x1b[31m.weight": torch.ones(30, 20), "[bold]a": torch.ones(7)}
    torch.save(state, path)
    for command in ("storage", "model"):
        result = run("inspect", command, path, *(["--tensors"] if command == "storage" else []))
        assert result.exit_code == 0, result.output
        assert "read, with torch" in result.stderr
        assert "\x1b" not in result.output
        assert "[bold]a" in result.stdout
        assert "b\\x1b[31m" in result.stdout
    report = json.loads(succeed("inspect", "storage", path, "--json", "-q"))
    assert report["dense_bytes"] == 4 * 607
    assert report["kind"] == "torch.save"
    fails(3, "inspect", "model", tmp_path / "missing.pth")


def test_files_without_anything_are_said(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.safetensors"
    nothing.write_bytes(b"")
    for command in ("storage", "model", "verify"):
        assert "0 bytes" in fails(3, "inspect", command, nothing)
    nothing.write_bytes(raw_file({}))
    assert "holds no tensors" in succeed("inspect", "storage", nothing)
    assert json.loads(succeed("inspect", "storage", nothing, "--json"))["ratio"] == 0
    hollow = save_dense(tmp_path / "hollow.safetensors", {"a.w": torch.ones(0, 3)})
    assert "1 tensors without elements" in succeed("inspect", "storage", hollow)
    told = {"format": "randsurgery", "version": 1, "members": [{}]}
    nothing.write_bytes(raw_file({"__metadata__": {"randsurgery": json.dumps(told)}}))
    assert "holds no tensors" in succeed("inspect", "storage", nothing)
    for path in (nothing, hollow):
        succeed("inspect", "storage", path, "--plot", tmp_path / f"{path.stem}.svg")
        whole, parts = drawn(storage(path)).axes
        assert [text.get_text() for text in whole.get_yticklabels()][1] == "this file"
        assert "header" in [text.get_text() for text in parts.get_yticklabels()]


def test_a_recipe_without_its_payload_is_refused(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a.safetensors", 3, 3 * 4096, recipe=True)
    data = path.read_bytes().replace(b"shared/blocks.0.part2", b"shared/blocks.0.part3")
    path.write_bytes(data)
    assert "'shared/blocks.0.part2.weight/source' is missing" in fails(
        3, "inspect", "storage", path
    )


# --- terminal, pipe, picture ---------------------------------------------------------------------


def test_one_member_is_shown_as_it_was() -> None:
    shown = succeed("inspect", "storage", GOLDEN / "popup.safetensors")
    lines = shown.splitlines()
    assert lines[0].split() == ["made", "of", "tensors", "bytes", "dense"]
    assert lines[-1].startswith("popup.safetensors: ")
    assert [line.split("  ")[0] for line in lines[2:-1]] == ["random + mask", "header", "file"]


@pytest.mark.parametrize("name", ["popup", "ensemble-masks"])
def test_bars_stand_in_a_terminal_alone(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    piped = succeed("inspect", "storage", path)
    assert not set(piped) & BARS
    shown = in_terminal("inspect", "storage", path)
    assert set(shown) & BARS
    assert max(map(len, shown.splitlines())) <= 80
    bars = [line for line in shown.splitlines() if set(line) & BARS]
    dense, this = bars[0], next(line for line in bars if line.startswith("this file"))
    assert "dense file" in dense
    assert dense.count("█") > this.count("█")
    if name == "popup":
        assert in_pty("inspect", "storage", path) == shown


def test_a_terminals_name_brings_no_bars_into_a_pipe() -> None:
    command = [sys.executable, "-m", "randsurgery", "inspect", "storage",
               str(GOLDEN / "ensemble-masks.safetensors")]  # fmt: skip
    forced = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, env=forced, check=True)
    assert not set(done.stdout) & BARS
    assert "\x1b" not in done.stdout


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(1, 10) == "█" * 10
    assert bar(0.5, 10) == "█" * 5
    assert bar(0.56, 10) == "█" * 5 + "▋"
    assert bar(1e-9, 10) == "▏"
    assert bar(0, 10) == ""
    assert bar(0.56, 10, "ascii") == "#" * 6
    assert bar(1e-9, 10, "ascii") == "#"
    assert bar(0, 10, "ascii") == ""


def test_long_names_are_whole_in_a_pipe_and_folded_in_a_terminal(tmp_path: Path) -> None:
    long = ".".join(["block"] * 30)
    path = save_dense(tmp_path / "long.safetensors", {long + ".w": torch.ones(3)})
    assert long in succeed("inspect", "model", path)
    assert long in succeed("inspect", "storage", path, "--tensors")
    shown = in_terminal("inspect", "model", path)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_chart_is_a_picture_and_never_written_over(tmp_path: Path, ending: str) -> None:
    plot = tmp_path / f"bytes.{ending}"
    path = GOLDEN / "ensemble-masks.safetensors"
    result = run("inspect", "storage", path, "--plot", plot)
    assert result.exit_code == 0
    assert f"chart: {plot}" in result.stderr
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert plot.read_bytes().startswith(start)
    assert "--force" in fails(6, "inspect", "storage", path, "--plot", plot)
    succeed("inspect", "storage", path, "--plot", plot, "--force")
    assert ".png, .svg or .pdf" in fails(2, "inspect", "storage", path, "--plot", "a.jpg")


def test_a_name_is_no_formula_in_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``$\\frac{$`` would be an error of matplotlib's, ``$x$`` an italic x."""
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    for stem in ("$x$", "$\\frac{$", "a\x1b[31m", "日本 $ö"):
        path = save_dense(tmp_path / f"{stem}.safetensors", {"w": torch.ones(3)})
        plot = tmp_path / "plot.svg"
        succeed("inspect", "storage", path, "--plot", plot, "--force")
        text = plot.read_text(encoding="utf-8")
        assert legible(path.name, 60) in text
        assert "\x1b" not in text


def test_nothing_of_a_file_reaches_a_terminal_as_markup(tmp_path: Path) -> None:
    tensors = {"[red]w": RawTensor.of(np.ones(3, np.float32))}
    path = tmp_path / "[bold]\x1b[31mfile.safetensors"
    told = {"format": "pt", "note\x1b[31m": "[blink]\x1b]0;title\x07 \u202e$x$"}
    path.write_bytes(b"".join(bytes(piece) for piece in pack(tensors, told)))
    for arguments in (("storage", "--tensors"), ("model",)):
        for shown in (
            in_terminal("inspect", *arguments, path),
            succeed("inspect", *arguments, path),
        ):
            assert not set(shown) & set("\x1b\x07\u202e")
            assert "[red]w" in shown
            assert "[bold]\\x1b[31mfile" in shown.replace("\n", "")
    assert "[blink]\\x1b]0;title\\x07 \\u202e$x$" in succeed("inspect", "model", path)
