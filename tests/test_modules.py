"""Recipe -> module -> recipe: the user's own modules, bases, what is stored and what is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from surgery_helpers import (
    Everything,
    assert_same_state,
    attach,
    conv2,
    everything,
    logits,
    read,
    same_bits,
    save_dense,
    train_steps,
    write,
)  # fmt: skip
from torch import nn
from torch.nn.utils import parametrizations

import randsurgery as rs
from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, Memory, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.derivation import payload_names
from randsurgery.format.recipe import Member
from randsurgery.inspection.storage import storage
from randsurgery.jobs.export import self_contained
from randsurgery.jobs.sources import SourceSpec, flatten, open_source
from randsurgery.surgery.bases import Base, read_base
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.heads import with_head
from randsurgery.surgery.modules import build, harvest
from randsurgery.surgery.recipes import make_recipe, make_recipe_on_base
from randsurgery.surgery.scores import attached

# --- the user's own module -----------------------------------------------------------------------


def popped(seed: int = 0, **options: Any) -> tuple[Checkpoint, Everything]:
    """The user's module as a recipe, and the module after a few steps of popup."""
    recipe = make_recipe(everything(), seed=seed)
    model = build(recipe, model=everything())
    attach(model, Popup(k="0.3", **options))
    train_steps(model)
    return recipe, model


def test_an_own_module_comes_back_from_its_file(tmp_path: Path) -> None:
    recipe, model = popped()
    path = tmp_path / "own.safetensors"
    assert rs.save(path, recipe, model) == path.stat().st_size
    again = rs.load(path, model=everything(7))
    assert not attached(again)
    assert not again.training
    assert same_bits(logits(again, 8), logits(model, 8))
    masked = again.state_dict()["hidden.weight"]
    assert int((masked != 0).sum()) == 72
    assert set(again.state_dict()) == set(everything().state_dict())


def test_an_own_module_is_needed_if_the_file_names_no_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "own.safetensors", make_recipe(everything()))
    with pytest.raises(IncompatibleError, match="pass your own"):
        rs.load(path)


def test_what_does_not_fit_is_named_before_anything_changes(tmp_path: Path) -> None:
    path = write(tmp_path / "own.safetensors", make_recipe(everything()))
    other = everything(5)
    other.hidden = nn.Linear(8, 31)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(IncompatibleError, match=r"hidden\.weight is \[30, 8\].*\[31, 8\]"):
        rs.load(path, model=other)
    assert_same_state(other.state_dict(), before)
    other = everything()
    other.more = nn.Linear(2, 2)
    with pytest.raises(IncompatibleError, match=r"needs 'more\.(bias|weight)', which the file"):
        rs.load(path, model=other)
    fewer = everything()
    del fewer.hidden
    with pytest.raises(IncompatibleError, match=r"the file has 'hidden\.\w+', which .* lacks"):
        rs.load(path, model=fewer)
    whole = everything()
    whole.norm.num_batches_tracked = torch.tensor(0.0)
    with pytest.raises(IncompatibleError, match="num_batches_tracked is I64"):
        rs.load(path, model=whole)


def test_a_module_with_scores_cannot_be_filled(tmp_path: Path) -> None:
    path = write(tmp_path / "own.safetensors", make_recipe(everything()))
    with pytest.raises(UsageError, match="has scores or a plan"):
        rs.load(path, model=attach(everything(), Popup(k="0.5")))


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_a_shared_layer_keeps_its_mask(tmp_path: Path) -> None:
    recipe = make_recipe(Shared())
    model = attach(build(recipe, model=Shared()), Popup(k="0.5"))
    path = tmp_path / "shared.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path, model=Shared())
    images = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert same_bits(model(images), again(images))
    assert int((again.first.weight == 0).sum()) == 18


class Tied(nn.Module):
    """A language model's embedding and output share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.body(self.embedding(tokens)))
        return result


def test_tied_weights_are_one_draw_and_come_back_tied(tmp_path: Path) -> None:
    recipe = make_recipe(Tied(), seed=4)
    entries = recipe.recipe.tensors
    assert entries["embedding.weight"].source.stream == "out.weight"
    assert entries["out.weight"].source.stream is None
    model = build(recipe, model=Tied())
    assert same_bits(model.out.weight, model.embedding.weight)
    with torch.no_grad():
        model.embedding.weight.mul_(3)
    rs.save(tmp_path / "tied.safetensors", recipe, model)
    again = rs.load(tmp_path / "tied.safetensors", model=Tied())
    assert again.out.weight is again.embedding.weight
    assert_same_state(again.state_dict(), model.state_dict())


def test_tied_weights_cannot_be_masked_apart(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"embedding.weight and out.weight are one"):
        attach(Tied(), Popup(k="0.5"))
    model = attach(Tied(), Popup(k="0.5", skip=("out",)))
    assert list(attached(model)) == ["body.weight"]


def test_two_values_do_not_fit_one_parameter(tmp_path: Path) -> None:
    untied = Tied()
    untied.out.weight = nn.Parameter(torch.randn(11, 8))
    rs.save(tmp_path / "untied.safetensors", make_recipe(untied), untied)
    target = Tied()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(IncompatibleError, match="one parameter in the given module, two in"):
        rs.load(tmp_path / "untied.safetensors", model=target)
    assert all(same_bits(target.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_module_of_another_precision_is_refused(tmp_path: Path) -> None:
    rs.save(tmp_path / "own.safetensors", make_recipe(everything()))
    with pytest.raises(IncompatibleError, match=r"is F32 in the file, torch.float16"):
        rs.load(tmp_path / "own.safetensors", model=everything().half())


def test_a_parametrized_layer_of_the_users_own_is_saved(tmp_path: Path) -> None:
    def make(seed: int) -> nn.Module:
        model = everything(seed)
        parametrizations.weight_norm(model.hidden)
        return model

    first = make(1)
    path = tmp_path / "own.safetensors"
    rs.save(path, make_recipe(make(0)), first)
    assert_same_state(rs.load(path, model=make(2)).state_dict(), first.state_dict())


def test_a_bfloat16_module_survives(tmp_path: Path) -> None:
    recipe = make_recipe(everything().bfloat16(), seed=2)
    model = build(recipe, model=everything().bfloat16())
    assert model.stem.weight.dtype == torch.bfloat16
    assert len(model.stem.weight.abs().unique()) == 1
    attach(model, Popup(k="0.5", learn=("@norm",)))
    with torch.no_grad():
        model.norm.weight.copy_(torch.linspace(-2, 2, 8))
        model.norm.running_mean.copy_(torch.linspace(-0.1, 0.1, 8))
    path = tmp_path / "own.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path, model=everything().bfloat16())
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).bfloat16()
    with torch.no_grad():
        assert same_bits(again(images), model.eval()(images))
    assert {t.dtype for n, t in again.state_dict().items() if "tracked" not in n} == {
        torch.bfloat16
    }


def test_values_are_kept_for_what_is_neither_weight_nor_norm(tmp_path: Path) -> None:
    model = everything()
    model.register_parameter("token", nn.Parameter(torch.arange(5.0)))
    model.register_buffer("table", torch.arange(12).view(3, 4))
    path = write(tmp_path / "own.safetensors", make_recipe(model))
    other = everything(9)
    other.register_parameter("token", nn.Parameter(torch.zeros(5)))
    other.register_buffer("table", torch.zeros(3, 4, dtype=torch.int64))
    again = rs.load(path, model=other)
    assert torch.equal(again.token, torch.arange(5.0))
    assert torch.equal(again.table, torch.arange(12).view(3, 4))


# --- what is stored ------------------------------------------------------------------------------


def test_only_masks_and_changed_tensors_are_stored(tmp_path: Path) -> None:
    recipe, model = popped(learn=("@norm",))
    harvested = harvest(recipe, model)
    found = {
        name: part.entry.source.kind if part.entry else [o.kind for o in part.overlays]
        for name, part in harvested.recipe.member().tensors.items()
    }
    masks = {name: ["mask"] for name in attached(model)}
    assert found == masks | {
        "norm.weight": ["replace"],
        "norm.bias": ["replace"],
        "norm.running_mean": ["replace"],
        "norm.running_var": ["replace"],
        "norm.num_batches_tracked": "constant",
    }
    assert len(set(payload_names(harvested.recipe))) == len(masks) + 4
    assert storage(write(tmp_path / "own.safetensors", harvested)).bytes < 8000


def test_running_statistics_come_back(tmp_path: Path) -> None:
    recipe, model = popped()
    path = tmp_path / "own.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path, model=everything())
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(again.norm, name), getattr(model.norm, name))
    assert int(again.norm.num_batches_tracked) == 2


def test_an_untouched_module_stores_nothing() -> None:
    recipe = conv2()
    harvested = harvest(recipe, build(recipe))
    assert harvested.recipe.member().tensors == {}
    assert not list(payload_names(harvested.recipe))


def test_scores_are_kept_when_asked_for(tmp_path: Path) -> None:
    recipe, model = popped()
    without, kept = tmp_path / "without.safetensors", tmp_path / "with.safetensors"
    rs.save(without, recipe, model)
    rs.save(kept, recipe, model, scores=True)
    with read_checkpoint(kept) as found:
        for name, layer in attached(model).items():
            assert np.array_equal(found.scores(name), layer.scores.detach().numpy())
    assert not rs.read_recipe(without).member().scores
    assert_same_state(
        rs.load(kept, model=everything()).state_dict(),
        rs.load(without, model=everything()).state_dict(),
    )


def test_saving_a_loaded_file_again_gives_identical_bytes(tmp_path: Path) -> None:
    recipe, model = popped(learn=("@norm", "@head"))
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    rs.save(first, recipe, model)
    rs.save(second, read(first))
    assert second.read_bytes() == first.read_bytes()
    rs.save(second, read(first), rs.load(first, model=everything()), force=True)
    assert second.read_bytes() == first.read_bytes()


def test_a_change_to_a_loaded_file_is_stored_beside_what_it_had(tmp_path: Path) -> None:
    recipe, model = popped()
    path = tmp_path / "own.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path, model=everything())
    with torch.no_grad():
        again.stem.weight[0, 0, 0, 0] += 1
        again.head.bias.fill_(0.25)
    rs.save(path, read(path), again, force=True)
    assert_same_state(rs.load(path, model=everything()).state_dict(), again.state_dict())


def test_other_members_keep_their_words_and_bytes() -> None:
    recipe, model = popped()
    names = (Member(name="a"), Member(name="b"))
    two = Checkpoint(recipe.recipe.model_copy(update={"members": names}), recipe.payloads)
    two = harvest(two, model, member="a")
    other = build(two, "b", model=everything())
    with torch.no_grad():
        other.head.weight.mul_(2)
    three = harvest(two, other, member="b")
    assert three.recipe.member("a") == two.recipe.member("a")
    for name in payload_names(two.recipe, "a"):
        assert three.payloads.read(name).same_bits(two.payloads.read(name))
    assert_same_state(build(three, "b", model=everything()).state_dict(), other.state_dict())
    with pytest.raises(UsageError, match=r"2 members \(a, b\)"):
        build(three, model=everything())
    with pytest.raises(UsageError, match="no member 'c'"):
        build(three, "c", model=everything())


def test_an_existing_file_is_not_overwritten_without_force(tmp_path: Path) -> None:
    path = write(tmp_path / "net.safetensors", conv2())
    before = path.read_bytes()
    with pytest.raises(rs.OutputError, match="pass force=True"):
        rs.save(path, conv2(num_classes=5))
    assert path.read_bytes() == before
    rs.save(path, conv2(num_classes=5), force=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]


# --- bases ---------------------------------------------------------------------------------------


def dense(seed: int = 0, **args: Any) -> nn.Module:
    """A "trained" dense network: every tensor far from any seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", **args)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    return save_dense(tmp_path / "dense.safetensors", dense(num_classes=10).state_dict())


@contextlib.contextmanager
def base_at(file: Path) -> Iterator[Base]:
    found = read_base(file)
    with contextlib.ExitStack() as stack:
        if isinstance(found.tensors, Container):
            stack.enter_context(found.tensors)
        yield found


def on_base(file: Path, **args: Any) -> Checkpoint:
    """A network on a base that is held in memory."""
    args = {"num_classes": 10, **args}
    with base_at(file) as base:
        names = list(base.names)
        held = Memory({name: base.tensors.read(name) for name in names})
        return make_recipe_on_base("test_resnet", replace(base, tensors=held), args=args)


def test_a_network_on_a_base_is_the_base(base_file: Path) -> None:
    assert_same_state(build(on_base(base_file)).state_dict(), dense(num_classes=10).state_dict())


def test_popup_over_a_dense_checkpoint_is_stored_as_base_and_mask(base_file: Path) -> None:
    recipe = on_base(base_file)
    model = attach(build(recipe), Popup(k="0.5"))
    path = base_file.parent / "popped.safetensors"
    rs.save(path, recipe, model)
    again = rs.load(path)
    assert same_bits(logits(again), logits(model))
    rows = {row.name: row.made_of for row in storage(path).tensors}
    assert {rows[name] for name in attached(model)} == {"base + mask"}
    assert {rows[name] for name in rows if name not in attached(model)} == {"base"}
    assert path.stat().st_size < base_file.stat().st_size / 20


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pth_files_are_opened_as_training_programs_write_them(
    tmp_path: Path, wrap: str | None, prefix: str
) -> None:
    state = {prefix + name: t for name, t in dense(num_classes=10).state_dict().items()}
    path = tmp_path / "dense.pth"
    beside: dict[str, Any] = {"epoch": 3, "arch": "test_resnet", "metrics": [0.5], "none": None}
    if wrap is None:
        torch.save(state, path)
    else:
        beside["state_dict_ema"] = {name: t.float() + 1 for name, t in state.items()}
        torch.save({**beside, wrap: state}, path)
    recipe = on_base(path)
    assert_same_state(build(recipe).state_dict(), dense(num_classes=10).state_dict())
    saved = write(tmp_path / "net.safetensors", recipe)
    assert_same_state(rs.load(saved, base=path).state_dict(), dense(num_classes=10).state_dict())


def test_a_base_of_another_number_of_classes_gets_a_classifier_from_the_seed(
    base_file: Path,
) -> None:
    recipe = on_base(base_file, num_classes=7)
    kinds = {name: entry.source.kind for name, entry in recipe.recipe.tensors.items()}
    assert kinds.pop("fc.weight") == "random"
    assert kinds.pop("fc.bias") == "constant"
    assert set(kinds.values()) == {"base"}
    state = build(recipe).state_dict()
    assert state["fc.weight"].shape[0] == 7
    assert same_bits(state["conv1.0.weight"], dense(num_classes=10).state_dict()["conv1.0.weight"])


def test_a_base_is_found_beside_the_file_or_given(base_file: Path, tmp_path: Path) -> None:
    saved = write(tmp_path / "net.safetensors", on_base(base_file))
    expected = dense(num_classes=10).state_dict()
    assert_same_state(rs.load(saved).state_dict(), expected)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = base_file.rename(elsewhere / "other.safetensors")
    with pytest.raises(IncompatibleError, match=r"base.*needed.*dense\.safetensors.*--base"):
        rs.load(saved)
    assert_same_state(rs.load(saved, base=moved).state_dict(), expected)


def test_a_wrong_base_is_named_with_both_identities(base_file: Path, tmp_path: Path) -> None:
    saved = write(tmp_path / "net.safetensors", on_base(base_file))
    with base_at(base_file) as base:
        right = base.identity
    wrong_file = save_dense(tmp_path / "wrong.safetensors", dense(1, num_classes=10).state_dict())
    with base_at(wrong_file) as base:
        wrong = base.identity
    base_file.unlink()
    with pytest.raises(IncompatibleError) as caught:
        rs.load(saved, base=wrong_file)
    assert right in str(caught.value)
    assert wrong in str(caught.value)
    torch.save(dense(1, num_classes=10).state_dict(), tmp_path / "wrong.pth")
    with pytest.raises(IncompatibleError, match=right):
        rs.load(saved, base=tmp_path / "wrong.pth")


def test_a_base_of_another_architecture_is_refused(base_file: Path, tmp_path: Path) -> None:
    with base_at(base_file) as base, pytest.raises(IncompatibleError, match="not one of test_vit"):
        make_recipe_on_base("test_vit", base)
    state = dense(num_classes=10).state_dict()
    del state["bn1.weight"]
    fewer = save_dense(tmp_path / "fewer.safetensors", state)
    with pytest.raises(IncompatibleError, match=r"lacks 'bn1\.weight'"):
        on_base(fewer)
    state["bn1.weight"] = torch.ones(3)
    with pytest.raises(IncompatibleError, match=r"'bn1\.weight' is \[3\]"):
        on_base(save_dense(tmp_path / "shape.safetensors", state))


def test_a_file_of_this_format_is_no_dense_checkpoint(tmp_path: Path) -> None:
    saved = write(tmp_path / "net.safetensors", conv2())
    with pytest.raises(FileFormatError, match="pass it as the source"):
        read_base(saved)


def test_a_self_contained_file_needs_no_base(base_file: Path, tmp_path: Path) -> None:
    saved = write(tmp_path / "net.safetensors", on_base(base_file))
    with read_checkpoint(saved) as found:
        whole = write(tmp_path / "whole.safetensors", self_contained(found))
    base_file.unlink()
    assert_same_state(rs.load(whole).state_dict(), dense(num_classes=10).state_dict())
    assert rs.read_recipe(whole).bases == {}


def test_a_pth_that_holds_a_whole_module_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "more.pth"
    for whole in (dense(), {"model": dense(), "epoch": 3}):
        torch.save(whole, path)
        with pytest.raises(FileFormatError, match=r"ResNet.*torch\.save\(model\.state_dict\(\)"):
            read_base(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04 x"])
def test_a_pth_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"broken\.pth"):
        read_base(path)


def test_a_truncated_pth_and_one_without_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "dense.pth"
    torch.save(dense().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FileFormatError, match=r"dense\.pth"):
        read_base(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(FileFormatError, match="holds no state dict"):
        read_base(path)
    torch.save([1, 2], path)
    with pytest.raises(FileFormatError, match="holds no state dict"):
        read_base(path)
    with pytest.raises(FileFormatError, match="no such file"):
        read_base(tmp_path / "missing.pth")


def test_a_sparse_or_odd_tensor_in_a_pth_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    for odd in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64)):
        torch.save({"weight": odd}, path)
        with pytest.raises((FileFormatError, IncompatibleError), match="weight"):
            read_base(path)


# --- heads and flattening ------------------------------------------------------------------------


def test_another_number_of_classes_redraws_a_classifier_that_holds_nothing_learned() -> None:
    recipe = conv2()
    other = with_head(recipe, 7)
    assert with_head(recipe, 10) is recipe
    state = build(other).state_dict()
    assert state["fc.weight"].shape == (7, 25)
    assert build(other)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert same_bits(state["fc1.weight"], build(recipe).state_dict()["fc1.weight"])
    assert_same_state(state, build(conv2(num_classes=7)).state_dict())
    assert other.recipe.member().head.classes == 7


def test_a_learned_classifier_is_not_redrawn(tmp_path: Path) -> None:
    recipe = conv2()
    model = attach(build(recipe), Popup(k="0.5"))
    harvested = harvest(recipe, model)
    for checkpoint in (harvested, flatten(harvested)):
        with pytest.raises(IncompatibleError, match="--num-classes 10"):
            with_head(checkpoint, 7)
    skipped = harvest(recipe, attach(build(recipe), Popup(k="0.5", skip=("@head",))))
    assert build(with_head(skipped, 7)).fc.weight.shape == (7, 25)
    with pytest.raises(IncompatibleError, match="no classifier"):
        with_head(make_recipe(nn.Conv2d(3, 3, 3)), 7)


def test_flattening_moves_overlays_and_changes_no_tensor(tmp_path: Path) -> None:
    recipe, model = popped(learn=("@norm", "@head"))
    harvested = harvest(recipe, model)
    flat = flatten(harvested)
    assert flat.recipe.member().tensors == {}
    assert_same_state(
        build(flat, model=everything()).state_dict(),
        build(harvested, model=everything()).state_dict(),
    )
    again = flatten(read(write(tmp_path / "flat.safetensors", flat)))
    assert_same_state(
        build(again, model=everything()).state_dict(),
        build(harvested, model=everything()).state_dict(),
    )


def test_popup_on_a_file_with_masks_puts_a_mask_on_the_masked_weights(tmp_path: Path) -> None:
    recipe, model = conv2(), build(conv2())
    first = write(tmp_path / "a.safetensors", harvest(recipe, attach(model, Popup(k="0.5"))))
    source = open_source(SourceSpec(str(first)))
    model = attach(build(source), Popup(k="0.5", seed=5))
    second = write(tmp_path / "b.safetensors", harvest(source, model))
    rows = {row.made_of for row in storage(second).tensors}
    assert rows == {"random + mask + mask"}
    assert same_bits(logits(rs.load(second)), logits(model))


def test_threads_change_no_bit() -> None:
    recipe = make_recipe("test_resnet", "kaiming-normal", seed=4)
    assert_same_state(build(recipe, threads=1).state_dict(), build(recipe, threads=3).state_dict())


def test_built_modules_are_plain_and_can_be_trained(tmp_path: Path) -> None:
    recipe = conv2()
    path = tmp_path / "net.safetensors"
    rs.save(path, recipe, attach(build(recipe), Popup(k="0.5")))
    model = rs.load(path)
    assert not model._forward_pre_hooks
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.fc.weight.detach().clone()
    model.train()(torch.ones(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.fc.weight, before)
