"""The CIFAR networks of partial training: counts, shapes, timm's interface, round trips."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from surgery_helpers import TABLE_1, assert_same_state, logits
from torch import nn
from torch.nn import functional as F

import randsurgery as rs
from randsurgery.errors import IncompatibleError
from randsurgery.surgery.architectures import build_meta, classifier_name, spec_of
from randsurgery.surgery.modules import build
from randsurgery.surgery.networks import BasicBlock, DenseLayer, Transition, WideBlock
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.roles import is_norm, select_modules, tensor_roles
from randsurgery.surgery.zoo import zoo_names

pytestmark = pytest.mark.slow

# parameters with 10 classes and three channels at 32 x 32
TOTALS = {
    "wrn_28_4": 5_849_050,
    "wrn_28_10": 36_479_194,
    "densenet_bc_100_12": 769_162,
    "vgg19_cifar": 20_029_514,
    "vgg19_bn_cifar": 20_040_522,
    "alexnet_cifar": 2_472_266,
    "resnet56_cifar": 855_770,
    "lenet_300_100": 953_010,
}
NAMES = tuple(TOTALS)
IN_PARTS = ("wrn_28_4", "wrn_28_10", "densenet_bc_100_12", "resnet56_cifar")
SMALLEST = {"vgg19_cifar": 32, "vgg19_bn_cifar": 32, "alexnet_cifar": 29}
FEATURES = {
    "wrn_28_4": 256, "wrn_28_10": 640, "densenet_bc_100_12": 342, "vgg19_cifar": 512,
    "vgg19_bn_cifar": 512, "alexnet_cifar": 256, "resnet56_cifar": 64, "lenet_300_100": 100,
}  # fmt: skip


def meta(name: str, **args: Any) -> Any:
    return build_meta(spec_of(name, {"num_classes": 10, **args}))


def count(module: nn.Module, *, norms: bool = True) -> int:
    """Parameters of a module, without those of its norms if asked."""
    return sum(
        parameter.numel()
        for part in module.modules()
        if norms or not is_norm(part)
        for parameter in part.parameters(recurse=False)
    )


def images(side: int, channels: int = 3, device: str = "meta") -> torch.Tensor:
    return torch.zeros(2, channels, side, side, device=device)


# --- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_parameters_in_all(name: str, total: int) -> None:
    assert count(meta(name)) == total


# Rosenfeld & Tsotsos, Table 1: what is learned with one part, the norms of the whole net included


@pytest.mark.parametrize(
    ("name", "part", "learned"),
    [(name, part, n) for name, rows in TABLE_1.items() for part, n in rows.items()],
)
def test_partial_training_learns_table_1s_parameters(name: str, part: str, learned: int) -> None:
    model = meta(name)
    norms = sum(count(module) for module in model.modules() if is_norm(module))
    rest = 0 if part == "@norm" else count(model.get_submodule(part), norms=False)
    assert norms + rest == learned
    # the same parameters by patterns, as the commands select them
    chosen = [model.get_submodule(n) for n in select_modules(model, ["@norm", part])]
    owned = {id(p): p.numel() for module in chosen for p in module.parameters(recurse=False)}
    assert sum(owned.values()) == learned


@pytest.mark.parametrize(
    ("name", "total", "fc"),
    [("densenet_bc_100_12", 800_032, 58_288), ("wrn_28_4", 5_872_180, 32_900)],
)
def test_100_classes_add_table_1s_parameters(name: str, total: int, fc: int) -> None:
    model = meta(name, num_classes=100)
    assert count(model) == total
    norms = sum(count(module) for module in model.modules() if is_norm(module))
    assert norms + count(model.fc) == fc


@pytest.mark.parametrize(
    ("name", "args", "total"),
    [
        ("wrn_28_4", {"depth": 40, "widen_factor": 2}, 2_243_546),
        ("wrn_28_10", {"depth": 16, "widen_factor": 8}, 10_961_370),
        ("wrn_28_10", {"widen_factor": 4}, TOTALS["wrn_28_4"]),
        ("densenet_bc_100_12", {"depth": 190, "growth_rate": 40}, 25_624_430),
        ("densenet_bc_100_12", {"depth": 250, "growth_rate": 24}, 15_324_406),
        ("resnet56_cifar", {"depth": 20}, 272_474),
        ("resnet56_cifar", {"depth": 110}, 1_730_714),
        ("lenet_300_100", {"img_size": 28, "in_chans": 1}, 266_610),
    ],
)
def test_arguments_give_the_other_depths_and_widths(
    name: str, args: dict[str, Any], total: int
) -> None:
    assert count(meta(name, **args)) == total


@pytest.mark.parametrize("name", IN_PARTS)
def test_parts_bear_table_1s_names(name: str) -> None:
    parts = [n for n, module in meta(name).named_children() if not is_norm(module)]
    between = [n for n in parts if n.startswith("transition")]
    assert [n for n in parts if n not in between] == ["conv1", "block1", "block2", "block3", "fc"]
    assert between == (["transition1", "transition2"] if "densenet" in name else [])


@pytest.mark.parametrize("name", [*IN_PARTS, "vgg19_bn_cifar"])
def test_norm_without_the_sign_still_means_every_norm(name: str) -> None:
    model = meta(name)
    norms = {n for n, module in model.named_modules() if is_norm(module)}
    assert select_modules(model, ["norm"]) == norms
    assert len(norms) > 1


# --- layers --------------------------------------------------------------------------------------


def convolutions(model: nn.Module) -> list[tuple[int, int, int, int, bool]]:
    """(channels out, kernel, stride, padding, has biases) of each convolution."""
    return [
        (m.out_channels, m.kernel_size[0], m.stride[0], int(m.padding[0]), m.bias is not None)
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]


@pytest.mark.parametrize("name", ["vgg19_cifar", "vgg19_bn_cifar"])
def test_vgg19_has_configuration_es_convolutions(name: str) -> None:
    model = meta(name)
    widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    assert convolutions(model) == [(width, 3, 1, 1, True) for width in widths]
    one = ["Conv2d", "BatchNorm2d", "ReLU"] if "bn" in name else ["Conv2d", "ReLU"]
    kinds = [type(module).__name__ for module in model.features]
    assert kinds == [k for turns in (2, 2, 4, 4, 4) for k in [*one * turns, "MaxPool2d"]]


def test_alexnets_convolutions() -> None:
    model = meta("alexnet_cifar")
    assert convolutions(model) == [
        (64, 11, 4, 5, True), (192, 5, 1, 2, True), (384, 3, 1, 1, True), (256, 3, 1, 1, True),
        (256, 3, 1, 1, True),
    ]  # fmt: skip
    kinds = "".join(type(module).__name__[0] for module in model.features)
    assert kinds == "CRMCRMCRCRCRM"


@pytest.mark.parametrize("name", IN_PARTS)
def test_convolutions_before_norms_have_no_biases(name: str) -> None:
    assert not any(bias for *_, bias in convolutions(meta(name)))


def warm(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with norms that do something, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(5)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3 * (tensor.dim() > 1))
    return module.eval()


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return (x - norm.running_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


def maps(channels: int) -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * channels * 36).view(2, channels, 6, 6)


@pytest.mark.parametrize(("out", "stride"), [(4, 1), (6, 1), (4, 2), (6, 2)])
@torch.no_grad()
def test_wide_blocks_by_hand(out: int, stride: int) -> None:
    block: Any = warm(WideBlock(4, out, stride))
    x = maps(4)
    active = normed(x, block.bn1).clamp(min=0)
    branch = F.conv2d(active, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(normed(branch, block.bn2).clamp(min=0), block.conv2.weight, padding=1)
    kept = x
    if (out, stride) != (4, 1):
        kept = F.conv2d(active, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), branch + kept)


@pytest.mark.parametrize(("out", "stride"), [(4, 1), (6, 1), (4, 2), (6, 2)])
@torch.no_grad()
def test_basic_blocks_by_hand(out: int, stride: int) -> None:
    block: Any = warm(BasicBlock(4, out, stride))
    x = maps(4)
    branch = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(normed(branch, block.bn1).clamp(min=0), block.conv2.weight, padding=1)
    kept = x
    if (out, stride) != (4, 1):
        kept = normed(F.conv2d(x, block.shortcut[0].weight, stride=stride), block.shortcut[1])
    expected = (normed(branch, block.bn2) + kept).clamp(min=0)
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_dense_layers_and_transitions_by_hand() -> None:
    layer: Any = warm(DenseLayer(4, 3))
    x = maps(4)
    new = F.conv2d(normed(x, layer.bn1).clamp(min=0), layer.conv1.weight)
    assert new.shape[1] == 12
    new = F.conv2d(normed(new, layer.bn2).clamp(min=0), layer.conv2.weight, padding=1)
    torch.testing.assert_close(layer(x), torch.cat((x, new), 1))

    transition: Any = warm(Transition(4))
    half = F.conv2d(normed(x, transition.bn).clamp(min=0), transition.conv.weight)
    expected = half.view(2, 2, 3, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(transition(x), expected)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("wrn_28_4", 4), ("wrn_28_10", 4), ("resnet56_cifar", 9), ("densenet_bc_100_12", 16)],
)
def test_stages_halve_the_image_twice(name: str, blocks: int) -> None:
    model = meta(name)
    sides = {}
    for part in ("block1", "block2", "block3"):
        module = model.get_submodule(part)
        assert len(module) == blocks
        module.register_forward_hook(lambda m, i, out, p=part: sides.update({p: out.shape[2]}))
    model(images(32))
    assert sides == {"block1": 32, "block2": 16, "block3": 8}


# --- timm's interface ----------------------------------------------------------------------------


def test_all_names_of_ours_are_listed() -> None:
    assert sorted(zoo_names()) == sorted(timm.list_models(module="zoo"))
    assert set(NAMES) < set(zoo_names())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (28, 1), (64, 3), (33, 2)])
def test_shapes_at_several_image_sizes(name: str, side: int, channels: int) -> None:
    args = {"img_size": side} if name == "lenet_300_100" else {}
    model = meta(name, in_chans=channels, **args)
    if side < SMALLEST.get(name, 0):
        with pytest.raises(ValueError, match=f"at least {SMALLEST[name]} pixels a side"):
            model(images(side, channels))
        return
    assert model(images(side, channels)).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_timm_models(name: str) -> None:
    model, features = meta(name), FEATURES[name]
    assert (model.num_features, model.head_hidden_size) == (features, features)
    assert model.get_classifier() is model.fc
    assert classifier_name(model) == "fc"
    assert (model.fc.in_features, model.fc.out_features) == (features, 10)
    found = model.forward_features(images(32))
    if name == "lenet_300_100":
        assert found.shape == (2, features)
    else:
        side = 1 if name in SMALLEST else 8
        assert found.shape == (2, features, side, side)
    assert model.forward_head(found, pre_logits=True).shape == (2, features)
    assert model.forward_head(found).shape == (2, 10)

    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.fc.weight.is_meta  # the new layer is where the others are
    assert model(images(32)).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images(32)).shape == (2, features)


@pytest.mark.parametrize("name", NAMES)
def test_timm_knows_the_first_layer_the_last_and_the_image(name: str) -> None:
    cfg, model = timm.get_pretrained_cfg(name), meta(name)
    assert cfg.input_size == (3, 32, 32)
    assert cfg.mean == (0.4914, 0.4822, 0.4465)
    assert cfg.classifier == "fc"
    if name == "lenet_300_100":
        assert cfg.first_conv is None
    else:
        assert model.get_submodule(cfg.first_conv).in_channels == 3


@pytest.mark.parametrize("name", ["wrn_28_4", "vgg19_bn_cifar", "alexnet_cifar"])
@torch.no_grad()
def test_initial_values_are_kaimings_by_fan_out(name: str) -> None:
    args = {"depth": 10} if name == "wrn_28_4" else {}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(name, **args)
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 30_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03)
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            assert not module.bias.any()
        if is_norm(module):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()
    spread = 1 / math.sqrt(model.num_features)  # torch's own: uniform within 1 / sqrt(fan in)
    assert float(model.fc.weight.abs().max()) == pytest.approx(spread, rel=0.02)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "said"),
    [
        ("wrn_28_4", 29, r"depth must be 6n \+ 4 \(10, 16, \.\.\.\), found 29"),
        ("wrn_28_10", 4, r"depth must be 6n \+ 4 \(10, 16, \.\.\.\), found 4"),
        ("densenet_bc_100_12", 101, r"depth must be 6n \+ 4 \(10, 16, \.\.\.\), found 101"),
        ("resnet56_cifar", 58, r"depth must be 6n \+ 2 \(8, 14, \.\.\.\), found 58"),
        ("resnet56_cifar", 1, r"depth must be 6n \+ 2 \(8, 14, \.\.\.\), found 1"),
    ],
)
def test_depths_that_do_not_divide_into_blocks_are_refused(
    name: str, depth: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        timm.create_model(name, depth=depth)
    with pytest.raises(IncompatibleError, match=f"{name} cannot be built with depth=.*{said}"):
        build_meta(spec_of(name, {"depth": depth}))


@pytest.mark.parametrize(("name", "smallest"), SMALLEST.items())
def test_images_that_pooling_would_leave_nothing_of_are_refused(name: str, smallest: int) -> None:
    said = f"needs images of at least {smallest} pixels a side, found "
    with pytest.raises(ValueError, match=f"{said}32 x {smallest - 1}"):
        timm.create_model(name, img_size=(32, smallest - 1))
    with pytest.raises(IncompatibleError, match=f"{name} cannot be built with img_size=8.*{said}8"):
        build_meta(spec_of(name, {"img_size": 8}))
    assert meta(name, img_size=smallest)(images(smallest)).shape == (2, 10)
    with pytest.raises(ValueError, match=f"{said}{smallest - 1} x {smallest - 1}"):
        meta(name)(images(smallest - 1))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("wrn_28_4", "growth_rate", 12), ("densenet_bc_100_12", "widen_factor", 2),
     ("vgg19_cifar", "depth", 16), ("resnet56_cifar", "img_size", 32),
     ("lenet_300_100", "width", 2.0)],
)  # fmt: skip
def test_arguments_of_other_networks_are_refused(name: str, key: str, value: Any) -> None:
    with pytest.raises(IncompatibleError, match=f"{name} cannot be built with {key}=.*{key}"):
        build_meta(spec_of(name, {key: value}))


# --- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_a_role(name: str) -> None:
    model = meta(name)
    roles = tensor_roles(model)
    assert set(roles) == set(model.state_dict())
    assert "other" not in {role.role for role in roles.values()}
    biased = {n.removesuffix(".bias") for n, role in roles.items() if role.role == "bias"}
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert biased == ({"fc"} if name in IN_PARTS else layers)
    weights = {role.module for role in roles.values() if role.role == "weight"}
    assert weights == layers


@pytest.mark.parametrize("name", NAMES)
def test_recipe_module_and_file_agree(name: str, tmp_path: Path) -> None:
    recipe = make_recipe(name, seed=3, args={"num_classes": 7})
    kinds = {entry.source.kind for entry in recipe.recipe.tensors.values()}
    assert kinds == {"random", "constant"}
    model = build(recipe)
    said = logits(model)
    assert said.shape == (2, 7)
    assert torch.isfinite(said).all()
    assert float((said[0] - said[1]).abs().max()) > 0
    path = tmp_path / "net.safetensors"
    rs.save(path, recipe, model)
    assert path.stat().st_size < 150_000
    again = rs.load(path)
    assert type(again) is type(model)
    assert_same_state(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SMALLEST])
def test_grey_images_of_28_pixels_do_too(name: str) -> None:
    args: dict[str, Any] = {"num_classes": 7, "in_chans": 1}
    args |= {"img_size": 28} if name == "lenet_300_100" else {}
    args |= {"widen_factor": 1} if name.startswith("wrn") else {}
    model = build(make_recipe(name, args=args))
    said = logits(model, size=28, channels=1)
    assert said.shape == (2, 7)
    assert torch.isfinite(said).all()
