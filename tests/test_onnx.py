"""ONNX files: what onnxruntime makes of them is what torch makes of the file they came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import CONV2, conv2, everything, same_bits, write
from timm.models import register_model
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.recipe import Member
from randsurgery.format.specs import InputSpec
from randsurgery.jobs import onnx as job
from randsurgery.surgery.heads import FixedClassifier

pytestmark = pytest.mark.slow

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, on import
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES = ("ant", "bee", "[red]cat\x1b", "dog", "élan")
LOOK = InputSpec(
    size=(24, 40), channels=3, mean=((0.5).hex(), (0.25).hex(), (0.1).hex()),
    std=((0.3).hex(),) * 3, interpolation="bilinear", crop=(0.875).hex(),
)  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments), "--format", "onnx"])


def fails(code: int, *arguments: object) -> str:
    """The one line of an export that ends with that code."""
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if not line.startswith("input: ")]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    return errors[0]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- the files that are exported ------------------------------------------------------------------


def popped_conv2() -> rs.Checkpoint:
    """Masks, class names and preprocessing."""
    recipe = conv2(num_classes=5, img_size=40)
    changed = recipe.recipe.model_copy(
        update={
            "input": LOOK.model_copy(update={"size": (40, 40)}),
            "members": (Member(name="main", classes=CLASSES, head=recipe.member().head),),
        }
    )
    recipe = rs.Checkpoint(changed, recipe.payloads)
    return rs.harvest(recipe, rs.attach(rs.build(recipe), rs.Popup(k="0.5")))


def statistics(model: nn.Module) -> None:
    """Norms that are not what they were drawn as, as after training."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_mean", "norm.weight", "bias")):
                tensor.add_(torch.rand(tensor.shape, generator=draw))


def trained(name: str, **args: Any) -> rs.Checkpoint:
    recipe = rs.make_recipe(name, "kaiming-normal", seed=2, args={"num_classes": 5, **args})
    model = rs.build(recipe)
    statistics(model)
    return rs.harvest(recipe, model)


def recorded(recipe: rs.Checkpoint, size: tuple[int, int]) -> rs.Checkpoint:
    look = LOOK.model_copy(update={"size": size})
    return rs.Checkpoint(recipe.recipe.model_copy(update={"input": look}), recipe.payloads)


def fixed_head(name: str, **args: Any) -> rs.Checkpoint:
    recipe = rs.fix_head(rs.make_recipe(name, seed=1, args=args), "hadamard")
    model = rs.build(recipe)
    with torch.no_grad():
        for head in model.modules():
            if isinstance(head, FixedClassifier):
                head.bias.copy_(torch.linspace(-1, 1, len(head.bias)))
    return rs.harvest(recipe, model)


FILES: dict[str, tuple[Callable[[], rs.Checkpoint], tuple[int, int, int]]] = {
    "conv2": (popped_conv2, (3, 40, 40)),
    "resnet": (lambda: recorded(trained("test_resnet"), (48, 64)), (3, 48, 64)),
    "vit": (lambda: trained("test_vit", img_size=32, in_chans=1), (1, 32, 32)),
    "convnext": (lambda: recorded(trained("test_convnext"), (64, 64)), (3, 64, 64)),
    "beit": (  # its fused attention the exporter cannot express
        lambda: trained("beit_base_patch16_224", img_size=32, embed_dim=24, depth=1),
        (3, 32, 32),
    ),
    "fixed head": (lambda: fixed_head("conv2", **CONV2), (3, 32, 32)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of FILES -> a folder with net.safetensors and net.onnx, exported once."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("onnx")
            write(folder / "net.safetensors", FILES[name][0]())
            done = run(folder / "net.safetensors", "-o", folder / "net.onnx", "--json")
            assert done.exit_code == 0, done.output
            (folder / "said.json").write_text(done.stdout)
            folders[name] = folder
        return folders[name]

    return folder_of


@pytest.fixture
def conv2_file(made: Callable[[str], Path]) -> Path:
    return made("conv2") / "net.safetensors"


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# --- what is in them ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_onnxruntime_and_torch_agree_on_any_number_of_images(
    name: str, made: Callable[[str], Path]
) -> None:
    folder, shape = made(name), FILES[name][1]
    runtime, model = session(folder / "net.onnx"), rs.load(folder / "net.safetensors")
    assert [(i.name, i.shape) for i in runtime.get_inputs()] == [("input", ["batch", *shape])]
    assert [o.name for o in runtime.get_outputs()] == ["logits"]
    for count in (1, 2, 3, 5):
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = model(images)
        found = torch.from_numpy(runtime.run(["logits"], {"input": images.numpy()})[0])
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
        if count > 1:
            assert float((expected[0] - expected[1]).abs().max()) > 0


@pytest.mark.parametrize("name", FILES)
def test_the_file_holds_no_trace_of_where_it_was_made(
    name: str, made: Callable[[str], Path]
) -> None:
    proto = onnx.load(made(name) / "net.onnx")
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", job.OPSET)]
    assert not proto.functions
    if name == "conv2":  # nothing to fold into its neighbour
        kept = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        for tensor, value in rs.load(made(name) / "net.safetensors").state_dict().items():
            assert same_bits(torch.tensor(kept[tensor]), value)
    data = (made(name) / "net.onnx").read_bytes()
    for trace in (b".py", b"stack_trace", b"/tmp", os.fsencode(Path.home()), b"pkg.torch"):
        assert trace not in data


def test_metadata_is_what_the_file_records(made: Callable[[str], Path]) -> None:
    said = session(made("conv2") / "net.onnx").get_modelmeta().custom_metadata_map
    assert said == {
        "architecture": "conv2",
        "backbone_id": rs.read_recipe(made("conv2") / "net.safetensors").backbone_id,
        "crop_pct": "0.875",
        "crop_mode": "center",
        "input_size": "[3, 40, 40]",
        "interpolation": "bilinear",
        "label_names": json.dumps(CLASSES),
        "mean": "[0.5, 0.25, 0.1]",
        "member": "main",
        "randsurgery_version": rs.__version__,
        "std": "[0.3, 0.3, 0.3]",
    }
    assert json.loads(said["label_names"]) == list(CLASSES)


def test_nothing_is_said_of_preprocessing_that_was_not_recorded(
    made: Callable[[str], Path],
) -> None:
    said = session(made("vit") / "net.onnx").get_modelmeta().custom_metadata_map
    assert set(said) == {"architecture", "backbone_id", "member", "randsurgery_version"}


def test_json_says_what_was_made(made: Callable[[str], Path]) -> None:
    said = json.loads((made("resnet") / "said.json").read_text())
    path = made("resnet") / "net.onnx"
    assert 0 <= said.pop("difference") < 1e-5
    assert said == {
        "path": str(path),
        "bytes": path.stat().st_size,
        "load": f"onnxruntime.InferenceSession({str(path)!r}).run(None, {{'input': images}})",
        "opset": 18,
        "input": [3, 48, 64],
    }
    images = torch.zeros(1, 3, 48, 64).numpy()
    logits = eval(said["load"], {"onnxruntime": onnxruntime, "images": images})[0]
    assert logits.shape == (1, 5)


def test_a_quiet_program_writes_the_same_bytes_and_nothing_else(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    source = made("fixed head") / "net.safetensors"
    command = [sys.executable, "-W", "always", "-m", "randsurgery", "export", str(source),
               "--format", "onnx"]  # fmt: skip
    done = subprocess.run(
        command, cwd=here, capture_output=True, text=True, timeout=200,
        env={
            **{key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"},
            **{"PYTHONHASHSEED": "77", "TMPDIR": str(elsewhere), "HOME": str(elsewhere)},
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert listing(here) == ["net.onnx"]
    assert listing(elsewhere) == []
    assert (here / "net.onnx").read_bytes() == (made("fixed head") / "net.onnx").read_bytes()
    first, load = done.stdout.splitlines()
    assert first.startswith("net.onnx: ")
    assert load.startswith("onnxruntime.InferenceSession('net.onnx')")
    heard = [line for line in done.stderr.splitlines() if line]
    assert heard[0] == "input: 3x32x32 images (the architecture's size; the file records none)"
    assert heard[1].startswith("written and verified: ")
    assert len(heard) == 2


def test_weights_of_16_bits_become_float32(tmp_path: Path) -> None:
    state = rs.build(conv2()).half().state_dict()
    torch.save(state, tmp_path / "half.pth")
    path = tmp_path / "net.safetensors"
    arguments = ["init", "conv2", "--checkpoint", str(tmp_path / "half.pth"), "-q", "-o", str(path)]
    for pair in CONV2.items():
        arguments += ["--model-kwargs", "=".join(map(str, pair))]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    done = run(path, "--base", tmp_path / "half.pth", "-o", tmp_path / "net.onnx")
    assert done.exit_code == 0, done.output
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    found = session(tmp_path / "net.onnx").run(None, {"input": images.numpy()})[0]
    with torch.no_grad():
        expected = rs.load(path, base=tmp_path / "half.pth").float()(images)
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(
    package: str, conv2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'randsurgery[onnx]'" in fails(2, conv2_file, "-o", tmp_path / "a.onnx")
    assert listing(tmp_path) == []


def test_an_exporter_of_old_is_refused(
    conv2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cu128")
    assert "torch 2.9 or newer, found torch 2.8.1+cu128" in fails(2, conv2_file)


def stub(monkeypatch: pytest.MonkeyPatch, proto: Any) -> None:
    """An exporter that gives this."""
    monkeypatch.setattr(job, "_translate", lambda *_: proto.SerializeToString(deterministic=True))


def test_without_onnxruntime_the_file_is_checked_alone(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = onnx.load(made("conv2") / "net.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    stub(monkeypatch, good)
    source, target = made("conv2") / "net.safetensors", tmp_path / "a.onnx"
    done = run(source, "-o", target, "--json")
    assert done.exit_code == 0, done.output
    assert "onnxruntime is not installed" in done.stderr
    assert json.loads(done.stdout)["difference"] is None
    assert target.read_bytes() == (made("conv2") / "net.onnx").read_bytes()
    del good.graph.node[0]
    stub(monkeypatch, good)
    assert "cannot be run" in fails(4, source, "-o", tmp_path / "b.onnx")
    assert listing(tmp_path) == ["a.onnx"]


def test_a_file_whose_logits_differ_is_not_written(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = onnx.load(made("conv2") / "net.onnx")
    last = next(part for part in wrong.graph.initializer if part.name == "fc.weight")
    values = onnx.numpy_helper.to_array(last).copy()
    values[0] *= 1.001
    last.CopyFrom(onnx.numpy_helper.from_array(values, last.name))
    stub(monkeypatch, wrong)
    target = tmp_path / "a.onnx"
    target.write_bytes(b"mine")
    source = made("conv2") / "net.safetensors"
    said = fails(4, source, "-o", target, "--force")
    assert "away from torch's" in said
    assert "nothing was written" in said
    assert target.read_bytes() == b"mine"
    assert listing(tmp_path) == ["a.onnx"]


def test_a_network_that_is_nothing_but_rounding_has_room_for_it() -> None:
    images, logits = job._noise(2, (1, 2, 2)), job._noise(2, (1, 1, 3)).reshape(2, 3)
    calm, restless = job._Trial(images, logits, 0.0), job._Trial(images, logits, 0.1)
    moved = logits + 0.05 * abs(logits).max()
    assert restless.compare(moved, "net") == pytest.approx(0.05, rel=1e-4)
    said = job.Graph((1, 2, 2), False, True).verdict
    assert said(2e-7) == "written and verified: logits differ from torch's by 2e-07 of the largest"
    assert "verified" not in said(0.05)
    for wrong in (moved, logits[:1], logits * float("nan")):
        with pytest.raises(IncompatibleError, match="net as ONNX gives logits"):
            calm.compare(wrong, "net")


def test_existing_and_unwritable_targets_are_refused_first(
    conv2_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, None)  # nothing is to come this far
    monkeypatch.chdir(tmp_path)
    Path("net.onnx").write_bytes(b"mine")
    assert "--force" in fails(6, conv2_file)
    assert "no such folder" in fails(6, conv2_file, "-o", "missing/net.onnx")
    Path("folder").mkdir()
    assert "is a folder" in fails(6, conv2_file, "-o", "folder")
    done = run(conv2_file, "-o", "b.onnx", "--dry-run")
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [
        "input: 3x40x40 images, as the file records", "would write b.onnx",
    ]  # fmt: skip
    assert listing(tmp_path) == ["folder", "net.onnx"]
    assert Path("net.onnx").read_bytes() == b"mine"


class Moody(nn.Module):
    """What it computes depends on the values it sees, which no graph can say."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3))
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


class Twofold(Moody):
    """Two outputs."""

    def forward(self, x: torch.Tensor) -> Any:
        out = self.fc(x.mean((2, 3)))
        return out, -out


@register_model
def moody_test(**_: Any) -> nn.Module:
    return Moody()


@register_model
def twofold_test(**_: Any) -> nn.Module:
    return Twofold()


@pytest.mark.parametrize(
    ("name", "why"),
    [("moody_test", "torch's exporter cannot express"), ("twofold_test", "several outputs")],
)
def test_an_architecture_that_no_graph_can_say_is_refused(
    name: str, why: str, tmp_path: Path
) -> None:
    write(tmp_path / "net.safetensors", rs.make_recipe(name, seed=1))
    assert f"{name} " in (said := fails(4, tmp_path / "net.safetensors", "-o", tmp_path / "a.onnx"))
    assert why in said
    assert listing(tmp_path) == ["net.safetensors"]


def test_what_is_no_image_for_the_architecture_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "net.safetensors", recorded(conv2(), (20, 20)))
    said = fails(4, tmp_path / "net.safetensors", "-o", tmp_path / "a.onnx")
    assert "conv2 cannot take images of 3x20x20" in said
    write(tmp_path / "vast.safetensors", recorded(conv2(), (1 << 40, 1 << 40)))
    assert "size of images" in fails(4, tmp_path / "vast.safetensors", "-o", tmp_path / "a.onnx")
    assert listing(tmp_path) == ["net.safetensors", "vast.safetensors"]


def test_a_file_without_architecture_and_one_too_large_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "own.safetensors", rs.make_recipe(everything(), seed=1))
    assert "no architecture" in fails(4, tmp_path / "own.safetensors")
    large = conv2(width=20.0)
    with pytest.raises(IncompatibleError, match=r"at most 2\.15 GB, the network needs 6\.\d+ GB"):
        job.plan_graph(large.recipe, large.member())


def test_unknown_formats_are_refused_by_name(conv2_file: Path) -> None:
    from randsurgery.jobs.export import prepare
    from randsurgery.jobs.sources import SourceSpec

    with pytest.raises(UsageError, match="dense, timm or onnx"):
        prepare(SourceSpec(str(conv2_file)), None, kind="tflite", member=None, force=False)
