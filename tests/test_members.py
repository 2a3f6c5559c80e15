"""Members moved between files: nothing about any of them changes; what does not fit is named."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import format_helpers as slow
import numpy as np
import pytest
import torch
from ensemble_helpers import Json, flip, kept, learned, named, shared_part, states
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from surgery_helpers import assert_same_state, conv2, save_dense, write
from test_checkpoint import (
    Builder,
    assemble,
    base_tensors,
    constant,
    entry,
    floats,
    random_source,
    some_bits,
    tiny,
    write_base,
)

import randsurgery as rs
from randsurgery.errors import (
    FileFormatError,
    IncompatibleError,
    OutputError,
    RandsurgeryError,
    UsageError,
)
from randsurgery.format import checkpoint as checkpoint_module
from randsurgery.format.checkpoint import Checkpoint, Memory, identity, read_checkpoint
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.members import fault_of, graft, members_named, pick, renamed, with_own
from randsurgery.format.specs import Calibration, DatasetSpec, InputSpec
from randsurgery.format.writing import backbone_id, finish, verify, write_checkpoint
from randsurgery.inspection.members import list_members, plot_members
from randsurgery.jobs.members import (
    Change,
    Incoming,
    prepare_add,
    prepare_extract,
    prepare_pack,
    prepare_remove,
    run_change,
)
from randsurgery.surgery.ensembles import joined

pytestmark = pytest.mark.slow

# --- random members on one backbone ---------------------------------------------------------------

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv.weight": ("F32", (6, 3, 2, 2)),
    "fc.weight": ("F32", (4, 6)),
    "half": ("BF16", (5, 3)),
    "norm.weight": ("F32", (6,)),
    "norm.count": ("I64", ()),
    "old": ("F16", (5, 7)),
}
WAYS = ("mask", "slice", "scatter", "replace", "scale", "mask, slice", "survivors", "other shape")


def backbone() -> tuple[Json, Memory]:
    """Shared entries of several sources, one of them in a base, under overlays of their own."""
    b = Builder()
    sources = {
        "conv.weight": (
            random_source("sign", 0.1),
            b.mask("shared", "conv.weight", 0, some_bits(72, 0.5, 1)),
            b.slice("shared", "conv.weight", 1, 0, floats("F32", (1, 3, 2, 2), 2)),
        ),
        "fc.weight": (random_source("normal", 0.3),),
        "half": (b.stored("shared", "half", floats("BF16", (5, 3), 3)),),
        "norm.weight": (constant(1.0),),
        "norm.count": (constant(0.0),),
        "old": ({"kind": "base", "base": "pre", "tensor": "w"},),
    }
    tensors = {name: entry(*SHAPES[name], *made) for name, made in sources.items()}
    base = base_tensors()
    about = {"identity": identity(base, base), "file": "pre.safetensors"}
    return tiny(tensors=tensors, bases={"pre": about}), b.payloads


def own_words(b: Builder, name: str, tensor: str, way: str, seed: int) -> Json:
    """What a member says of a tensor."""
    dtype, shape = SHAPES[tensor]
    size = int(np.prod(shape))
    bits = some_bits(size, 0.4, seed)
    if dtype == "I64":
        return {"entry": entry(dtype, shape, constant(float(seed)))}
    if way == "other shape":
        wide = (*shape[:-1], shape[-1] + 1)
        stored = b.stored(name, tensor, floats(dtype, wide, seed))
        return {"entry": entry(dtype, wide, stored, {"kind": "scale", "factor": (-0.5).hex()})}
    if way == "survivors":
        values = floats(dtype, (sum(bits),), seed)
        filled = b.scatter(name, tensor, 0, bits, values)
        return {"entry": entry(dtype, shape, constant(0.0), filled)}
    dim = seed % len(shape)
    part = (*shape[:dim], 1 + seed % shape[dim], *shape[dim + 1 :])
    ways: dict[str, Callable[[int], Json]] = {
        "mask": lambda at: b.mask(name, tensor, at, bits),
        "slice": lambda at: b.slice(name, tensor, at, dim, floats(dtype, part, seed)),
        "scatter": lambda at: b.scatter(name, tensor, at, bits, floats(dtype, (sum(bits),), seed)),
        "replace": lambda at: b.replace(name, tensor, at, floats(dtype, shape, seed)),
        "scale": lambda at: {"kind": "scale", "factor": (1.5).hex()},
    }
    return {"overlays": [ways[step](at) for at, step in enumerate(way.split(", "))]}


LOOK = {"size": [8, 6], "channels": 1, "mean": [(0.5).hex()], "std": [(0.25).hex()]}
ABOUT: dict[str, Any] = {
    "input": LOOK,
    "dataset": {"name": "torch/cifar10", "test_split": "test"},
    "calibration": {"temperature": (1.5).hex(), "dataset": "digits", "share": "0.25", "seed": 3},
    "provenance": {"command": "é", "metrics": {"test_accuracy": 0.5, "deep": [1, None, 2.5]}},
    "plan": {
        "tensors": {
            "old": {"part": "slice", "dim": 1, "count": 2,
                    "start": {"kind": "base", "base": "pre", "tensor": "w"}},
            "norm.weight": {},
        },
        "statistics": "frozen",
    },
    "head": {"name": "fc", "kind": "hadamard", "scale": "given", "classes": 3},
    "classes": ["cat", "dög", "fish"],
}  # fmt: skip


SEEDS = st.integers(0, 99)
SPECS = st.fixed_dictionaries(
    {
        "ways": st.dictionaries(
            st.sampled_from(sorted(SHAPES)), st.tuples(st.sampled_from(WAYS), SEEDS)
        ),
        "its/own": st.none() | SEEDS,  # a tensor that no other member has
        "scores": st.none() | SEEDS,
        "about": st.sets(st.sampled_from(sorted(ABOUT))),
    }
)
"""A member: any words about any tensors, any of the descriptions."""

NAMES = ("a", "b.2", "c")
THREE = st.tuples(SPECS, SPECS, SPECS)
Specs = tuple[Json, Json, Json]
few = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def member_of(name: str, spec: Json) -> tuple[Json, Memory]:
    b = Builder()
    own = {tensor: own_words(b, name, tensor, *way) for tensor, way in spec["ways"].items()}
    said: Json = {"name": name, "tensors": own, **{key: ABOUT[key] for key in spec["about"]}}
    if spec["its/own"] is not None:
        stored = b.stored(name, "its/own", floats("F16", (2, 3), spec["its/own"]))
        own["its/own"] = {"entry": entry("F16", (2, 3), stored)}
    if spec["scores"] is not None and "entry" not in own.get("fc.weight", {}):
        scores = floats("F32", (4, 6), spec["scores"])
        said["scores"] = {"fc.weight": b.put(name, "fc.weight", "scores", scores)}
        said["algorithm"] = ["edge-popup", "supermask"][spec["scores"] % 2]
    return said, b.payloads


def files_of(folder: Path, specs: Specs) -> list[Path]:
    """A file for each member, with the base that they build on beside it."""
    write_base(folder)
    made = [member_of(*one) for one in zip(NAMES, specs, strict=True)]
    return [alone(*one, folder / f"{one[0]['name']}.safetensors") for one in made]


def packed(files: Iterable[Path], target: Path) -> Path:
    return done(prepare_pack(Incoming(tuple(map(str, files))), str(target), force=False))


def alone(member: Json, payloads: Memory, path: Path) -> Path:
    """A file of the backbone and one member."""
    recipe, shared = backbone()
    whole = assemble({**recipe, "members": [member]}, Memory({**shared, **payloads}))
    return write(path, replace(whole, bases={"pre": base_tensors()}))


def done(change: Change) -> Path:
    with change.checkpoint:
        run_change(change)
    return change.output


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "extract"]), st.integers(0, 2), st.booleans()),
    max_size=7,
)


@few
@given(THREE, st.permutations(range(3)), STEPS, st.permutations(range(3)))
def test_no_member_changes_whatever_is_added_removed_and_extracted(
    specs: Specs, order: list[int], steps: list[tuple[str, int, bool]], back: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = files_of(folder, specs)
        base = base_tensors()
        bases = {identity(base, base): slow.read_file(folder / "pre.safetensors")[1]}
        before = {n: kept(f, bases)[n] for n, f in zip(NAMES, files, strict=True)}
        shared = shared_part(files[0])

        def check(path: Path, names: set[str]) -> None:
            found = kept(path, bases)
            assert found == {name: before[name] for name in names}
            assert list(found) == sorted(found)
            assert shared_part(path) == shared
            with read_checkpoint(path) as checkpoint:
                assert all(one.ok for one in verify(checkpoint))

        whole = packed(files, folder / "e.safetensors")
        check(whole, set(NAMES))
        bytes_of_all = whole.read_bytes()
        other = packed((files[index] for index in order), folder / "o.safetensors")
        assert other.read_bytes() == bytes_of_all

        extracted, there = {}, set(NAMES)
        for what, index, fresh in steps:
            one = NAMES[index]
            if what == "extract" and one in there:
                target = str(folder / f"{one}-out.safetensors")
                extracted[one] = done(prepare_extract(str(whole), one, target, force=True))
                check(extracted[one], {one})
                assert extracted[one].read_bytes() == files[index].read_bytes()
            if what == "remove" and one in there and len(there) > 1:
                done(prepare_remove(str(whole), [one]))
                there.remove(one)
            if what == "add" and one not in there:
                source = extracted.get(one, files[index]) if fresh else files[index]
                done(prepare_add(str(whole), Incoming((str(source),))))
                there.add(one)
            check(whole, there)
        for index in back:
            if NAMES[index] not in there:
                done(prepare_add(str(whole), Incoming((str(files[index]),))))
        assert whole.read_bytes() == bytes_of_all


@few
@given(THREE, st.sets(st.sampled_from([*SHAPES, "nowhere"])))
def test_shared_entries_moved_into_the_members_change_no_bit(specs: Specs, moved: set[str]) -> None:
    made = [member_of(*one) for one in zip(NAMES, specs, strict=True)]
    recipe, payloads = backbone()
    for _, own in made:
        payloads |= own
    start = assemble({**recipe, "members": [one for one, _ in made]}, Memory(payloads))
    start = finish(replace(start, bases={"pre": base_tensors()}))
    after = with_own(start, moved)
    assert set(after.recipe.tensors) == set(SHAPES) - moved
    assert after.recipe.backbone_id == backbone_id(after.recipe, after.payloads)
    for member in start.recipe.members:
        one, two = start.tensors(member.name), after.tensors(member.name)
        assert all(raw.same_bits(two[name]) for name, raw in one.items())
        assert one.keys() == two.keys()
        for name in member.scores:
            assert np.array_equal(start.scores(name, member.name), after.scores(name, member.name))
    assert all(one.ok for one in verify(after))
    assert finish(after).recipe == after.recipe


# --- what is refused ------------------------------------------------------------------------------


def popup_file(path: Path, seed: int = 3, turn: int = 0, name: str = "m", **args: Any) -> Path:
    """A conv2 of that seed under the masks of that turn."""
    start = rs.make_recipe("conv2", seed=seed, args={"width": 0.1, "img_size": 8,
                                                     "num_classes": 10, **args})  # fmt: skip
    made = learned(start, rs.Popup("0.5"), name, turn)
    write_checkpoint(path, made, finished=True)
    return path


def opened(*paths: Path) -> list[Checkpoint]:
    """Files read whole and closed."""
    found = []
    for path in paths:
        with read_checkpoint(path) as one:
            memory = Memory({name: one.payloads.read(name) for name in one.payloads.infos})
            found.append(replace(one, payloads=memory))
    return found


@pytest.mark.parametrize("join", [graft, joined])
@pytest.mark.parametrize(
    ("more", "theirs", "ours"),
    [
        ({"seed": 4}, "theirs.safetensors has another backbone: its fc.weight is [10, 25] sign of "
                      "seed 4", "in ours.safetensors it is [10, 25] sign of seed 3"),
        ({"width": 0.2}, "theirs.safetensors is a conv2 img_size=8 num_classes=10 width=0.2",
                         "ours.safetensors a conv2 img_size=8 num_classes=10 width=0.1"),
        ({"in_chans": 1}, "theirs.safetensors is a conv2 img_size=8 in_chans=1 num_classes=10",
                          "ours.safetensors a conv2 img_size=8 num_classes=10"),
    ],
)  # fmt: skip
def test_another_seed_or_architecture_is_refused_and_both_are_named(
    tmp_path: Path, more: dict[str, Any], theirs: str, ours: str, join: Callable[..., Checkpoint]
) -> None:
    one = popup_file(tmp_path / "ours.safetensors", name="a")
    two = popup_file(tmp_path / "theirs.safetensors", name="b", **more)
    with pytest.raises(IncompatibleError) as caught:
        join(*opened(one, two))
    assert theirs in str(caught.value)
    assert ours in str(caught.value)


def test_another_name_of_an_architecture_is_refused(tmp_path: Path) -> None:
    one = popup_file(tmp_path / "ours.safetensors", name="a")
    start = rs.make_recipe("conv4", seed=3, args={"width": 0.1, "img_size": 8, "num_classes": 10})
    two = tmp_path / "theirs.safetensors"
    write_checkpoint(two, learned(start, rs.Popup("0.5"), "b", 1), finished=True)
    with pytest.raises(IncompatibleError, match=r"theirs\.safetensors is a conv4 .*, "
                                                r"ours\.safetensors a conv2 "):  # fmt: skip
        graft(*opened(one, two))


def small(name: str, **changes: Any) -> Checkpoint:
    """A member of that name on the small backbone, of which entries may be changed."""
    recipe, payloads = backbone()
    recipe["tensors"] |= changes.pop("tensors", {})
    recipe |= {"members": [{"name": name}], **changes}
    return finish(replace(assemble(recipe, payloads), bases={"pre": base_tensors()}))


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"norm.weight": entry("F32", (6,), constant(2.0))}, ("norm.weight", "constant")),
        ({"norm.weight": entry("F32", (7,), constant(1.0))}, ("[7] constant", "[6] constant")),
        ({"more": entry("F32", (6,), constant(1.0))}, ("more is [6] constant", "it is missing")),
        ({"fc.weight": entry("F32", (4, 6), random_source("uniform", 0.3))},
         ("uniform of seed 11", "normal of seed 11")),
    ],
)  # fmt: skip
def test_another_backbone_is_refused_and_the_first_difference_named(
    tensors: dict[str, Json], parts: tuple[str, ...]
) -> None:
    with pytest.raises(IncompatibleError, match="another backbone") as caught:
        graft(small("a"), small("b", tensors=tensors))
    for part in parts:
        assert part in str(caught.value)


def test_another_base_is_another_backbone() -> None:
    other = Memory({**base_tensors(), "b": floats("F32", (4,), 77)})
    recipe, payloads = backbone()
    recipe |= {"bases": {"pre": {"identity": identity(other, other)}}, "members": [{"name": "b"}]}
    theirs = finish(replace(assemble(recipe, payloads), bases={"pre": other}))
    with pytest.raises(IncompatibleError, match="another backbone: its old is"):
        graft(small("a"), theirs)


@pytest.mark.parametrize("join", [graft, joined])
def test_two_members_of_one_name_are_refused(join: Callable[..., Checkpoint]) -> None:
    with pytest.raises(UsageError, match=r"two members would bear the name 'a'.*--name"):
        join(small("a"), small("a"))
    with pytest.raises(UsageError, match="two members would bear the name 'b'"):
        renamed(graft(small("a"), small("b")), {"a": "b"})


@pytest.mark.parametrize("name", ["shared", "a/b", "", "é", "-a", "a..b", "a b", "a" * 65, "../a"])
def test_what_is_no_members_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="is not a member name"):
        renamed(small("a"), {"a": name})


def test_names_may_be_exchanged(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    one, two = (popup_file(tmp_path / f"{n}.safetensors", turn=t, name=n) for t, n in
                enumerate("ab"))  # fmt: skip
    write_checkpoint(path, renamed(graft(*opened(one, two)), {"a": "b", "b": "a"}), finished=True)
    found = states(path, "ab")
    assert_same_state(found["a"], rs.load(two).state_dict())
    assert_same_state(found["b"], rs.load(one).state_dict())


def test_picking_asks_for_members_that_are_there() -> None:
    both = graft(small("a"), small("bird"))
    assert [m.name for m in pick(both, ["bird"]).recipe.members] == ["bird"]
    assert [m.name for m in members_named(both, ["bird", "a"])] == ["a", "bird"]
    with pytest.raises(UsageError, match="no member 'birds'; near: bird"):
        pick(both, ["birds"])
    with pytest.raises(UsageError, match="one member at least"):
        pick(both, [])


def test_members_without_a_classifier_have_the_same_classes() -> None:
    def headless(name: str, classes: int) -> Checkpoint:
        made = conv2(num_classes=10)
        spec = made.recipe.model
        assert spec is not None
        args = {**spec.args, "num_classes": classes}
        recipe = made.recipe.model_copy(update={"model": spec.model_copy(update={"args": args})})
        return named(replace(made, recipe=recipe), name, head=None)

    assert len(graft(headless("a", 10), headless("b", 10)).recipe.members) == 2
    with pytest.raises(IncompatibleError, match=r"only members that have a classifier may differ"):
        graft(headless("a", 10), headless("b", 11))


# --- bases, inputs, many at once ------------------------------------------------------------------


def on_two_bases(name: str, key: str, value: int, shared_key: str = "pre") -> Checkpoint:
    """A member whose own entry, and the start of its plan, lie in a base of its own; the key of the
    shared one is another's in another file."""
    own = Memory({"x": floats("F32", (4, 6), value)})
    recipe, payloads = backbone()
    recipe["tensors"]["old"]["source"]["base"] = shared_key
    source = {"kind": "base", "base": key, "tensor": "x"}
    part = {"part": "slice", "dim": 0, "count": 2, "start": source}
    member = {
        "name": name,
        "tensors": {"fc.weight": {"entry": entry("F32", (4, 6), source)}},
        "plan": {"tensors": {"fc.weight": part}},
    }
    first = recipe["bases"].pop("pre")
    recipe["bases"] = {shared_key: first, key: {"identity": identity(own, own)}}
    recipe["members"] = [member]
    bases = {shared_key: base_tensors(), key: own}
    return finish(replace(assemble(recipe, payloads), bases=bases))


def test_bases_under_clashing_keys_are_renamed_and_found() -> None:
    parts = [
        on_two_bases("a", "own", 1),
        on_two_bases("b", "own", 2),  # another base under the same key
        on_two_bases("c", "pre", 1, shared_key="own"),  # the two keys exchanged, a's base again
        on_two_bases("d", "own-2", 3),  # a key that renaming has taken
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = graft(whole, part)
    assert len({ref.identity for ref in whole.recipe.bases.values()}) == 4
    assert len(whole.recipe.bases) == 4
    for part in parts:
        who = part.member()
        one, two = part.tensors(), whole.tensors(who.name)
        assert all(raw.same_bits(two[name]) for name, raw in one.items())
        plan = whole.member(who.name).plan
        assert plan is not None
        start = plan.tensors["fc.weight"].start
        assert start is not None
        assert start.kind == "base"
        found = whole.bases[start.base].read("x")
        assert found.same_bits(part.bases[next(k for k in part.bases if "x" in part.bases[k])]["x"])
    assert all(one.ok for one in verify(whole))


def spec(size: int) -> InputSpec:
    return InputSpec(size=(size, size), channels=1, mean=((0.5).hex(),), std=((0.5).hex(),))


@pytest.mark.parametrize("ours", [None, 8, 9])
@pytest.mark.parametrize("theirs", [None, 8, 9])
@pytest.mark.parametrize("own", [None, 8, 9])
def test_members_keep_what_they_expect_to_see(
    ours: int | None, theirs: int | None, own: int | None
) -> None:
    looks = {size: None if size is None else spec(size) for size in (None, 8, 9)}
    onto, other = small("a"), small("b")
    onto = replace(onto, recipe=onto.recipe.model_copy(update={"input": looks[ours]}))
    changed = other.recipe.model_copy(update={"input": looks[theirs]})
    member = changed.members[0].model_copy(update={"input": looks[own]})
    other = replace(other, recipe=changed.with_member(member))
    both = graft(onto, other).recipe
    assert both.input_of(both.member("a")) == looks[ours]
    said = other.recipe.input_of(member)
    # a member that records nothing takes what the file says of all
    assert both.input_of(both.member("b")) == (looks[ours] if said is None else said)
    if ours == theirs:
        assert both.member("b") == member


def test_files_of_many_members_join_at_once(tmp_path: Path) -> None:
    files = [
        popup_file(tmp_path / f"{n}.safetensors", turn=t, name=n) for t, n in enumerate("cabd")
    ]
    one = packed(files[:2], tmp_path / "1.safetensors")
    two = packed(files[2:], tmp_path / "2.safetensors")
    change = prepare_add(str(one), Incoming((str(two),)))
    assert change.moved == ("b", "d")
    assert change.members == ("a", "b", "c", "d")
    done(change)
    at_once = packed(files, tmp_path / "3.safetensors")
    assert one.read_bytes() == at_once.read_bytes()
    for file, name in zip(files, "cabd", strict=True):
        assert_same_state(rs.load(one, member=name).state_dict(), rs.load(file).state_dict())


# --- tasks ----------------------------------------------------------------------------------------

HEADS = ("linear", "hadamard", "orthonormal")


def task(kind: str, count: int, name: str, **about: Any) -> Checkpoint:
    """A member with its classifier and its masks learned, on the network of one seed."""
    start = conv2(img_size=8, num_classes=count)
    if kind != "linear":
        start = rs.fix_head(start, kind, seed=count)  # type: ignore[arg-type]
    return learned(start, rs.Popup("0.5", learn=("@head",), skip=("@head",)), name, count, **about)


@pytest.mark.parametrize("first", HEADS)
@pytest.mark.parametrize("second", HEADS)
@pytest.mark.parametrize("classes", [10, 3])
def test_members_of_two_tasks_take_their_classifiers_along(
    tmp_path: Path, first: str, second: str, classes: int
) -> None:
    one = task(first, 10, "one", classes=tuple("0123456789"))
    names = tuple(map(str, range(classes)))
    two = task(second, classes, "two", classes=names, dataset=DatasetSpec(name="folder"))
    before = {"one": rs.build(one), "two": rs.build(two)}
    both = joined(one, two)
    path = tmp_path / "both.safetensors"
    write_checkpoint(path, both, finished=True)
    assert both.recipe.member("two").classes == names
    if (first, 10) != (second, classes):
        assert not [name for name in both.recipe.tensors if name.startswith("fc.")]
    for name, module in before.items():
        found = rs.load(path, member=name)
        assert_same_state(found.state_dict(), module.state_dict())
        assert type(found.get_submodule("fc")) is type(module.get_submodule("fc"))
        # rows of one fixed classifier are never learned, so they stay shared
        shared = (first, 10) == (second, classes) and first != "linear"
        own = {"fc.bias"} if shared else {"fc.weight"}
        assert both.recipe.member(name).tensors.keys() >= own
    # and a third, onto members that have their classifiers already, and the other way round
    three = task("linear", 5, "three")
    for whole in (joined(both, three), joined(three, both)):
        write_checkpoint(path, whole, force=True, finished=True)
        found = rs.load(path, member="three").state_dict()
        assert_same_state(found, rs.build(three).state_dict())
        assert_same_state(states(path, ["one"])["one"], before["one"].state_dict())


def test_the_order_of_tasks_changes_nothing_of_the_members(tmp_path: Path) -> None:
    tasks = [task("linear", 10, "b"), task("linear", 3, "a"), task("hadamard", 10, "c")]
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        whole = tasks[order[0]]
        for index in order[1:]:
            whole = joined(whole, tasks[index])
        path = tmp_path / f"{order}.safetensors"
        write_checkpoint(path, whole, finished=True)
        found.append((kept(path, rebuild=False), whole.recipe.backbone_id))
    assert found[0] == found[1] == found[2]


def test_a_backbone_that_differs_beyond_the_classifier_is_refused_in_the_classifiers_place() -> (
    None
):
    other = learned(rs.make_recipe("conv2", seed=4, args={"width": 0.1, "img_size": 8,
                                                          "num_classes": 3}),
                    rs.Popup("0.5"), "other", 0)  # fmt: skip
    with pytest.raises(IncompatibleError, match="another backbone"):
        joined(task("linear", 10, "one"), other)


# --- jobs: where files are written, and what is closed --------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three files of one member and two of them packed."""
    monkeypatch.chdir(tmp_path)
    for turn, name in enumerate("abc"):
        popup_file(tmp_path / f"{name}.safetensors", turn=turn, name=name)
    done(prepare_pack(Incoming(("a.safetensors", "b.safetensors")), "e.safetensors", force=False))
    return tmp_path


def test_every_file_is_closed_with_the_change(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Container] = []

    class Recorded(Container):
        def __init__(self, path: Any) -> None:
            super().__init__(path)
            made.append(self)

    monkeypatch.setattr(checkpoint_module, "Container", Recorded)
    changes: list[Callable[[], Change]] = [
        lambda: prepare_pack(Incoming(("a.safetensors", "c.safetensors")), "n.safetensors",
                             force=True),
        lambda: prepare_pack(Incoming(("a.safetensors", "c.safetensors"), names=("x", "y")),
                             "n.safetensors", force=True),
        lambda: prepare_add("e.safetensors", Incoming(("c.safetensors",)), "n.safetensors",
                            force=True),
        lambda: prepare_remove("e.safetensors", ["a"], "n.safetensors", force=True),
        lambda: prepare_extract("e.safetensors", "a", "n.safetensors", force=True),
    ]  # fmt: skip
    for prepare in changes:
        done(prepare())
        assert made
        assert all(container._file.closed for container in made)
        made.clear()
    with pytest.raises(RandsurgeryError):
        prepare_pack(Incoming(("a.safetensors", "a.safetensors")), "n.safetensors", force=True)
    assert made
    assert all(container._file.closed for container in made)


def test_a_file_is_changed_in_place_or_written_elsewhere(here: Path) -> None:
    before = Path("e.safetensors").read_bytes()
    change = prepare_remove("e.safetensors", ["a"], "other.safetensors")
    assert (change.output, change.moved, change.members) == (
        Path("other.safetensors"),
        ("a",),
        ("b",),
    )
    assert not Path("other.safetensors").exists()
    done(change)
    assert Path("e.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match=r"other\.safetensors: exists already"):
        prepare_remove("e.safetensors", ["a"], "other.safetensors")
    done(prepare_remove("e.safetensors", ["a"]))
    assert Path("e.safetensors").read_bytes() == Path("other.safetensors").read_bytes()
    done(prepare_add("e.safetensors", Incoming(("a.safetensors",)), "./e.safetensors"))
    assert Path("e.safetensors").read_bytes() == before


def test_names_come_from_the_members_the_files_or_the_user(here: Path) -> None:
    for name in ("digits run (1)", "..x"):
        popup_file(here / f"{name}.safetensors", name="main")
    files = ("digits run (1).safetensors", "..x.safetensors", "e.safetensors")
    change = prepare_pack(Incoming(files), "n.safetensors", force=False)
    with change.checkpoint:
        assert change.moved == ("a", "b", "digits-run-1", "x")
    change = prepare_pack(Incoming(files, names=("1", "2", "3", "4")), "n.safetensors", force=False)
    done(change)
    assert_same_state(rs.load("n.safetensors", member="4").state_dict(),
                      rs.load("b.safetensors").state_dict())  # fmt: skip
    with pytest.raises(UsageError, match=r"4 members, but 3 names"):
        prepare_pack(Incoming(files, names=("1", "2", "3")), "m.safetensors", force=False)
    assert not Path("m.safetensors").exists()


def test_what_is_written_is_held_against_the_recorded_digests(here: Path) -> None:
    """A finished digest that does not agree, under payloads that do, is found before the rename."""
    change = prepare_add("e.safetensors", Incoming(("c.safetensors",)))
    recipe = change.checkpoint.recipe
    who = recipe.member("c")
    name, own = next(iter(who.tensors.items()))
    wrong = who.model_copy(
        update={"tensors": {**who.tensors, name: own.model_copy(update={"digest": "0" * 32})}}
    )
    changed = replace(change.checkpoint, recipe=recipe.with_member(wrong))
    before = Path("e.safetensors").read_bytes()
    with changed, pytest.raises(FileFormatError, match=f"c/{name}: rebuilt .*0000"):
        run_change(replace(change, checkpoint=changed))
    assert Path("e.safetensors").read_bytes() == before
    assert not list(here.glob(".e.*"))


# --- dense files ----------------------------------------------------------------------------------

ARGS = {"width": 0.1, "img_size": 8}


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with dense weights and two networks that were fine-tuned from them."""
    monkeypatch.chdir(tmp_path)
    start = rs.make_recipe("conv2", "kaiming-normal", args={**ARGS, "num_classes": 10})
    state = rs.build(start).state_dict()
    save_dense(tmp_path / "base.safetensors", state)
    for turn in (1, 2):
        tuned = {name: tensor.clone() for name, tensor in state.items()}
        tuned["fc1.weight"][:turn] += turn
        tuned["fc.weight"] *= 1 + turn
        save_dense(tmp_path / f"t{turn}.safetensors", tuned)
    three = {**state, "fc.weight": torch.ones(3, 25)}
    save_dense(tmp_path / "three.safetensors", three)
    return tmp_path


def test_dense_files_become_members_on_their_base(dense: Path) -> None:
    files = ("t1.safetensors", "t2.safetensors")
    with pytest.raises(
        UsageError, match=r"t1\.safetensors is a dense checkpoint; pass --arch NAME, and --base"
    ):
        prepare_pack(Incoming(files), "e.safetensors", force=False)
    done(prepare_pack(Incoming(files, base="base.safetensors", arch="conv2", args=dict(ARGS)),
                      "e.safetensors", force=False))  # fmt: skip
    done(prepare_add("e.safetensors", Incoming(("three.safetensors",), base="base.safetensors")))
    assert [m.name for m in rs.read_recipe("e.safetensors").members] == ["t1", "t2", "three"]
    for name in ("t1", "t2", "three"):
        with Container(f"{name}.safetensors") as plain, read_checkpoint("e.safetensors") as found:
            tensors = found.tensors(name)
            assert set(tensors) == set(plain.infos)
            assert all(tensors[one].same_bits(plain.read(one)) for one in tensors)
    done(prepare_remove("e.safetensors", ["three"]))
    assert Path("e.safetensors").stat().st_size < Path("base.safetensors").stat().st_size


def test_a_base_elsewhere_is_given(dense: Path) -> None:
    done(prepare_pack(Incoming(("t1.safetensors", "t2.safetensors"), base="base.safetensors",
                               arch="conv2", args=dict(ARGS)), "e.safetensors",
                      force=False))  # fmt: skip
    Path("elsewhere").mkdir()
    Path("base.safetensors").rename("elsewhere/base.safetensors")
    with pytest.raises(IncompatibleError, match="--base"):
        prepare_remove("e.safetensors", ["t1"])
    base = "elsewhere/base.safetensors"
    done(prepare_extract("e.safetensors", "t1", base=base))
    done(prepare_remove("e.safetensors", ["t1"], base=base))
    done(prepare_add("e.safetensors", Incoming(("e-t1.safetensors",), base=base)))
    assert_same_state(rs.load("e.safetensors", member="t1", base=base).state_dict(),
                      rs.load("e-t1.safetensors", base=base).state_dict())  # fmt: skip


# --- damage ---------------------------------------------------------------------------------------


def test_a_fault_is_found_in_its_owner_alone(here: Path) -> None:
    with read_checkpoint("e.safetensors") as checkpoint:
        assert [fault_of(checkpoint, owner) for owner in ("shared", "a", "b")] == [None] * 3
    flip("e.safetensors", "b/fc1.weight/0.mask")
    with read_checkpoint("e.safetensors") as checkpoint:
        assert fault_of(checkpoint, "shared") is None
        assert fault_of(checkpoint, "a") is None
        assert "payload 'b/fc1.weight/0.mask' is corrupt" in str(fault_of(checkpoint, "b"))


@pytest.mark.parametrize("broken", ["b/fc1.weight/0.mask", "a/fc.weight/0.mask"])
def test_no_change_is_made_to_a_file_that_is_damaged(here: Path, broken: str) -> None:
    flip("e.safetensors", broken)
    before = Path("e.safetensors").read_bytes()
    words = f"member {broken[0]} is damaged: payload '{broken}' is corrupt"
    with pytest.raises(FileFormatError, match=words):
        prepare_add("e.safetensors", Incoming(("c.safetensors",)))
    with pytest.raises(FileFormatError, match=words):
        prepare_extract("e.safetensors", broken[0])
    assert Path("e.safetensors").read_bytes() == before
    # what is damaged can be removed, and the rest taken out
    other = "ab".replace(broken[0], "")
    done(prepare_extract("e.safetensors", other, "out.safetensors"))
    assert Path("out.safetensors").read_bytes() == Path(f"{other}.safetensors").read_bytes()
    done(prepare_remove("e.safetensors", [broken[0]]))
    assert Path("e.safetensors").read_bytes() == Path(f"{other}.safetensors").read_bytes()


# --- the report -----------------------------------------------------------------------------------


def test_the_report_is_of_each_member(tmp_path: Path) -> None:
    about = Calibration(temperature=(1.25).hex(), dataset="digits", share="0.2")
    one = task("linear", 10, "one", calibration=about, dataset=DatasetSpec(name="digits"),
               provenance={"metrics": {"test_accuracy": 0.75}})  # fmt: skip
    two = task("hadamard", 3, "two", provenance={"metrics": {"test_accuracy": "high"}})
    path = tmp_path / "e.safetensors"
    write_checkpoint(path, joined(one, two), finished=True)
    report = list_members(path)
    assert (report.file, report.model, report.fault) == ("e.safetensors", "conv2", None)
    assert report.bytes == path.stat().st_size
    rows = {row.name: row for row in report.members}
    assert list(rows) == ["one", "two"]
    assert (rows["one"].classes, rows["two"].classes) == (10, 3)
    assert (rows["one"].dataset, rows["two"].dataset) == ("digits", None)
    assert (rows["one"].accuracy, rows["two"].accuracy) == (0.75, None)
    assert (rows["one"].temperature, rows["two"].temperature) == (1.25, None)
    for name, row in rows.items():
        state = rs.load(path, member=name).state_dict()
        assert row.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())
        payloads = kept(path, rebuild=False)[name].payloads
        assert row.payload_bytes == sum(len(raw) for _, _, raw in payloads.values())
    shared = shared_part(path)["payloads"]
    assert report.shared_bytes == sum(len(raw) for _, _, raw in shared.values())
    whole = report.header_bytes + report.shared_bytes
    assert report.bytes == whole + sum(row.payload_bytes for row in report.members)
    assert report.dense_bytes == sum(row.dense_bytes for row in rows.values())


@few
@given(THREE, st.sampled_from(NAMES))
def test_a_members_bytes_are_what_removing_it_saves(specs: Specs, gone: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = packed(files_of(folder, specs), folder / "e.safetensors")
        said = next(row.bytes for row in list_members(whole).members if row.name == gone)
        saved = whole.stat().st_size
        saved -= done(prepare_remove(str(whole), [gone])).stat().st_size
        assert abs(said - saved) <= max(0.02 * saved, 200)


def test_damage_is_reported_beside_the_rest(here: Path) -> None:
    sound = list_members("e.safetensors")
    assert sound.faults == []
    flip("e.safetensors", "b/fc1.weight/0.mask")
    report = list_members("e.safetensors")
    assert [row.fault is None for row in report.members] == [True, False]
    assert report.faults == [f"b: {report.members[1].fault}"]
    assert report.to_json()["ok"] is False
    assert [row.bytes for row in report.members] == [row.bytes for row in sound.members]


def test_damage_of_the_backbone_is_the_backbones(tmp_path: Path) -> None:
    write_base(tmp_path)
    path = alone({"name": "a"}, Memory(), tmp_path / "a.safetensors")
    flip(path, "shared/half/source")
    report = list_members(path)
    assert "payload 'shared/half/source' is corrupt" in str(report.fault)
    assert report.faults == [f"the backbone: {report.fault}"]
    with pytest.raises(FileFormatError, match="the backbone is damaged"):
        prepare_extract(str(path), "a", str(tmp_path / "o.safetensors"))


def test_a_file_of_other_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    write_atomically(path, pack(base_tensors(), {"format": "pt"}))
    with pytest.raises(FileFormatError, match="not one of randsurgery"):
        list_members(path)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_chart_shows_every_member(here: Path, ending: str) -> None:
    report = list_members("e.safetensors")
    plot_members(report, f"chart.{ending}")
    data = Path(f"chart.{ending}").read_bytes()
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert data.startswith(start)
    if ending == "svg":
        for words in ("<!-- shared -->", "<!-- a -->", "<!-- b -->", "<!-- kB added -->"):
            assert words in data.decode()


def test_the_report_of_a_member_is_plain_json(here: Path) -> None:
    found = json.loads(json.dumps(list_members("e.safetensors").to_json()))
    assert found["ok"] is True
    assert {"name", "bytes"} <= found["members"][0].keys()
    assert found["bytes"] == Path("e.safetensors").stat().st_size
