"""Modules of every shape that people have: the right value, or one line that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from surgery_helpers import assert_same_state, conv2, same_bits
from test_heads import KINDS
from torch import nn
from torch.nn.utils import parametrizations, prune
from typer.testing import CliRunner

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.surgery.heads import FixedClassifier
from randsurgery.surgery.modules import plain_state
from randsurgery.surgery.plans import make_plan
from randsurgery.surgery.roles import select
from randsurgery.surgery.scores import attached


def one_line(caught: pytest.ExceptionInfo[rs.RandsurgeryError], *words: str) -> None:
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# --- layers whose weight is made from other tensors -----------------------------------------------


def with_weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )


def with_spectral_norm() -> nn.Module:
    return nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 2)
    )


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Linear(3, 2))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


@pytest.mark.parametrize("make", [with_weight_norm, with_spectral_norm, pruned])
def test_a_weight_made_from_others_is_neither_sliced_nor_masked(make: Any) -> None:
    recipe = rs.make_recipe(make(), seed=7)
    with pytest.raises(rs.IncompatibleError) as caught:
        rs.freeze(recipe, rs.Freeze(fraction="0.5"), model=make())
    one_line(caught, "0.weight is made from other tensors", "--only")
    with pytest.raises(rs.IncompatibleError) as caught:
        rs.attach(make(), rs.Popup("0.5"))
    one_line(caught, "0.weight", "--skip")
    other = rs.freeze(recipe, rs.Freeze(fraction="0.5", only=("2",)), model=make())
    model = rs.attach(rs.build(other, model=make()), other)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "2.learned_weight", "2.learned_bias"]  # fmt: skip


def test_a_plan_for_another_network_is_refused() -> None:
    first, second = (
        nn.Sequential(*head, nn.Linear(4, 4), nn.Linear(4, 2)) for head in ((), (nn.Flatten(),))
    )
    planned = rs.freeze(rs.make_recipe(first), rs.Freeze(fraction="0.5"), model=second)
    with pytest.raises(rs.IncompatibleError) as caught:
        rs.attach(first, planned)
    one_line(caught, "the plan learns '2.bias', which the recipe lacks")


# --- what a state dict may hold -------------------------------------------------------------------


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"amax": 1}

    def set_extra_state(self, state: Any) -> None:
        pass


class ExtraTensor(Extra):
    def get_extra_state(self) -> Any:
        return torch.ones(2)


def _strange(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state[prefix + "strange"] = torch.ones(2) if isinstance(module, nn.Linear) else "text"


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer._register_state_dict_hook(_strange)
    return nn.Sequential(layer)


def hooked_text() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model._register_state_dict_hook(_strange)
    return model


def named(name: str) -> nn.Module:
    model = nn.Module()
    model.add_module(name, nn.Linear(4, 4))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(Extra(4, 4)), ("0._extra_state", "get_extra_state")),
        (lambda: nn.Sequential(ExtraTensor(4, 4)), ("0._extra_state", "get_extra_state")),
        (hooked, ("0.strange", "remove the hook")),
        (hooked_text, ("strange in the state dict is a str",)),
        (lambda: named("größe"), ("größe", "ASCII", "rename")),
        (lambda: named("a\nb"), ("printable", "rename")),
        (lambda: named("x" * 500), ("1 to 400", "rename")),
    ],
)
def test_what_a_file_cannot_hold_is_named(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(rs.IncompatibleError) as caught:
        rs.make_recipe(make(), seed=7)
    one_line(caught, *words)


def test_extra_state_that_came_later_is_named() -> None:
    recipe = rs.make_recipe(nn.Sequential(nn.Linear(4, 4)))
    for refused in (
        lambda: rs.build(recipe, model=nn.Sequential(Extra(4, 4))),
        lambda: rs.harvest(recipe, nn.Sequential(Extra(4, 4))),
    ):
        with pytest.raises(rs.IncompatibleError) as caught:
            refused()
        one_line(caught, "_extra_state")


# --- tensors without elements ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 2)), torch.empty(5, 0)),
        (lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 2)), torch.ones(5, 4)),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0)), torch.ones(5, 4)),
    ],
)
@pytest.mark.parametrize("what", ["popup", "supermask", "out", "in", "everything"])
def test_tensors_without_elements_pass_through(
    make: Any, x: torch.Tensor, what: str, tmp_path: Path
) -> None:
    recipe = rs.make_recipe(make(), seed=7)
    if what in ("out", "in"):
        wish = rs.Freeze(fraction="0.5", dim=what, least=1, head="frozen")  # type: ignore[arg-type]
        recipe = rs.freeze(recipe, wish, model=make())
    methods = {"popup": rs.Popup(k="0.5"), "supermask": rs.Supermask(rescale=True)}
    model = rs.build(recipe, model=make())
    if what in methods and x.shape == (5, 4) and model[0].out_features == 0:  # type: ignore[operator, union-attr]
        with pytest.raises(rs.UsageError, match="no convolution or linear layer is left"):
            rs.attach(model, methods[what])  # type: ignore[arg-type]
        return
    rs.attach(model, methods.get(what, recipe))  # type: ignore[arg-type]
    out = model(x)
    if any(p.requires_grad and p.numel() for p in model.parameters()):
        out.sum().backward()
    rs.save(tmp_path / "a.safetensors", recipe, model, scores=what in methods)
    again = rs.load(tmp_path / "a.safetensors", model=make())
    assert same_bits(again(x).detach(), model.eval()(x).detach())


# --- meta -----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A tied weight, a buffer of the state dict and one outside it."""

    def __init__(self, *, hidden: bool = False, made: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.norm.weight.requires_grad_(False)
        if hidden:
            self.register_buffer("index", torch.arange(4), persistent=False)
        if made:
            self.init_non_persistent_buffers = self._fill

    def _fill(self) -> None:
        self.index = torch.arange(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)))
        return out


def test_a_shell_on_meta_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rs.save(path, rs.make_recipe(Tied(), seed=7))
    with torch.device("meta"):
        shell = Tied()
    half = Tied()
    half.first.to("meta")
    half.last.weight = half.first.weight
    plain = rs.load(path, model=Tied())
    x = torch.ones(2, 4)
    for given in (shell, half):
        model = rs.load(path, model=given)
        assert model is given
        assert_same_state(model.state_dict(), plain.state_dict())
        assert torch.equal(model(x), plain(x))
        assert model.first.weight is model.last.weight  # type: ignore[union-attr]
        assert not model.norm.weight.requires_grad  # type: ignore[union-attr]
        assert model.first.weight.requires_grad  # type: ignore[union-attr]


def test_a_buffer_on_meta_that_no_file_holds_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    rs.save(path, rs.make_recipe(Tied(), seed=7))
    with torch.device("meta"):
        shell = Tied(hidden=True)
    with pytest.raises(rs.IncompatibleError) as caught:
        rs.load(path, model=shell)
    one_line(caught, "its buffer index is in no file", "on the CPU")
    assert shell.first.weight.is_meta  # nothing was begun


@pytest.mark.parametrize("what", ["popup", "plan", "harvest"])
def test_a_module_on_meta_is_not_trained_or_saved(what: str) -> None:
    recipe = rs.make_recipe(nn.Sequential(nn.Linear(4, 4)), seed=7)
    with torch.device("meta"):
        shell = nn.Sequential(nn.Linear(4, 4))
    work: dict[str, Any] = {
        "popup": lambda: rs.attach(shell, rs.Popup("0.5")),
        "plan": lambda: rs.attach(shell, recipe),
        "harvest": lambda: rs.harvest(recipe, shell),
    }
    with pytest.raises(rs.IncompatibleError) as caught:
        work[what]()
    one_line(caught, "meta")


# --- recurrent layers, embeddings, bare parameters ------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.e = nn.LSTM(4, 4), nn.Embedding(5, 4)
        self.pos_embed, self.gate = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(4))
        self.act, self.o = nn.PReLU(), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.l(self.e(x) + self.pos_embed)[0] * self.gate
        out: torch.Tensor = self.o(self.act(x))
        return out


def test_an_lstm_is_not_sliced_and_the_message_says_why() -> None:
    recipe = rs.make_recipe(Mixed(), seed=7)
    with pytest.raises(rs.UsageError) as caught:
        rs.freeze(recipe, rs.Freeze(only=("l",), fraction="0.5"), model=Mixed())
    one_line(caught, "--only l names no convolution or linear layer to slice", "LSTM", "whole")
    with pytest.raises(rs.UsageError) as caught:  # beside a layer that can be
        rs.freeze(recipe, rs.Freeze(only=("o", "e"), fraction="0.5"), model=Mixed())
    one_line(caught, "Embedding")
    whole = rs.freeze(recipe, rs.Freeze(only=("l",)), model=Mixed())
    plan = whole.member().plan
    assert plan is not None
    assert set(plan.tensors) == {f"l.{n}" for n, _ in Mixed().l.named_parameters()}


def test_what_popup_leaves_alone_is_listed_in_a_warning() -> None:
    with pytest.warns(rs.RandsurgeryWarning) as caught:
        rs.attach(Mixed(), rs.Popup("0.5"))
    text = str(caught[0].message)
    assert "l (LSTM), e (Embedding), act (PReLU)" in text
    assert "gate" in text
    assert "pos_embed" not in text  # positions are random by design
    assert "\n" not in text
    assert caught[0].filename == __file__
    with pytest.warns(rs.RandsurgeryWarning, match="gate, l \\(LSTM\\); name them"):
        rs.attach(Mixed(), rs.Supermask(learn=("e", "act")))
    rs.attach(Mixed(), rs.Popup("0.5", skip=("l", "gate"), learn=("e", "act")))  # says nothing


def test_the_command_line_lists_it_in_a_note(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["popup", "convnextv2_atto", "--k", "0.5", "--dry-run"])
    assert found.exit_code == 0, found.output
    assert "neither masked nor learned" in found.stderr
    assert "RandsurgeryWarning" not in found.stderr


def test_bare_parameters_are_selected_by_pattern() -> None:
    model = rs.build(rs.make_recipe("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1}))
    found = select(model, ("pos_embed", "cls_*", "blocks"))
    assert found.parameters == {"pos_embed", "cls_token"}
    assert "blocks.0.attn" in found.modules
    skip = ("blocks.0.mlp.fc1.weight",)
    rs.attach(model, rs.Popup("0.5", learn=("pos_embed", "*_token"), skip=skip))
    free = {n for n, p in model.named_parameters() if p.requires_grad and "scores" not in n}
    assert free == {"pos_embed", "cls_token"}
    assert "blocks.0.mlp.fc1.weight" not in attached(model)
    with pytest.raises(rs.UsageError, match="near: pos_embed"):
        select(model, ("pos_embd",))
    with pytest.raises(rs.UsageError, match="but the parameter 'pos_embed'; name a layer"):
        rs.attach(Mixed(), rs.Popup("0.5", k_for=(("pos_embed", "0.1"),)))


def test_a_plan_may_learn_a_bare_parameter() -> None:
    model = Mixed()
    model.o = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))  # type: ignore[assignment]
    plan = make_plan(model, rs.Freeze(only=("pos_embed", "o.0"), fraction="0.4"))
    assert {n: p.part for n, p in plan.tensors.items()} == {
        "o.0.bias": "slice", "o.0.weight": "slice", "pos_embed": "whole"}  # fmt: skip
    alone = make_plan(model, rs.Freeze(only=("gate",)))
    assert list(alone.tensors) == ["gate"]


# --- what a fixed classifier fixes ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, 3.0])
@pytest.mark.parametrize("what", ["popup", "random", "supermask", "everything", "freeze", "plan"])
def test_fixed_rows_and_a_given_scale_stay_to_the_bit(
    kind: Any, scale: float | None, what: str
) -> None:
    start = conv2(num_classes=5)
    if what == "plan":  # made before the classifier was fixed
        start = rs.freeze(start, rs.Freeze(fraction="0.5", least=1))
    recipe = rs.fix_head(start, kind, scale=scale)
    if what == "freeze":
        recipe = rs.freeze(recipe, rs.Freeze(only=("@head", "fc1"), head="learned"))
    methods: dict[str, Any] = {
        "popup": rs.Popup("0.5", learn=("@head",)),
        "random": rs.Popup("0.5", mask="random", learn=("@head",)),
        "supermask": rs.Supermask(learn=("fc",)),
    }
    model = rs.build(recipe)
    place = next(n for n, m in model.named_modules() if isinstance(m, FixedClassifier))
    rs.attach(model, methods.get(what, recipe))
    before = {n: t.clone() for n, t in plain_state(model).items()}
    with torch.random.fork_rng(devices=[]):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
        for turn in range(2):
            draw = torch.Generator().manual_seed(turn)
            x = torch.randn(6, 3, 32, 32, generator=draw)
            nn.functional.cross_entropy(model.train()(x), torch.arange(6) % 5).backward()
            optimizer.step()
            optimizer.zero_grad()
    after = plain_state(model)
    assert same_bits(after[f"{place}.weight"], before[f"{place}.weight"])
    moved = not same_bits(after[f"{place}.scale"], before[f"{place}.scale"])
    assert moved == (scale is None)
    assert not same_bits(after[f"{place}.bias"], before[f"{place}.bias"])


def test_fixed_rows_cannot_be_asked_for() -> None:
    recipe = rs.fix_head(conv2(), "hadamard", scale=2.0)
    for leaf, word in (("weight", "rows are never"), ("scale", "given scale is never")):
        for refused in (
            lambda leaf=leaf: rs.attach(rs.build(recipe), rs.Popup("0.5", learn=(f"fc.{leaf}",))),
            lambda leaf=leaf: rs.freeze(recipe, rs.Freeze(only=(f"fc.{leaf}",))),
        ):
            with pytest.raises(rs.IncompatibleError, match=word):
                refused()


@pytest.mark.parametrize("scale", [(), ("--head-scale", "3")])
def test_the_command_line_keeps_them_too(scale: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    words = "popup conv2 --width 0.1 --epochs 1 -b 256 --k 0.5 --head orthonormal --learn @head -q"
    found = CliRunner().invoke(app, [*words.split(), *scale, "-o", str(path)])
    assert found.exit_code == 0, found.output
    file = rs.read_checkpoint(path)
    own = file.member().tensors
    assert "fc.weight" not in own
    assert ("fc.scale" in own) == (not scale)
    assert "fc.bias" in own
    assert not scale or rs.load(path).fc.scale.detach().tolist() == [3.0]  # type: ignore[arg-type, union-attr]


# --- what is passed -------------------------------------------------------------------------------


def test_wrapped_modules_are_told_from_their_inside() -> None:
    recipe = conv2()
    model = rs.build(recipe)
    for wrapped, inner in (
        (nn.DataParallel(model), ".module"),
        (torch.optim.swa_utils.AveragedModel(model), ".module"),
    ):
        with pytest.raises(rs.IncompatibleError) as caught:
            rs.harvest(recipe, wrapped)
        one_line(caught, type(wrapped).__name__, f"pass its {inner}")


def test_a_header_will_do_where_no_payload_is_spoken_of(tmp_path: Path) -> None:
    seed, learned, again = (tmp_path / f"{n}.safetensors" for n in ("seed", "learned", "again"))
    rs.save(seed, conv2())
    header = rs.read_recipe(seed)
    model = rs.attach(rs.build(header), rs.Popup("0.5"))
    rs.save(learned, header, model)
    assert_same_state(rs.load(learned).state_dict(), rs.load(learned).state_dict())
    with pytest.raises(rs.UsageError) as caught:
        rs.save(again, rs.read_recipe(learned))
    one_line(caught, "read_recipe gives a file's header alone", "read_checkpoint(FILE)")
    whole = rs.read_checkpoint(learned)
    learned.rename(tmp_path / "away")  # it is in memory
    rs.save(again, whole)
    assert again.read_bytes() == (tmp_path / "away").read_bytes()


RECIPE = conv2()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rs.attach(rs.build(RECIPE), "popup"),  # type: ignore[arg-type]
        lambda: rs.attach(RECIPE, rs.Popup("0.5")),  # type: ignore[arg-type]
        lambda: rs.save("a.safetensors", {}),  # type: ignore[arg-type]
        lambda: rs.save("a.safetensors", RECIPE, {}),  # type: ignore[arg-type]
        lambda: rs.harvest(RECIPE, rs.build(RECIPE).state_dict()),  # type: ignore[arg-type]
        lambda: rs.build("conv2"),  # type: ignore[arg-type]
        lambda: rs.build(RECIPE, model=nn.Linear),  # type: ignore[arg-type]
        lambda: rs.make_recipe(nn.Linear),  # type: ignore[arg-type]
        lambda: rs.make_recipe(7),  # type: ignore[arg-type]
        lambda: rs.freeze(RECIPE, rs.Popup("0.5")),  # type: ignore[arg-type]
        lambda: rs.freeze(RECIPE, rs.Freeze(fraction="0.5"), model="conv2"),  # type: ignore[arg-type]
        lambda: rs.fix_head(RECIPE, "random"),  # type: ignore[arg-type]
        lambda: rs.fix_head(RECIPE, "hadamard", seed=-1),
        lambda: rs.attach(nn.Linear(2, 2), rs.Popup(k=[0.5])),  # type: ignore[arg-type]
        lambda: rs.load("there is none.safetensors"),
        lambda: rs.load("."),
        lambda: rs.read_checkpoint("there is none.safetensors"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(wrong: Any) -> None:
    with pytest.raises(rs.RandsurgeryError) as caught:
        wrong()
    one_line(caught, "")
