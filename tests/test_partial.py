"""``freeze`` and ``train`` on the command line, and runs that are resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from surgery_helpers import TABLE_1, same_bits, save_dense
from torch import nn
from typer.testing import CliRunner, Result

import randsurgery as rs
from randsurgery.cli.app import app
from randsurgery.cli.options import RunOptions, plan_of
from randsurgery.inspection.storage import storage
from randsurgery.jobs.preparing import RunPlan
from randsurgery.jobs.sources import SourceSpec
from randsurgery.jobs.train import prepare_train, run_train
from randsurgery.training.loop import Hooks

pytestmark = pytest.mark.slow

SMALL = ("--width", "0.1", "--num-classes", "10")
QUICK = ("--epochs", "1", "-b", "256")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fails(code: int, *arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_of(path: str) -> dict[str, str]:
    return {row.name: row.made_of for row in storage(path).tensors}


# --- the papers' counts ---------------------------------------------------------------------------


def counted(*arguments: object) -> dict[str, Any]:
    result = succeed("freeze", *arguments, "--num-classes", 10, "--dry-run", "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["learned"] == sum(layer["learned"] for layer in found["layers"])
    assert found["total"] == sum(layer["total"] for layer in found["layers"])
    return found


@pytest.mark.parametrize(
    ("name", "only"), [(name, only) for name, rows in TABLE_1.items() for only in rows]
)
def test_learned_parameters_are_those_of_table_1(here: Path, name: str, only: str) -> None:
    assert counted(name, "--only", only)["learned"] == TABLE_1[name][only]
    assert not list(here.iterdir())


def test_a_tenth_of_densenets_filters_is_the_papers_90_thousand(here: Path) -> None:
    assert counted("densenet_bc_100_12", "--fraction", "0.1")["learned"] == 90_196
    assert counted("densenet_bc_100_12", "--only", "@head")["learned"] == 27_418


# --- freeze ---------------------------------------------------------------------------------------


def test_freeze_writes_a_plan_and_shows_its_table(here: Path) -> None:
    result = succeed("freeze", "conv2", *SMALL, "--fraction", "0.5", "-o", "plan.safetensors")
    assert re.search(r"features\.0\s+81\s+162\s+50\.0%", result.stdout)
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "written and verified: plan.safetensors" in result.stderr
    assert storage("plan.safetensors").bytes < 3000
    plan = rs.read_recipe("plan.safetensors").members[0].plan
    assert plan is not None
    assert plan.tensors["features.0.weight"].count == 3
    assert "digests agree" in succeed("inspect", "verify", "plan.safetensors").stdout
    assert "exists already" in fails(6, "freeze", "conv2", *SMALL, "--fraction", "0.5", "-o",
                                     "plan.safetensors")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "nothing would be frozen; give --fraction, --count, --only"),
        (("--head", "learned"), "nothing would be frozen"),
        (("--fraction", "0.1"), "pass --min 1"),
        (("--fraction", "1.5"), "fraction must lie in (0, 1]"),
        (("--fraction", "0.5", "--count", "2"), "exclude each other"),
        (("--fraction", "0.5", "--dim", "height"), "has no height"),
        (("--fraction", "0.5", "--dim", "depth"), "unknown --dim"),
        (("--only", "featurs.0"), "near: features.0"),
        (("--only", "@head", "--head", "frozen"), "contradict"),
        (("--only", "fc", "--head", "frozen"), "--only fc and --head frozen contradict"),
        (("--only", "@head", "--fraction", "0.5"), "--fraction slices nothing"),
        (("--only", "fc", "--count", "2"), "--count slices nothing"),
        (("--count", "1", "--min", "4"), "--count 1 and --min 4 contradict"),
        (("--only", "@head", "--norms", "none"), "--norms must be learned or frozen"),
        (("--only", "@head", "--fill", "zero"), "--fill zero goes with"),
        (("--count", "1", "--fill", "one"), "--fill must be own or zero"),
        (("--count", "1", "--head", "hadamrd"), "learned or frozen or orthonormal or hadamard"),
        (("--count", "1", "--head-scale", "2"), "--head-scale goes with"),
        (("--statistics", "frozen"), "nothing would be frozen"),
        (("--count", "1", "--base", "x.safetensors"), "--base goes with a file"),
        (("--count", "1", "-o", "x.pt"), "--output must end in .safetensors"),
    ],
)
def test_bad_wishes_are_named_and_write_nothing(
    here: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in fails(2, "freeze", "conv2", *SMALL, *options)
    assert not list(here.iterdir())


def learned(path: str) -> set[str]:
    plan = rs.read_recipe(path).members[0].plan
    assert plan is not None
    return set(plan.tensors)


def in_norms(model: nn.Module) -> set[str]:
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {n for n, _ in model.named_parameters() if n.rpartition(".")[0] in norms}


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (("--head", "frozen"), lambda model: {"fc.weight", "fc.bias"}),
        (("--head", "hadamard"), lambda model: {"fc.weight"}),
        (("--norms", "frozen"), in_norms),
    ],
)
def test_without_a_slice_all_is_learned_but_what_is_frozen(
    here: Path, options: tuple[str, ...], gone: Callable[[nn.Module], set[str]]
) -> None:
    succeed("freeze", "lenet_300_100" if "--head" in options else "test_resnet", *options,
            "--num-classes", 10, "-o", "p.safetensors")  # fmt: skip
    model = rs.load("p.safetensors")
    every = {name for name, _ in model.named_parameters()}
    assert every - learned("p.safetensors") == gone(model)


def test_a_fixed_head_learns_its_scale_and_bias_whatever_else_is_learned(here: Path) -> None:
    succeed("freeze", "conv2", *SMALL, "--only", "fc1", "--head", "hadamard", "-o", "p.safetensors")
    assert learned("p.safetensors") == {"fc1.weight", "fc.scale", "fc.bias"}


def test_a_file_can_be_frozen_for_other_classes_and_with_other_rows(here: Path) -> None:
    succeed("init", "conv2", *SMALL, "-o", "a.safetensors")
    for seed in (0, 1):
        succeed("freeze", "a.safetensors", "--num-classes", 7, "--head", "orthonormal", "--seed",
                seed, "-o", f"{seed}.safetensors")  # fmt: skip
    zero, one = (rs.load(f"{seed}.safetensors").state_dict()["fc.weight"] for seed in (0, 1))
    assert zero.shape[0] == 7
    assert not same_bits(zero, one)
    words = fails(2, "freeze", "a.safetensors", "--only", "fc", "--seed", 3)
    assert "a seed of the weights goes with an architecture" in words
    words = fails(2, "freeze", "a.safetensors", "--only", "fc", "--img-size", 64)
    assert "the model argument img_size goes with an architecture" in words


@pytest.mark.parametrize("command", [("freeze", "--fraction", "0.5"), ("popup",), ("train",)])
def test_a_learned_fixed_head_is_not_drawn_anew_for_other_classes(
    here: Path, command: tuple[str, ...]
) -> None:
    succeed("train", "conv2", "--width", "0.1", "--head", "hadamard", *QUICK, "-o", "h.safetensors")
    options = ("--num-classes", 12, "-o", "new.safetensors")
    words = fails(4, command[0], "h.safetensors", *command[1:], *options)
    assert "is learned for 10 classes, 12 are wanted" in words
    assert not Path("new.safetensors").exists()
    words = fails(2, "freeze", "h.safetensors", "--only", "fc1", "--head", "learned")
    assert "the classifier is fixed (hadamard)" in words


def test_counting_asks_nothing_of_the_output(here: Path) -> None:
    succeed("freeze", "conv2", *SMALL, "--count", 1)
    assert json.loads(
        succeed("freeze", "conv2", *SMALL, "--count", 1, "--dry-run", "--json").stdout
    )
    assert "exists already" in fails(6, "freeze", "conv2", *SMALL, "--count", 1)


def test_slices_over_a_mask_are_pointed_out(here: Path) -> None:
    succeed("popup", "conv2", "--width", "0.1", "--k", "0.3", *QUICK, "-o", "m.safetensors")
    told = succeed("freeze", "m.safetensors", "--fraction", "0.5", "-o", "p.safetensors").stderr
    assert "4 of the sliced tensors are masked" in told
    facts = json.loads(succeed("train", "m.safetensors", "--dry-run", "--json").stdout)
    assert 0.25 < facts["learned"] / facts["total"] < 0.35


def test_a_settings_file_takes_every_option_by_its_name(here: Path) -> None:
    Path("c.yaml").write_text("fraction: 0.1\nmin: 2\nnum-classes: 10\nwidth: 0.1\n")
    succeed("freeze", "conv2", "-c", "c.yaml", "-o", "p.safetensors")
    Path("d.yaml").write_text("config: c.yaml\n")
    assert "unknown option" in program("freeze", "conv2", "-c", "d.yaml").stderr
    plan = rs.read_recipe("p.safetensors").members[0].plan
    assert plan is not None
    assert plan.tensors["features.0.weight"].count == 2


# --- train ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["own", "zero"])
def test_train_learns_a_plan_and_stores_its_slices(here: Path, fill: str) -> None:
    succeed("freeze", "conv2", *SMALL, "--fraction", "0.5", "--fill", fill, "-o", "p.safetensors")
    result = succeed("train", "p.safetensors", *QUICK, "-o", "slim.safetensors")
    assert re.fullmatch(r"test accuracy \d+\.\d\d%", result.stdout.splitlines()[-1])
    source = "random" if fill == "own" else "constant"
    assert made_of("slim.safetensors")["features.0.weight"] == f"{source} + slice"
    assert made_of("slim.safetensors")["fc.weight"] == "random + replace"
    plain, slim = (rs.load(f"{n}.safetensors").state_dict() for n in ("p", "slim"))
    assert same_bits(plain["features.2.weight"][3:], slim["features.2.weight"][3:])
    assert bool((slim["features.2.weight"][:3] != plain["features.2.weight"][:3]).any())
    again = succeed("train", "slim.safetensors", *QUICK, "-o", "more.safetensors")
    assert "no dataset given" not in again.stderr
    assert made_of("more.safetensors") == made_of("slim.safetensors")


def test_an_untrained_plan_of_zeros_is_not_taken_for_a_network(here: Path) -> None:
    succeed("freeze", "conv2", *SMALL, "--count", 1, "--fill", "zero", "-o", "z.safetensors")
    words = fails(4, "freeze", "z.safetensors", "--count", 2)
    assert "--fill zero that was not trained" in words
    assert "--fill zero that was not trained" in fails(4, "popup", "z.safetensors", *QUICK)


def test_fixing_the_head_adds_nothing_else_to_a_plan(here: Path) -> None:
    plan = ("--only", "stages.0.blocks.0.mlp", "--norms", "frozen")
    succeed("freeze", "caformer_s18", "--num-classes", 10, *plan, "-o", "p.safetensors")
    names = set(rs.read_recipe("p.safetensors").members[0].plan.tensors)  # type: ignore[union-attr]
    job = prepare_train(
        RunPlan(SourceSpec("p.safetensors"), head="hadamard", output="t.safetensors")
    )
    with job.checkpoint:
        after = set(job.checkpoint.member().plan.tensors)  # type: ignore[union-attr]
    assert after - names == {"head.fc.fc2.scale", "head.fc.fc2.bias"}
    assert names <= after


def test_train_without_a_plan_is_the_dense_baseline(here: Path) -> None:
    succeed("train", "conv2", "--width", "0.1", *QUICK, "-o", "dense.safetensors")
    assert set(made_of("dense.safetensors").values()) == {"random + replace"}
    facts = json.loads(succeed("train", "conv2", "--width", "0.1", "--dry-run", "--json").stdout)
    assert facts["learned"] == facts["total"]


def test_train_on_a_popup_file_learns_the_survivors(here: Path) -> None:
    succeed("popup", "conv2", "--width", "0.1", "--k", "0.3", *QUICK, "-o", "m.safetensors")
    succeed("train", "m.safetensors", *QUICK, "-o", "ticket.safetensors")
    assert made_of("ticket.safetensors")["fc1.weight"] == "constant + scatter"
    masked, ticket = (rs.load(f"{n}.safetensors").state_dict() for n in ("m", "ticket"))
    alive = masked["fc1.weight"] != 0
    assert bool((ticket["fc1.weight"][~alive] == 0).all())
    assert bool((ticket["fc1.weight"][alive] != masked["fc1.weight"][alive]).any())
    succeed("train", "ticket.safetensors", *QUICK, "-o", "again.safetensors")
    assert bool((rs.load("again.safetensors").state_dict()["fc1.weight"][~alive] == 0).all())


def test_freeze_and_train_on_dense_weights_refer_to_their_base(here: Path) -> None:
    start = rs.make_recipe("conv2", "kaiming-normal", args={"width": 0.1, "num_classes": 10})
    save_dense(Path("dense.safetensors"), rs.build(start).state_dict())
    succeed("freeze", "conv2", "--checkpoint", "dense.safetensors", *SMALL, "--only", "@head", "-o",
            "p.safetensors")  # fmt: skip
    succeed("train", "p.safetensors", *QUICK, "-o", "t.safetensors")
    found = made_of("t.safetensors")
    assert found.pop("fc.weight") == "base + replace"
    assert set(found.values()) == {"base"}


def test_the_fixed_heads_scale_is_in_the_records_and_the_plot(here: Path) -> None:
    succeed("train", "conv2", "--width", "0.1", "--head", "hadamard", "--epochs", 2, "-b", 256,
            "-o", "h.safetensors", "--plot", "curves.svg")  # fmt: skip
    scales = [json.loads(line)["head_scale"] for line in
              Path("h.metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert len(set(scales)) == 2
    assert "head scale" in re.sub(r"<!--|-->", "", Path("curves.svg").read_text())
    assert made_of("h.safetensors")["fc.weight"] == "hadamard"
    assert "accuracy" in succeed("eval", "h.safetensors").stdout
    assert "must end in" in fails(2, "train", "conv2", "--width", "0.1", "--plot", "curves.txt")
    assert "exists already" in fails(6, "train", "conv2", "--width", "0.1", "--plot", "curves.svg")


def test_pictures_may_have_capital_endings(here: Path) -> None:
    succeed("train", "conv2", "--width", "0.1", *QUICK, "-o", "a.safetensors", "--plot", "A.PNG")
    assert Path("A.PNG").read_bytes().startswith(b"\x89PNG")


def test_optimisers_that_need_more_than_a_gradient_are_refused(here: Path) -> None:
    words = fails(2, "train", "conv2", "--width", "0.1", "--opt", "adahessian")
    assert "--opt adahessian cannot be used here" in words


def test_settings_beside_the_output_repeat_the_run(here: Path) -> None:
    succeed("popup", "conv2", "--width", "0.1", *QUICK, "--lr", "0.02", "--seed", 5, "--init",
            "kaiming-normal", "-o", "a.safetensors")  # fmt: skip
    settings = yaml.safe_load(Path("a.settings.yaml").read_text())
    assert settings["lr"] == 0.02
    succeed("popup", "conv2", "-c", "a.settings.yaml", "-o", "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    succeed("train", "conv2", "--width", "0.1", *QUICK, "-o", "c.safetensors")
    succeed("train", "conv2", "-c", "c.settings.yaml", "-o", "d.safetensors")
    assert Path("c.safetensors").read_bytes() == Path("d.safetensors").read_bytes()


# --- resume ---------------------------------------------------------------------------------------

RUN = ("popup", "conv2", "--width", "0.1", "--epochs", "3", "-b", "128", "--learn", "@head")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def killed_run(output: str, *more: str) -> None:
    """Start a run and kill it once it has written a state within an epoch."""
    command = [sys.executable, "-m", "randsurgery", *RUN, "-o", output, "--state-every", "3", *more]
    state = Path(output).with_suffix(".state.safetensors")
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 60
    while not state.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state.exists()
    assert not Path(output).exists()


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "randsurgery", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)


def test_a_killed_run_resumed_ends_with_the_same_bytes(here: Path) -> None:
    assert program(*RUN, "-o", "whole.safetensors").returncode == 0
    killed_run("cut.safetensors")
    Path(".cut.state.safetensors.abcd1234").write_bytes(b"as if it had been killed while writing")
    resumed = program(*RUN, "-o", "cut.safetensors", "--state-every", "3", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(here.glob("*.state.*"))
    assert not list(here.glob(".cut*"))
    lines = [json.loads(line) for line in Path("cut.metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]


def test_a_run_stopped_after_its_result_was_written_can_be_resumed(here: Path) -> None:
    killed_run("cut.safetensors")
    state = Path("cut.state.safetensors").read_bytes()
    resume = ("-o", "cut.safetensors", "--state-every", "3", "--resume", "auto")
    assert program(*RUN, *resume).returncode == 0
    result = Path("cut.safetensors").read_bytes()
    Path("cut.state.safetensors").write_bytes(state)  # as if it had not come to tidying up
    assert program(*RUN, *resume).returncode == 0
    assert Path("cut.safetensors").read_bytes() == result
    assert program(*RUN, *resume).returncode == 6


def test_a_state_is_not_lost_to_another_run(here: Path) -> None:
    killed_run("cut.safetensors")
    state = Path("cut.state.safetensors").read_bytes()
    made = program("popup", "conv2", "--width", "0.2", *QUICK, "-o", "cut.safetensors")
    assert made.returncode == 6
    assert "--resume auto goes on" in made.stderr
    assert Path("cut.state.safetensors").read_bytes() == state


def test_a_state_of_another_run_is_refused(here: Path) -> None:
    killed_run("cut.safetensors")
    made = program(*RUN, "-o", "cut.safetensors", "--lr", "0.01", "--resume", "auto")
    assert made.returncode == 4
    assert "its lr is 0.05, here it is 0.01" in made.stderr
    other = program(*RUN, "-o", "new.safetensors", "--resume", "nowhere.safetensors")
    assert other.returncode == 3
    assert "no such file" in other.stderr
    dry = program(*RUN, "-o", "cut.safetensors", "--lr", "0.01", "--resume", "auto", "--dry-run")
    assert dry.returncode == 4
    assert "its lr is 0.05, here it is 0.01" in dry.stderr


def test_going_on_from_another_state_does_not_overwrite(here: Path) -> None:
    killed_run("cut.safetensors")
    Path("done.safetensors").write_bytes(b"of another run")
    Path("new.state.safetensors").write_bytes(b"of another run")
    for output in ("done.safetensors", "new.safetensors"):
        made = program(*RUN, "-o", output, "--resume", "cut.state.safetensors")
        assert made.returncode == 6
    assert Path("done.safetensors").read_bytes() == b"of another run"
    assert Path("new.state.safetensors").read_bytes() == b"of another run"


def test_a_state_of_other_threads_is_pointed_out(here: Path) -> None:
    killed_run("cut.safetensors")
    again = (*RUN, "-o", "cut.safetensors", "--state-every", "3", "--resume", "auto")
    command = [sys.executable, "-m", "randsurgery", *again]
    two = {**environment(), "OMP_NUM_THREADS": "2"}
    made = subprocess.run(command, capture_output=True, text=True, env=two, timeout=120)
    assert made.returncode == 0
    assert "threads 1, here 2: the result may differ" in made.stderr


def test_a_damaged_state_is_refused(here: Path) -> None:
    killed_run("cut.safetensors")
    state = Path("cut.state.safetensors")
    damaged = bytearray(state.read_bytes())
    damaged[-5] ^= 1
    state.write_bytes(damaged)
    made = program(*RUN, "-o", "cut.safetensors", "--resume", "auto")
    assert made.returncode == 3
    assert "is damaged" in made.stderr
    assert bytes(damaged) == state.read_bytes()


@pytest.mark.parametrize("opt", ["adamw", "lamb", "adafactor", "lion", "rmsproptf", "muon"])
def test_every_kind_of_optimiser_goes_on_where_it_stopped(here: Path, opt: str) -> None:
    run_ = ("train", "conv2", "--width", "0.1", "--epochs", 2, "-b", 256, "--opt", opt, "--lr",
            "0.001", "--seed", 3)  # fmt: skip
    succeed(*run_, "-o", "whole.safetensors")
    job = prepare_train(plan_of("conv2", RunOptions(width=0.1, epochs=2, batch_size=256, opt=opt,
                                                   lr=0.001, seed=3, output="cut.safetensors",
                                                   state_every=3)))  # fmt: skip

    def stop(step: int, loss: float) -> None:
        if step == 8:  # within the second epoch
            raise KeyboardInterrupt

    with job.checkpoint, pytest.raises(KeyboardInterrupt, match="goes on from the last state"):
        run_train(job, Hooks(on_step=stop))
    succeed(*run_, "--state-every", 3, "--resume", "auto", "-o", "cut.safetensors")
    assert Path("cut.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_a_diverged_run_keeps_its_last_good_state(here: Path) -> None:
    made = program("train", "conv2", "--width", "0.1", "--lr", "1e30", "--epochs", "2", "-b", "128",
                   "--state-every", "1", "-o", "nan.safetensors")  # fmt: skip
    assert made.returncode == 7
    assert "the last good state is nan.state.safetensors, --force begins anew" in made.stderr
    assert sorted(path.name for path in here.iterdir()) == ["nan.state.safetensors"]


def test_auto_starts_afresh_where_there_is_no_state(here: Path) -> None:
    succeed(*RUN[:4], *QUICK, "--resume", "auto", "-o", "a.safetensors")
    assert Path("a.safetensors").exists()


def test_tensorboard_gets_every_figure(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeed(*RUN[:4], *QUICK, "--log-to", "tensorboard", "-o", "a.safetensors")
    events = EventAccumulator("a.tensorboard")
    events.Reload()
    record = json.loads(Path("a.metrics.jsonl").read_text())
    assert set(events.Tags()["scalars"]) == set(record) - {"epoch", "step"}
    assert events.Scalars("test_accuracy")[0].value == pytest.approx(record["test_accuracy"])


def test_tensorboard_shows_a_resumed_epoch_once(here: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_to = ("--log-to", "tensorboard", "-o", "a.safetensors")
    succeed(*RUN[:4], *QUICK, *log_to)
    time.sleep(1.1)  # TensorBoard's files are named by the second
    succeed(*RUN[:4], "--epochs", 2, "-b", 256, *log_to, "--force")
    events = EventAccumulator("a.tensorboard")
    events.Reload()
    assert [point.step for point in events.Scalars("test_accuracy")] == [1, 2]


def test_tensorboard_is_named_where_it_is_missing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = fails(2, *RUN[:4], *QUICK, "--log-to", "tensorboard", "-o", "a.safetensors")
    assert "pip install tensorboard" in words
    assert "expected tensorboard" in fails(2, *RUN[:4], "--log-to", "wandb")
