"""``convert``: files of hidden-networks and dense files, against the networks they came from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hidden_twin as twin
import numpy as np
import pytest
import timm
import torch
from surgery_helpers import assert_same_state, same_bits, save_dense, write
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.format.checkpoint import Memory
from randsurgery.format.masks import Mask
from randsurgery.format.recipe import Entry, Member, Recipe
from randsurgery.format.tensors import RawTensor
from randsurgery.inspection.storage import storage
from randsurgery.surgery.architectures import hidden_names
from randsurgery.surgery.bases import read_base
from randsurgery.surgery.differences import difference
from randsurgery.surgery.hidden_networks import zeroed_count
from randsurgery.surgery.pickles import Skipped
from randsurgery.surgery.sentences import compact_entry
from randsurgery.surgery.tensors import from_torch

pytestmark = pytest.mark.slow

SMALL = ("--width", "0.125")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def convert(*arguments: object) -> dict[str, Any]:
    """The report of a conversion into ``out.safetensors``, which re-reads and verifies it."""
    result = run("convert", *arguments, "-o", "out.safetensors", "--force", "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def refused(code: int, *arguments: object) -> str:
    """The one line that a refused conversion says; nothing is written."""
    before = sorted(path.name for path in Path().iterdir())
    result = run("convert", *arguments, "-o", "refused.safetensors")
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sorted(path.name for path in Path().iterdir()) == before
    return lines[0]


def said(model: nn.Module, size: int = 32, channels: int = 3) -> torch.Tensor:
    """Logits of two fixed images in float64: in float32 a 1x1 convolution and the linear layer that
    takes its place differ by up to 1e-6 themselves, by the order in which they add."""
    count = 2 * channels * size * size
    images = torch.linspace(-1, 1, count, dtype=torch.float64).view(2, channels, size, size)
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(images)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-6 of the largest logit."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def saved(model: nn.Module, arch: str = "Conv4", **more: Any) -> str:
    torch.save(twin.checkpoint(model, arch, **more), "theirs.pth")
    return "theirs.pth"


def conv4(layer: twin.Layer = twin.Scored, *, signed: bool = True, **more: Any) -> nn.Module:
    model = twin.Plain(2, layer, more.pop("first", layer), width=0.125)
    return twin.set_k(twin.drawn(model, signed=signed), more.pop("k", 0.3))


# --- hidden-networks: the same logits ------------------------------------------------------------


def test_conv4_gives_the_same_logits_and_its_masks_are_theirs() -> None:
    model = twin.set_k(twin.drawn(twin.Plain(2, twin.Scored, twin.Scored)), 0.3)
    report = convert(saved(model), "--arch", "conv4", "--k", "0.3")
    found = rs.load("out.safetensors")
    close(said(found), said(model))
    theirs = [m for m in model.modules() if isinstance(m, twin.Scored)]
    ours = [m for m in found.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for before, after in zip(theirs, ours, strict=True):
        kept = before.mask().view_as(after.weight)
        assert torch.equal(after.weight != 0, kept != 0)
    assert report["weights"] == {"signs": 7}
    assert report["kept_weights"] == sum(int(m.mask().sum()) for m in theirs)
    assert report["input_bytes"] == Path("theirs.pth").stat().st_size
    assert report["bytes"] == Path("out.safetensors").stat().st_size
    # a sign bit and a mask at its entropy, against a float and a score each
    assert report["bytes"] < report["dense_bytes"] * (1 + 0.8813) / 32 * 1.02
    assert report["verified"] is True


def test_a_cifar_resnet18_gives_the_same_logits() -> None:
    model = twin.ResNet18(twin.Scored, cifar=True, classes=6, norm=nn.BatchNorm2d, last=nn.Conv2d)
    twin.set_k(twin.drawn(model), 0.5)
    report = convert(saved(model, parallel=False), "--arch", "resnet18_cifar", "--k", "0.5")
    found = rs.load("out.safetensors")
    close(said(found, 16), said(model, 16))
    assert report["model_args"] == {"num_classes": 6}
    assert report["masked_tensors"] == 20
    assert same_bits(found.fc.bias.detach(), model.fc.bias.detach())
    assert same_bits(found.bn1.weight.detach(), model.bn1.weight.detach())
    recipe = rs.read_recipe("out.safetensors")
    assert recipe.tensors["bn1.weight"].source.kind == "constant"
    assert recipe.members[0].tensors["bn1.weight"].overlays[0].kind == "replace"


def test_a_resnet18_for_imagenet_gives_the_same_logits() -> None:
    model = twin.ResNet18(
        twin.Scored, cifar=False, classes=50, norm=twin.bare_norm, first=twin.dense_layer
    )
    twin.set_k(twin.drawn(model), 0.3)
    report = convert(saved(model), "--arch", "resnet18", "--k", "0.3")
    found = rs.load("out.safetensors")
    close(said(found, size=40), said(model, size=40))
    assert report["model_args"] == {"num_classes": 50}
    assert report["masked_tensors"] == 20
    assert {row["made_of"] for row in report["storage"]} == {
        "signs", "signs + mask", "constant", "constant + replace",
    }  # fmt: skip
    assert found.bn1.weight.eq(1).all()
    assert torch.equal(found.bn1.running_mean, model.bn1.running_mean)


def test_the_fully_connected_network_converts() -> None:
    model = twin.set_k(twin.drawn(twin.Plain(0, twin.Scored, twin.Scored, side=12)), 0.5)
    arguments = ("--arch", "lenet_300_100", "--in-chans", "1", "--img-size", "12")
    report = convert(saved(model, "FC"), *arguments, "--k", "0.5")
    close(said(rs.load("out.safetensors"), 12, 1), said(model, 12, 1))
    assert report["filled"] == 3  # their layers have no biases


@pytest.mark.parametrize("weights", ["auto", "stored", "survivors"])
def test_several_magnitudes_are_stored_whole_or_as_survivors(weights: str) -> None:
    model = conv4(signed=False)
    report = convert(saved(model), "--arch", "conv4", *SMALL, "--k", "0.3", "--weights", weights)
    close(said(rs.load("out.safetensors")), said(model))
    kind = "survivors" if weights == "survivors" else "stored"
    assert report["weights"] == {kind: 7}
    whole = report["masked_weights"] * 4
    assert (report["bytes"] < whole) == (weights == "survivors")


def test_a_fixed_mask_is_the_scores_themselves() -> None:
    model = conv4(twin.Fixed, signed=False)
    report = convert(saved(model), "--arch", "conv4", *SMALL)
    close(said(rs.load("out.safetensors")), said(model))
    assert report["algorithm"] == "fixed mask"
    assert report["k"] is None
    assert report["weights"] == {"survivors": 7}
    assert "leave --k out" in refused(2, "theirs.pth", "--arch", "conv4", *SMALL, "--k", "0.3")


def test_a_supermask_keeps_the_positive_scores() -> None:
    model = conv4(twin.Positive)
    file = saved(model)
    report = convert(file, "--arch", "conv4", *SMALL, "--algorithm", "supermask", "--save-scores")
    close(said(rs.load("out.safetensors")), said(model))
    assert report["algorithm"] == "supermask"
    assert rs.read_recipe("out.safetensors").members[0].algorithm == "supermask"
    found = json.loads(run("eval", "out.safetensors", "--samples", 2, "--json").stdout)
    assert len(found["samples"]["accuracies"]) == 2
    shown = run("convert", file, "--arch", "conv4", *SMALL, "--algorithm", "supermask", "--dry-run")
    assert "draws in each pass" in shown.stderr
    assert "positive scores" in refused(
        2, file, "--arch", "conv4", *SMALL, "--algorithm", "supermask", "--k", "0.5"
    )


def test_half_precision_stays_what_it_is() -> None:
    dtype = torch.bfloat16
    model = twin.drawn(twin.ResNet18(twin.Scored, cifar=True, classes=10, norm=twin.bare_norm))
    wide = model.fc.weight.detach().to(dtype)
    convert(saved(model.to(dtype)), "--arch", "resnet18_cifar", "--k", "0.5")
    found = rs.load("out.safetensors", dtype=None)
    assert {t.dtype for t in found.state_dict().values()} == {dtype, torch.int64}
    kept = found.fc.weight != 0
    assert int(kept.sum()) == wide.numel() // 2
    assert torch.equal(found.fc.weight[kept], wide.view_as(found.fc.weight)[kept])


# --- which weights are kept ----------------------------------------------------------------------


def test_their_count_is_computed_in_floats() -> None:
    assert zeroed_count(0.9, 150) == 14  # exactly it would be 15
    assert [zeroed_count(k, 10) for k in (1.0, 0.5, 0.3, 0.1)] == [0, 5, 7, 9]
    model = conv4(k=0.9)
    convert(saved(model), "--arch", "conv4", *SMALL, "--k", "0.9")
    close(said(rs.load("out.safetensors")), said(model))
    found = rs.load("out.safetensors")
    assert int((found.fc.weight == 0).sum()) == int((1 - 0.9) * 320) == 31  # exactly: 32


def test_of_equal_scores_the_lower_index_goes_first_and_the_user_is_told() -> None:
    model = conv4(k=0.5)
    with torch.no_grad():
        model.linear[4].scores.copy_(torch.where(model.linear[4].scores > 0, 0.25, -0.25))
    result = run(
        "convert", saved(model), "--arch", "conv4", *SMALL, "--k", "0.5", "-o", "o.safetensors"
    )
    assert result.exit_code == 0, result.output
    assert "in 1 of 7 layers" in result.stderr
    kept = (rs.load("o.safetensors").fc.weight != 0).flatten()
    assert not kept[:160].any()
    assert kept[160:].all()


def test_zeros_among_the_signs_come_back() -> None:
    model = conv4(k=1.0)
    with torch.no_grad():
        model.linear[0].weight.view(-1)[::7] = 0.0  # sign(0) is 0
    report = convert(saved(model), "--arch", "conv4", *SMALL, "--k", "1", "--weights", "signs")
    close(said(rs.load("out.safetensors")), said(model))
    assert report["weights"] == {"signs": 7}
    assert len(rs.read_recipe("out.safetensors").tensors["fc1.weight"].overlays) == 1


def test_one_value_is_a_constant() -> None:
    model = conv4(k=0.5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, twin.Scored):
                module.weight.abs_()  # their unsigned constant
    report = convert(saved(model), "--arch", "conv4", *SMALL, "--k", "0.5", "--weights", "signs")
    close(said(rs.load("out.safetensors")), said(model))
    assert report["weights"] == {"constant": 7}


def test_k_is_taken_from_the_file_if_it_is_there() -> None:
    model = conv4(k=0.4)
    for more in ({"prune_rate": 0.4}, {"args": {"prune_rate": 0.4}}):
        file = saved(model, **more)
        done = run("convert", file, "--arch", "conv4", *SMALL, "-o", "o.safetensors", "--force")
        assert done.exit_code == 0, done.output
        assert "k is 0.4, as the file records it" in done.stderr
        close(said(rs.load("o.safetensors")), said(model))
    for useless in (-1, 0.0, True, "0.4", 1.5, float("nan")):
        assert "--k is missing" in refused(
            2, saved(model, prune_rate=useless), "--arch", "conv4", *SMALL
        )


def test_the_folder_tells_what_k_may_be(here: Path) -> None:
    folder = here / "conv4" / "prune_rate=0.3" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(twin.checkpoint(conv4(), "Conv4"), folder / "model_best.pth")
    message = refused(2, folder / "model_best.pth", "--arch", "conv4", *SMALL)
    assert "share of each layer's weights that is kept" in message
    assert "try --k 0.3" in message


# --- hidden-networks: the file -------------------------------------------------------------------


def test_two_masks_over_one_network_have_one_backbone() -> None:
    ids = []
    for seed in (1, 2):
        model = conv4()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, twin.Scored):
                    draw = torch.Generator().manual_seed(seed)
                    module.scores.uniform_(-1, 1, generator=draw)
        convert(saved(model), "--arch", "conv4", *SMALL, "--k", "0.3")
        ids.append(rs.read_recipe("out.safetensors").backbone_id)
    assert ids[0] == ids[1]


def test_scores_are_kept_when_asked_for() -> None:
    model = conv4()
    file = saved(model)
    convert(file, "--arch", "conv4", *SMALL, "--k", "0.3")
    assert rs.read_recipe("out.safetensors").members[0].scores == {}
    convert(file, "--arch", "conv4", *SMALL, "--k", "0.3", "--save-scores")
    with rs.api.read_checkpoint("out.safetensors") as found:
        scores = found.scores("fc1.weight")
    assert np.array_equal(scores, model.linear[0].scores.detach()[:, :, 0, 0].numpy())
    assert storage("out.safetensors").score_bytes > 0


def test_training_goes_on_from_a_converted_file() -> None:
    convert(saved(conv4()), "--arch", "conv4", *SMALL, "--k", "0.3")
    done = run(
        "train", "out.safetensors", "--epochs", "1", "-b", "512", "-o", "t.safetensors", "-q"
    )
    assert done.exit_code == 0, done.output
    before, after = rs.load("out.safetensors"), rs.load("t.safetensors")
    assert torch.equal(before.fc1.weight == 0, after.fc1.weight == 0)
    assert not torch.equal(before.fc1.weight, after.fc1.weight)


def test_the_report_for_people_has_both_sizes_and_the_table() -> None:
    result = run("convert", saved(conv4()), "--arch", "conv4", *SMALL, "--k", "0.3")
    assert result.exit_code == 0, result.output
    assert "signs + mask" in result.stdout
    assert "before: theirs.pth, " in result.stdout
    assert "x smaller" in result.stdout
    assert "written and verified: theirs-converted.safetensors" in result.stderr
    assert "\x1b" not in result.output
    again = run("convert", "theirs.pth", "--arch", "conv4", *SMALL, "--k", "0.3")
    assert again.exit_code == 6
    provenance = rs.read_recipe("theirs-converted.safetensors").members[0].provenance
    assert provenance["settings"] == {
        "kind": "hidden-networks",
        "algorithm": "edge-popup",
        "k": 0.3,
    }


def test_a_dry_run_and_a_configuration_file(here: Path) -> None:
    file = saved(conv4())
    Path("c.yaml").write_text("arch: conv4\nwidth: 0.125\nk: 0.3\n")
    result = run("convert", file, "-c", "c.yaml", "--dry-run", "--json", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    report = json.loads(result.stdout)
    assert report["k"] == 0.3
    assert report["path"] == "theirs-converted.safetensors"
    assert not (here / "theirs-converted.safetensors").exists()
    shown = run("convert", file, "-c", "c.yaml", "--dry-run")
    assert "kept_weights" in shown.stdout
    assert "would write" in shown.stderr


# --- hidden-networks: bad input ------------------------------------------------------------------

C4 = ("--arch", "conv4", *SMALL, "--k", "0.3")


def broken(change: Any) -> str:
    """A file whose state dict was changed."""
    found = twin.checkpoint(conv4(), "Conv4", parallel=False)
    change(found["state_dict"])
    torch.save(found, "theirs.pth")
    return "theirs.pth"


def test_an_architecture_is_needed_and_the_file_helps() -> None:
    file = saved(conv4())
    assert "the checkpoint says Conv4, so try --arch conv4" in refused(2, file)
    assert "try --arch conv4" in refused(2, file, "--arch", "Conv4")
    assert "near: " in refused(2, file, "--arch", "convv4")
    assert "so try --arch conv4" in refused(4, file, "--arch", "conv6", *SMALL, "--k", "0.3")
    assert "--arch is missing" in refused(2, saved(conv4(), "Other"))


def test_unknown_names_and_shapes_that_do_not_fit() -> None:
    def renamed(state: dict[str, Any]) -> None:
        state["convs.0.mask"] = state.pop("convs.0.scores")

    assert "'convs.0.mask' is not one of conv4" in refused(4, broken(renamed), *C4)
    message = refused(4, saved(conv4()), "--arch", "conv4", "--k", "0.3")
    assert "is [8, 3, 3, 3], conv4 needs [64, 3, 3, 3]" in message
    assert "--width" in message

    def stretched(state: dict[str, Any]) -> None:
        state["linear.2.scores"] = torch.zeros(32, 31, 1, 1)

    assert "'linear.2.scores' is [32, 31, 1, 1]" in refused(4, broken(stretched), *C4)

    def twice(state: dict[str, Any]) -> None:
        state["fc.weight"] = state["linear.4.weight"]

    assert "are both fc.weight" in refused(4, broken(twice), *C4)


def test_scores_that_are_missing_or_belong_to_nothing() -> None:
    def without(state: dict[str, Any]) -> None:
        del state["linear.2.scores"]

    message = refused(4, broken(without), *C4)
    assert "'linear.2.weight' has no scores beside it" in message

    def alone(state: dict[str, Any]) -> None:
        del state["linear.2.weight"]

    assert "has scores of 'fc2.weight'" in refused(4, broken(alone), *C4)

    def gone(state: dict[str, Any]) -> None:
        del state["linear.2.weight"], state["linear.2.scores"]

    assert "lacks 'fc2.weight' of conv4" in refused(4, broken(gone), *C4)

    def none(state: dict[str, Any]) -> None:
        for name in [n for n in state if n.endswith("scores")]:
            del state[name]

    assert "has no scores" in refused(2, broken(none), *C4)
    assert "has no scores" in refused(2, "theirs.pth", "--arch", "conv4", *SMALL, "--save-scores")
    assert "lacks 'bn1.running_mean'" in refused(
        4, bn_without("bn1.running_mean"), "--arch", "resnet18_cifar", "--k", "0.5"
    )


def bn_without(name: str) -> str:
    model = twin.ResNet18(twin.Scored, cifar=True, classes=10, norm=twin.bare_norm)
    found = twin.checkpoint(twin.drawn(model), "cResNet18", parallel=False)
    del found["state_dict"][name]
    torch.save(found, "theirs.pth")
    return "theirs.pth"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_and_weights_that_are_not_finite(value: float) -> None:
    for leaf in ("scores", "weight"):

        def spoilt(state: dict[str, Any], leaf: str = leaf) -> None:
            state[f"convs.2.{leaf}"].data.view(-1)[5] = value

        message = refused(4, broken(spoilt), *C4)
        assert "finite" in message
        assert ("features.2.weight" in message) or ("convs.2.weight" in message)


def test_several_magnitudes_are_refused_if_signs_are_asked_for() -> None:
    message = refused(4, saved(conv4(signed=False)), *C4, "--weights", "signs")
    assert "several" in message
    assert "--weights auto" in message


def test_options_out_of_range() -> None:
    file = saved(conv4())
    for k in ("0", "1.5", "-1", "many"):
        assert "--k" in refused(2, file, "--arch", "conv4", *SMALL, "--k", k)
    assert "unknown --weights 'sign'" in refused(2, file, *C4, "--weights", "sign")
    assert "unknown --algorithm" in refused(2, file, *C4, "--algorithm", "hidden")
    assert "--base goes with dense" in refused(2, file, *C4, "--base", file)


class Thing:
    """A class that only a pickle of this test knows."""


def test_pickled_objects_and_other_files_are_refused(here: Path) -> None:
    torch.save(twin.checkpoint(conv4(), "Conv4", args=Thing()), "theirs.pth")
    assert isinstance(read_base("theirs.pth").about["args"], Skipped)
    torch.save(conv4(), "theirs.pth")
    assert "a whole object of" in refused(3, "theirs.pth", *C4)
    torch.save({"epoch": 1}, "theirs.pth")
    assert "no state dict" in refused(3, "theirs.pth", *C4)
    Path("theirs.pth").write_bytes(b"nothing of the kind")
    assert "theirs.pth" in refused(3, "theirs.pth", *C4)
    assert "no such file" in refused(3, "gone.pth", *C4)
    assert "no such file" in refused(3, "gone.safetensors", *C4)
    write(here / "ours.safetensors", rs.make_recipe("conv2", args={"width": 0.1}))
    assert "a randsurgery file already" in refused(3, "ours.safetensors", *C4)


def test_the_input_is_not_overwritten_even_with_force() -> None:
    file = saved(conv4())
    before = Path(file).read_bytes()
    result = run("convert", file, *C4, "-o", file, "--force")
    assert result.exit_code == 2
    assert "must end in .safetensors" in result.stderr
    assert Path(file).read_bytes() == before
    save_dense(Path("dense.safetensors"), rs.build(rs.make_recipe("conv2")).state_dict())
    before = Path("dense.safetensors").read_bytes()
    again = ("-o", "dense.safetensors", "--force")
    result = run("convert", "dense.safetensors", "--arch", "conv2", *again)
    assert result.exit_code == 6
    assert "is read by this command" in result.stderr
    assert Path("dense.safetensors").read_bytes() == before


def test_numpys_numbers_in_a_checkpoint_run_no_code() -> None:
    model = conv4()
    file = saved(model, best=np.float32(3), seen=np.int64(5))
    state = read_base(file)
    assert isinstance(state.about["best"], Skipped)
    assert isinstance(state.about["optimizer"]["param_groups"][0]["lr"], Skipped)
    assert state.about["epoch"] == 100
    torch.save({"state_dict": model.state_dict(), "array": np.zeros(3)}, file)
    assert isinstance(read_base(file).about["array"], Skipped)


def test_files_of_their_time_and_safetensors_are_read() -> None:
    model = conv4()
    theirs = twin.checkpoint(model, "Conv4")
    torch.save(theirs, "old.pth", _use_new_zipfile_serialization=False)
    data = Path("old.pth").read_bytes()
    assert b"multiarray" in data
    Path("old.pth").write_bytes(data.replace(b"numpy._core.", b"numpy.core."))  # before NumPy 2
    save_dense(Path("theirs.safetensors"), theirs["state_dict"])
    for file in ("old.pth", "theirs.safetensors"):
        convert(file, *C4)
        close(said(rs.load("out.safetensors")), said(model))


# --- dense files ---------------------------------------------------------------------------------

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet": ("test_resnet", {}),
    "vit": ("test_vit", {}),
    "convnext": ("test_convnext", {}),
    "efficientnet": ("test_efficientnet", {}),
    "byobnet": ("test_byobnet", {}),
    "mambaout": ("test_mambaout", {}),
}


def dense(name: str, classes: int = 7, seed: int = 0, **args: Any) -> dict[str, torch.Tensor]:
    """A state dict that depends on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, num_classes=classes, **args)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.normal_()
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def largest(state: dict[str, torch.Tensor], count: int) -> list[str]:
    """The names of the largest tensors."""
    return sorted(state, key=lambda n: (-state[n].numel(), n))[:count]


def finetuned(base: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The base with changes of every kind, and what each changed tensor is to be made of."""
    state = {name: tensor.clone() for name, tensor in base.items()}
    one, two, three, four, five, six = largest(state, 6)
    state[one].view(-1)[::50] += 1
    state[one].view(-1)[3] = float("nan")
    state[one].view(-1)[4] = -0.0
    state[two][:2] = torch.linspace(-1, 1, state[two][:2].numel()).view_as(state[two][:2])
    state[three] *= 1.5
    state[four].view(-1)[state[four].view(-1) < 0.5] = 0.0
    state[five] = torch.where(state[five] > 0, 0.25, -0.25)
    state[six] = torch.full_like(state[six], -0.0)
    kinds = {one: "base + scatter", two: "base + slice", three: "base + replace",
             four: "base + mask", five: "signs", six: "constant"}  # fmt: skip
    return state, kinds


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_file_comes_back_bit_for_bit(family: str) -> None:
    name, args = FAMILIES[family]
    state = dense(name, **args)
    changed, kinds = finetuned(state)
    save_dense(Path("base.safetensors"), state)
    torch.save({"state_dict": changed, "epoch": 3}, "tuned.pth")
    kwargs = [part for k, v in args.items() for part in ("--model-kwargs", f"{k}={v}")]
    report = convert("tuned.pth", "--arch", name, *kwargs, "--base", "base.safetensors")
    rows = {row.name: row for row in storage("out.safetensors").tensors}
    assert {n: rows[n].made_of for n in kinds} == kinds
    assert all(row.made_of == "base" for n, row in rows.items() if n not in kinds)
    assert report["bytes"] < report["dense_bytes"] / 2
    assert report["model_args"]["num_classes"] == 7

    done = run("export", "out.safetensors", "-o", "dense.safetensors", "-q")
    assert done.exit_code == 0, done.output
    plain = timm.create_model(name, num_classes=7, checkpoint_path="dense.safetensors", **args)
    assert_same_state(plain.state_dict(), changed)
    assert_same_state(rs.load("out.safetensors").state_dict(), changed)
    assert hidden_names(plain) == hidden_names(rs.load("out.safetensors"))


def test_without_a_base_everything_is_in_the_file() -> None:
    changed, kinds = finetuned(dense("test_resnet"))
    torch.save({f"module.{n}": t for n, t in changed.items()}, "tuned.pth")
    report = convert("tuned.pth", "--arch", "test_resnet")
    assert_same_state(rs.load("out.safetensors").state_dict(), changed)
    rows = {row.name: row.made_of for row in storage("out.safetensors").tensors}
    alone = {"base + replace": "stored", "base + scatter": "stored", "base + slice": "stored",
             "base + mask": "stored"}  # fmt: skip
    assert {n: rows[n] for n in kinds} == {n: alone.get(k, k) for n, k in kinds.items()}
    assert "base" not in report
    again = convert("tuned.pth", "--arch", "test_resnet.r160_in1k")  # timm's tag is cut off
    assert again["model"] == "test_resnet"


def test_two_files_on_one_base_have_one_backbone() -> None:
    base = dense("test_resnet", classes=10)
    torch.save(base, "base.pth")
    ids, models = [], []
    for classes, half in ((10, False), (4, False), (10, True)):
        state, _ = finetuned(base)
        head = dense("test_resnet", classes=classes, seed=classes)
        state |= {n: head[n] for n in ("fc.weight", "fc.bias")}
        if half:
            state["conv1.0.weight"] = state["conv1.0.weight"].half()
        torch.save(state, "tuned.pth")
        convert("tuned.pth", "--arch", "test_resnet", "--base", "base.pth")
        recipe = rs.read_recipe("out.safetensors")
        ids.append(recipe.backbone_id)
        models.append(recipe.model.args["num_classes"] if recipe.model else None)
        assert_same_state(rs.load("out.safetensors", dtype=None).state_dict(), state)
        own = recipe.members[0].tensors
        assert (own["fc.weight"].entry is not None) == (classes == 4)
        assert ("conv1.0.weight" in own) == half
    assert len(set(ids)) == 1
    assert models == [10, 4, 10]


def test_the_base_is_found_beside_the_file_or_the_user_is_told(here: Path) -> None:
    base = dense("test_resnet")
    save_dense(here / "base.safetensors", base)
    torch.save(finetuned(base)[0], "tuned.pth")
    (here / "away").mkdir()
    arguments = ("tuned.pth", "--arch", "test_resnet", "--base", "base.safetensors")
    done = run("convert", *arguments, "-o", "away/out.safetensors")
    assert done.exit_code == 0, done.output
    assert "does not lie beside it" in done.stderr
    done = run("convert", *arguments, "-o", "out.safetensors", "--force")
    assert "which lies beside it" in done.stderr
    assert_same_state(rs.load("out.safetensors").state_dict(), finetuned(base)[0])
    assert rs.load("away/out.safetensors", base="base.safetensors") is not None
    torch.save(base, "base.pth")
    convert("tuned.pth", "--arch", "test_resnet", "--base", "base.pth")
    assert run("inspect", "verify", "out.safetensors").exit_code == 0  # it lies beside
    result = run("convert", *arguments, "-o", "base.safetensors", "--force")
    assert result.exit_code == 6
    assert storage("base.safetensors").groups()[0][0] == "stored"  # as it was


def test_dense_files_in_their_naming_convert_too() -> None:
    model = twin.drawn(
        twin.ResNet18(twin.dense_layer, cifar=True, classes=10, norm=nn.BatchNorm2d), signed=False
    )
    convert(saved(model, "cResNet18"), "--arch", "resnet18_cifar")
    close(said(rs.load("out.safetensors")), said(model))
    assert storage("out.safetensors").ratio < 1.01


def test_dense_files_that_do_not_fit() -> None:
    state = dense("test_resnet")
    torch.save({n: t for n, t in state.items() if n != "layer1.0.bn1.weight"}, "tuned.pth")
    assert "lacks 'layer1.0.bn1.weight'" in refused(4, "tuned.pth", "--arch", "test_resnet")
    torch.save(state, "tuned.pth")
    assert "is not one of test_vit" in refused(4, "tuned.pth", "--arch", "test_vit")
    assert "num_classes" not in refused(2, "tuned.pth", "--arch", "test_resnet", "--k", "0.3")
    save_dense(Path("other.safetensors"), dense("test_vit"))
    message = refused(4, "tuned.pth", "--arch", "test_resnet", "--base", "other.safetensors")
    assert "other.safetensors: tensor" in message
    halves = {n: t.half() if t.is_floating_point() else t + 1 for n, t in state.items()}
    save_dense(Path("half.safetensors"), halves)
    message = refused(4, "tuned.pth", "--arch", "test_resnet", "--base", "half.safetensors")
    assert "nothing in common" in message
    assert "F16" in message
    torch.save({**state, "fc.bias": torch.arange(7)}, "tuned.pth")
    assert "'fc.bias' is I64" in refused(4, "tuned.pth", "--arch", "test_resnet")
    torch.save({**state, "fc.bias": torch.zeros(7).to_sparse()}, "tuned.pth")
    assert "sparse" in refused(4, "tuned.pth", "--arch", "test_resnet")
    torch.save({**state, "fc.bias": torch.zeros(1).expand(10**13)}, "tuned.pth")
    assert "this machine has" in refused(4, "tuned.pth", "--arch", "test_resnet")
    torch.save({**state, "bad\nname\x1b[31m": torch.zeros(7)}, "tuned.pth")
    message = refused(4, "tuned.pth", "--arch", "test_resnet")
    assert "\x1b" not in message
    assert "is not one of test_resnet" in message


# --- differences and entries, one by one ---------------------------------------------------------


def rebuilt(before: RawTensor, after: RawTensor) -> tuple[str, int, RawTensor]:
    """What a difference is made of, its payload bytes, and the tensor it gives."""
    payloads = Memory()
    shared = compact_entry(before, "shared", "t", payloads)
    own = Memory()
    part = difference(before, after, "main", "t", own)
    member = Member(tensors={"t": part} if part else {})
    recipe = Recipe(tensors={"t": shared}, members=(member,))
    payloads.update(own)
    made = rs.Checkpoint(recipe, payloads).tensor("t")
    kind = "same"
    if part is not None:
        kind = part.entry.source.kind if part.entry else part.overlays[0].kind
    return kind, sum(raw.nbytes for raw in own.values()), made


def random_pair(draw: np.random.Generator) -> tuple[RawTensor, RawTensor]:
    shape = tuple(draw.integers(1, 9, draw.integers(0, 4)))
    dtype = (np.float32, np.float16, np.int64, np.float64)[draw.integers(4)]
    before = (draw.normal(size=shape) * 9).astype(dtype)
    after = before.copy()
    flat = after.reshape(-1)
    how = draw.integers(6)
    if how == 1:
        flat[draw.integers(flat.size)] += 1
    if how == 2:
        flat[draw.random(flat.size) < 0.3] = 0
    if how == 3 and after.ndim:
        after[: draw.integers(1, after.shape[0] + 1)] = 3
    if how == 4:
        flat[:] = (draw.normal(size=flat.size) * 9).astype(dtype)
    if how == 5 and after.dtype.kind == "f":
        flat[:] = -0.0
        flat[0] = np.nan
    return RawTensor.of(before), RawTensor.of(after)


def test_a_difference_gives_the_tensor_and_is_never_larger_than_it() -> None:
    draw = np.random.default_rng(0)
    kinds = set()
    for _ in range(400):
        before, after = random_pair(draw)
        kind, size, made = rebuilt(before, after)
        assert made.same_bits(after)
        assert size <= after.nbytes
        kinds.add(kind)
    assert kinds >= {"same", "replace", "constant"}


def test_the_shortest_of_the_ways_is_taken() -> None:
    draw = np.random.default_rng(1)
    before = RawTensor.of(draw.normal(size=(40, 50)).astype(np.float32))

    def after(where: Any, value: Any) -> tuple[str, int]:
        array = before.array.copy()
        array[where] = value
        kind, size, made = rebuilt(before, RawTensor.of(array))
        assert made.same_bits(RawTensor.of(array))
        return kind, size

    assert after((slice(3), slice(None)), 7.5) == ("slice", 3 * 50 * 4)
    assert after((slice(None), slice(3)), 7.5) == ("slice", 40 * 3 * 4)
    assert after((slice(3), slice(3)), 7.5)[0] == "scatter"  # nine values, not a slice of them
    assert after((39, 49), 7.5)[0] == "scatter"
    assert after((slice(None, None, 2), slice(None)), 0.0)[0] == "mask"
    assert after((slice(None, None, 2), slice(None)), -0.0)[0] == "scatter"
    assert after(slice(None), draw.normal(size=(40, 50)))[0] == "replace"
    assert after(slice(None), -0.0)[0] == "constant"
    signs = np.sign(draw.normal(size=(40, 50))) * 0.5
    assert after(slice(None), signs) == ("signs", 2000 // 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zeros", [False, True])
def test_signs_of_one_magnitude_come_back_bit_for_bit(dtype: torch.dtype, zeros: bool) -> None:
    tensor = torch.where(torch.arange(91).view(7, 13) % 3 > 0, 0.1, -0.1).to(dtype)
    if zeros:
        tensor[2, 3:7] = 0.0
    payloads, raw = Memory(), from_torch(tensor)
    entry = compact_entry(raw, "shared", "t", payloads)
    assert entry.source.kind == "signs"
    assert len(entry.overlays) == zeros
    made = rs.Checkpoint(Recipe(tensors={"t": entry}), payloads).tensor("t")
    assert made.same_bits(raw)


def test_what_signs_cannot_hold_is_stored() -> None:
    for odd in ([0.5, -0.0], [0.5, float("nan")], [0.5, 0.25], [float("inf"), -float("inf")]):
        for dtype in (torch.float32, torch.bfloat16):
            raw, payloads = from_torch(torch.tensor(odd, dtype=dtype)), Memory()
            entry: Entry = compact_entry(raw, "shared", "t", payloads)
            assert entry.source.kind == "stored"
    wide = compact_entry(from_torch(torch.tensor([0.5, -0.5]).double()), "shared", "t", Memory())
    assert wide.source.kind == "stored"


def test_the_twin_keeps_what_a_slow_count_keeps() -> None:
    """The twin itself, held against the rule by hand: all but the lowest, ties by index."""
    layer = twin.Scored(1, 5, 1)
    layer.k = 0.6
    with torch.no_grad():
        layer.scores.view(-1)[:] = torch.tensor([0.5, -0.1, 0.1, -0.9, 0.1])
    assert layer.mask().view(-1).tolist() == [1, 0, 0, 1, 1]
    assert Mask.of(np.array([True, False, False, True, True])).count == 3


# --- what is said, and what is refused ------------------------------------------------------------


def test_survivors_with_scores_are_refused_and_cannot_be_thresholded_anew(here: Path) -> None:
    file = saved(conv4(twin.Scored, signed=False))
    words = refused(2, file, "--arch", "conv4", *SMALL, "--k", "0.5", "--weights", "survivors",
                    "--save-scores")  # fmt: skip
    assert "contradict each other" in words
    words = refused(2, saved(conv4(twin.Fixed)), "--arch", "conv4", *SMALL, "--save-scores")
    assert "leave --save-scores out" in words


def test_another_k_than_the_recorded_and_layers_without_scores_are_pointed_out(here: Path) -> None:
    state = conv4(twin.Scored).state_dict()
    for name in ("convs.0.scores", "linear.4.scores"):
        del state[name]
    torch.save({"state_dict": state, "prune_rate": 0.3}, "part.pth")
    told = run("convert", "part.pth", "--arch", "conv4", *SMALL, "--k", "0.5", "--dry-run").stderr
    assert "the file records prune_rate 0.3; --k 0.5 was given" in told
    assert "without scores, kept dense and frozen: features.0.weight, fc.weight" in told


def test_the_base_is_counted_beside_the_file(here: Path) -> None:
    recipe = rs.make_recipe("conv2", "kaiming-normal", args={"width": 0.1, "num_classes": 10})
    state = rs.build(recipe).state_dict()
    save_dense(Path("base.safetensors"), state)
    save_dense(Path("tuned.safetensors"), {**state, "fc.weight": state["fc.weight"] + 1})
    made = run("convert", "tuned.safetensors", "--arch", "conv2", "--width", "0.1", "--base",
               "base.safetensors", "-o", "t.safetensors")  # fmt: skip
    assert "beside the base of" in made.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("predict", "c.pth", "x.png"), "randsurgery convert c.pth --arch ARCH"),
        (("eval", "c.pth"), "randsurgery convert c.pth --arch ARCH"),
        (("convert", ".", "--arch", "conv4"), "a folder without weights"),
        (
            ("convert", "junk.pth", "--arch", "conv4"),
            "not a checkpoint of torch.save",
        ),
        (("convert", "empty.pth", "--arch", "conv4"), "is empty (0 bytes)"),
        (("convert", "c.pth", "--arch", "conv4", "-o", "out.pth"), "must end in .safetensors"),
    ],
)
def test_files_of_the_wrong_kind_are_named(
    here: Path, command: tuple[str, ...], words: str
) -> None:
    torch.save({"a": torch.zeros(3)}, "c.pth")
    Path("junk.pth").write_bytes(b"no checkpoint at all")
    Path("empty.pth").write_bytes(b"")
    Path("x.png").write_bytes(b"")
    result = run(*command)
    assert result.exit_code in (2, 3)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
