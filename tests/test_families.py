"""Real round trips of one small network from each family: recipe, file, module, dense export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from surgery_helpers import assert_same_state, logits, same_bits
from torch import nn
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.inspection.storage import storage
from randsurgery.surgery.architectures import hidden_names
from randsurgery.surgery.modules import build, plain_state
from randsurgery.surgery.roles import STANDARDISED
from randsurgery.surgery.scores import attached

pytestmark = pytest.mark.slow

CLASSES = 7

# name, image size in pixels, arguments
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "swin": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "embed_dim": 48}),
    "swinv2": ("swinv2_cr_tiny_ns_224", 64, {"img_size": 64, "embed_dim": 24}),
    "convnext": ("test_convnext", 64, {}),
    "vit": ("test_vit", 32, {"img_size": 32}),
    "vit with register tokens": ("test_vit3", 48, {"img_size": 48}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "densenet": ("densenet121", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "resmlp": ("resmlp_12_224", 32, {"img_size": 32}),
    "maxvit": ("test_maxvit", 160, {}),
    "coatnet": ("test_coatnet", 160, {}),
    "beit": ("beit_base_patch16_224", 32, {"img_size": 32, "embed_dim": 48, "depth": 2}),
    "levit": ("levit_128s", 224, {}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "depth": 2}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"depth": 2}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "byobnet": ("test_byobnet", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "repvit": ("repvit_m0_9", 64, {}),
    "conditional convolutions": ("efficientnet_cc_b0_4e", 64, {}),
    "wide resnet": ("wrn_28_4", 32, {"depth": 10, "widen_factor": 1}),
    "densenet-bc": ("densenet_bc_100_12", 28, {"depth": 16, "growth_rate": 4}),
    "deep resnet": ("resnet56_cifar", 28, {"depth": 14}),
    "alexnet": ("alexnet_cifar", 32, {}),
    "lenet": ("lenet_300_100", 28, {"img_size": 28}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
}


def recipe_of(family: str, seed: int = 5) -> tuple[rs.Checkpoint, int]:
    name, size, args = FAMILIES[family]
    return rs.make_recipe(name, seed=seed, args={"num_classes": CLASSES, **args}), size


def draw_head_bias(model: nn.Module) -> None:
    """Something changed by training, so that a file does not hold seeds alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and parameter.numel() == CLASSES:
                parameter.copy_(torch.linspace(-1, 1, CLASSES).view_as(parameter))


def assert_close_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal tensors, but torch picks kernels by alignment and threads, so not the last bits."""
    assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_recipe_file_module_and_export_agree(family: str, tmp_path: Path) -> None:
    recipe, size = recipe_of(family)
    model = build(recipe)
    draw_head_bias(model)
    path, dense = tmp_path / "net.safetensors", tmp_path / "dense.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path)
    assert_same_state(again.state_dict(), model.state_dict())
    said = logits(model, size)
    assert said.shape[-1] == CLASSES
    assert torch.isfinite(said).all()
    assert float((said[0] - said[1]).abs().max()) > 0  # no branch is silenced by a zero scale
    assert_close_logits(logits(again, size), said)

    done = CliRunner().invoke(app, ["export", str(path), "-o", str(dense), "-q"])
    assert done.exit_code == 0, done.output
    name, _, args = FAMILIES[family]
    plain = timm.create_model(name, checkpoint_path=str(dense), num_classes=CLASSES, **args)
    assert_same_state(plain.state_dict(), model.state_dict())
    for hidden in hidden_names(plain):
        assert torch.equal(again.get_buffer(hidden), plain.get_buffer(hidden)), hidden
    assert_close_logits(logits(plain, size), said)


MASKABLE = [family for family in FAMILIES if family != "nfnet"]


# of tables and temperatures that no mask covers
@pytest.mark.filterwarnings("ignore:neither masked nor learned:randsurgery.RandsurgeryWarning")
@pytest.mark.parametrize("family", MASKABLE)
def test_popup_learns_a_mask_that_comes_back(family: str, tmp_path: Path) -> None:
    recipe, size = recipe_of(family)
    model = rs.attach(build(recipe), rs.Popup(k="0.4"))
    frozen = {n: t.clone() for n, t in plain_state(model).items()}
    before = {name: layer.scores.detach().clone() for name, layer in attached(model).items()}
    step(model, size)
    moved = [n for n, layer in attached(model).items() if not torch.equal(layer.scores, before[n])]
    assert len(moved) > 0.9 * len(before)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, tensor in plain_state(model).items():
        assert name.endswith(statistics) or same_bits(tensor, frozen[name]), name

    path = tmp_path / "net.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path)
    assert not attached(again)
    for name, weight in again.state_dict().items():
        module, _, leaf = name.rpartition(".")
        assert same_bits(weight, getattr(model.get_submodule(module), leaf)), name
        if name in attached(model):
            assert int((weight == 0).sum()) == weight.numel() * 6 // 10
    # torch picks another kernel for a weight that needs no gradient, so the last bits may differ
    assert_close_logits(logits(again, size), logits(model, size))
    masks = [row for row in storage(path).tensors if "mask" in row.overlays]
    weights = sum(row.dense_bytes for row in masks) / 4
    assert sum(row.bytes for row in masks) < weights / 8 + 64 * len(masks)


def step(model: nn.Module, size: int) -> None:
    scores = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(scores, lr=1.0, momentum=0.9)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, labels = torch.randn(2, 3, size, size), torch.tensor([1, 4])
        said = model.train()(images)
        said = said[0] if isinstance(said, tuple) else said
        nn.functional.cross_entropy(said, labels).backward()
    optimizer.step()


def test_networks_that_standardise_their_weights_are_refused() -> None:
    recipe, _ = recipe_of("nfnet")
    model = build(recipe)
    assert any(isinstance(module, STANDARDISED) for module in model.modules())
    with pytest.raises(rs.IncompatibleError, match="standardises its weight"):
        rs.attach(model, rs.Popup(k="0.4"))


def test_at_least_the_families_asked_for_are_here() -> None:
    asked = {"swin", "convnext", "vit", "efficientnet", "nfnet", "regnet", "densenet",
             "mobilenetv3", "mixer"}  # fmt: skip
    assert asked <= set(FAMILIES)
    assert len(FAMILIES) >= 14
