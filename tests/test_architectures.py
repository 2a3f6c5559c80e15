"""Registry names and arguments: what is allowed, what is refused, and the papers' networks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from surgery_helpers import CONV2, conv2, save_dense, write
from torch import nn

import randsurgery as rs
from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory
from randsurgery.format.container import Container, pack
from randsurgery.format.recipe import Entry, Member, MemberTensor
from randsurgery.format.specs import ModelSpec
from randsurgery.surgery import architectures
from randsurgery.surgery.architectures import (
    ARGUMENTS,
    build_initialised,
    build_meta,
    check_argument,
    check_name,
    class_count,
    classifier_name,
    hidden_names,
    spec_of,
)
from randsurgery.surgery.modules import build
from randsurgery.surgery.recipes import make_recipe

pytestmark = pytest.mark.slow

# --- names and arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet5O", "Resnet50", "resnet50 "])
def test_unknown_names_are_listed_with_near_ones(name: str) -> None:
    with pytest.raises(UsageError, match=r"unknown architecture.*near: .*resnet50"):
        spec_of(name, {})


FOREIGN_NAMES = (
    "hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18", "local-dir:/tmp", "resnet18.a1_in1k",
    "timm/resnet18", "../resnet18", "", "os.system", "resnet18.", "hf-hub:resnet18",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_name_is_the_registrys_alone(name: str) -> None:
    with pytest.raises(UsageError, match="unknown architecture"):
        check_name(name)
    with pytest.raises(IncompatibleError, match="unknown architecture"):
        build_meta(ModelSpec(name=name))


FOREIGN_ARGUMENTS: list[tuple[str, Any]] = [
    ("pretrained", True), ("checkpoint_path", "x.pth"), ("pretrained_cfg", "x"),
    ("scriptable", True), ("cache_dir", "/tmp"), ("features_only", True),
    ("act_layer", "torch.nn.ReLU"), ("block", "x"),
    ("pretrained_cfg_overlay", None), ("exportable", True),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FOREIGN_ARGUMENTS)
def test_other_arguments_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"model argument '{key}' is not allowed"):
        spec_of("resnet18", {key: value})
    with pytest.raises(IncompatibleError, match=f"model argument '{key}' is not allowed"):
        build_meta(ModelSpec(name="resnet18", args={key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_classes", -1), ("num_classes", 10**7), ("num_classes", True), ("num_classes", 10.0),
     ("num_classes", "10"), ("img_size", 0), ("img_size", 10**6), ("depth", 10**9),
     ("embed_dim", 10**6), ("width", 1e6), ("width", 0), ("width", float("nan")),
     ("width", float("inf")), ("width", True), ("widen_factor", 0),
     ("widen_factor", 65), ("widen_factor", 2.0), ("growth_rate", 0), ("growth_rate", 1025),
     ("drop_rate", 1.5), ("dynamic_img_size", 1),
     ("global_pool", "sum"), ("global_pool", 3), ("in_chans", 0), ("mlp_ratio", "4")],
)  # fmt: skip
def test_values_out_of_bounds_or_of_another_type_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"model argument {key} must"):
        check_argument(key, value)


def test_values_within_bounds_are_kept_in_their_type() -> None:
    assert check_argument("width", 1) == 1.0
    assert isinstance(check_argument("width", 1), float)
    for key, bound in ARGUMENTS.items():
        if bound.kind in (int, float):
            for edge in (bound.low, bound.high):
                assert check_argument(key, bound.kind(edge)) == edge


def test_floats_travel_as_hexadecimal_text() -> None:
    spec = spec_of("conv2", {"width": 0.1, "num_classes": 10})
    assert spec.args == {"num_classes": 10, "width": (0.1).hex()}
    assert architectures.arguments_of(spec) == {"num_classes": 10, "width": 0.1}
    with pytest.raises(IncompatibleError, match="width must be float"):
        build_meta(ModelSpec(name="conv2", args={"width": "wide"}))


def test_an_argument_the_architecture_does_not_take_is_named() -> None:
    with pytest.raises(IncompatibleError, match="resnet18 cannot be built with embed_dim=12"):
        build_meta(spec_of("resnet18", {"embed_dim": 12}))
    with pytest.raises(IncompatibleError, match=r"conv8 cannot be built .* at least 16 pixels"):
        build_meta(spec_of("conv8", {"img_size": 8}))


# --- files that ask for what they must not get ---------------------------------------------------


def rewritten(path: Path, change: Any) -> Path:
    """The file with its recipe changed as JSON."""
    with Container(path) as file:
        recipe = json.loads(file.metadata["randsurgery"])
        tensors = Memory({name: file.read(name) for name in file.infos})
        tensors = Memory({n: type(t)(t.dtype, t.array.copy()) for n, t in tensors.items()})
    change(recipe)
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    pieces = pack(tensors, {"format": "pt", "randsurgery": text})
    path.write_bytes(b"".join(bytes(piece) for piece in pieces))
    return path


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_file_cannot_name_a_path_or_the_network(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "net.safetensors", conv2())
    rewritten(path, lambda recipe: recipe["model"].update(name=name))
    with pytest.raises(IncompatibleError, match="unknown architecture"):
        rs.load(path)


@pytest.mark.parametrize(("key", "value"), FOREIGN_ARGUMENTS[:4])
def test_a_file_cannot_pass_other_arguments(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path / "net.safetensors", conv2())
    rewritten(path, lambda recipe: recipe["model"]["args"].update({key: value}))
    with pytest.raises(IncompatibleError, match=f"'{key}' is not allowed"):
        rs.load(path)


def test_shapes_that_do_not_fit_the_architecture_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "net.safetensors", conv2())
    # the classes are the member's own, whatever the architecture's arguments say
    rewritten(path, lambda recipe: recipe["members"][0]["head"].update(classes=11))
    with pytest.raises(IncompatibleError, match=r"fc\.weight is \[10, 25\].*\[11, 25\]"):
        rs.load(path)
    path.unlink()
    write(path, conv2())
    rewritten(path, lambda recipe: recipe["model"].update(name="conv4"))
    with pytest.raises(IncompatibleError, match="conv4"):
        rs.load(path)


def test_a_header_that_claims_terabytes_is_refused_before_allocating(tmp_path: Path) -> None:
    path = write(tmp_path / "net.safetensors", conv2())

    def grow(recipe: Any) -> None:
        recipe["tensors"]["fc1.weight"]["shape"] = [1 << 20, 1 << 18]

    rewritten(path, grow)
    with pytest.raises(IncompatibleError, match="GB"):
        rs.load(path)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 8192}),  # buffers no checkpoint holds
        ("swin_tiny_patch4_window7_224", {"img_size": 7168, "patch_size": 1}),
        ("vit_tiny_patch16_224", {"img_size": 8192, "patch_size": 1, "embed_dim": 16383}),
        ("vit_tiny_patch16_224", {"embed_dim": 16384, "num_heads": 16, "mlp_ratio": 64.0}),
    ],
)
def test_arguments_that_ask_for_terabytes_are_refused_before_allocating(
    name: str, args: dict[str, Any]
) -> None:
    started = time.monotonic()
    with pytest.raises(IncompatibleError, match="GB"):
        build(make_recipe(name, args=args))
    assert time.monotonic() - started < 20


def test_a_swin_of_89600_pixels_is_refused_for_its_size_argument() -> None:
    with pytest.raises(IncompatibleError, match="img_size must lie in"):
        build_meta(ModelSpec(name="swin_tiny_patch4_window7_224", args={"img_size": 89600}))


def test_a_member_with_another_head_of_terabytes_is_refused() -> None:
    recipe = conv2()
    entry: Entry = recipe.recipe.tensors["fc.weight"]
    huge = MemberTensor(entry=entry.model_copy(update={"shape": (1 << 40, 25)}))
    member = Member(tensors={"fc.weight": huge})
    with pytest.raises(IncompatibleError, match="GB"):
        build(Checkpoint(recipe.recipe.with_member(member), recipe.payloads))


def test_an_empty_or_foreign_file_is_no_network(tmp_path: Path) -> None:
    path = save_dense(tmp_path / "dense.safetensors", {"w": torch.ones(2)})
    with pytest.raises(FileFormatError, match="not one of randsurgery"):
        rs.load(path)


# --- construction --------------------------------------------------------------------------------


def test_making_and_building_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    for name in ("test_vit", "test_convnext", "test_resnet", "conv2"):
        recipe = make_recipe(name)
        build(recipe)
        build_initialised(spec_of(name, {}), 3)
    assert torch.equal(torch.get_rng_state(), before)


SMALL = {"img_size": 64, "embed_dim": 24, "num_classes": 5}


def test_what_timm_draws_follows_the_seed_and_is_stored() -> None:
    token = {}
    biases = "layers.0.blocks.0.attn.relative_position_bias_table"
    for seed, noise in ((1, 5), (1, 6), (2, 5)):
        torch.manual_seed(noise)
        recipe = make_recipe("swin_tiny_patch4_window7_224", seed=seed, args=SMALL)
        assert recipe.recipe.tensors[biases].source.kind == "stored"
        token[seed, noise] = build(recipe).get_parameter(biases)
    assert torch.equal(token[1, 5], token[1, 6])
    assert not torch.equal(token[1, 5], token[2, 5])


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "levit_128s", "coatnet_pico_rw_224"]
)
def test_hidden_buffers_are_those_of_timm(name: str) -> None:
    args = {"img_size": 64} if "128s" not in name and "v2" not in name else {}
    spec = spec_of(name, args)
    shell = build_meta(spec)
    assert all(p.is_meta for p in shell.parameters())
    assert hidden_names(shell)
    expected = dict(timm.create_model(name, **args).named_buffers())
    model = build(make_recipe(name, args=args))
    for hidden in hidden_names(shell):
        assert torch.equal(model.get_buffer(hidden), expected[hidden]), hidden


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("resnet18", "fc"), ("vit_tiny_patch16_224", "head"), ("test_convnext", "head.fc"),
     ("test_efficientnet", "classifier"), ("mobilenetv3_small_050", "classifier"),
     ("swin_tiny_patch4_window7_224", "head.fc"), ("densenet121", "classifier"),
     ("regnetx_002", "head.fc"), ("levit_128s", "head"),
     ("deit_tiny_distilled_patch16_224", "head"), ("conv2", "fc"), ("resnet18_cifar", "fc")],
)  # fmt: skip
def test_the_classifier_is_found_whatever_it_is_called(name: str, classifier: str) -> None:
    model = build_meta(spec_of(name, {"num_classes": 7}))
    assert classifier_name(model) == classifier
    assert class_count(model, classifier) == 7


def test_other_modules_classify_with_their_last_linear_layer() -> None:
    assert classifier_name(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))) == "2"
    assert classifier_name(nn.Conv2d(3, 3, 3)) is None
    for name in ("resnet18", "conv2", "test_vit"):
        assert make_recipe(name, args={"num_classes": 0}).recipe.member().head is None


# --- the papers' networks ------------------------------------------------------------------------


def conv_parameters(depth: int, width: float = 1.0, classes: int = 10) -> int:
    """Ramanujan et al., Table 1, counted by hand for 3 x 32 x 32 images; no biases."""
    total, channels, side = 0, 3, 32
    for pair in range(depth // 2):
        for _ in range(2):
            out = int(width * 64 * 2**pair)
            total += 9 * channels * out
            channels = out
        side //= 2
    hidden = int(width * 256)
    return total + channels * side * side * hidden + hidden * hidden + hidden * classes


@pytest.mark.parametrize(
    ("depth", "count"), [(2, 4_300_992), (4, 2_425_024), (6, 2_261_184), (8, 5_275_840)]
)
def test_convn_has_table_1s_weights(depth: int, count: int) -> None:
    assert conv_parameters(depth) == count
    model = timm.create_model(f"conv{depth}")
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.dim() > 1 for p in model.parameters())  # neither biases nor norms
    kinds = [type(m).__name__ for m in model.features]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "ReLU", "MaxPool2d"] * (depth // 2)
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [0.1, 0.5, 0.37, 1.5])
def test_a_width_of_w_has_int_w_times_n_channels(width: float) -> None:
    model = timm.create_model("conv4", width=width, num_classes=7)
    convolutions = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [int(width * n) for n in (64, 64, 128, 128)]
    assert (model.fc1.out_features, model.fc2.out_features) == (int(width * 256),) * 2
    assert model.fc.out_features == 7
    found = sum(p.numel() for p in model.parameters())
    assert found == conv_parameters(4, width, 7)


@pytest.mark.parametrize(("name", "args"), [("conv2", CONV2), ("conv6", {"width": 0.1})])
def test_convn_is_a_timm_model(name: str, args: dict[str, Any]) -> None:
    model = timm.create_model(name, **args)
    images = torch.zeros(1, 3, 32, 32)
    hidden = model.forward_head(model.forward_features(images), pre_logits=True)
    assert hidden.shape == (1, int(0.1 * 256))
    model.reset_classifier(3)
    assert model(images).shape == (1, 3)
    model.reset_classifier(0)
    assert model(images).shape == (1, int(0.1 * 256))
    assert timm.create_model(name, in_chans=1, img_size=28, **args)(
        torch.zeros(1, 1, 28, 28)
    ).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar"])
def test_cifar_resnets_have_the_cifar_stem(name: str) -> None:
    model = build_meta(spec_of(name, {"num_classes": 10}))
    plain = build_meta(spec_of(name.removesuffix("_cifar"), {"num_classes": 10}))
    stem = model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert stem.bias is None
    assert isinstance(model.maxpool, nn.Identity)
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected = {name: tuple(t.shape) for name, t in plain.state_dict().items()}
    assert shapes == {**expected, "conv1.weight": (64, 3, 3, 3)}
    maps = model.forward_features(torch.zeros(1, 3, 32, 32, device="meta"))
    assert maps.shape[2:] == (4, 4)
