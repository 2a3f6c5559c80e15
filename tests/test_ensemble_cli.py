"""``randsurgery ensemble``: built, stopped and resumed, changed, evaluated; and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ensemble_helpers import (
    QUICK,
    TINY,
    Json,
    fails,
    flip,
    folder_bytes,
    kept,
    one_thread,
    run,
    said,
    states,
    succeed,
)
from surgery_helpers import assert_same_state, same_bits, save_dense, write_images

import randsurgery as rs
from randsurgery.cli.options import RunOptions, plan_of
from randsurgery.format.generator import torch_seed
from randsurgery.jobs import ensembles as ensembles_job
from randsurgery.jobs.build import BuildPlan, PreparedBuild, prepare_build, run_build
from randsurgery.jobs.ensembles import calibration_images
from randsurgery.surgery import ensembles
from randsurgery.training import datasets, loop
from randsurgery.training.datasets import open_data
from randsurgery.training.loop import Hooks
from randsurgery.training.temperature import mean_nll

pytestmark = pytest.mark.slow

A, B, E, TASKS = "a.safetensors", "b.safetensors", "e.safetensors", "tasks.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Every command shows the same few images; they are read from scikit-learn once."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "_digits", functools.cache(datasets._digits))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that take a moment to train, once for all tests, which get copies."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed, name in enumerate("ab"):
            succeed("popup", "conv2", *QUICK, "--seed", seed, "--init-seed", 0, "-o",
                    f"{name}.safetensors")  # fmt: skip
        succeed("popup", "conv2", *QUICK, "--init-seed", 9, "-o", "other.safetensors")
        write_images(folder / "pets/train", {"cat": 4, "dog": 4, "fish": 4}, size=8)
        write_images(folder / "pets/validation", {"cat": 3, "dog": 2, "fish": 2}, size=8, seed=1)
        succeed("popup", "conv2", *QUICK, "--init-seed", 0, "--data-dir", "pets", "-o",
                "pets.safetensors")  # fmt: skip
        succeed("ensemble", "build", A, B, "-o", E)
        succeed("ensemble", "build", A, "pets.safetensors", "-o", TASKS)
        for trace in (*folder.glob("*.jsonl"), *folder.glob("*.yaml")):
            trace.unlink()
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a and b (two masks), e (both), other (another seed), pets (another
    task) and tasks (a and pets)."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def members_of(path: str) -> list[str]:
    return [member.name for member in rs.read_recipe(path).members]


# --- build: what is learned -----------------------------------------------------------------------

DENSENET = ("densenet_bc_100_12", "--num-classes", 10)


def planned(*arguments: object) -> Json:
    found = said("ensemble", "build", *arguments, "--dry-run")
    assert not list(Path().iterdir())
    return found


def test_five_classifiers_and_norms_learn_the_papers_137_thousand(empty: Path) -> None:
    facts = planned(*DENSENET, "--members", 5, "--kind", "fc")
    assert (facts["learned"], facts["learned_each"]) == (137_090, 27_418)
    assert facts["members"] == ["m0", "m1", "m2", "m3", "m4"]
    assert facts["kind"] == "fc"


def test_a_share_of_nine_tenths_learns_what_freezing_a_tenth_learns(empty: Path) -> None:
    facts = planned(*DENSENET, "--members", 2, "--kind", "share", "--share", "0.9")
    assert (facts["learned"], facts["learned_each"]) == (2 * 90_196, 90_196)
    succeed("freeze", *DENSENET, "--fraction", "0.1", "-o", "p.safetensors")
    job = prepare(DENSENET[0], num_classes=10, members=2, kind="share", share="0.9")
    assert job.learned == rs.read_recipe("p.safetensors").members[0].plan


def test_full_and_popup_learn_one_number_a_weight(empty: Path) -> None:
    full = planned("conv2", *TINY, "--members", 3, "--kind", "full")
    assert full["learned_each"] == full["total"]
    masks = planned("conv2", *TINY, "--members", 3, "--kind", "popup", "--k", "0.4")
    assert masks["learned_each"] == full["total"]  # the network has weights alone
    assert (masks["k"], full.get("k")) == ("0.4", None)


def test_survivors_are_counted_as_eval_counts_them(here: Path) -> None:
    succeed("train", A, "--epochs", 1, "-b", 256, "-o", "t.safetensors")
    facts = said("ensemble", "build", "t.safetensors", "--members", 2, "--dry-run")
    assert facts["kind"] == "plan"
    assert 0.25 < facts["learned_each"] / facts["total"] < 0.35
    succeed("ensemble", "build", "t.safetensors", "--members", 2, "--epochs", 1, "-b", 256, "-o",
            "n.safetensors")  # fmt: skip
    assert said("ensemble", "eval", "n.safetensors")["learned"] == facts["learned"]


@pytest.mark.parametrize(("count", "last"), [(1, "m0"), (10, "m9"), (11, "m10"), (101, "m100")])
def test_default_names_sort_in_their_order(count: int, last: str) -> None:
    plan = BuildPlan(plan_of("conv2", RunOptions()), count, "fc")
    names = plan.member_names
    assert list(names) == sorted(names)
    assert len(set(names)) == count
    assert names[-1] == last


# --- build: what single commands do ---------------------------------------------------------------


def prepare(source: str, *, members: int, **given: Any) -> PreparedBuild:
    """A checked build, by the names of the command's options."""
    own = {k: given.pop(k) for k in ("kind", "share", "k", "warmup", "reinit", "names")
           if k in given}  # fmt: skip
    resume = given.pop("resume", None)
    plan = replace(plan_of(source, RunOptions(**given)), resume=resume)
    job = prepare_build(BuildPlan(plan, members, **own))
    job.job.checkpoint.close()
    return job


SHORT = ("--epochs", 2, "-b", 256)
SMALL = (*TINY, "--num-classes", 10)


@pytest.mark.parametrize(
    ("kind", "plan", "single"),
    [
        (("--kind", "popup"), None, ("popup", "conv2", *TINY, "--init-seed", 4)),
        (("--kind", "popup", "--k", "0.6"), None,
         ("popup", "conv2", *TINY, "--init-seed", 4, "--k", "0.6")),
        (("--kind", "full"), None, ("train", "conv2", *TINY, "--init-seed", 4)),
        (("--kind", "fc"), ("--only", "@head"), ("train", "plan.safetensors")),
        (("--kind", "share", "--share", "0.7"), ("--fraction", "0.3", "--min", 1),
         ("train", "plan.safetensors")),
    ],
)  # fmt: skip
def test_each_member_is_what_the_single_command_trains(
    empty: Path,
    kind: tuple[str, ...],
    plan: tuple[object, ...] | None,
    single: tuple[object, ...],
) -> None:
    """Member i against ``--seed i``: finished tensors, payload bytes and what is said of them."""
    succeed("ensemble", "build", "conv2", *TINY, "--members", 2, *kind, *SHORT, "--seed", 3,
            "--init-seed", 4, "-o", "e.safetensors")  # fmt: skip
    if plan is not None:
        succeed("freeze", "conv2", *SMALL, "--seed", 4, *plan, "-o", "plan.safetensors")
    found, both = kept(E, rebuild=False), states(E, ["m0", "m1"])
    for index in range(2):
        name = f"s{index}.safetensors"
        succeed(*single, *SHORT, "--seed", 3 + index, "-o", name)
        assert_same_state(both[f"m{index}"], rs.load(name).state_dict())
        alone = kept(name, rebuild=False)["main"]
        assert found[f"m{index}"].payloads == alone.payloads
        assert alone.payloads
        assert found[f"m{index}"].words["tensors"] == alone.words["tensors"]
        assert rs.read_recipe(name).backbone_id == rs.read_recipe(E).backbone_id
    assert not same_bits(both["m0"]["fc.weight"], both["m1"]["fc.weight"])


@pytest.mark.parametrize("fill", ["own", "zero"])
def test_a_plan_says_what_its_members_learn(empty: Path, fill: str) -> None:
    succeed("freeze", "conv2", *SMALL, "--fraction", "0.5", "--fill", fill, "-o", "p.safetensors")
    succeed("ensemble", "build", "p.safetensors", "--members", 2, *SHORT, "-o", E)
    for index in range(2):
        succeed("train", "p.safetensors", *SHORT, "--seed", index, "-o", f"{index}.safetensors")
        twin = rs.load(f"{index}.safetensors").state_dict()
        assert_same_state(states(E, [f"m{index}"])[f"m{index}"], twin)
    zeros = rs.load(E, member="m1").state_dict()["features.2.weight"][3:]
    assert bool((zeros == 0).all()) == (fill == "zero")
    assert said("ensemble", "eval", E)["kind"] == "Plan"
    words = fails(2, "ensemble", "build", "p.safetensors", "--members", 2, "--kind", "fc", "-o",
                  "n.safetensors")  # fmt: skip
    assert "the source has a plan, which implies what members learn; leave --kind fc out" in words


def test_members_packed_from_single_files_are_those_of_a_build(here: Path) -> None:
    succeed("ensemble", "build", "conv2", *QUICK, "--kind", "popup", "--members", 2, "--name", "a",
            "--name", "b", "-o", "built.safetensors")  # fmt: skip
    packed, built = kept(E, rebuild=False), kept("built.safetensors", rebuild=False)
    for name in "ab":
        assert packed[name].payloads == built[name].payloads
        assert packed[name].words["tensors"] == built[name].words["tensors"]
    # and they can give each other members
    words = fails(2, "ensemble", "add", E, "built.safetensors")
    assert "two members would bear the name 'a'" in words
    succeed("ensemble", "add", E, "built.safetensors", "--name", "c", "--name", "d")
    found = states(E, "abcd")
    assert_same_state(found["c"], found["a"])


# --- build: where members start -------------------------------------------------------------------

STILL = ("--epochs", 1, "-b", 256, "--lr", 0)
"""Nothing is learned, so that a file shows where its members started."""


@pytest.mark.parametrize("kind", ["fc", "popup", "share"])
def test_a_warm_up_trains_what_all_members_share(empty: Path, kind: str) -> None:
    more = ("--share", "0.5") if kind == "share" else ()
    succeed("ensemble", "build", "conv2", *QUICK, "--kind", kind, *more, "--members", 2,
            "--warmup-epochs", 2, "-o", E)  # fmt: skip
    init = "signed-constant" if kind == "popup" else "kaiming-normal"
    succeed("train", "conv2", *TINY, "--epochs", 2, "-b", 256, "--init", init, "-o",
            "t.safetensors")  # fmt: skip
    warm, plain = rs.load("t.safetensors").state_dict(), "features.2.weight"
    assert not same_bits(warm[plain], draws(0, init)[plain])
    found = states(E, ["m0", "m1"])
    for state in found.values():
        for name, tensor in state.items():
            if kind == "fc" and name != "fc.weight":
                assert same_bits(tensor, warm[name])
            if kind == "popup":
                assert same_bits(tensor, torch.where(tensor != 0, warm[name], torch.zeros(())))
            if kind == "share" and name != "fc.weight":
                half = len(tensor) // 2
                assert same_bits(tensor[half:], warm[name][half:])
                assert not same_bits(tensor[:half], warm[name][:half])
    assert not same_bits(found["m0"]["fc.weight"], found["m1"]["fc.weight"])
    lines = [json.loads(line) for line in Path("e.metrics.jsonl").read_text().splitlines()]
    assert [(line["member"], line["epoch"]) for line in lines] == [
        ("start", 1), ("start", 2), ("m0", 1), ("m1", 1)
    ]  # fmt: skip


def test_a_warm_start_is_what_single_commands_start_from(empty: Path) -> None:
    succeed("ensemble", "build", "conv2", *QUICK, "--kind", "fc", "--members", 2,
            "--warmup-epochs", 1, "-o", E)  # fmt: skip
    succeed("train", "conv2", *QUICK, "-o", "t.safetensors")
    succeed("freeze", "t.safetensors", "--only", "@head", "-o", "p.safetensors")
    found = states(E, ["m0", "m1"])
    for index in range(2):
        succeed("train", "p.safetensors", "--epochs", 1, "-b", 256, "--seed", index, "-o",
                f"{index}.safetensors")  # fmt: skip
        twin = rs.load(f"{index}.safetensors").state_dict()
        assert_same_state(found[f"m{index}"], twin)


def draws(seed: int, init: Any = "kaiming-normal") -> dict[str, torch.Tensor]:
    """The network as that seed draws it."""
    args = {"width": 0.1, "img_size": 8, "num_classes": 10}
    return rs.build(rs.make_recipe("conv2", init, seed=seed, args=args)).state_dict()


def test_without_reinit_all_members_start_alike(empty: Path) -> None:
    succeed("ensemble", "build", "conv2", *TINY, *STILL, "--kind", "full", "--members", 2, "-o", E)
    for state in states(E, ["m0", "m1"]).values():
        assert_same_state(state, draws(0))


def test_reinit_draws_each_start_from_the_members_own_seed(empty: Path) -> None:
    build = ("ensemble", "build", "conv2", *TINY, *STILL, "--seed", 5, "--init-seed", 2,
             "--members", 2, "--reinit")  # fmt: skip
    succeed(*build, "--kind", "full", "-o", E)
    for index, state in enumerate(states(E, ["m0", "m1"]).values()):
        assert_same_state(state, draws(torch_seed(5 + index, "reinit")))
    succeed(*build, "--kind", "share", "--share", "0.5", "-o", "s.safetensors")
    rest = draws(2)
    for index, state in enumerate(states("s.safetensors", ["m0", "m1"]).values()):
        own = draws(torch_seed(5 + index, "reinit"))
        assert same_bits(state["fc.weight"], own["fc.weight"])
        for name in set(rest) - {"fc.weight"}:
            half = len(rest[name]) // 2
            assert same_bits(state[name][:half], own[name][:half])
            assert same_bits(state[name][half:], rest[name][half:])


def test_reinit_needs_something_that_was_drawn(empty: Path) -> None:
    save_dense(Path("d.safetensors"), draws(0))
    words = fails(2, "ensemble", "build", "conv2", "--checkpoint", "d.safetensors", *QUICK,
                  "--kind", "full", "--members", 2, "--reinit", "-o", E)  # fmt: skip
    assert "--reinit needs weights that were drawn from a seed" in words


@pytest.mark.parametrize("fill", ["own", "zero"])
def test_what_a_file_has_learned_is_where_its_members_start(empty: Path, fill: str) -> None:
    """Also what slices over zeros have learned, which once were drawn."""
    succeed("freeze", "conv2", *SMALL, "--fraction", "0.5", "--fill", fill, "-o", "p.safetensors")
    succeed("train", "p.safetensors", "--epochs", 1, "-b", 256, "-o", "t.safetensors")
    before = rs.load("t.safetensors").state_dict()
    succeed("ensemble", "build", "t.safetensors", *STILL, "--members", 2, "-o", E)
    for state in states(E, ["m0", "m1"]).values():
        assert_same_state(state, before)
    succeed("train", "t.safetensors", *STILL, "-o", "again.safetensors")
    assert_same_state(rs.load("again.safetensors").state_dict(), before)
    # what is learned next is the members', over what was learned before
    succeed("ensemble", "build", "t.safetensors", *SHORT, "--members", 2, "--warmup-epochs", 1,
            "-o", "n.safetensors")  # fmt: skip
    found = states("n.safetensors", ["m0", "m1"])
    assert not same_bits(found["m0"]["features.0.weight"], found["m1"]["features.0.weight"])
    half = len(before["fc1.weight"]) // 2
    assert same_bits(found["m0"]["fc1.weight"][half:], found["m1"]["fc1.weight"][half:])


def test_a_network_of_zeros_cannot_be_warmed_up(empty: Path) -> None:
    succeed("freeze", "conv2", *SMALL, "--fraction", "0.5", "--fill", "zero", "-o", "p.safetensors")
    words = fails(2, "ensemble", "build", "p.safetensors", "--members", 2, "--warmup-epochs", 1)
    assert "--warmup-epochs trains the whole network first" in words
    succeed("ensemble", "build", "p.safetensors", "--members", 2, *STILL, "--reinit", "--seed", 7,
            "-o", E)  # fmt: skip
    for index, state in enumerate(states(E, ["m0", "m1"]).values()):
        half = len(state["fc1.weight"]) // 2
        assert same_bits(
            state["fc1.weight"][:half], draws(torch_seed(7 + index, "reinit"))["fc1.weight"][:half]
        )


def test_a_trained_file_is_the_backbone_of_its_members(here: Path) -> None:
    """A popup file: its masks are shared, and so cost the members nothing."""
    succeed("ensemble", "build", A, "--kind", "fc", "--members", 2, *SHORT, "-o", "n.safetensors")
    found, before = states("n.safetensors", ["m0", "m1"]), rs.load(A).state_dict()
    for state in found.values():
        for name in set(before) - {"fc.weight"}:
            assert same_bits(state[name], before[name])
    recipe = rs.read_recipe("n.safetensors")
    assert all(set(member.tensors) == {"fc.weight"} for member in recipe.members)
    assert {o.kind for o in recipe.tensors["fc1.weight"].overlays} == {"mask"}


def test_settings_beside_the_output_repeat_the_build(empty: Path) -> None:
    succeed("ensemble", "build", "conv2", *QUICK, "--kind", "share", "--share", "0.5", "--members",
            2, "--name", "x", "--name", "y", "--warmup-epochs", 1, "--seed", 3, "--init",
            "kaiming-normal", "-o", E)  # fmt: skip
    told = yaml.safe_load(Path("e.settings.yaml").read_text())
    assert (told["members"], told["kind"], told["name"]) == (2, "share", ["x", "y"])
    succeed("ensemble", "build", "conv2", "-c", "e.settings.yaml", "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path(E).read_bytes()
    assert sorted(path.name for path in empty.iterdir()) == [
        "again.metrics.jsonl", "again.safetensors", "again.settings.yaml", "e.metrics.jsonl", E,
        "e.settings.yaml",
    ]  # fmt: skip


def test_provenance_says_what_each_member_is(empty: Path) -> None:
    built = said("ensemble", "build", "conv2", *QUICK, "--kind", "popup", "--k", "0.4", "--members",
                 2, "--seed", 6, "-o", E)  # fmt: skip
    for index, member in enumerate(rs.read_recipe(E).members):
        told = member.provenance
        assert told["command"] == "ensemble build"
        assert told["settings"]["seed"] == 6 + index
        assert (told["settings"]["kind"], told["settings"]["k"]) == ("popup", "0.4")
        assert told["metrics"]["test_accuracy"] == built["metrics"][f"m{index}"]["test_accuracy"]
        assert built["members"][index]["accuracy"] == told["metrics"]["test_accuracy"]
        assert member.dataset is not None
        assert member.dataset.name == "digits"
    assert built["verified"] is True
    assert built["bytes"] == Path(E).stat().st_size


# --- build: stopped and resumed -------------------------------------------------------------------

BUILD: Json = {
    "members": 3, "kind": "popup", "width": 0.1, "img_size": 8, "epochs": 2, "batch_size": 256
}  # fmt: skip
COMMAND = ("ensemble", "build", "conv2", *TINY, "--members", 3, "--kind", "popup", *SHORT)
PARTS = Path("e.parts")


def stopped(member: str, step: int, **more: Any) -> list[str]:
    """A build that is interrupted in that member, before or after a step; the stages begun."""
    job = prepare("conv2", **{**BUILD, "output": E, **more})
    begun = []

    def hooks(name: str) -> Hooks:
        begun.append(name)

        def stop(at: int, *_: object) -> None:
            if name == member and at >= step:
                raise KeyboardInterrupt

        return Hooks(on_epoch_start=stop if step == 0 else lambda *_: None, on_step=stop)

    with pytest.raises(KeyboardInterrupt, match=r"trained so far are in e\.parts; --resume auto"):
        run_build(job, hooks)
    assert not Path(E).exists()
    return begun


def resumed(**more: Any) -> list[tuple[str, int]]:
    """The same build gone on with: each stage and step that was trained."""
    job = prepare("conv2", **{**BUILD, "output": E, "resume": "auto", **more})
    done: list[tuple[str, int]] = []

    def hooks(name: str) -> Hooks:
        return Hooks(on_step=lambda step, _: done.append((name, step)))

    run_build(job, hooks)
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What builds that nobody stops write."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        for name, more in (("plain", ()), ("warm", ("--warmup-epochs", 1))):
            succeed(*COMMAND, *more, "-o", f"{name}.safetensors")
            found[name] = Path(f"{name}.safetensors").read_bytes()
    return found


def test_a_build_stopped_in_its_second_member_goes_on_with_it(
    empty: Path, whole: dict[str, bytes]
) -> None:
    assert stopped("m1", 0) == ["m0", "m1"]
    assert (PARTS / "m0.safetensors").exists()
    assert not (PARTS / "m1.safetensors").exists()
    done = resumed()
    assert {name for name, _ in done} == {"m1", "m2"}
    assert Path(E).read_bytes() == whole["plain"]
    assert not PARTS.exists()
    assert sorted(path.name for path in empty.iterdir()) == [
        "e.metrics.jsonl",
        E,
        "e.settings.yaml",
    ]
    lines = [json.loads(line) for line in Path("e.metrics.jsonl").read_text().splitlines()]
    assert [(line["member"], line["epoch"]) for line in lines] == [
        (f"m{member}", epoch) for member in range(3) for epoch in (1, 2)
    ]


def test_a_build_stopped_within_an_epoch_goes_on_from_its_state(
    empty: Path, whole: dict[str, bytes]
) -> None:
    stopped("m1", 9, state_every=2)  # 5 steps an epoch, so that the state is of step 8
    assert (PARTS / "m1.state.safetensors").exists()
    done = resumed(state_every=2)
    assert [step for name, step in done if name == "m1"] == [9, 10]
    assert Path(E).read_bytes() == whole["plain"]
    assert not PARTS.exists()


def test_a_build_stopped_between_epochs_goes_on_there_on_the_command_line(
    empty: Path, whole: dict[str, bytes]
) -> None:
    stopped("m2", 7)
    succeed(*COMMAND, "--resume", "auto", "-o", E)
    assert Path(E).read_bytes() == whole["plain"]
    assert not PARTS.exists()


@pytest.mark.parametrize(("stage", "step"), [("start", 3), ("m0", 0), ("m1", 7)])
def test_a_warm_up_is_not_lost(empty: Path, whole: dict[str, bytes], stage: str, step: int) -> None:
    stopped(stage, step, warmup=1)
    done = resumed(warmup=1)
    assert ("start" in {name for name, _ in done}) == (stage == "start")
    assert Path(E).read_bytes() == whole["warm"]


def test_a_build_can_be_stopped_again_and_again(empty: Path, whole: dict[str, bytes]) -> None:
    stopped("m0", 3)
    stopped("m1", 1, resume="auto")
    stopped("m2", 7, resume="auto")
    assert resumed() == [("m2", step) for step in range(6, 11)]
    assert Path(E).read_bytes() == whole["plain"]


def test_an_interrupted_build_says_where_its_members_are(
    empty: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, taken = loop._step, []

    def stop(*arguments: Any) -> Any:
        taken.append(1)
        if len(taken) == 13:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", stop)
    result = run(*COMMAND, "-q", "-o", E)
    assert result.exit_code == 130
    assert result.stderr == (
        "interrupted; the members trained so far are in e.parts; --resume auto goes on with the "
        "same command\n"
    )
    succeed(*COMMAND, "--resume", "auto", "-o", E)
    assert len(taken) == 13 + 20  # the first member is not trained again
    assert Path(E).read_bytes() == whole["plain"]


def test_parts_are_neither_lost_nor_taken_for_another_builds(
    empty: Path, whole: dict[str, bytes]
) -> None:
    stopped("m1", 0)
    words = fails(6, *COMMAND, "-o", E)
    assert "e.parts: holds the members of a build that was stopped; --resume auto goes on" in words
    for option, told in (
        (("--lr", "0.01"), "its lr is 0.05, here it is 0.01"),
        (("--seed", 1), "its "),
        (("--k", "0.5"), "its k is 0.3, here it is 0.5"),
        (("--name", "x", "--name", "y", "--name", "z"), "its members is ['m0', 'm1', 'm2'], here"),
        (("--warmup-epochs", 1), "its start_epochs is 0, here it is 1"),
        (("--width", "0.2"), "its network is"),
    ):
        words = fails(4, *COMMAND, *option, "--resume", "auto", "-q", "-o", E)
        assert "e.parts: holds the members of another build" in words
        assert told in words
    assert {name for name, _ in resumed()} == {"m1", "m2"}
    assert Path(E).read_bytes() == whole["plain"]


def test_force_begins_anew(empty: Path, whole: dict[str, bytes]) -> None:
    stopped("m1", 0, epochs=1)
    Path(E).write_bytes(b"older")
    succeed(*COMMAND, "--force", "-o", E)
    assert Path(E).read_bytes() == whole["plain"]
    assert not PARTS.exists()


def test_a_folder_that_is_no_builds_is_left_alone(empty: Path) -> None:
    PARTS.mkdir()
    (PARTS / "m0.safetensors").write_bytes(b"of someone else's")
    for more in ((), ("--force",), ("--resume", "auto")):
        words = fails(6, *COMMAND, *more, "-q", "-o", E)
        assert "e.parts: is where the members are kept, but is not a build's" in words
    shutil.rmtree(PARTS)
    PARTS.write_bytes(b"a file")
    fails(6, *COMMAND, "--force", "-q", "-o", E)


def test_a_state_is_not_a_builds(here: Path) -> None:
    words = fails(2, *COMMAND, "--resume", "x.safetensors", "-o", "n.safetensors")
    assert "--resume x.safetensors: a build is resumed by auto" in words


def test_a_diverged_build_keeps_its_parts(empty: Path) -> None:
    result = run("ensemble", "build", "conv2", *TINY, "--kind", "full", "--members", 2, "--epochs",
                 2, "-b", 128, "--lr", "1e30", "-o", E)  # fmt: skip
    assert result.exit_code == 7
    assert not Path(E).exists()
    assert (PARTS / "build.json").exists()
    assert list(PARTS.glob("m0.*")) == []  # it was lost before its first state
    words = fails(6, "ensemble", "build", "conv2", *TINY, "--kind", "full", "--members", 2, "-q",
                  "-o", E)  # fmt: skip
    assert "e.parts: holds the members of a build that was stopped" in words


# --- bad input ------------------------------------------------------------------------------------

TRAIN = ("ensemble", "build", "conv2", *QUICK, "-q")
NEW = ("-o", "n.safetensors")


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, (*TRAIN, "--members", 0, "--kind", "fc"), "--members must be 1 or more, found 0"),
        (2, (*TRAIN, "--members", -1, "--kind", "fc"), "--members must be 1 or more, found -1"),
        (2, (*TRAIN, "--members", 2, "--kind", "masks"),
         "unknown --kind 'masks', expected fc, share, full, popup"),
        (2, (*TRAIN, "--members", 2, "--kind", "plan"), "unknown --kind 'plan'"),
        (2, (*TRAIN, "--members", 2), "--kind fc, share, full or popup is needed"),
        (2, (*TRAIN, "--members", 2, "--share", "0.9"), "--share goes with --kind share"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--share", "0.9"), "--share goes with --kind"),
        (2, (*TRAIN, "--members", 2, "--kind", "share"), "--kind share needs --share"),
        (2, (*TRAIN, "--members", 2, "--kind", "share", "--share", "1"), "--share must be below 1"),
        (2, (*TRAIN, "--members", 2, "--kind", "share", "--share", "1.5"), "--share must"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--k", "0.5"), "--k goes with --kind popup"),
        (2, (*TRAIN, "--members", 2, "--kind", "popup", "--k", "0"), "k must lie in"),
        (2, (*TRAIN, "--members", 2, "--kind", "popup", "--reinit"), "--reinit goes with learned"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--name", "x"), "2 members, but 1 names"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--name", "x", "--name", "x"),
         "two members would bear the name 'x'"),
        (2, (*TRAIN, "--members", 1, "--kind", "fc", "--name", "../x"), "'../x' is not a member"),
        (2, (*TRAIN, "--members", 1, "--kind", "fc", "--name", "shared"), "'shared' is not a memb"),
        (2, (*TRAIN, "--members", 1, "--kind", "fc", "--name", "start", "--warmup-epochs", 1),
         "--name start is a part of the build's own"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--name", "x.state", "--name", "x"),
         "--name x.state is a part of the build's own"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--opt", "nadda"), "near: "),
        (2, ("ensemble", "build", A, B, "--members", 2, "--kind", "fc"), "trains from one source"),
        (2, (*TRAIN, "--members", 2, "--kind", "fc", "--arch", "conv2"), "--arch goes with dense"),
        (2, ("ensemble", "build", E, "--members", 2, "--kind", "fc"), "2 members (a, b); name one"),
        (2, ("ensemble", "build", A, B, "--kind", "fc"), "--kind goes with --members N"),
        (2, ("ensemble", "build", A, B, "--resume", "auto"), "--resume goes with --members N"),
        (2, ("ensemble", "build", A, B, "--epochs", 3), "--epochs goes with --members N"),
        (2, ("ensemble", "build", A, B, "--no-hflip"), "--hflip goes with --members N"),
        (2, ("ensemble", "build", A), "one source: pass --members N to train"),
        (2, ("ensemble", "build", A, A), "two members would bear the name 'a'"),
        (2, ("ensemble", "build", A, B, "--name", "x"), "2 members, but 1 names"),
        (2, ("ensemble", "build", A, B, "--name", "x", "--name", "a b"), "'a b' is not a member"),
        (3, ("ensemble", "build", A, "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (4, ("ensemble", "build", A, "other.safetensors"),
         "other.safetensors has another backbone: its fc.weight is [10, 25] sign of seed 9"),
        (4, ("ensemble", "build", A, "other.safetensors"), "in a.safetensors it is [10, 25] sign "
                                                           "of seed 0"),
        (2, ("ensemble", "build", A, B, "-o", "n.pt"), "--output must end in .safetensors"),
    ],
)  # fmt: skip
def test_builds_that_cannot_be_are_named(
    here: Path, code: int, arguments: tuple[object, ...], words: str
) -> None:
    more = () if "-o" in arguments else NEW
    assert words in fails(code, *arguments, *more)


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (6, ("build", A, B, "-o", E), "e.safetensors: exists already"),
        (6, ("build", A, B, "-o", A, "--force"), "a.safetensors: is read by this command"),
        (2, ("add", E, A), "two members would bear the name 'a'; give others with --name"),
        (4, ("add", E, "other.safetensors"), "other.safetensors has another backbone: its fc"),
        (4, ("add", E, "other.safetensors"), "in e.safetensors it is [10, 25] sign of seed 0"),
        (2, ("add", E, E), "e.safetensors has its members already; name other files"),
        (6, ("add", E, A, "-o", A, "--force"), "a.safetensors: is read by this command"),
        (3, ("add", "nowhere.safetensors", A), "nowhere.safetensors: no such file"),
        (6, ("add", E, "pets.safetensors", "-o", A), "a.safetensors: exists already"),
        (2, ("remove", E, "c"), "no member 'c'"),
        (2, ("remove", E, "a", "b"), "no member would be left"),
        (2, ("remove", A, "main"), "no member would be left"),
        (2, ("remove", "hf-hub:some/net", "a"), "is not on this machine; pass --output"),
        (6, ("remove", E, "a", "-o", A), "a.safetensors: exists already"),
        (2, ("extract", E, "c"), "the file has no member 'c'; members: a, b"),
        (6, ("extract", E, "a", "-o", A), "a.safetensors: exists already"),
        (6, ("extract", E, "a", "-o", E, "--force"), "e.safetensors: is read by this command"),
        (3, ("list", "nowhere.safetensors"), "no such file"),
        (2, ("list", E, "--plot", "chart.txt"), "--plot must end in .png, .svg or .pdf"),
        (6, ("list", E, "--plot", A.replace("safetensors", "png")), "exists already"),
        (4, ("eval", TASKS), "the members have different classes, so they have no mean (a: 10"),
        (4, ("predict", TASKS), "choose members of one task with --member"),
        (4, ("calibrate", TASKS), "pets: 3 classes (cat, dog, fish)"),
        (2, ("eval", E, "--member", "c"), "no member 'c'; members: a, b"),
        (2, ("eval", E, "--engine", "fast"), "unknown --engine 'fast'"),
        (2, ("eval", TASKS, "--engine", "fast"), "unknown --engine 'fast'"),
        (5, ("eval", E, "--dataset", "digit"), "unknown dataset 'digit'"),
        (4, ("eval", TASKS, "--member", "pets", "--dataset", "digits"), "digits has 10 classes"),
        (4, ("eval", A, "--base", B), "builds on no base"),
        (2, ("predict", E, "--engine", "fast"), "unknown --engine 'fast'"),
        (2, ("predict", E, "--json"), "--json needs -o FILE.csv"),
        (6, ("predict", E, "-o", E, "--force"), "is read by this command"),
        (2, ("calibrate", E, "--share", "0"), "--share must be a decimal above 0, up to 1"),
        (2, ("calibrate", E, "--share", "0.0"), "found '0.0'"),
        (2, ("calibrate", E, "--share", "1.5"), "found '1.5'"),
        (2, ("calibrate", E, "--share", "1/3"), "found '1/3'"),
        (2, ("calibrate", E, "--share", "1e-1"), "found '1e-1'"),
        (2, ("calibrate", E, "--share", "-0.5"), "found '-0.5'"),
        (2, ("calibrate", E, "--share", "half"), "found 'half'"),
        (6, ("calibrate", E, "-o", A), "a.safetensors: exists already"),
        (2, ("calibrate", E, "--member", "c"), "no member 'c'"),
        (2, ("calibrate", E, "-o", "n.pt"), "--output must end in .safetensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named_and_nothing_is_written(
    here: Path, code: int, arguments: tuple[object, ...], words: str
) -> None:
    Path("a.png").write_bytes(b"a picture")
    assert words in fails(code, "ensemble", *arguments)


# --- add, remove, extract, list -------------------------------------------------------------------


def test_a_file_is_changed_and_changed_back(here: Path) -> None:
    before, third = Path(E).read_bytes(), Path("third.safetensors")
    succeed("popup", "conv2", *QUICK, "--seed", 2, "--init-seed", 0, "-o", third)
    added = said("ensemble", "add", E, third)
    assert added["moved"] == ["third"]
    assert [row["name"] for row in added["members"]] == ["a", "b", "third"]
    out = said("ensemble", "extract", E, "third")
    assert out["path"] == "e-third.safetensors"
    for name, single in (("a", A), ("b", B), ("third", third)):
        assert_same_state(states(E, [name])[name], rs.load(single).state_dict())
    assert kept("e-third.safetensors", rebuild=False)["third"] == kept(E, rebuild=False)["third"]
    whole = Path(E).read_bytes()
    assert said("ensemble", "remove", E, "third")["moved"] == ["third"]
    assert Path(E).read_bytes() == before
    told = succeed("ensemble", "add", E, "e-third.safetensors").stderr
    assert told.splitlines() == ["added: third", "written and verified: e.safetensors"]
    assert Path(E).read_bytes() == whole
    assert "digests agree" in succeed("inspect", "verify", E).stdout


def test_provenance_travels(here: Path) -> None:
    words = {name: kept(f"{name}.safetensors", rebuild=False)["main"].words for name in "ab"}
    assert words["a"]["provenance"] != words["b"]["provenance"]
    for name, found in kept(E, rebuild=False).items():
        assert found.words == words[name]


def test_a_dry_run_writes_nothing(here: Path) -> None:
    before = folder_bytes(here)
    commands: dict[tuple[str, ...], list[str]] = {
        ("build", A, "pets.safetensors", "-o", "n.safetensors"): ["a", "pets"],
        ("add", E, "pets.safetensors"): ["a", "b", "pets"],
        ("remove", E, "a"): ["b"],
        ("extract", E, "a"): ["a"],
    }
    for command, names in commands.items():
        assert said("ensemble", *command, "--dry-run")["members"] == names
        assert succeed("ensemble", *command, "--dry-run").stdout.strip().endswith(", ".join(names))
    succeed(*COMMAND, "--dry-run", "-o", "n.safetensors")
    assert folder_bytes(here) == before


def test_two_tasks_in_one_file_keep_their_own_classes(here: Path) -> None:
    found = said("ensemble", "list", TASKS)
    rows = {row["name"]: row for row in found["members"]}
    assert {name: (row["classes"], row["dataset"]) for name, row in rows.items()} == {
        "a": (10, "digits"), "pets": (3, "folder")
    }  # fmt: skip
    for name, file in (("a", A), ("pets", "pets.safetensors")):
        assert_same_state(states(TASKS, [name])[name], rs.load(file).state_dict())


def test_the_list_says_what_each_member_costs(here: Path) -> None:
    found = said("ensemble", "list", E)
    assert found["ok"] is True
    assert found["bytes"] == Path(E).stat().st_size
    for row in found["members"]:
        after = said("ensemble", "remove", E, row["name"], "-o", "n.safetensors", "--force")
        saved = found["bytes"] - after["bytes"]
        assert abs(row["bytes"] - saved) <= max(0.02 * saved, 200)
    table = succeed("ensemble", "list", E, "--plot", "chart.png")
    assert max(len(line) for line in table.stdout.splitlines()) <= 80
    assert table.stderr.strip() == "chart: chart.png"
    assert Path("chart.png").read_bytes().startswith(b"\x89PNG")
    assert "of which" in table.stdout


def test_listing_needs_no_torch(here: Path) -> None:
    code = (
        "import sys\n"
        "from randsurgery.cli.app import app\n"
        "app(['ensemble', 'list', 'e.safetensors', '--json'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["members"]) == 2


# --- dense files ----------------------------------------------------------------------------------

ARGS = {"width": 0.1, "img_size": 8, "num_classes": 10}
MODEL = ("--arch", "conv2", "--model-kwargs", "width=0.1", "--model-kwargs", "img_size=8")


@pytest.fixture
def dense(empty: Path) -> Path:
    """A dense base and three networks that were fine-tuned from it, one for other classes."""
    state = rs.build(rs.make_recipe("conv2", "kaiming-normal", args=ARGS)).state_dict()
    save_dense(empty / "base.safetensors", state)
    for turn in (1, 2):
        tuned = {**state, "fc.weight": state["fc.weight"] * (1 + turn)}
        tuned["fc1.weight"] = state["fc1.weight"].clone()
        tuned["fc1.weight"][:turn] = turn
        save_dense(empty / f"t{turn}.safetensors", tuned)
        torch.save({"state_dict": tuned}, empty / f"t{turn}.pth")
    save_dense(empty / "three.safetensors", {**state, "fc.weight": torch.ones(3, 25)})
    return empty


def test_fine_tuned_files_become_members_on_their_base(dense: Path) -> None:
    base = ("--base", "base.safetensors")
    succeed("ensemble", "build", "t1.safetensors", "t2.pth", *base, *MODEL, "-o", E)
    assert members_of(E) == ["t1", "t2"]
    succeed("ensemble", "add", E, "three.safetensors", *base)
    assert members_of(E) == ["t1", "t2", "three"]
    for name in ("t1", "t2", "three"):
        twin = _dense_state(f"{name}.safetensors")
        assert_same_state(states(E, [name])[name], twin)
    assert Path(E).stat().st_size < Path("base.safetensors").stat().st_size
    facts = said("ensemble", "eval", E, "--member", "t1", "--member", "t2", "--dataset", "digits")
    assert list(facts["members"]) == ["t1", "t2"]
    succeed("ensemble", "remove", E, "three")
    succeed("ensemble", "extract", E, "t2", "-o", "x.safetensors")
    assert_same_state(rs.load("x.safetensors").state_dict(), _dense_state("t2.safetensors"))


def _dense_state(path: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


@pytest.mark.parametrize(
    ("code", "arguments", "words"),
    [
        (2, ("build", "t1.pth", "t2.pth"),
         "t1.pth is a dense checkpoint; pass --arch NAME, and --base FILE"),
        (2, ("build", "t1.safetensors", "t2.safetensors", "--base", "base.safetensors"),
         "--arch is missing"),
        (4, ("build", "t1.safetensors", "t2.safetensors", "--base", "base.safetensors", "--arch",
             "conv4"), "conv4"),
        (3, ("build", "t1.safetensors", "t2.safetensors", "--base", "no.safetensors", *MODEL),
         "no.safetensors: no such file"),
        (6, ("build", "t1.safetensors", "t2.safetensors", "--base", "base.safetensors", *MODEL,
             "-o", "base.safetensors", "--force"), "is read by this command"),
    ],
)  # fmt: skip
def test_dense_files_that_cannot_be_members_are_named(
    dense: Path, code: int, arguments: tuple[str, ...], words: str
) -> None:
    more = () if "-o" in arguments else NEW
    assert words in fails(code, "ensemble", *arguments, *more)


def test_a_dense_file_without_its_base_is_not_added(here: Path) -> None:
    save_dense(Path("d.safetensors"), draws(0))
    assert "is a dense checkpoint; pass --base FILE" in fails(
        4, "ensemble", "add", E, "d.safetensors"
    )
    save_dense(Path("base.safetensors"), draws(1))
    words = fails(4, "ensemble", "add", E, "d.safetensors", "--base", "base.safetensors")
    assert "d.safetensors has nothing in common with base.safetensors" in words
    save_dense(Path("base.safetensors"), {**draws(0), "fc.weight": torch.ones(10, 25)})
    words = fails(4, "ensemble", "add", E, "d.safetensors", "--base", "base.safetensors")
    assert "has another backbone" in words


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_member_is_named_by_every_command(here: Path) -> None:
    flip(E, "b/fc1.weight/0.mask")
    payload = "payload 'b/fc1.weight/0.mask' is corrupt"
    listed = run("ensemble", "list", E)
    assert listed.exit_code == 3
    assert listed.stderr.startswith(f"error: b: {payload}")
    assert listed.stderr.count("\n") == 1
    assert "a " in listed.stdout
    assert "b (damaged)" in listed.stdout
    found = run("ensemble", "list", E, "--json")
    assert found.exit_code == 3
    report = json.loads(found.stdout)
    assert report["ok"] is False
    assert [row["fault"] is None for row in report["members"]] == [True, False]
    for command in (
        ("add", E, "pets.safetensors"),
        ("remove", E, "a"),
        ("extract", E, "b"),
    ):
        assert f"member b is damaged: {payload}" in fails(3, "ensemble", *command)
    for command in (("eval", E), ("predict", E, "-o", "n.csv"), ("calibrate", E)):
        assert payload in fails(3, "ensemble", *command, "-q")
    # the others are sound
    assert said("ensemble", "eval", E, "--member", "a")["members"].keys() == {"a"}
    succeed("ensemble", "extract", E, "a", "-o", "n.safetensors")
    succeed("ensemble", "remove", E, "b")
    assert said("ensemble", "list", E)["ok"] is True


def test_a_damaged_file_is_neither_packed_nor_added(here: Path) -> None:
    flip(B, "main/fc1.weight/0.mask")
    words = "member {0} is damaged: payload '{0}/fc1.weight/0.mask' is corrupt"
    assert words.format("b") in fails(3, "ensemble", "build", A, B, "-o", "n.safetensors")
    assert words.format("x") in fails(3, "ensemble", "add", E, B, "--name", "x")


# --- eval -----------------------------------------------------------------------------------------


def digits(file: str) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """The test images as the file has them, normalised, and their labels."""
    recipe = rs.read_recipe(file)
    look = recipe.input
    assert look is not None
    dataset = recipe.members[0].dataset
    assert dataset is not None
    parts = list(open_data(dataset, look, "test").evaluation(256))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]).numpy()


def logits_of(file: str, names: str) -> np.ndarray[Any, Any]:
    """(members, images, classes), each member loaded on its own."""
    images, _ = digits(file)
    with torch.no_grad():
        return np.stack([rs.load(file, member=name)(images).numpy() for name in names])


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_eval_agrees_with_members_loaded_one_by_one(here: Path) -> None:
    found = said("ensemble", "eval", E)
    _, labels = digits(E)
    shares = softmax(logits_of(E, "ab"))
    assert (found["images"], found["labelled"], found["left_out"]) == (360, 360, 0)
    assert (found["dataset"], found["engine"]) == ("digits", "switch")
    for name, one in zip("ab", shares, strict=True):
        right = float((one.argmax(-1) == labels).mean())
        assert found["members"][name]["accuracy"] == pytest.approx(right)
        single = json.loads(succeed("eval", f"{name}.safetensors", "--json", "-q").stdout)
        assert found["members"][name]["accuracy"] == single["accuracy"]
        assert found["members"][name]["nll"] == pytest.approx(single["loss"], rel=1e-5)
    mean = shares.mean(0)
    assert found["ensemble"]["accuracy"] == pytest.approx((mean.argmax(-1) == labels).mean())
    nll = -np.log(mean[np.arange(360), labels]).mean()
    assert found["ensemble"]["nll"] == pytest.approx(nll, rel=1e-5)
    differ = (shares[0].argmax(-1) != shares[1].argmax(-1)).mean()
    assert found["disagreement"] == pytest.approx(differ)
    assert differ > 0
    size = sum(t.numel() for t in rs.load(A).state_dict().values())
    assert found["learned"] == 2 * size


@pytest.mark.parametrize("engine", ["switch", "batched", "auto"])
def test_every_engine_gives_the_same_figures(here: Path, engine: str) -> None:
    found, plain = (said("ensemble", "eval", E, *more) for more in (("--engine", engine), ()))
    assert found["engine"] == ("batched" if engine == "batched" else "switch")
    for figure in ("accuracy", "nll", "brier", "entropy"):
        assert found["ensemble"][figure] == pytest.approx(plain["ensemble"][figure], rel=1e-4)


def test_one_task_of_two_is_evaluated_on_its_own_data(here: Path) -> None:
    found = said("ensemble", "eval", TASKS, "--member", "pets", "--data-dir", "pets")
    assert (found["dataset"], found["images"]) == ("folder", 7)
    single = json.loads(
        succeed("eval", "pets.safetensors", "--data-dir", "pets", "--json", "-q").stdout
    )
    assert found["ensemble"]["accuracy"] == single["accuracy"]
    other = said("ensemble", "eval", TASKS, "--member", "a", "--dataset", "digits")
    assert other["images"] == 360
    assert other["ensemble"] == said("ensemble", "eval", A)["ensemble"]


def test_a_second_dataset_tells_what_uncertainty_is_worth(here: Path) -> None:
    found = said("ensemble", "eval", E, "--ood-dir", "pets")
    assert found["ood"]["dataset"] == "folder"
    assert found["ood"].keys() == {"dataset", "entropy", "confidence", "mutual_information"}
    assert 0 <= found["ood"]["entropy"]["auroc"] <= 1
    shown = succeed("ensemble", "eval", E, "--ood-dir", "pets").stdout
    assert "against folder" in shown
    assert "mutual information" in shown
    alone = said("ensemble", "eval", E, "--member", "a", "--ood-dir", "pets")
    assert "mutual_information" not in alone["ood"]


def test_the_table_is_the_papers_row(empty: Path) -> None:
    succeed("ensemble", "build", "conv2", *QUICK, "--kind", "share", "--share", "0.9", "--members",
            2, "-o", E)  # fmt: skip
    facts, shown = said("ensemble", "eval", E), succeed("ensemble", "eval", E).stdout
    assert facts["kind"] == "Share-Conv-0.9"
    row = next(line for line in shown.splitlines() if line.startswith("Share-Conv-0.9"))
    assert row.split()[1:] == [
        f"{facts['learned']:,}",
        f"{100 * facts['mean_accuracy']:.1f}",
        f"{100 * facts['ensemble']['accuracy']:.2f}",
    ]
    dry = said("ensemble", "build", "conv2", *QUICK, "--kind", "share", "--share", "0.9",
               "--members", 2, "--dry-run")  # fmt: skip
    assert dry["learned"] == facts["learned"]


# --- calibrate ------------------------------------------------------------------------------------


def test_calibrating_stores_one_temperature_and_eval_leaves_its_images_out(here: Path) -> None:
    raw = logits_of(E, "ab")
    before = kept(E, rebuild=False)
    found = said("ensemble", "calibrate", E)
    used = calibration_images(360, "0.2", 0)
    assert (found["images"], len(used), len(set(used.tolist()))) == (72, 72, 72)
    for member in rs.read_recipe(E).members:
        about = member.calibration
        assert about is not None
        assert float.fromhex(about.temperature) == found["temperature"]
        assert (about.dataset, about.share, about.seed) == ("digits", "0.2", 0)
    after = kept(E, rebuild=False)
    for name in "ab":
        assert after[name].payloads == before[name].payloads
        words = {k: v for k, v in after[name].words.items() if k != "calibration"}
        words = {**words, "provenance": {**words["provenance"]}}
        assert words["provenance"].pop("calibrated_on")
        assert words == before[name].words
    _, labels = digits(E)
    fitted = [one[used] for one in raw]
    assert found["before"] == pytest.approx(mean_nll(fitted, labels[used], 1.0))
    assert found["after"] == pytest.approx(mean_nll(fitted, labels[used], found["temperature"]))
    assert found["after"] < found["before"]
    # the least there is, but for the width of the grid
    for other in np.geomspace(0.05, 20, 200):
        assert found["after"] <= mean_nll(fitted, labels[used], float(other)) + 1e-9

    rest = np.setdiff1d(np.arange(360), used)
    scored = said("ensemble", "eval", E)
    assert (scored["images"], scored["left_out"]) == (288, 72)
    assert scored["temperatures"] == dict.fromkeys("ab", found["temperature"])
    mean = softmax(raw / found["temperature"]).mean(0)[rest]
    nll = -np.log(mean[np.arange(288), labels[rest]]).mean()
    assert scored["ensemble"]["nll"] == pytest.approx(nll, rel=1e-4)
    told = succeed("ensemble", "eval", E)
    assert "left out: 72 images that a temperature was fitted on" in told.stderr
    assert "288 test images" in told.stdout
    row = said("ensemble", "list", E)["members"][0]
    assert row["temperature"] == found["temperature"]


def test_calibrating_twice_is_calibrating_once(here: Path) -> None:
    """It is fitted to what the members say, not to what the last one made of it."""
    succeed("ensemble", "calibrate", E)
    once = Path(E).read_bytes()
    succeed("ensemble", "calibrate", E)
    assert Path(E).read_bytes() == once


def test_calibrating_on_all_images_leaves_none_out(here: Path) -> None:
    found = said("ensemble", "calibrate", E, "--share", "1")
    assert found["images"] == 360
    scored = said("ensemble", "eval", E)
    assert (scored["images"], scored["left_out"]) == (360, 0)
    assert scored["ensemble"]["nll"] == pytest.approx(found["after"], rel=1e-4)


def test_the_chosen_members_alone_are_calibrated_into_another_file(here: Path) -> None:
    before = Path(E).read_bytes()
    succeed("ensemble", "calibrate", E, "--member", "b", "--share", "0.50", "--seed", 7, "-o",
            "n.safetensors")  # fmt: skip
    assert Path(E).read_bytes() == before
    a, b = rs.read_recipe("n.safetensors").members
    assert a.calibration is None
    assert b.calibration is not None
    assert (b.calibration.share, b.calibration.seed) == ("0.50", 7)
    used = {
        (share, seed): set(calibration_images(360, share, seed).tolist())
        for share, seed in (("0.50", 7), ("0.2", 0))
    }
    assert used["0.50", 7] != set(calibration_images(360, "0.50", 8).tolist())
    # of a member that was not fitted, nothing is left out; of two, what either was fitted on
    assert said("ensemble", "eval", "n.safetensors", "--member", "a")["left_out"] == 0
    succeed("ensemble", "calibrate", "n.safetensors", "--member", "a")
    scored = said("ensemble", "eval", "n.safetensors")
    assert scored["left_out"] == len(used["0.50", 7] | used["0.2", 0])


def test_a_temperature_follows_its_member(here: Path) -> None:
    temperature = said("ensemble", "calibrate", E)["temperature"]
    succeed("ensemble", "extract", E, "b", "-o", "x.safetensors")
    succeed("ensemble", "remove", E, "b")
    succeed("ensemble", "add", E, "x.safetensors")
    assert said("ensemble", "eval", E)["temperatures"]["b"] == temperature
    single = json.loads(succeed("predict", "x.safetensors", "-o", "x.csv", "--json", "-q").stdout)
    assert single["images"] == 360
    with open("x.csv", newline="") as file:
        first = next(csv.DictReader(file))
    share = softmax(logits_of("x.safetensors", ["b"]) / temperature)[0, 0].max()  # type: ignore[arg-type]
    assert float(first["probability"]) == pytest.approx(share, rel=1e-4)


# --- predict --------------------------------------------------------------------------------------

COLUMNS = ["path", "class", "probability", "entropy", "mutual_information", "disagreement"]


def rows_of(*arguments: object) -> tuple[list[str], list[dict[str, str]]]:
    with_header = csv.reader(succeed("ensemble", "predict", *arguments).stdout.splitlines())
    header = next(with_header)
    return header, [dict(zip(header, row, strict=True)) for row in with_header]


@pytest.mark.parametrize("engine", ["switch", "auto"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_predictions_are_those_of_load_ensemble(here: Path, engine: str, calibrate: bool) -> None:
    if calibrate:
        succeed("ensemble", "calibrate", E)
    header, rows = rows_of(E, "--engine", engine, "--top", 3)
    ranked = [f"{what}_{rank}" for rank in (1, 2, 3) for what in ("class", "probability")]
    assert header == [*COLUMNS, *ranked, "label"]
    images, labels = digits(E)
    with rs.load_ensemble(E, engine="switch") as ensemble:
        found = ensemble.predict(images)
    shares, order = found.probabilities.sort(dim=1, descending=True, stable=True)
    assert [row["path"] for row in rows] == [f"test/{index}" for index in range(360)]
    assert [row["label"] for row in rows] == [str(label) for label in labels]
    told = [[int(row[f"class_{rank}"]) for rank in (1, 2, 3)] for row in rows]
    probabilities = [[float(row[f"probability_{rank}"]) for rank in (1, 2, 3)] for row in rows]
    np.testing.assert_allclose(probabilities, shares[:, :3], rtol=1e-4)
    assert np.mean(np.array(told) == order[:, :3].numpy()) > 0.99  # ties may fall the other way
    for column, figure in (
        ("entropy", found.entropy),
        ("mutual_information", found.mutual_information),
    ):
        np.testing.assert_allclose([float(row[column]) for row in rows], figure, atol=1e-5)
    assert {float(row["disagreement"]) for row in rows} <= {0.0, 0.5, 1.0}
    assert all(row["class"] == row["class_1"] for row in rows)
    accuracy = np.mean([row["class"] == row["label"] for row in rows])
    with rs.load_ensemble(E, engine="switch") as ensemble:
        twin = (ensemble(images).argmax(-1).numpy() == labels).mean()
    assert accuracy == pytest.approx(twin, abs=1 / 360)


def test_images_are_predicted_with_the_members_classes(here: Path) -> None:
    header, rows = rows_of(TASKS, "pets/validation", "--member", "pets")
    assert header[:6] == COLUMNS
    assert "label" not in header
    assert {row["class"] for row in rows} <= {"cat", "dog", "fish"}
    assert len(rows) == 7
    assert {row["disagreement"] for row in rows} == {"0"}
    assert {row["mutual_information"] for row in rows} == {"0"}
    for row in rows:
        shares = [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        entropy = -sum(p * math.log(p) for p in shares if p > 0)
        assert float(row["entropy"]) == pytest.approx(entropy, abs=1e-4)


def test_a_csv_is_written_whole_or_not_at_all(here: Path) -> None:
    found = said("ensemble", "predict", E, "-o", "x.csv")
    assert (found["images"], found["dataset"], found["failures"]) == (360, "digits", [])
    before = Path("x.csv").read_bytes()
    assert "exists already" in fails(6, "ensemble", "predict", E, "-o", "x.csv")
    succeed("ensemble", "predict", E, "-o", "x.csv", "--force")
    assert Path("x.csv").read_bytes() == before
    assert succeed("ensemble", "predict", E, "-q").stdout.encode() == before


def test_no_timing_decides_the_last_digits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where members run one after another unless they are told otherwise."""

    def timed(*_: object) -> float:
        raise AssertionError("timed")

    monkeypatch.setattr(ensembles, "_seconds", timed)
    succeed("ensemble", "predict", E, "--device", "cpu", "-o", "x.csv")
    said("ensemble", "eval", E, "--device", "cpu")
    succeed("ensemble", "predict", E, "--engine", "batched", "-o", "y.csv")
    with rs.load_ensemble(E) as ensemble, pytest.raises(AssertionError, match="timed"):
        ensemble(digits(E)[0][:2])


def test_classifiers_of_two_kinds_predict_together(here: Path) -> None:
    """They are other modules, which are put in each other's place."""
    succeed("popup", "conv2", *QUICK, "--init-seed", 0, "--head", "hadamard", "-o", "h.safetensors")
    succeed("ensemble", "add", E, "h.safetensors")
    assert members_of(E) == ["a", "b", "h"]
    _, rows = rows_of(E)
    images, _ = digits(E)
    with rs.load_ensemble(E) as ensemble:
        twin = ensemble(images).max(-1).values
    np.testing.assert_allclose([float(row["probability"]) for row in rows], twin, rtol=1e-4)
    facts = said("ensemble", "eval", E)
    single = json.loads(succeed("eval", "h.safetensors", "--json", "-q").stdout)
    assert facts["members"]["h"]["accuracy"] == single["accuracy"]
    assert "different kinds" in fails(4, "ensemble", "eval", E, "--engine", "batched", "-q")


def test_a_file_without_data_of_its_own_falls_back_on_digits(here: Path) -> None:
    succeed("init", "conv2", *SMALL, "-o", "i.safetensors")
    result = succeed("ensemble", "eval", "i.safetensors")
    assert "no dataset given or recorded: evaluating on digits" in result.stderr
    assert ensembles_job.kind_of(rs.read_recipe("i.safetensors").members) == "Members"


def test_help_names_every_command() -> None:
    shown = succeed("ensemble", "--help").stdout
    commands: list[str] = ["build", "add", "remove", "extract", "list", "eval", "predict",
                           "calibrate"]  # fmt: skip
    assert all(f" {name} " in shown for name in commands)
    for name in commands:
        text = succeed("ensemble", name, "--help").stdout
        assert "options." not in text
        assert "Usage:" in text
