"""Ensembles: bytes of a member, memory and time of an evaluation, switching, the two engines.

Members are made, not trained: masks of initial scores, slices and statistics moved by a pass over
random images, which have the sizes and the entropy of trained ones.

    python -m benchmarks.ensembles bytes      # files
    python -m benchmarks.ensembles memory     # peak of one process each
    python -m benchmarks.ensembles switch     # against one forward of batch 64 at 224x224
    python -m benchmarks.ensembles eval       # five members against five single evaluations
    python -m benchmarks.ensembles engines    # switched against batched
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import in_turn, note, parser_for, report
from randsurgery.format.checkpoint import Checkpoint, read_checkpoint
from randsurgery.format.derivation import payload_names
from randsurgery.format.members import graft, pick, renamed
from randsurgery.format.recipe import MaskOverlay
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.format.writing import finish, write_checkpoint
from randsurgery.inspection.members import list_members
from randsurgery.jobs.ensembles import EvalPlan, run_eval
from randsurgery.jobs.inputs import DataOptions, describe
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.ensembles import Ensemble
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import Freeze, make_plan, with_plan
from randsurgery.surgery.recipes import make_recipe
from randsurgery.surgery.resident import Resident
from randsurgery.training.catalogue import input_for

CLASSES = 10
KINDS = ("popup", "share", "fc")


def member(start: Checkpoint, kind: str, seed: int, size: int) -> Checkpoint:
    """One member of its own, finished: what it learns is moved, its statistics settled."""
    model = build(start)
    draw = torch.Generator().manual_seed(seed)
    if kind == "popup":
        Popup("0.3", seed=seed).attach(model)
    else:
        wish = Freeze(fraction="0.1", least=1) if kind == "share" else Freeze(only=("@head",))
        start = with_plan(start, make_plan(meta_module(start), wish))
        learn_plan(model, start)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1e-3 * torch.randn(parameter.shape, generator=draw))
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size, generator=draw))
    return finish(harvest(start, model.eval()))


def make_file(path: Path, arch: str, kind: str, count: int, size: int = 32) -> int:
    """A file of so many members, which expect images of digits; its bytes."""
    start = make_recipe(arch, "signed-constant", seed=1, args={"num_classes": CLASSES})
    start = describe(start, _look(size), DatasetSpec(name="digits"), (), CLASSES)
    whole: Checkpoint | None = None
    for index in range(count):
        name = f"m{index:02d}"
        part = renamed(member(start, kind, index, max(size, 32)), {"main": name})
        whole = part if whole is None else graft(whole, part)
    assert whole is not None
    return write_checkpoint(path, whole, force=True, finished=True)


def _look(size: int) -> InputSpec:
    return input_for("digits", {}, size)


# --- bytes ---------------------------------------------------------------------------------------


def measure_bytes(folder: Path) -> None:
    """Ten popup members against one dense file; what a further member adds."""
    ratios: dict[str, float] = {}
    for arch, kind in (
        ("resnet18", "popup"), ("resnet50", "popup"), ("resnet50", "share"), ("resnet18", "share"),
        ("densenet_bc_100_12", "fc"), ("densenet_bc_100_12", "share"),
    ):  # fmt: skip
        path, fewer = folder / "ten.safetensors", folder / "nine.safetensors"
        note(f"{arch}, {kind}")
        size = make_file(path, arch, kind, 10)
        report_on = list_members(path)
        dense = report_on.members[0].dense_bytes
        with read_checkpoint(path) as checkpoint:
            names = [one.name for one in checkpoint.recipe.members]
            rest = write_checkpoint(fewer, pick(checkpoint, names[:-1]), force=True, finished=True)
            last = checkpoint.recipe.members[-1]
            own = sum(
                checkpoint.payloads.read(name).nbytes
                for name in payload_names(checkpoint.recipe, last.name)
            )
            bound = 10 * _entropy_bytes(checkpoint)
        ratios[f"{arch} {kind}: ten members / a dense file"] = size / dense
        ratios[f"{arch} {kind}: a member / its payloads + 250 bytes a tensor"] = (size - rest) / (
            own + 250 * len(last.tensors)
        )
        if kind == "popup":
            ratios[f"{arch} {kind}: entropy bound of ten / a dense file"] = bound / dense
    report(ratios=ratios)


def _entropy_bytes(checkpoint: Checkpoint) -> float:
    """What the masks of one member take at the least."""
    total = 0.0
    who = checkpoint.recipe.members[0]
    for name, own in who.tensors.items():
        for overlay in own.added:
            if isinstance(overlay, MaskOverlay):
                size = checkpoint.recipe.tensors[name].size
                p = overlay.count / size
                total += size * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    return total


# --- memory --------------------------------------------------------------------------------------


def measure_memory(folder: Path) -> None:
    """Peak resident memory of evaluating ten members and one, each in a process of its own."""
    found, ratios = {}, {}
    for kind in ("share", "popup"):
        for count in (1, 10):
            path = folder / f"{kind}-{count}.safetensors"
            make_file(path, "resnet50", kind, count)
            work = [sys.executable, "-m", "benchmarks.ensembles", "one", "--file", str(path)]
            done = subprocess.run(work, check=True, capture_output=True, text=True)
            found[f"{kind}, {count}"] = float(done.stdout.split()[-1])
            note(f"{kind}, {count}: {found[f'{kind}, {count}']:.0f} MB")
        ratios[f"resnet50 {kind}: 10 members / 1"] = found[f"{kind}, 10"] / found[f"{kind}, 1"]
    report(ratios=ratios, peak_mb=found)


def one_evaluation(path: str) -> None:
    """Evaluate a file, and say this process's peak memory in MB."""
    run_eval(EvalPlan(path, DataOptions("digits"), device="cpu"))
    # not getrusage: its peak counts the process that started this one
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1000)


# --- time ----------------------------------------------------------------------------------------


def measure_switch(folder: Path, rounds: int, device: torch.device) -> None:
    """Becoming another member against one forward pass of batch 64 at 3x224x224."""
    ratios: dict[str, float] = {}
    for arch in ("resnet50", "resnet18"):
        for kind in ("share", "popup"):
            path = folder / f"{arch}-{kind}.safetensors"
            make_file(path, arch, kind, 2, 224)
            with read_checkpoint(path) as checkpoint:
                timings = in_turn(_switch_or_forward(Resident(checkpoint, "m00"), device), rounds)
            ratios[f"{arch} {kind}"] = timings.ratio("switch", "forward")
            note(f"{arch} {kind}: {timings.medians()}")
    report(ratios=ratios)


def _switch_or_forward(resident: Resident, device: torch.device) -> dict[str, Callable[[], None]]:
    resident.model.to(device)
    images = torch.randn(64, 3, 224, 224, device=device)

    def switch() -> None:
        resident.switch("m01" if resident.member == "m00" else "m00")
        _wait(device)

    def forward() -> None:
        with torch.inference_mode():
            resident.model(images)
        _wait(device)

    return {"switch": switch, "forward": forward}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_eval(folder: Path, rounds: int) -> None:
    """A file of five members evaluated once, against five evaluations of a file of one."""
    ratios = {}
    for kind in ("share", "popup"):
        five, single = folder / "five.safetensors", folder / "single.safetensors"
        make_file(five, "resnet18", kind, 5, 64)
        make_file(single, "resnet18", kind, 1, 64)

        work = {"five": evaluate(five, 1), "single": evaluate(single, 5)}
        # processor time: a ratio near 1 drowns in what else a machine does
        timings = in_turn(work, rounds, clock=time.process_time)
        ratios[f"resnet18 {kind}, 360 images of 64x64"] = timings.ratio("five", "single")
        note(f"{kind}: {timings.medians()}")
    report(ratios=ratios)


def evaluate(path: Path, times: int) -> Callable[[], None]:
    """So many evaluations of a file."""

    def work() -> None:
        for _ in range(times):
            run_eval(EvalPlan(str(path), DataOptions("digits")))

    return work


def measure_engines(folder: Path, rounds: int, device: torch.device) -> None:
    """One call of an ensemble of five: batched against switched, and switched without switching."""
    ratios: dict[str, float] = {}
    for arch, kind, size in (
        ("conv4", "popup", 32), ("conv4", "share", 32), ("resnet18", "popup", 64),
        ("resnet18", "share", 64), ("densenet_bc_100_12", "fc", 32),
    ):  # fmt: skip
        path = folder / "engines.safetensors"
        make_file(path, arch, kind, 5, size)
        for batch in (1, 32, 256):
            with read_checkpoint(path) as checkpoint:
                ensemble: nn.Module = Ensemble(checkpoint).to(device)
                assert isinstance(ensemble, Ensemble)
                images = torch.randn(batch, 3, size, size, device=device)
                timings = in_turn(_engines(ensemble, images), rounds)
            key = f"{arch} {kind}, {batch} images of {size}x{size}"
            ratios[f"{key}: batched / switch"] = timings.ratio("batched", "switch")
            ratios[f"{key}: batched / forward alone"] = timings.ratio("batched", "forward")
            note(f"{key}: {timings.medians()}")
    report(ratios=ratios)


def _engines(ensemble: Ensemble, images: torch.Tensor) -> dict[str, Callable[[], Any]]:
    def run(engine: Any) -> Callable[[], None]:
        def work() -> None:
            ensemble.engine = engine
            with torch.inference_mode():
                ensemble(images)
            _wait(images.device)

        return work

    def forward() -> None:
        with torch.inference_mode():
            for _ in ensemble.members:
                ensemble.backbone(images)
        _wait(images.device)

    return {"switch": run("switch"), "batched": run("batched"), "forward": forward}


def main() -> None:
    """Measure what is asked for."""
    parser = parser_for("ensembles", __doc__)
    what = ["bytes", "memory", "switch", "eval", "engines", "one"]
    parser.add_argument("what", choices=what)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--file", help="of one")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.what == "one":
        one_evaluation(args.file)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.what == "bytes":
            measure_bytes(folder)
        elif args.what == "memory":
            measure_memory(folder)
        elif args.what == "switch":
            measure_switch(folder, args.rounds, device)
        elif args.what == "eval":
            measure_eval(folder, args.rounds)
        else:
            measure_engines(folder, args.rounds, device)


if __name__ == "__main__":
    main()
