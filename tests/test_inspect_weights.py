"""``inspect weights``: statistics against NumPy's, what is learned, names, tables, plots."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from format_helpers import raw_file, tensor_header
from hypothesis import given, settings
from hypothesis import strategies as st
from inspect_helpers import in_terminal
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner, Result

from randsurgery.cli.app import app
from randsurgery.errors import UsageError
from randsurgery.format.checkpoint import Checkpoint, read_checkpoint
from randsurgery.format.container import pack, write_atomically
from randsurgery.format.rebuild import read_mask
from randsurgery.format.tensors import RawTensor, from_f32
from randsurgery.inspection import moments, weight_files, weight_plots
from randsurgery.inspection.grouping import block, fitting_depth
from randsurgery.inspection.histograms import Histogram, layer_histogram
from randsurgery.inspection.pictures import common_parts, told_apart
from randsurgery.inspection.weight_plots import EXPECTED
from randsurgery.inspection.weights import (
    LayerWeights,
    WeightsReport,
    in_blocks,
    in_order,
    merged,
)

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden"
RNG = np.random.Generator(np.random.Philox(0))
EVIL = "\x1b[31mred[bold]$x^2_$\u202e\n.weight"


def normal(*shape: int) -> npt.NDArray[np.float32]:
    return RNG.standard_normal(shape, dtype=np.float32)


def save(path: Path, **tensors: npt.NDArray[Any] | RawTensor) -> Path:
    raw = {n: t if isinstance(t, RawTensor) else RawTensor.of(t) for n, t in tensors.items()}
    write_atomically(path, pack(raw, {}))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["inspect", "weights", *map(str, arguments)])


def shown(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def found(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout, parse_constant=pytest.fail)


def layers(*arguments: object) -> dict[str, Any]:
    return {layer["name"]: layer for layer in found(*arguments)["files"][0]["layers"]}


def fails(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output)
    assert result.stdout == ""
    return result.stderr


# --- statistics against NumPy's ------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")
def slow(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    """The slow, obvious twin: whole arrays in float64."""
    finite = values[np.isfinite(values)]
    norms = None
    if values.ndim > 1 and values.size:
        kept = np.where(np.isfinite(values), values, 0.0).reshape(len(values), -1)
        norms = [math.sqrt(math.fsum(x * x for x in row)) for row in kept.tolist()]
    if not finite.size:
        return {"count": values.size, "mean": None, "norms": norms}
    return {
        "count": values.size, "finite": finite.size, "nan": int(np.isnan(values).sum()),
        "infinite": int(np.isinf(values).sum()), "zeros": int((finite == 0).sum()),
        "mean": finite.mean(), "mean_abs": np.abs(finite).mean(), "variance": finite.var(),
        "std": finite.std(), "min": finite.min(), "max": finite.max(), "norms": norms,
    }  # fmt: skip


def agree(summary: Any, values: npt.NDArray[np.float64]) -> None:
    scale = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    for key, expected in slow(values).items():
        actual = summary[key] if isinstance(summary, dict) else getattr(summary, key)
        if isinstance(summary, dict) and isinstance(expected, float) and not np.isfinite(expected):
            assert actual is None, key  # which JSON does not know
        elif isinstance(expected, float):
            # a mean near zero is a difference of large sums: relative to these
            floor = 1e-12 * scale if key == "mean" else 0.0
            assert actual == pytest.approx(expected, rel=1e-6, abs=floor), key
        elif key == "norms" and expected is not None:
            known = [math.inf if n is None else n for n in actual]
            assert known == pytest.approx(expected, rel=1e-6, abs=1e-300)
        else:
            assert actual == expected, key


SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[RawTensor, npt.NDArray[np.float64]]:
    """A tensor of any kind with its values: offset, scaled, sparse, with NaN and infinities."""
    shape = draw(SHAPES)
    rng = np.random.Generator(np.random.Philox(draw(st.integers(0, 2**32))))
    values = rng.standard_normal(shape) * 10.0 ** draw(st.integers(-6, 6))
    values = values + draw(st.sampled_from([0.0, 1.0, -1000.0, 1e-3]))
    values = np.where(rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0])), 0.0, values)
    if draw(st.booleans()):
        values = np.where(rng.random(shape) < 0.2, draw(st.sampled_from([np.nan, np.inf])), values)
    dtype = draw(st.sampled_from(["F64", "F32", "F16", "BF16", "I32", "I64", "BOOL"]))
    if dtype == "F64":
        return RawTensor.of(np.asarray(values)), values
    if dtype in ("I32", "I64", "BOOL"):
        kind = {"I32": np.int32, "I64": np.int64, "BOOL": np.bool_}[dtype]
        whole = np.asarray(rng.integers(-50, 50, shape) // 3, dtype=kind)
        return RawTensor.of(whole), whole.astype(np.float64)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = np.asarray(values, dtype=np.float16)
        return RawTensor.of(half), half.astype(np.float64)
    single = np.asarray(values, dtype=np.float32)
    if dtype == "F32":
        return RawTensor.of(single), single.astype(np.float64)
    finite = np.asarray(np.where(np.isfinite(single), single, 0.5), dtype=np.float32)
    bits = np.asarray(from_f32("BF16", finite.reshape(-1))).reshape(shape)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    return RawTensor("BF16", bits), wide.astype(np.float64)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(tensors(), min_size=1, max_size=5),
    st.sampled_from([7, 64, moments.BLOCK]),
)
def test_the_statistics_of_random_checkpoints_are_numpys(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: list[tuple[RawTensor, npt.NDArray[np.float64]]],
    block: int,
) -> None:
    path = tmp_path_factory.mktemp("random") / "a.safetensors"
    save(path, **{f"t{i}": raw for i, (raw, _) in enumerate(checkpoint)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "BLOCK", block)
        report = layers(path, "--tensors", "--norms")
    for index, (_, values) in enumerate(checkpoint):
        agree(report[f"t{index}"]["all"], values)


def test_a_block_of_layers_has_the_statistics_of_all_their_values() -> None:
    parts = [normal(5, 3, 2), 3 + normal(7, 2), np.zeros((2, 2), np.float32), normal(2, 9) * 1e-3]
    parts[3][0, 0] = np.nan
    rows = []
    for index, array in enumerate(parts):
        flat = array.reshape(-1)
        one = moments.summarise("F32", array.shape, lambda a, b, flat=flat: flat[a:b])
        rows.append(LayerWeights(f"b.{index}.weight", "F32", array.shape, array.size, all=one))
    (block,) = in_blocks(rows, 1)
    assert block.all is not None
    expected = slow(np.concatenate([array.reshape(-1) for array in parts]).astype(np.float64))
    for key in ("count", "nan", "zeros", "mean", "mean_abs", "variance", "min", "max"):
        assert getattr(block.all, key) == pytest.approx(expected[key], rel=1e-9), key
    assert len(block.all.norms or ()) == sum(len(array) for array in parts)


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats_have_torchs_values(name: str) -> None:
    kind = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(kind).to(torch.float64).numpy()
    np.testing.assert_array_equal(moments.as_f64(name, codes), expected)


def test_values_far_from_zero_keep_their_variance(tmp_path: Path) -> None:
    values = 1e6 + RNG.standard_normal((3, 300_001))
    one = layers(save(tmp_path / "a.safetensors", w=values))["w"]["all"]
    assert one["variance"] == pytest.approx(values.var(), rel=1e-6)


# --- what is learned -----------------------------------------------------------------------------


def slow_labels(checkpoint: Checkpoint, member: Any, name: str) -> list[str]:
    """The part of every element, one after another, from the sentence."""
    made = checkpoint.derivation(member, name)
    owner, entry, steps = made.owner, made.entry, made.steps
    kinds = [step.overlay.kind for step in steps]
    start = "fixed"
    if owner != "shared" and entry.source.kind in ("stored", "signs", "constant"):
        start = "learned"
    if entry.source.kind == "constant" and "scatter" in kinds:
        start = "masked"
    parts = [start] * entry.size
    for step in steps:
        who, overlay = step.owner, step.overlay
        brought = "fixed" if who == "shared" else "learned"
        if overlay.kind in ("mask", "scatter"):
            bits = read_mask(checkpoint.payloads, step, entry.size).unpack()
        for i in range(entry.size):
            if overlay.kind == "replace":
                parts[i] = brought
            elif overlay.kind == "slice":
                inner = math.prod(entry.shape[overlay.dim + 1 :])
                if i // inner % entry.shape[overlay.dim] < overlay.count:
                    parts[i] = brought
            elif overlay.kind == "mask" and not bits[i]:
                parts[i] = "masked"
            elif overlay.kind == "scatter" and bits[i]:
                parts[i] = brought
    return parts


RECIPES = sorted(
    path.name for path in GOLDEN.glob("*.safetensors")
    if path.name not in ("base.safetensors", "written-otherwise.safetensors")
)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_of_every_golden_file_are_those_of_its_sentences(name: str) -> None:
    path = GOLDEN / name
    report = found(path, "--tensors", "--norms")["files"]
    with read_checkpoint(path) as checkpoint:
        assert len(report) == len(checkpoint.recipe.members)
        for member, network in zip(checkpoint.recipe.members, report, strict=True):
            for layer in network["layers"]:
                raw = checkpoint.rebuild(member, layer["name"])
                values = moments.as_f64(raw.dtype, raw.array.reshape(-1)).reshape(raw.shape)
                agree(layer["all"], values)
                labels = np.array(slow_labels(checkpoint, member, layer["name"]))
                assert layer["masked"] == int((labels == "masked").sum())
                for part in ("learned", "fixed"):
                    here = values.reshape(-1)[labels == part]
                    if not here.size:
                        assert layer[part] is None
                        continue
                    agree({**layer[part], "norms": None}, here)
                    if raw.array.ndim > 1:
                        only = np.where(labels == part, values.reshape(-1), 0.0)
                        having = (labels == part).reshape(len(values), -1).any(axis=1)
                        norms = slow(only.reshape(raw.shape)[having])["norms"]
                        if all(map(math.isfinite, norms)):
                            assert layer[part]["norms"] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("init", ["signed-constant", "kaiming-normal", "kaiming-uniform"])
def test_what_is_expected_is_what_a_large_draw_gives(init: str) -> None:
    drawn = layers("conv4", "--init", init, "--width", "0.5", "--filter", "fc1", "--norms")
    (layer,) = drawn.values()
    for key in ("mean_abs", "variance", "std", "norm"):
        assert layer["all"][key] == pytest.approx(layer["initial"][key], rel=0.02), key
    assert layer["fixed"] == layer["all"]
    assert layer["learned"] is None


def test_a_zero_filled_slice_is_compared_with_the_start_of_its_plan() -> None:
    layer = layers(GOLDEN / "slices-zero.safetensors")["fc1.weight"]
    assert layer["initial"]["kind"] == "uniform"
    assert layer["fixed"]["mean_abs"] == 0


def test_headers_alone_answer_what_was_expected(tmp_path: Path) -> None:
    damaged = bytearray((GOLDEN / "slices-out.safetensors").read_bytes())
    damaged[-400:] = bytes(400)
    path = tmp_path / "a.safetensors"
    path.write_bytes(damaged)
    assert run(path).exit_code == 3
    layer = layers(path, "--expected")["fc1.weight"]
    assert (layer["initial"]["kind"], layer["all"]) == ("uniform", None)
    assert "uniform" in shown(path, "--expected")
    base = tmp_path / "b.safetensors"
    base.write_bytes((GOLDEN / "on-base.safetensors").read_bytes())
    assert "is needed" in fails(4, base)
    assert "not known" in shown(base, "--expected")
    assert "layers" in shown(base, "--base", GOLDEN / "base.safetensors")


def test_a_base_that_no_file_builds_on_is_refused() -> None:
    files, base = [GOLDEN / "popup.safetensors"], GOLDEN / "base.safetensors"
    for tail in ((), ("--expected",)):
        told = fails(2, *files, base, "--base", base, *tail)
        assert f"no file builds on a base; leave {base} out" in told
    assert "layers" in shown(*files, GOLDEN / "on-base.safetensors", "--base", base)


def test_members_stand_side_by_side() -> None:
    path = GOLDEN / "ensemble-masks.safetensors"
    assert "[3] ensemble-masks.safetensors:seed-2" in shown(path)
    one = found(path, GOLDEN / "popup.safetensors", "--member", "seed-1")["files"]
    assert [file["member"] for file in one] == ["seed-1", None]
    assert "members: seed-0, seed-1, seed-2" in fails(2, path, "--member", "seed-9")


# --- files of all kinds --------------------------------------------------------------------------


def test_a_sharded_file_is_its_tensors(tmp_path: Path) -> None:
    first, second = normal(3, 4), normal(2, 5)
    save(tmp_path / "a-1.safetensors", **{"x.weight": first})
    save(tmp_path / "a-2.safetensors", **{"y.weight": second})
    index = tmp_path / "a.safetensors.index.json"

    def write(weight_map: object) -> Path:
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return index

    both = {"x.weight": "a-1.safetensors", "y.weight": "a-2.safetensors"}
    report = layers(write(both), "--norms")
    agree(report["x.weight"]["all"], first.astype(np.float64))
    agree(report["y.weight"]["all"], second.astype(np.float64))
    assert "not a bare name" in fails(3, write({"x.weight": "../a-1.safetensors"}))
    assert "'z.weight' is not in a-1.safetensors" in fails(
        3, write({"z.weight": "a-1.safetensors"})
    )
    assert "is missing" in fails(3, write({"x.weight": "a-3.safetensors"}))
    assert "no weight_map" in fails(3, write(["x"]))
    index.write_text('{"weight_map": {"x": "a", "x": "b"}}')
    assert "duplicate key" in fails(3, index)


def test_a_pth_is_its_tensors_in_its_order(tmp_path: Path) -> None:
    state = {
        "z.weight": torch.randn(3, 4),
        "a.weight": torch.randn(4, 6).t(),
        "c": torch.zeros(2, 2, dtype=torch.complex64),
        "n": torch.tensor(3),
    }
    path = tmp_path / "a.pth"
    torch.save({"state_dict": state, "epoch": 3}, path)
    report = layers(path, "--norms")
    assert list(report) == ["z.weight", "a.weight"]
    agree(report["a.weight"]["all"], state["a.weight"].numpy().astype(np.float64))
    assert found(path)["files"][0]["skipped"] == {"c": "complex64"}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert list(layers(path)) == ["z.weight", "a.weight"]


def test_what_holds_no_layer_is_said(tmp_path: Path) -> None:
    empty = save(tmp_path / "empty.safetensors")
    assert shown(empty) == "empty.safetensors: holds no tensor\n"
    assert found(empty)["files"][0]["layers"] == []
    whole = save(tmp_path / "i.safetensors", q=np.ones((3, 4), np.int8), b=normal(4))
    text = shown(whole)
    assert "2 tensors, no layer" in text
    assert "1 tensor of integers" in text
    assert "--tensors" in text
    assert layers(whole, "--tensors")["q"]["all"]["mean"] == 1
    nothing = save(tmp_path / "z.safetensors", **{"x.weight": normal(0, 3)})
    assert re.search(r"^x +empty", shown(nothing), re.M)
    assert layers(nothing)["x.weight"]["all"]["mean"] is None
    (tmp_path / "zero.safetensors").touch()
    (tmp_path / "zero.pth").touch()
    assert "0 bytes" in fails(3, tmp_path / "zero.safetensors")
    assert "is empty" in fails(3, tmp_path / "zero.pth")
    assert "no such file" in fails(3, tmp_path / "nothing.pth")
    assert "unknown architecture" in fails(2, "resnet5")


def test_nan_and_infinity_are_counted_and_shown(tmp_path: Path) -> None:
    values = normal(4, 8)
    values[0, 0], values[1, 1], values[2, 2] = np.nan, np.inf, -np.inf
    path = save(tmp_path / "a.safetensors", x=values, y=np.full((2, 2), np.nan, np.float32))
    agree(layers(path, "--norms")["x"]["all"], values.astype(np.float64))
    text = shown(path)
    assert "x: 1 NaN and 2 infinite values" in text
    assert "y: 4 NaN and 0 infinite values" in text
    assert "not finite" in text
    huge = save(tmp_path / "h.safetensors", x=np.full((2, 2), 1e200))
    assert layers(huge)["x"]["all"]["infinite"] == 0


# --- names from files ----------------------------------------------------------------------------


def texts(path: Path) -> str:
    return path.read_bytes().decode("latin-1")


@pytest.mark.parametrize("tail", [(), ("--norms",), ("--tensors",), ("--histogram", EVIL)])
def test_no_name_reaches_the_terminal_unescaped(tmp_path: Path, tail: tuple[str, ...]) -> None:
    path = tmp_path / "$a_b$[red].pth"
    torch.save({EVIL: torch.randn(3, 4), "c\x07": torch.zeros(1, dtype=torch.complex64)}, path)
    for files in ((path,), (path, path)):
        text = shown(*files, "--csv", tmp_path / "a.csv", "--force", *tail)
        text += (tmp_path / "a.csv").read_text()
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\x07" not in text
        assert "[bold]" in "".join(text.split())
    error = fails(2, path, "--filter", "\x1b[31mre")
    assert "\x1b" not in error


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_names_are_no_mathematics_on_a_figure(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "_$\\frac{a}$.pth"  # as mathematics this is an error
    torch.save({EVIL: torch.randn(3, 4), "_$\\frac{$.weight": torch.randn(2, 2)}, path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tail in ((), ("--histogram", EVIL)):
            out = tmp_path / f"a.{ending}"
            figure = picture(out, path, "--force", *tail)
            assert out.read_bytes().startswith(start)
            names = {text.get_text(): text.get_parse_math() for text in figure.findobj(Text)}
            assert names[path.name] is False
            assert tail or names["_$\\frac{$"] is False
            assert not any("\x1b" in name for name in names)


# --- figures -------------------------------------------------------------------------------------


def picture(out: Path, *arguments: object) -> Figure:
    """The figure that --plot writes."""
    seen: list[Figure] = []
    whole = Figure.savefig

    def savefig(self: Figure, *args: Any, **more: Any) -> None:
        whole(self, *args, **more)
        seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        assert f"written: {out}" in run(*arguments, "--plot", out).stderr
    (figure,) = seen
    return figure


def curves(axes: Axes) -> list[list[float | None]]:
    """The heights of each line, a gap as None; those without any left out."""
    lines = [np.asarray(line.get_ydata(), float).tolist() for line in axes.get_lines()]
    found = [[None if math.isnan(y) else y for y in line] for line in lines]
    return [line for line in found if any(y is not None for y in line)]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def ticks(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_xticklabels()]


def weights_of(name: str, *labels: str) -> WeightsReport:
    """A network whose layers are all alike."""
    one = moments.Summary(6, mean=0.1, mean_abs=0.5, variance=0.25, norms=(1.0, 3.0))
    rows = tuple(LayerWeights(f"{la}.weight", "F32", (2, 3), 6, all=one) for la in labels)
    return WeightsReport(name, None, name, None, rows, len(rows))


def test_a_network_alone_has_a_curve_of_learned_and_one_of_fixed_values(tmp_path: Path) -> None:
    path = GOLDEN / "slices-out.safetensors"
    figure = picture(tmp_path / "a.svg", path)
    report = layers(path)
    assert legend(figure) == [f"{path.name} (learned)", f"{path.name} (fixed)", EXPECTED]
    assert [axes.get_ylabel() for axes in figure.axes] == ["mean |w|", "variance"]
    assert ticks(figure.axes[1]) == [name.removesuffix(".weight") for name in report]
    for axes, key in zip(figure.axes, ("mean_abs", "variance"), strict=True):
        drawn = curves(axes)
        for part in ("learned", "fixed"):
            assert [layer[part] and layer[part][key] for layer in report.values()] in drawn
        assert [layer["initial"][key] for layer in report.values()] in drawn


def test_norms_are_drawn_in_a_panel_of_their_own(tmp_path: Path) -> None:
    path = GOLDEN / "slices-out.safetensors"
    figure = picture(tmp_path / "a.svg", path, "--norms")
    report = layers(path, "--norms")
    (axes,) = figure.axes
    assert axes.get_ylabel() == "mean norm of the filters"
    assert [layer["learned"] and layer["learned"]["norm"] for layer in report.values()] in curves(
        axes
    )
    dashed = [line for line in axes.get_lines() if line.get_color() == weight_plots.GREY]
    assert list(dashed[0].get_ydata()) == [la["initial"]["norm"] for la in report.values()]


def test_what_is_expected_is_the_curve_where_no_value_is_read(tmp_path: Path) -> None:
    paths = [GOLDEN / "slices-out.safetensors", GOLDEN / "popup.safetensors"]
    figure = picture(tmp_path / "a.svg", *paths, "--expected")
    assert legend(figure) == [path.name for path in paths]
    for axes, key in zip(figure.axes, ("mean_abs", "variance"), strict=True):
        drawn = curves(axes)
        assert len(drawn) == 2
        for line, file in zip(drawn, found(*paths, "--expected")["files"], strict=True):
            known = [layer["initial"][key] for layer in file["layers"]]
            assert [y for y in line if y is not None] == known
    (norms,) = picture(tmp_path / "b.svg", paths[0], "--expected", "--norms").axes
    assert norms.get_ylabel() == "expected mean norm of the filters"


def test_no_two_of_64_curves_look_alike_and_65_are_refused() -> None:
    many = [weight_plots._look(i) for i in range(64)]
    assert len({(d["color"], str(d["linestyle"]), d["marker"]) for d in many}) == 64
    assert len({(d["color"], str(d["linestyle"])) for d in many[:32]}) == 32
    figure = weight_plots.drawn([weights_of(f"n{i}", "a", "b") for i in range(24)])
    for artists in (figure.legends[0].get_lines(), figure.axes[0].get_lines()[::2]):
        looks = {(a.get_color(), str(a._dash_pattern), a.get_marker()) for a in artists}  # type: ignore[attr-defined]
        assert len(looks) == 24
    with pytest.raises(UsageError, match="64 curves apart, found 65"):
        weight_plots.drawn([weights_of(f"n{i}", "a") for i in range(65)])


def test_no_two_networks_of_a_histogram_look_alike() -> None:
    edges, none = (0.0, 1.0, 2.0), dict[str, Any]()

    def lines(count: int) -> Figure:
        counts = {f"n{i}": (1 + i, 1) for i in range(count)}
        return weight_plots.drawn_histogram(Histogram("w", edges, counts, none))

    figure = lines(24)
    looks = {
        (a.get_color(), str(a._dash_pattern), a.get_marker())  # type: ignore[attr-defined]
        for a in figure.legends[0].get_lines()
    }
    assert len(looks) == len(legend(figure)) == 24
    drawn = {(str(p.get_edgecolor()), str(p._dash_pattern)) for p in figure.axes[0].patches}  # type: ignore[attr-defined]
    assert len(drawn) == 24
    with pytest.raises(UsageError, match="64 curves apart, found 65"):
        lines(65)


def test_long_names_are_told_apart_on_the_axis() -> None:
    stem = "transformer.encoder.very_long_module_name"
    long = [f"{stem}.{i}.self_attention_projection_out" for i in range(70)]
    figure = weight_plots.drawn([weights_of("a", *long)])
    assert ticks(figure.axes[1])[1] == "2.self_attention_projection_out"
    assert figure.axes[1].get_xlabel() == f"{stem}.*"
    figure = weight_plots.drawn([weights_of("a", "stem", *long)])
    shown = ticks(figure.axes[1])
    assert len(set(shown)) == len(shown) == 36
    assert ".1.self" in shown[1]
    assert figure.axes[1].get_xlabel() == ""
    assert ticks(weight_plots.drawn([weights_of("a", long[0])]).axes[1])[0].startswith("transf")
    names = [f"a_very_long_name_of_a_file_that_goes_on_{i}_and_ends_alike.st" for i in (1, 2)]
    assert len(set(legend(weight_plots.drawn([weights_of(name, "a") for name in names])))) == 2


@given(st.lists(st.text("ab.\x1b\\", max_size=40), unique=True, min_size=1))
def test_names_that_differ_have_labels_that_differ(names: list[str]) -> None:
    assert len(set(told_apart(names, 20))) == len(names)
    for name, label in zip(names, told_apart(names, 20), strict=True):
        assert name == label or len(name) > 20 or "\x1b" in name or "(" in label
    stem = common_parts(names)
    assert not stem or stem.endswith(".")
    assert all(name.startswith(stem) for name in names)


@pytest.mark.parametrize("top", [1.6, 1.9, 3.0, 8.0, 60.0])
def test_an_axis_has_two_numbers_or_more(top: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0.65, top])
    weight_plots._scale(axes)
    FigureCanvasAgg(figure).draw()
    low, high = axes.get_ylim()
    shown = [
        tick for which in (axes.yaxis.get_major_ticks(), axes.yaxis.get_minor_ticks())
        for tick in which if tick.label1.get_text() and low <= tick.get_loc() <= high
    ]  # fmt: skip
    assert len(shown) > 1


def test_where_nothing_can_be_drawn_nothing_is_written(tmp_path: Path) -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    cases = {
        "found no layer": save(tmp_path / "empty.safetensors"),
        "found 1 layer, none with a finite mean": save(tmp_path / "z.safetensors", x=normal(0, 3)),
        "found 2 layers, none": save(tmp_path / "0.safetensors", x=0 * normal(2, 3), y=nan),
    }
    out, table = tmp_path / "a.png", tmp_path / "a.csv"
    for words, path in cases.items():
        assert words in fails(2, path, "--plot", out, "--csv", table)
    last = tmp_path / "0.safetensors"
    assert "filters' norm above 0" in fails(2, last, "--plot", out, "--norms")
    assert "known expected mean" in fails(2, last, "--plot", out, "--expected")
    for path, layer in ((tmp_path / "z.safetensors", "x"), (last, "y")):
        told = fails(2, path, "--histogram", layer, "--plot", out, "--csv", table)
        assert f"found no finite value in {layer}" in told
    assert not out.exists()
    assert not table.exists()


def test_what_can_be_drawn_is_drawn_without_the_rest(tmp_path: Path) -> None:
    zero = save(tmp_path / "0.safetensors", a=np.zeros((2, 3)), c=np.full((2, 3), 1e308))
    one = save(tmp_path / "1.safetensors", a=np.full((2, 3), 0.5), b=np.zeros((2, 3)))
    figure = picture(tmp_path / "a.svg", zero, one)
    (axes,) = figure.axes  # all variances are 0
    assert curves(axes) == [[0.5, None, None]]
    assert legend(figure) == ["0.safetensors (nothing to draw)", "1.safetensors"]


# --- histograms ----------------------------------------------------------------------------------

FAR = 1.7e308
ULP = float(np.spacing(1000.0))


@pytest.mark.parametrize(
    "values",
    [(-FAR, FAR, 0.0), (FAR,), (-FAR,), (0.0,), (5e-324, 1e-323), (1.0, np.nextafter(1.0, 2.0))]
    + [(-1003.7, -1003.7 + n * ULP) for n in range(1, 40)],
)  # fmt: skip
def test_a_histogram_counts_every_value_however_far_or_near(
    tmp_path: Path, values: tuple[float, ...]
) -> None:
    path = save(tmp_path / "a.safetensors", w=np.array([values, values]))
    (network,) = weight_files.with_members([[dense(path)]], [])
    bins = layer_histogram([network], "w")
    assert list(bins.edges) == sorted(bins.edges)
    assert bins.edges[0] <= min(values) <= max(values) <= bins.edges[-1] < math.inf
    assert sum(bins.counts["a"]) == 2 * len(values)
    (axes,) = weight_plots.drawn_histogram(bins).axes
    FigureCanvasAgg(axes.get_figure()).draw()  # type: ignore[arg-type]


def dense(path: Path) -> weight_files.Network:
    with contextlib.ExitStack() as stack:
        (network,) = weight_files.open_networks(path, stack, "a")
        arrays = {t.name: t.open()(0, t.size).copy() for t in network.tensors}
    return replace(
        network,
        tensors=tuple(
            replace(t, open=lambda name=t.name: lambda a, b: arrays[name][a:b])
            for t in network.tensors
        ),
    )


def test_a_histogram_has_learned_values_before_fixed_ones(tmp_path: Path) -> None:
    path = GOLDEN / "slices-out.safetensors"
    made = found(path, "--histogram", "fc1")["histogram"]["counts"]
    assert list(made) == [f"{path.name} (learned)", f"{path.name} (fixed)"]
    figure = picture(tmp_path / "a.svg", path, "--histogram", "fc1")
    assert legend(figure) == [*made, EXPECTED]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "fc1.weight"
    for patch, counts in zip(axes.patches[:2], made.values(), strict=True):
        shares = patch.get_data().values  # type: ignore[attr-defined]
        np.testing.assert_array_equal(shares, np.array(counts) / sum(counts))


def test_the_layers_that_no_histogram_was_asked_of_are_not_left_out(tmp_path: Path) -> None:
    path = GOLDEN / "slices-out.safetensors"
    text = shown(path, "--histogram", "fc1")
    assert "1 layer, 576 weights\n" in text
    assert "--filter" not in text
    assert "by --filter" in shown(path, "--histogram", "fc1", "--filter", "fc1")
    other = save(tmp_path / "other.safetensors", w=normal(2, 3))
    result = run(path, other, "--histogram", "fc1")
    assert "other.safetensors: none of the layers that are shown" in result.stderr
    assert "--tensors" not in result.output


# --- tables --------------------------------------------------------------------------------------


def many(tmp_path: Path) -> Path:
    names = [f"blocks.{i}.part.{j}.convolution.weight" for i in range(50) for j in range(6)]
    return save(tmp_path / "many.safetensors", **{name: normal(4, 4) for name in names})


@pytest.mark.parametrize("tail", [(), ("--depth", "0"), ("--norms",), ("--expected",)])
def test_tables_of_300_layers_fit_80_columns(tmp_path: Path, tail: tuple[str, ...]) -> None:
    path = many(tmp_path)
    for files in ((path,), (path,) * 5):
        text = in_terminal("inspect", "weights", *files, *tail)
        rows = [row for row in text.splitlines() if row.startswith("blocks.")]
        assert max(map(len, rows)) <= 80
        assert (len(rows) >= 300) == ("0" in tail)
        assert len(rows) <= 100 or "0" in tail


def test_depth_groups_by_the_parts_of_names() -> None:
    assert block("a.b.c", 2) == "a.b"
    assert block("a.b.c", 0) == "a.b.c"
    made = [f"blocks.{i}.{j}.w" for i in range(9) for j in range(9)]
    assert fitting_depth(made) == 2
    assert fitting_depth(made, rows=81) == 0
    assert fitting_depth(made, rows=5) == 2  # one block would say nothing
    assert fitting_depth([f"a{i}.b.w" for i in range(50)]) == 0  # as many blocks as names
    assert fitting_depth([f"a{i % 50}.b{i}.w" for i in range(100)]) == 1


def test_layers_stand_in_the_networks_order() -> None:
    names = ["fc.weight", "layer1.10.w", "layer1.2.w", "conv1.weight", "norm.weight"]
    tensors = tuple(
        weight_files.TensorSource(n, "F32", (2, 2), lambda: lambda a, b: np.zeros(b - a))
        for n in names
    )
    network = weight_files.Network("a", tensors)
    assert [t.name for t in in_order(network)] == [
        "conv1.weight", "layer1.2.w", "layer1.10.w", "norm.weight", "fc.weight"
    ]  # fmt: skip
    assert merged([["a", "b", "d"], ["a", "c", "d"]]) == ["a", "c", "b", "d"]


def test_sort_and_filter(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.safetensors", **{"a.b.weight": normal(2, 2), "a.c.weight": 9 * normal(2, 2),
        "d.weight": 99 * normal(2, 2), "d.bias": normal(2)},
    )  # fmt: skip
    rows = shown(path, "--sort", "std").splitlines()[2:5]
    assert [row.split()[0] for row in rows] == ["d", "a.c", "a.b"]
    assert list(layers(path, "--filter", "a")) == ["a.b.weight", "a.c.weight"]
    assert list(layers(path, "--filter", "*.c")) == ["a.c.weight"]
    assert list(layers(path, "--filter", "d")) == ["d.weight"]
    assert list(layers(path, "--filter", "d.bias")) == ["d.bias"]
    assert "near: std" in fails(2, path, "--sort", "sdt")
    assert "near: a.c, a.b" in fails(2, path, "--filter", "a.x")
    assert "expected auto" in fails(2, path, "--part", "most")
    assert "go with an architecture" in fails(2, path, "--init", "kaiming-normal")


def test_a_pipe_has_no_colours_and_no_bars(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", **{"x.weight": normal(30, 30)})
    for tail in ((), ("--histogram", "x")):
        command = [sys.executable, "-m", "randsurgery", "inspect", "weights", str(path), *tail]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "\x1b" not in done.stdout + done.stderr
        assert "█" not in done.stdout
    assert sum(found(path, "--histogram", "x")["histogram"]["counts"]["a.safetensors"]) == 900


def test_a_histogram_counts_what_numpy_counts(tmp_path: Path) -> None:
    values = normal(50, 40)
    report = found(save(tmp_path / "a.safetensors", w=values), "--histogram", "w")["histogram"]
    expected = np.histogram(values.astype(np.float64), report["edges"])[0]
    assert report["counts"]["a.safetensors"] == expected.tolist()
    both = found(GOLDEN / "slices-out.safetensors", "--histogram", "fc1")["histogram"]["counts"]
    assert {name: sum(counts) for name, counts in both.items()} == {
        "slices-out.safetensors (fixed)": 288, "slices-out.safetensors (learned)": 288
    }  # fmt: skip
    assert "near: fc" in fails(2, GOLDEN / "slices-out.safetensors", "--histogram", "fcc")


# --- output --------------------------------------------------------------------------------------


def test_csv_holds_every_part_and_keeps_an_older_file(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    shown(GOLDEN / "slices-out.safetensors", "--csv", table)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {row["part"] for row in rows if row["tensor"] == "fc1.weight"} == {
        "all", "learned", "fixed"
    }  # fmt: skip
    report = layers(GOLDEN / "slices-out.safetensors")
    for row in rows:
        expected = report[row["tensor"]][row["part"]]
        assert float(row["variance"]) == expected["variance"]
        assert float(row["initial_std"]) == report[row["tensor"]]["initial"]["std"]
    before = table.read_bytes()
    assert "exists already" in fails(6, GOLDEN / "popup.safetensors", "--csv", table)
    assert table.read_bytes() == before
    shown(GOLDEN / "popup.safetensors", "--csv", table, "--force")
    assert table.read_bytes() != before


def test_outputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", w=normal(2, 2))
    assert ".png" in fails(2, path, "--plot", tmp_path / "a.gif")
    told = fails(6, path, "--csv", path, "--force")
    assert "is read by this command; choose another --csv" in told
    png = path.rename(tmp_path / "a.png")
    assert "choose another --plot" in fails(6, png, "--plot", png, "--force")
    png.rename(path)
    assert "no such folder" in fails(6, path, "--csv", tmp_path / "b" / "a.csv")
    assert path.stat().st_size > 0


def test_a_safetensors_file_is_read_without_torch_a_block_at_a_time(tmp_path: Path) -> None:
    """Peak memory: far below the file's size, which is ten times its largest tensor's."""
    size = 1 << 21
    path = save(tmp_path / "a.safetensors", **{f"l{i}.weight": normal(2, size) for i in range(10)})
    code = f"""
import resource, sys
from randsurgery.cli.app import app
try:
    app(["inspect", "weights", {os.fspath(path)!r}])
except SystemExit as end:
    assert not end.code
status = open("/proc/self/status").read() if sys.platform == "linux" else "VmHWM: 0 kB"
print("torch" in sys.modules, status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch_loaded, peak = done.stderr.split()[-2:]
    assert torch_loaded == "False"
    assert int(peak) * 1024 < 3 * (2 * size * 4) + 150e6


def test_bool_bytes_that_are_neither_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file({"a": tensor_header("BOOL", [2, 2], 0, 4)}, bytes([0, 1, 2, 1])))
    assert "BOOL bytes other than 0 and 1" in fails(3, path, "--tensors")


def test_a_distribution_beyond_float64_is_null_in_json() -> None:
    beyond = weight_files.Initial("normal", 1e300, 0.0, math.inf, math.inf, math.nan)
    found = LayerWeights("a", "F32", (2, 2), 4, initial=beyond).to_json(norms=False)
    assert json.loads(json.dumps(found, allow_nan=False))["initial"] == {
        "kind": "normal", "scale": 1e300, "mean": 0.0, "mean_abs": None, "variance": None,
        "norm": None, "std": None,
    }  # fmt: skip


def test_several_files_are_sorted_by_the_largest_figure_of_any(tmp_path: Path) -> None:
    one = save(tmp_path / "1.safetensors", **{"a.weight": normal(2, 2), "b.weight": normal(2, 2)})
    two = save(
        tmp_path / "2.safetensors", **{"a.weight": normal(2, 2), "b.weight": 99 * normal(2, 2)}
    )
    for files in ((one, two), (two, one)):
        rows = shown(*files, "--sort", "std").splitlines()[2:4]
        assert [row.split()[0] for row in rows] == ["b", "a"]
    rows = shown(one, two, "--sort", "name").splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["a", "b"]


def test_a_corrupt_payload_is_told_with_its_file(tmp_path: Path) -> None:
    sound = GOLDEN / "popup.safetensors"
    data = bytearray(sound.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    assert "damaged.safetensors: payload 'main/" in fails(3, sound, damaged)
