"""Dense weights used as they are, on images of other sizes and channels, and packed whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ensemble_helpers import fails, one_thread, run, said, succeed
from safetensors.torch import load_file
from surgery_helpers import assert_same_state, same_bits, save_dense
from torch import nn
from torch.nn.utils import prune

import randsurgery as rs
from randsurgery.cli import common
from randsurgery.errors import RandsurgeryError
from randsurgery.format.recipe import BaseSource

pytestmark = pytest.mark.slow

CLASSES = 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def network(arch: str = "test_resnet", seed: int = 0, **args: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm.create_model(arch, **{"num_classes": CLASSES, **args}).eval()


def written(model: nn.Module, path: str = "d.safetensors", dtype: Any = None) -> nn.Module:
    state = model.state_dict()
    if dtype is not None:
        state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    if path.endswith(".safetensors"):
        save_dense(Path(path), state)
    else:
        torch.save(state, path)
    return model


# --- without ceremony -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["d.safetensors", "d.pth"])
def test_dense_weights_are_used_as_a_file_of_ours_is(path: str) -> None:
    model = written(network(), path)
    dense = ("test_resnet", "--checkpoint", path)
    succeed("init", *dense, "-o", "i.safetensors")
    for arguments in (("eval",), ("eval", "--img-size", 48, "--per-class")):
        command, *options = arguments
        found, ours = (said(command, *net, *options) for net in (dense, ("i.safetensors",)))
        assert {**found, "file": ""} == {**ours, "file": ""}
    rows = [succeed("predict", *net, "--top", 2).stdout for net in (dense, ("i.safetensors",))]
    assert rows[0] == rows[1]
    assert rows[0].count("\n") == 361
    succeed("export", *dense, "-o", "e.safetensors")
    assert_same_state(load_file("e.safetensors"), model.state_dict())
    succeed("export", *dense, "--format", "timm")
    assert_same_state(load_file("test_resnet-timm/model.safetensors"), model.state_dict())
    succeed("export", *dense, "--self-contained", "-o", "whole.safetensors")
    assert not rs.read_recipe("whole.safetensors").bases
    assert_same_state(rs.load("whole.safetensors").state_dict(), model.state_dict())


def test_dense_weights_become_onnx() -> None:
    pytest.importorskip("onnxruntime")
    written(network())
    told = said("export", "test_resnet", "--checkpoint", "d.safetensors", "--format", "onnx")
    assert told["difference"] < 1e-4


def test_a_folder_is_shown_images_as_it_says() -> None:
    model = network()
    cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "input_size": (3, 40, 40),
           "crop_pct": 1.0, "interpolation": "bilinear"}  # fmt: skip
    timm.models.save_for_hf(model, "folder", model_config=cfg, safe_serialization=True)
    config = json.loads(Path("folder/config.json").read_text())
    config["pretrained_cfg"] |= cfg
    Path("folder/config.json").write_text(json.dumps(config))
    done = succeed("eval", "./folder", "-v")
    assert "no preprocessing is recorded" not in done.stderr
    succeed("popup", "./folder", "--epochs", 1, "-o", "p.safetensors", "-q")  # digits' own look
    shown = succeed("predict", "./folder", "-v", "-o", "p.csv").stderr
    assert "40 x 40 pixels, bilinear, crop 1, mean 0.5, 0.4, 0.3, deviation 0.2, 0.25, 0.3" in shown


def test_what_is_assumed_of_the_images_is_said() -> None:
    written(network())
    done = succeed("eval", "test_resnet", "--checkpoint", "d.safetensors")
    assert "no preprocessing is recorded: using 32 x 32 pixels" in done.stderr


def test_which_class_is_which_must_be_known() -> None:
    written(network(num_classes=12))
    dense = ("test_resnet", "--checkpoint", "d.safetensors")
    assert "10 classes and the network 12 without names" in fails(4, "eval", *dense)
    assert said("eval", *dense, "--any-classes")["images"] == 360
    written(network(num_classes=7))
    assert "digits has 10 classes, the network 7" in fails(4, "eval", *dense)


@pytest.mark.parametrize(
    ("code", "arguments", "told"),
    [
        (3, ("eval", "test_resnet"), "pass --checkpoint or --pretrained"),
        (3, ("export", "test_resnet"), "`randsurgery init test_resnet`"),
        (3, ("eval", "d.safetensors"), "pass it as --checkpoint with an architecture"),
        (3, ("predict", "nothing"), "no such file"),
        (2, ("eval", "i.safetensors", "--checkpoint", "d.safetensors"), "--checkpoint"),
        (2, ("eval", "i.safetensors", "--width", "0.5"), "width"),
        (2, ("eval", "i.safetensors", "--ema"), "--ema"),
        (2, ("export", "test_resnet", "--checkpoint", "d.safetensors", "--base", "d.safetensors"),
         "--base"),
        (2, ("eval", "resnet", "--checkpoint", "d.safetensors"), "unknown architecture"),
        (4, ("eval", "test_vit", "--checkpoint", "d.safetensors"), "test_vit"),
    ],
)  # fmt: skip
def test_one_line_for_what_is_no_network(code: int, arguments: tuple[str, ...], told: str) -> None:
    written(network())
    succeed("init", "test_resnet", "-o", "i.safetensors")
    assert told in fails(code, *arguments)


# --- other images than the checkpoint's -----------------------------------------------------------

# architecture, arguments of the checkpoint, of the network: what timm adapts
ADAPTED = {
    "a stem to grey": ("test_resnet", {}, {"in_chans": 1}),
    "a stem to more channels": ("test_resnet", {}, {"in_chans": 5, "num_classes": 3}),
    "a grey stem to colours": ("test_resnet", {"in_chans": 1}, {"in_chans": 3}),
    "a stem of ours": ("conv2", {"width": 0.1}, {"width": 0.1, "in_chans": 2}),
    "positions": ("test_vit", {}, {"img_size": 96}),
    "positions and a patch embedding": ("test_vit", {}, {"img_size": 96, "in_chans": 1}),
    "relative positions": ("test_coatnet", {}, {"img_size": 96}),
    "windows": ("swin_s3_tiny_224", {"embed_dim": 24}, {"embed_dim": 24, "img_size": 192}),
}
OPTIONS = {"in_chans": "--in-chans", "img_size": "--img-size", "num_classes": "--num-classes"}


def as_options(args: dict[str, int]) -> list[object]:
    own = [part for k, v in args.items() if k in OPTIONS for part in (OPTIONS[k], v)]
    return own + [
        p for k, v in args.items() if k not in OPTIONS for p in ("--model-kwargs", f"{k}={v}")
    ]


@pytest.mark.filterwarnings("ignore")  # of torch about timm's own code
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "bfloat16"])
@pytest.mark.parametrize("what", ADAPTED)
def test_other_images_are_adapted_to_as_timm_does(what: str, dtype: torch.dtype) -> None:
    arch, had, has = ADAPTED[what]
    state = written(network(arch, **had), dtype=dtype).state_dict()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    overlay = {"state_dict": state, "num_classes": CLASSES, "source": "",
               "input_size": (had.get("in_chans", 3), 32, 32)}  # fmt: skip
    theirs = timm.create_model(
        arch, pretrained=True, pretrained_cfg_overlay=overlay,
        **{"num_classes": CLASSES, "in_chans": 3, **has},
    ).state_dict()  # fmt: skip

    done = succeed("init", arch, "--checkpoint", "d.safetensors", *as_options(has),
                   "-o", "n.safetensors")  # fmt: skip
    recipe, ours = rs.read_recipe("n.safetensors"), rs.load("n.safetensors").state_dict()
    changed = [name for name in ours if ours[name].shape != state[name].shape]
    head = [name for name in changed if name.startswith("fc.")]
    assert bool(head) == ("num_classes" in has)
    for name, tensor in ours.items():
        if name in head:
            continue
        assert same_bits(tensor, theirs[name]), name
        own = isinstance(recipe.tensors[name].source, BaseSource)
        assert own == (name not in changed), name
    adapted = [name for name in changed if name not in head]
    assert adapted
    assert adapted[0] in done.stderr
    assert "adapted as timm does" in done.stderr
    assert ("drawn anew" in done.stderr) == bool(head)
    succeed("inspect", "verify", "n.safetensors")
    if arch != "swin_s3_tiny_224":
        seen = as_options({"img_size": 32, **has, "num_classes": CLASSES})
        succeed("popup", arch, "--checkpoint", "d.safetensors", *seen, "--epochs", 1,
                "-o", "p.safetensors")  # fmt: skip
        assert said("eval", "p.safetensors")["images"] == 360


def test_channels_are_the_checkpoints_unless_others_are_asked_for() -> None:
    model = written(network(in_chans=1))
    dense = ("test_resnet", "--checkpoint", "d.safetensors")
    for command in (("init", *dense), ("convert", "d.safetensors", "--arch", "test_resnet")):
        succeed(*command, "-o", "n.safetensors", "--force")
        assert rs.read_recipe("n.safetensors").model.args["in_chans"] == 1  # type: ignore[union-attr]
        assert_same_state(rs.load("n.safetensors").state_dict(), model.state_dict())
    assert said("eval", *dense)["images"] == 360
    done = succeed("train", *dense, "--epochs", 1, "-o", "t.safetensors")
    assert "is [16, 1, 3, 3] in d.safetensors, [16, 3, 3, 3] here" in done.stderr


@pytest.mark.parametrize(
    ("arch", "had", "has"),
    [
        ("conv4", {"width": 0.1}, {"width": 0.2}),
        ("conv4", {"width": 0.1}, {"width": 0.1, "img_size": 48}),
        ("mixer_s32_224", {}, {"img_size": 96}),
        ("pit_ti_224", {}, {"img_size": 96}),  # timm has no resampling for it
    ],
)
def test_what_timm_does_not_adapt_is_refused(
    arch: str, had: dict[str, Any], has: dict[str, Any]
) -> None:
    written(network(arch, **had))
    told = fails(4, "init", arch, "--checkpoint", "d.safetensors", *as_options(has))
    assert "timm does not adapt it" in told
    assert "pass --width, --img-size, --in-chans or --model-kwargs as it was" in told


def test_a_random_stem_in_place_of_an_adapted_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """timm says so in its log alone."""
    written(network())

    def unable(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("timm.models._builder.adapt_input_conv", unable)
    told = fails(4, "init", "test_resnet", "--checkpoint", "d.safetensors", "--in-chans", 1)
    assert "timm does not adapt it" in told


def test_a_pruned_stem_is_not_adapted() -> None:
    model = network()
    prune.l1_unstructured(model.conv1[0], "weight", amount=0.5)
    torch.save(model.state_dict(), "d.pth")
    told = fails(4, "init", "test_resnet", "--checkpoint", "d.pth", "--in-chans", 1)
    assert "is pruned" in told


# --- packed whole ---------------------------------------------------------------------------------


def test_independent_networks_are_packed_whole_and_come_back() -> None:
    models = [written(network(seed=seed), f"d{seed}.pth") for seed in range(3)]
    arguments = ("ensemble", "build", "d0.pth", "d1.pth", "--arch", "test_resnet")
    done = succeed(*arguments, "-o", "e.safetensors")
    assert "kept whole" in done.stderr
    assert "kept whole" not in succeed(*arguments, "--kind", "full", "-o", "f.safetensors").stderr
    assert Path("e.safetensors").read_bytes() == Path("f.safetensors").read_bytes()
    succeed("ensemble", "add", "e.safetensors", "d2.pth")
    succeed("inspect", "verify", "e.safetensors")
    for seed, model in enumerate(models):
        back = rs.load("e.safetensors", member=f"d{seed}")
        assert_same_state(back.state_dict(), model.state_dict())
        succeed("ensemble", "extract", "e.safetensors", f"d{seed}", "-o", f"x{seed}.safetensors")
        assert_same_state(rs.load(f"x{seed}.safetensors").state_dict(), model.state_dict())
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    with torch.no_grad():
        mean = sum(model(images).softmax(1) for model in models) / 3
    for engine in ("switch", "held", "batched"):
        with rs.load_ensemble("e.safetensors", engine=engine) as ensemble:
            torch.testing.assert_close(ensemble(images), mean)
    succeed("ensemble", "remove", "e.safetensors", "d0")
    assert [m.name for m in rs.read_recipe("e.safetensors").members] == ["d1", "d2"]


def test_files_of_other_seeds_are_packed_with_kind_full() -> None:
    for seed in (1, 2):
        succeed("train", "conv2", "--width", 0.1, "--seed", seed, "--epochs", 1,
                "-o", f"s{seed}.safetensors")  # fmt: skip
    files = ("ensemble", "build", "s1.safetensors", "s2.safetensors", "-o", "e.safetensors")
    assert "(--kind full)" in fails(4, *files)
    succeed(*files, "--kind", "full")
    for seed in (1, 2):
        assert_same_state(
            rs.load("e.safetensors", member=f"s{seed}").state_dict(),
            rs.load(f"s{seed}.safetensors").state_dict(),
        )
    assert "--kind goes with --members" in fails(2, *files, "--kind", "fc", "--force")


def test_dense_weights_do_not_join_a_backbone_without_a_base() -> None:
    written(network(), "d.pth")
    succeed("init", "test_resnet", "--num-classes", 10, "-o", "i.safetensors")
    files = ("i.safetensors", "d.pth")
    told = fails(4, "ensemble", "build", *files, "--arch", "test_resnet", "-o", "e.safetensors")
    assert "pass --base FILE" in told
    assert "pass --base FILE" in fails(4, "ensemble", "add", *files)
    succeed("ensemble", "build", *files, "--arch", "test_resnet", "--kind", "full",
            "-o", "e.safetensors")  # fmt: skip


# --- how the program ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyError("x"), 70, "a bug of ours (KeyError: 'x'); please report it, with what -v shows"),
        (MemoryError(), 2, "out of memory; a smaller --batch-size"),
        (RuntimeError("CUDA out of memory. Tried"), 2, "out of memory; a smaller --batch-size"),
        (RandsurgeryError("so"), 1, "so"),
    ],
)
def test_a_bug_is_told_from_an_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, told: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("randsurgery.jobs.evaluate.run_eval", broken)
    assert told in fails(code, "eval", "n.safetensors")
    shown = run("eval", "n.safetensors", "-v").stderr
    assert "Traceback" in shown
    assert f"{type(error).__name__}" in shown
    assert common.verbosity.level == 2


def test_an_initialiser_that_draws_nothing_is_told() -> None:
    written(network())
    dense = ("test_resnet", "--checkpoint", "d.safetensors", "--dry-run")
    told = "--init kaiming-normal draws nothing"
    assert told in succeed("popup", *dense, "--init", "kaiming-normal").stderr
    assert told not in succeed("popup", *dense).stderr
    done = succeed("init", *dense, "--init", "kaiming-normal", "--num-classes", 4)
    assert told not in done.stderr


def test_a_torch_file_called_safetensors_has_one_remedy() -> None:
    written(network(), "d.pth")
    Path("d.pth").rename("d.safetensors")
    remedy = "written by torch.save, no safetensors file; rename it to .pth"
    for command in (("convert", "d.safetensors", "--arch", "test_resnet"),
                    ("inspect", "weights", "d.safetensors"), ("eval", "d.safetensors"),
                    ("init", "test_resnet", "--checkpoint", "d.safetensors"),
                    ("ensemble", "build", "d.safetensors", "d.safetensors")):  # fmt: skip
        assert remedy in fails(3, *command), command


def test_two_networks_under_prefixes_are_named() -> None:
    state = network().state_dict()
    torch.save(
        {f"{who}.{n}": t for who in ("student", "teacher") for n, t in state.items()}, "d.pth"
    )
    for command in (("init", "test_resnet", "--checkpoint", "d.pth"),
                    ("convert", "d.pth", "--arch", "test_resnet")):  # fmt: skip
        assert "several networks, under 'student.' and 'teacher.'" in fails(4, *command)


def test_arguments_that_an_architecture_lacks_are_named_as_they_were_given() -> None:
    told = fails(4, "popup", "test_resnet", "--width", "0.5", "--dry-run")
    assert "width=0.5" in told


@pytest.mark.parametrize("size", [5000, 100_000])
def test_cut_off_files_are_called_so(size: int) -> None:
    written(network(), "d.pth")
    Path("d.pth").write_bytes(Path("d.pth").read_bytes()[:size])
    told = fails(3, "eval", "test_resnet", "--checkpoint", "d.pth")
    assert "truncated or damaged; fetch it again" in told
