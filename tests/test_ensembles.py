"""One resident network that becomes each member, and members that answer together, against
networks that are built one by one."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ensemble_helpers import drawn, flip, learned, named, one_thread
from slice_helpers import Net, batch
from surgery_helpers import assert_same_state, everything, same_bits, write
from test_checkpoint import Builder, assemble, constant, entry, floats, tiny
from torch import nn

import randsurgery as rs
from randsurgery.errors import FileFormatError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint, read_checkpoint
from randsurgery.format.container import Container
from randsurgery.format.members import graft
from randsurgery.format.recipe import Member, MemberTensor
from randsurgery.format.specs import Calibration, DatasetSpec, InputSpec
from randsurgery.format.writing import finish, write_checkpoint
from randsurgery.surgery import ensembles, plans
from randsurgery.surgery.ensembles import Ensemble, joined
from randsurgery.surgery.modules import build
from randsurgery.surgery.resident import Resident

pytestmark = pytest.mark.slow

# --- members of every kind on one backbone --------------------------------------------------------

ARGS = {"depth": 10, "growth_rate": 2}


def dense_start(classes: int = 10) -> Checkpoint:
    args = {**ARGS, "num_classes": classes}
    return rs.make_recipe("densenet_bc_100_12", "kaiming-normal", seed=9, args=args)


def survivors(start: Checkpoint, name: str, seed: int) -> Checkpoint:
    """A member whose masked weights were trained: zeros with values scattered in."""
    masked = rs.harvest(start, drawn(rs.attach(rs.build(start), rs.Popup("0.5")), seed))
    alive = [n for n, own in masked.member().tensors.items() if own.overlays]
    planned = plans.with_plan(masked, plans.survivors(rs.build(masked), alive))
    return learned(planned, None, name, seed, statistics=True)


def members() -> list[Checkpoint]:
    """Slices of other counts and dims, masks, replaced norms, own classifiers and so on."""
    start, freeze = dense_start(), rs.Freeze
    fixed = [rs.fix_head(dense_start(n), kind, seed=n) for n, kind in
             ((10, "hadamard"), (3, "orthonormal"))]  # fmt: skip
    only = {"norms": False, "head": "frozen", "least": 1}
    return [
        learned(start, freeze(fraction="0.2", **only), "few", 1),  # type: ignore[arg-type]
        learned(start, freeze(fraction="0.8", **only), "many", 2),  # type: ignore[arg-type]
        learned(start, freeze(fraction="0.5", dim="in", **only), "across", 3),  # type: ignore[arg-type]
        learned(start, freeze(fraction="0.5", least=1), "norms", 4, statistics=True),
        learned(start, freeze(fraction="0.5", least=1), "counts", 5, statistics=True),
        learned(start, freeze(only=("@head",)), "head", 6),
        learned(start, rs.Popup("0.5"), "mask", 7),
        learned(start, rs.Popup("0.9", learn=("@norm",)), "masks", 8, statistics=True),
        survivors(start, "ticket", 9),
        learned(start, None, "whole", 10, statistics=True),
        named(start, "nothing"),
        learned(fixed[0], freeze(fraction="0.5", least=1), "hadamard", 11, statistics=True),
        learned(fixed[1], freeze(fraction="0.5", least=1), "three", 12),
        learned(dense_start(5), rs.Popup("0.5"), "five", 13),
    ]


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "zoo.safetensors"
    parts = members()
    whole = parts[0]
    for part in parts[1:]:
        whole = joined(whole, part)
    write_checkpoint(path, whole, finished=True)
    return path


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The members of one task: their classifier is shared, but for those that learned it."""
    path = tmp_path_factory.mktemp("slices") / "slices.safetensors"
    few, many, across = members()[:3]
    write_checkpoint(path, graft(graft(graft(few, many), across), named(dense_start(), "nothing")),
                     finished=True)  # fmt: skip
    return path


@pytest.fixture
def checkpoint(zoo: Path) -> Any:
    with read_checkpoint(zoo) as found:
        yield found


@pytest.fixture
def sliced(slices: Path) -> Any:
    with read_checkpoint(slices) as found:
        yield found


Twins = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def twins(zoo: Path) -> Twins:
    """The slow way: every member built on its own."""
    names = [member.name for member in rs.read_recipe(zoo).members]
    return {name: rs.load(zoo, member=name).state_dict() for name in names}


def test_the_zoo_has_what_switching_must_undo(zoo: Path) -> None:
    """Or the tests below would pass for want of trying."""
    recipe = rs.read_recipe(zoo)
    told = {
        (overlay.kind, getattr(overlay, "dim", None), getattr(overlay, "count", None))
        for member in recipe.members
        for own in member.tensors.values()
        for overlay in own.overlays
        if overlay.kind == "slice"
    }
    assert len({count for _, dim, count in told if dim == 0}) > 2
    assert any(dim == 1 for _, dim, _ in told)
    own = {own.entry.source.kind for m in recipe.members for own in m.tensors.values() if own.entry}
    assert own >= {"constant", "random", "hadamard", "stored"}
    counts = recipe.member("norms").tensors["block1.0.bn2.num_batches_tracked"].entry
    assert counts is not None
    assert counts.source.kind == "constant"
    kinds = {
        overlay.kind for m in recipe.members for o in m.tensors.values() for overlay in o.added
    }
    assert kinds >= {"slice", "mask", "replace", "scatter"}
    assert {m.head.classes for m in recipe.members if m.head} == {10, 3, 5}


# --- the resident network -------------------------------------------------------------------------


def test_any_member_after_any_other_has_the_bits_of_its_own_build(
    checkpoint: Checkpoint, twins: Twins
) -> None:
    resident = Resident(checkpoint, "few")
    for first, second in itertools.permutations(twins, 2):
        resident.switch(first)
        assert_same_state(resident.switch(second).state_dict(), twins[second])
        head = checkpoint.member(second).head
        assert head is not None
        assert resident.model.num_classes == head.classes


def test_a_long_walk_among_members_ends_where_it_ought_to(
    checkpoint: Checkpoint, twins: Twins
) -> None:
    resident, draw = Resident(checkpoint, "nothing"), random.Random(5)
    module = resident.model
    for name in draw.choices(list(twins), k=80):
        assert resident.switch(name) is module
        assert resident.member == name
        assert_same_state(module.state_dict(), twins[name])
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_a_switched_network_says_what_its_own_build_says(checkpoint: Checkpoint) -> None:
    resident = Resident(checkpoint, "three")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("hadamard", "many", "five", "three"):
            assert torch.equal(resident.switch(name)(images), build(checkpoint, name)(images))


def test_an_unknown_member_changes_nothing(checkpoint: Checkpoint, twins: Twins) -> None:
    resident = Resident(checkpoint, "many")
    with pytest.raises(UsageError, match="no member 'manny'; near: many"):
        resident.switch("manny")
    assert resident.member == "many"
    assert_same_state(resident.model.state_dict(), twins["many"])
    with pytest.raises(UsageError, match="14 members"):
        Resident(checkpoint)


class Counted:
    """How many tensors a checkpoint rebuilds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        whole = Checkpoint.rebuild

        def rebuild(checkpoint: Checkpoint, member: Member, name: str, out: Any = None) -> Any:
            self.names.append(name)
            return whole(checkpoint, member, name, out)

        monkeypatch.setattr(Checkpoint, "rebuild", rebuild)


def test_from_slice_to_slice_nothing_is_rebuilt(
    sliced: Checkpoint, twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, counted = Resident(sliced, "few"), Counted(monkeypatch)
    assert_same_state(resident.switch("many").state_dict(), twins["many"])
    assert counted.names == []
    resident.switch("few")  # a smaller slice leaves values of the larger behind
    few, many = (
        {name: own.overlays[0].count for name, own in sliced.member(n).tensors.items()}  # type: ignore[union-attr]
        for n in ("few", "many")
    )
    assert set(counted.names) == {name for name, count in many.items() if count > few[name]}
    assert len(counted.names) > 3
    counted.names.clear()
    resident.switch("across")  # another dimension
    assert counted.names
    counted.names.clear()
    resident.switch("nothing")
    counted.names.clear()
    resident.switch("few")
    assert counted.names == []
    resident.switch("few")
    assert counted.names == []


def test_a_slice_is_all_that_is_written(sliced: Checkpoint, twins: Twins) -> None:
    """What lies beyond it keeps a value that nothing would make."""
    resident, told = Resident(sliced, "few"), sliced.member("many").tensors
    learned_part = {
        name: told[name].overlays[0].count if name in told else 0  # type: ignore[union-attr]
        for name, tensor in resident.model.state_dict().items()
        if tensor.is_floating_point()
    }
    assert sum(learned_part.values()) > 20
    for name, count in learned_part.items():
        resident.model.state_dict()[name][count:] = math.pi
    state = resident.switch("many").state_dict()
    for name, count in learned_part.items():
        assert same_bits(state[name][:count], twins["many"][name][:count])
        assert bool((state[name][count:] == torch.tensor(math.pi)).all())


def test_a_shared_part_of_a_classifier_is_filled_in_where_the_classifier_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows and biases of their own, under one scale that nobody changes."""
    args = {"width": 0.1, "img_size": 8, "num_classes": 10}
    start = rs.fix_head(rs.make_recipe("conv2", args=args), "hadamard")
    rows, bias = (start.recipe.tensors[f"fc.{leaf}"] for leaf in ("weight", "bias"))
    head = start.member().head
    assert head is not None
    three = Member(
        name="three",
        head=head.model_copy(update={"classes": 3}),
        tensors={
            "fc.weight": MemberTensor(entry=rows.model_copy(update={"shape": (3, rows.shape[1])})),
            "fc.bias": MemberTensor(entry=bias.model_copy(update={"shape": (3,)})),
        },
    )
    ten = start.member().model_copy(update={"name": "ten"})
    both = replace(start, recipe=start.recipe.model_copy(update={"members": (three, ten)}))
    empty = nn.Module.to_empty

    def poisoned(module: nn.Module, **options: Any) -> nn.Module:
        found = empty(module, **options)
        for tensor in found.state_dict().values():
            tensor.fill_(math.nan)
        return found

    monkeypatch.setattr(nn.Module, "to_empty", poisoned)
    resident = Resident(both, "ten")
    for name in ("three", "ten", "three"):
        assert_same_state(resident.switch(name).state_dict(), build(both, name).state_dict())


@pytest.mark.parametrize("after", ["few", "mask", "three", "nothing"])
@pytest.mark.parametrize(
    "broken", ["many/conv1.weight/0.slice", "five/fc.weight/0.mask", "norms/bn.weight/0.tensor"]
)
def test_a_damaged_member_is_refused_and_the_next_is_right(
    zoo: Path, tmp_path: Path, twins: Twins, broken: str, after: str
) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(zoo.read_bytes())
    flip(path, broken)
    name = broken.partition("/")[0]
    with read_checkpoint(path) as checkpoint:
        resident = Resident(checkpoint, "few")
        with pytest.raises(FileFormatError, match=f"payload '{broken}' is corrupt"):
            resident.switch(name)
        assert resident.member is None
        with pytest.raises(FileFormatError):  # not taken for it the second time either
            resident.switch(name)
        assert_same_state(resident.switch(after).state_dict(), twins[after])
        assert_same_state(resident.switch("many" if name != "many" else "five").state_dict(),
                          twins["many" if name != "many" else "five"])  # fmt: skip


def test_other_dtypes_of_the_network_are_kept(checkpoint: Checkpoint, twins: Twins) -> None:
    resident = Resident(checkpoint, "few")
    resident.model.double()
    for name in ("many", "three", "norms", "few"):
        state = resident.switch(name).state_dict()
        for key, tensor in twins[name].items():
            wanted = tensor.double() if tensor.is_floating_point() else tensor
            assert same_bits(state[key], wanted)


# --- the user's own module ------------------------------------------------------------------------


def own_members() -> list[Checkpoint]:
    start = rs.make_recipe(everything(), seed=3)

    def on(name: str, what: Any, seed: int) -> Checkpoint:
        return learned(start, what, name, seed, model=everything(), statistics=seed % 2 == 0)

    return [
        on("popup", rs.Popup("0.5"), 1),
        on("slices", rs.Freeze(count=2, norms=False, statistics="frozen"), 2),
        on("more", rs.Freeze(count=5, norms=False), 3),
        on("whole", None, 4),
    ]


def test_a_module_of_the_users_becomes_each_member(tmp_path: Path) -> None:
    whole = own_members()[0]
    for part in own_members()[1:]:
        whole = joined(whole, part)
    path = tmp_path / "own.safetensors"
    write_checkpoint(path, whole, finished=True)
    names = [member.name for member in whole.recipe.members]
    found = {n: rs.load(path, member=n, model=everything()).state_dict() for n in names}
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with read_checkpoint(path) as checkpoint:
        mine = everything()
        resident = Resident(checkpoint, "more", mine)
        assert resident.model is mine
        for first, second in itertools.permutations(names, 2):
            resident.switch(first)
            assert_same_state(resident.switch(second).state_dict(), found[second])
        with pytest.raises(IncompatibleError, match="names no architecture"):
            Resident(checkpoint, "more")
    with rs.load_ensemble(path, model=everything(), engine="switch") as ensemble:
        with torch.no_grad():
            twin = [rs.load(path, member=n, model=everything())(images).softmax(-1) for n in names]
        torch.testing.assert_close(ensemble(images), torch.stack(twin).mean(0), atol=1e-6, rtol=0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(5))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"v": {"entry": entry("F32", (5,), constant(1.0))}}, "'v', which the network lacks"),
        ({"w": {"entry": entry("F32", (1,), constant(1.0))}}, r"w is \[1\] in the file, \[5\] in"),
        ({"w": {"entry": entry("I64", (5,), constant(1.0))}}, "w is I64 in the file"),
    ],
)
def test_a_member_that_does_not_fit_is_refused_as_build_refuses_it(
    words: dict[str, Any], told: str
) -> None:
    """A value of another shape is not spread over the tensor."""
    recipe = tiny(tensors={"w": entry("F32", (5,), constant(0.0))},
                  members=[{"name": "a"}, {"name": "b", "tensors": words}])  # fmt: skip
    checkpoint = finish(assemble(recipe, Builder().payloads))
    resident = Resident(checkpoint, "a", Two())
    with pytest.raises(IncompatibleError):
        build(checkpoint, "b", model=Two())
    with pytest.raises(IncompatibleError, match=told):
        resident.switch("b")
    assert resident.member is None
    assert torch.equal(resident.switch("a").state_dict()["w"], torch.zeros(5))


@pytest.mark.parametrize(("dim", "count"), [(1, 1), (0, 6)])
def test_a_slice_that_does_not_exist_is_refused_as_build_refuses_it(dim: int, count: int) -> None:
    b = Builder()
    part = b.slice("b", "w", 0, 0, floats("F32", (5,), 1))
    words = {"w": {"overlays": [{**part, "dim": dim, "count": count}]}}
    recipe = tiny(tensors={"w": entry("F32", (5,), constant(0.0))},
                  members=[{"name": "a"}, {"name": "b", "tensors": words}])  # fmt: skip
    checkpoint = assemble(recipe, b.payloads)
    resident = Resident(checkpoint, "a", Two())
    for refused in (lambda: build(checkpoint, "b", model=Two()), lambda: resident.switch("b")):
        with pytest.raises(FileFormatError, match=f"no slice of {count} along dim {dim}"):
            refused()


# --- together -------------------------------------------------------------------------------------

TEN = ("across", "counts", "few", "head", "many", "mask", "masks", "norms", "nothing", "ticket",
       "whole")  # fmt: skip
ENGINES = ("switch", "held", "batched")


def images(count: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def calibrated(zoo: Path, path: Path, temperatures: dict[str, float]) -> Path:
    """A copy of the file in which some members have a temperature."""
    with read_checkpoint(zoo) as found:
        recipe = found.recipe
        for name, value in temperatures.items():
            about = Calibration(temperature=value.hex(), dataset="digits", share="0.2")
            member = recipe.member(name).model_copy(update={"calibration": about})
            recipe = recipe.with_member(member)
        write_checkpoint(path, replace(found, recipe=recipe), finished=True)
    return path


SCALES = {"few": 2.5, "mask": 0.1, "whole": 1.0}


@pytest.fixture(scope="module")
def warm(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(zoo, tmp_path_factory.mktemp("warm") / "warm.safetensors", SCALES)


@functools.cache
def loaded(path: Path, name: str) -> nn.Module:
    """A member on its own. Nothing may change it."""
    return rs.load(path, member=name)


def shares_of(
    path: Path, names: tuple[str, ...], x: torch.Tensor, scales: dict[str, float] | None = None
) -> torch.Tensor:
    """The slow way: every member loaded, its logits by its temperature, softmax; (M, B, C)."""
    found = []
    with torch.no_grad():
        for name in names:
            said = loaded(path, name)(x)
            found.append((said / torch.tensor((scales or {}).get(name, 1.0))).softmax(-1))
    return torch.stack(found)


def test_the_mean_is_that_of_members_loaded_one_by_one(warm: Path) -> None:
    x = images()
    twin = shares_of(warm, TEN, x, SCALES)
    with rs.load_ensemble(warm, members=TEN, engine="switch") as ensemble:
        assert ensemble.members == TEN
        assert torch.equal(ensemble(x), twin.mean(0))
        assert torch.equal(ensemble(x), twin.mean(0))  # and once more, from another member on
        assert torch.equal(ensemble.predict(x).members, twin)
    with rs.load_ensemble(warm, members=TEN, engine="batched") as ensemble:
        torch.testing.assert_close(ensemble(x), twin.mean(0), atol=1e-6, rtol=0)
        other = shares_of(warm, TEN, images(2, 1), SCALES).mean(0)
        torch.testing.assert_close(ensemble(images(2, 1)), other, atol=1e-6, rtol=0)


def test_a_temperature_divides_the_logits(zoo: Path, warm: Path) -> None:
    x = images()
    with rs.load_ensemble(warm, members=["few", "many"], engine="switch") as ensemble:
        warmer = ensemble.logits(x)
    with rs.load_ensemble(zoo, members=["few", "many"], engine="switch") as ensemble:
        plain = ensemble.logits(x)
        assert ensemble.temperatures == [1.0, 1.0]
    assert torch.equal(warmer, torch.stack([plain[0] / torch.tensor(2.5), plain[1]]))


@pytest.mark.parametrize("engine", ENGINES)
def test_members_are_those_named_in_the_files_order(zoo: Path, engine: Any) -> None:
    with rs.load_ensemble(zoo, members=["norms", "few"], engine=engine) as ensemble:
        assert ensemble.members == ("few", "norms")
        found = ensemble.predict(images())
        assert found.members.shape == (2, 5, 10)
        twin = shares_of(zoo, ("few", "norms"), images())
        torch.testing.assert_close(found.members, twin, atol=1e-6, rtol=0)
    with rs.load_ensemble(zoo, members=["three"]) as ensemble:
        assert ensemble(images()).shape == (5, 3)


def entropy_of(row: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in row if p > 0)


@pytest.mark.parametrize("engine", ENGINES)
def test_uncertainty_agrees_with_loops(warm: Path, engine: Any) -> None:
    x = images(6)
    with rs.load_ensemble(warm, members=TEN, engine=engine) as ensemble:
        found = ensemble.predict(x)
    each = found.members.tolist()
    for image in range(6):
        mean = [math.fsum(row[image][c] for row in each) / len(TEN) for c in range(10)]
        assert found.probabilities[image].tolist() == pytest.approx(mean, abs=1e-6)
        assert float(found.entropy[image]) == pytest.approx(entropy_of(mean), abs=1e-5)
        inner = math.fsum(entropy_of(row[image]) for row in each) / len(TEN)
        assert float(found.mutual_information[image]) == pytest.approx(
            max(0.0, entropy_of(mean) - inner), abs=1e-5
        )
        best = mean.index(max(mean))
        others = sum(row[image].index(max(row[image])) != best for row in each)
        assert float(found.disagreement[image]) == pytest.approx(others / len(TEN))
    assert float(found.disagreement.max()) > 0
    assert float(found.mutual_information.min()) > 0


def test_one_member_knows_nothing_differently(warm: Path) -> None:
    with rs.load_ensemble(warm, members=["few"], engine="switch") as ensemble:
        found = ensemble.predict(images())
        assert torch.equal(found.mutual_information, torch.zeros(5))
        assert torch.equal(found.disagreement, torch.zeros(5))
        assert torch.equal(found.probabilities, shares_of(warm, ("few",), images(), SCALES)[0])


def test_certain_members_have_no_entropy() -> None:
    shares = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert ensembles._entropy(shares).tolist() == pytest.approx([0.0, math.log(2)])


# --- engines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "faster"), [((1.0, 2.0), "batched"), ((2.0, 1.0), "held")])
def test_auto_takes_the_faster_engine_for_each_shape(
    warm: Path, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], faster: str
) -> None:
    """The batched call is timed first, then members one after another."""
    clock = list(seconds)
    done: list[str] = []

    def fake(work: Callable[[], object], device: torch.device) -> float:
        work()
        done.append("timed")
        return clock[(len(done) - 1) % 2]

    monkeypatch.setattr(ensembles, "_seconds", fake)
    with rs.load_ensemble(warm, members=TEN) as ensemble:
        assert ensemble.engine == "auto"
        for count, runs in ((5, 2), (5, 2), (3, 4)):
            torch.testing.assert_close(
                ensemble(images(count)), shares_of(warm, TEN, images(count), SCALES).mean(0),
                atol=1e-6, rtol=0,
            )  # fmt: skip
            assert len(done) == runs
        assert set(ensemble.fastest.values()) == {faster}
        assert len(ensemble.fastest) == 2


def test_auto_times_both_and_gives_one_of_them(warm: Path) -> None:
    with rs.load_ensemble(warm, members=TEN) as ensemble:
        found = ensemble(images())
        assert ensemble.fastest[(5, 3, 16, 16)] in ENGINES
        torch.testing.assert_close(
            found, shares_of(warm, TEN, images(), SCALES).mean(0), atol=1e-6, rtol=0
        )


def test_an_unknown_engine_is_refused(zoo: Path) -> None:
    with pytest.raises(
        UsageError, match=r"unknown --engine 'fast', expected auto, switch, held, batched"
    ):
        rs.load_ensemble(zoo, members=TEN, engine="fast")  # type: ignore[arg-type]


class Branching(Net):
    """A network that looks at its own numbers, which no batched call can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        return out if float(out.detach().sum()) > 1e9 else 2 * out


def branching() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return Branching()


def test_a_network_that_cannot_be_batched_is_run_one_by_one(tmp_path: Path) -> None:
    start = rs.make_recipe(branching(), seed=3)
    one, two = (learned(start, rs.Freeze(count=n), f"m{n}", n, model=branching()) for n in (1, 2))
    path = write(tmp_path / "own.safetensors", graft(one, two))
    x, _ = batch()
    with rs.load_ensemble(path, model=branching()) as ensemble:
        found = ensemble(x)
        assert ensemble.fastest == {tuple(x.shape): "held"}
    with (
        rs.load_ensemble(path, model=branching(), engine="batched") as ensemble,
        pytest.raises(IncompatibleError, match=r"cannot run as one batched call.*switch"),
    ):
        ensemble(x)
    with rs.load_ensemble(path, model=branching(), engine="switch") as ensemble:
        assert torch.equal(ensemble(x), found)


def test_members_that_change_nothing_are_switched(tmp_path: Path) -> None:
    start = dense_start()
    path = write(tmp_path / "same.safetensors", graft(named(start, "a"), named(start, "b")))
    with rs.load_ensemble(path) as ensemble:
        plain = build(start)(images()).softmax(-1).detach()
        assert torch.equal(ensemble(images()), torch.stack([plain, plain]).mean(0))


def test_classifiers_of_two_kinds_are_one_task_that_is_switched(zoo: Path) -> None:
    names = ("hadamard", "head")
    with rs.load_ensemble(zoo, members=names) as ensemble:
        for mode in (True, False):
            with torch.inference_mode(mode):
                assert torch.equal(ensemble(images()), shares_of(zoo, names, images()).mean(0))
        assert set(ensemble.fastest.values()) == {"switch"}
    with (
        rs.load_ensemble(zoo, members=names, engine="batched") as ensemble,
        pytest.raises(IncompatibleError, match=r"classifiers are of different kinds.*switch"),
    ):
        ensemble(images())


@pytest.mark.parametrize("between", ["whole", "three", "hadamard", "few"])
@pytest.mark.parametrize("stacked", [True, False])
def test_what_the_resident_network_was_does_not_matter_to_a_batched_call(
    zoo: Path, between: str, stacked: bool
) -> None:
    """Also a member that the ensemble leaves out, with tensors that no other changes."""
    names = ("few", "many")
    with rs.load_ensemble(zoo, members=names, engine="batched") as ensemble:
        twin = shares_of(zoo, names, images()).mean(0)
        if stacked:
            ensemble(images())
        assert ensemble.member(between) is ensemble.backbone
        torch.testing.assert_close(ensemble(images()), twin, atol=1e-6, rtol=0)


# --- as a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_it_follows_to_another_dtype(warm: Path, engine: Any) -> None:
    x = images()
    with rs.load_ensemble(warm, members=TEN, engine=engine) as ensemble:
        single = ensemble(x)
        assert ensemble.to(torch.float64) is ensemble
        assert all(p.dtype == torch.float64 for p in ensemble.parameters())
        found = ensemble(x.double())
        with torch.no_grad():
            said = [copy.deepcopy(loaded(warm, n)).double()(x.double()).float() for n in TEN]
        scaled = [one / torch.tensor(SCALES.get(n, 1.0)) for n, one in zip(TEN, said, strict=True)]
        twin = torch.stack([one.softmax(-1) for one in scaled]).mean(0)
        if engine != "batched":
            assert torch.equal(found, twin)
        torch.testing.assert_close(found, twin, atol=1e-6, rtol=0)
        torch.testing.assert_close(found, single, atol=1e-5, rtol=0)
        assert torch.equal(ensemble.to(torch.float32)(x), single)  # float64 held every bit


def test_it_stays_in_evaluation_mode_and_takes_no_gradients(zoo: Path) -> None:
    with rs.load_ensemble(zoo, members=TEN, engine="switch") as ensemble:
        before = ensemble(images())
        assert ensemble.train() is ensemble
        assert not any(module.training for module in ensemble.modules())
        found = ensemble(images().requires_grad_())
        assert torch.equal(found, before)
        assert not found.requires_grad
        assert not any(p.requires_grad for p in ensemble.parameters())
        assert [m for m in ensemble.modules() if m is ensemble.backbone]


def test_the_file_is_closed_with_the_ensemble(zoo: Path) -> None:
    with rs.load_ensemble(zoo, members=TEN) as ensemble:
        file = ensemble.checkpoint.payloads
        assert isinstance(file, Container)
        assert not file._file.closed
    assert file._file.closed
    other = rs.load_ensemble(zoo, members=["few"])
    other.close()
    assert isinstance(other.checkpoint.payloads, Container)
    assert other.checkpoint.payloads._file.closed


def test_the_file_is_closed_if_the_ensemble_cannot_be(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Checkpoint] = []
    whole = rs.api.open_checkpoint

    def recorded(*arguments: Any, **options: Any) -> Checkpoint:
        made.append(whole(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(rs.api, "open_checkpoint", recorded)
    with pytest.raises(UsageError, match="no member 'fewer'; near: few"):
        rs.load_ensemble(zoo, members=["fewer"])
    with pytest.raises(UsageError, match="one member at least"):
        rs.load_ensemble(zoo, members=[])
    assert len(made) == 2
    assert all(one.payloads._file.closed for one in made)  # type: ignore[attr-defined]


def test_a_damaged_member_is_named_when_its_turn_comes(zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(zoo.read_bytes())
    flip(path, "many/conv1.weight/0.slice")
    with rs.load_ensemble(path, members=["few", "many"], engine="switch") as ensemble:
        with pytest.raises(FileFormatError, match=r"many/conv1\.weight"):
            ensemble(images())
        assert torch.equal(ensemble.member("few")(images()), loaded(zoo, "few")(images()))
    with rs.load_ensemble(path, members=["few", "norms"], engine="switch") as ensemble:
        twin = shares_of(zoo, ("few", "norms"), images()).mean(0)
        assert torch.equal(ensemble(images()), twin)


# --- members that have no mean --------------------------------------------------------------------


def test_members_of_two_tasks_are_named(zoo: Path) -> None:
    with pytest.raises(IncompatibleError) as caught:
        rs.load_ensemble(zoo)
    for part in ("three: 3 classes", "five: 5 classes", "few, hadamard", "10 classes", "--member"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def described(name: str, seed: int, **about: Any) -> Checkpoint:
    return learned(dense_start(), rs.Popup("0.5"), name, seed, **about)


def test_classes_of_other_names_are_another_task(tmp_path: Path) -> None:
    letters, digits = tuple("abcdefghij"), tuple("0123456789")
    whole = graft(described("one", 1, classes=digits), described("two", 2, classes=letters))
    path = write(tmp_path / "tasks.safetensors", whole)
    with pytest.raises(IncompatibleError, match=r"one: 10 classes \(0, 1, 2, \.\.\.\); two: 10 "):
        rs.load_ensemble(path)
    with rs.load_ensemble(path, members=["two"]) as ensemble:
        assert ensemble.members == ("two",)


def test_images_that_are_prepared_differently_are_named(tmp_path: Path) -> None:
    def look(size: int) -> InputSpec:
        half = ((0.5).hex(),) * 3
        return InputSpec(size=(size, size), channels=3, mean=half, std=half)

    data = DatasetSpec(name="digits")
    one = described("one", 1, input=look(16), dataset=data)
    two = described("two", 2, input=look(32), dataset=data)
    path = write(tmp_path / "looks.safetensors", graft(one, two))
    with pytest.raises(IncompatibleError, match=r"differently prepared images \(one; two\)"):
        rs.load_ensemble(path)
    same = write(
        tmp_path / "same.safetensors", graft(one, described("two", 2, input=look(16), dataset=data))
    )
    with rs.load_ensemble(same) as ensemble:
        assert ensemble.members == ("one", "two")


def test_one_member_alone_is_an_ensemble(tmp_path: Path) -> None:
    path = write(tmp_path / "one.safetensors", described("main", 1))
    with rs.load_ensemble(path, engine="batched") as ensemble:
        twin = rs.load(path)(images()).softmax(-1)
        torch.testing.assert_close(ensemble(images()), twin, atol=1e-6, rtol=0)
        assert isinstance(ensemble, Ensemble)
