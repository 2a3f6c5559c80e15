"""Reports on files: ``inspect weights`` on a dense ResNet-50 against one pass of NumPy's mean over
the same bytes (read tensor by tensor from the same file and, beside it, held in memory), and its
peak memory; ``inspect storage`` as a process on files of a gigabyte, dense and of many members.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from benchmarks.timing import in_turn, note, parser_for, report
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.members import graft, renamed
from randsurgery.format.tensors import RawTensor
from randsurgery.format.writing import finish, write_checkpoint
from randsurgery.inspection.weight_files import open_networks
from randsurgery.inspection.weights import WeightsReport, chosen, report_on
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import everything, with_plan
from randsurgery.surgery.recipes import make_recipe

GIGABYTE = 10**9

# a launcher of its own: Linux counts what a process was before it became another one
_LAUNCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
spent = time.perf_counter() - start
print(spent, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_dense(path: Path, copies: int = 1) -> None:
    """Dense ResNet-50s with normal values."""
    model: nn.Module = timm.create_model("resnet50")
    rng = np.random.Generator(np.random.Philox(0))
    tensors = {
        f"{copy}.{name}" if copies > 1 else name: RawTensor.of(
            rng.standard_normal(tuple(value.shape), dtype=np.float32)
        )
        for copy in range(copies)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    write_atomically(path, pack(tensors, {}))


def write_members(path: Path, count: int) -> None:
    """ResNet-50s that learned everything, over one backbone, in one file."""
    start = make_recipe("resnet50", "signed-constant", seed=1, args={"num_classes": 1000})
    start = with_plan(start, everything(meta_module(start)))
    whole: Checkpoint | None = None
    for index in range(count):
        model = build(start)
        learn_plan(model, start)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(index))
        one = renamed(finish(harvest(start, model.eval())), {"main": f"m{index:02d}"})
        whole = one if whole is None else graft(whole, one)
    assert whole is not None
    write_checkpoint(path, whole, finished=True)


def layers(path: Path) -> WeightsReport:
    """The statistics of every layer of a file."""
    with contextlib.ExitStack() as stack:
        networks = open_networks(path, stack, "file")
        tensors = chosen(networks)
        return report_on(networks[0], tensors[0])


def means(path: Path) -> list[float]:
    """NumPy's mean of every layer, each read and let go."""
    with Container(path) as file:
        names = [name for name, info in file.infos.items() if len(info.shape) > 1]
        return [float(file.read(name).array.mean()) for name in names]


def inspected(command: str, path: Path) -> tuple[float, float]:
    """(seconds, peak memory in MB) of ``randsurgery inspect COMMAND PATH`` as a process."""
    script = shutil.which("randsurgery", path=str(Path(sys.executable).parent))
    if script is None:
        raise SystemExit("randsurgery is not installed beside this interpreter")
    launcher = [sys.executable, "-c", _LAUNCH, script, "inspect", command, str(path)]
    done = subprocess.run(launcher, check=True, capture_output=True, text=True)
    seconds, kilobytes = done.stdout.split()
    return float(seconds), int(kilobytes) * 1024 / 1e6


def measure_weights(folder: Path, rounds: int) -> None:
    """Time against the mean, and peak memory."""
    path = folder / "dense.safetensors"
    write_dense(path)
    with Container(path) as file:
        shapes = {name: info.shape for name, info in file.infos.items()}
        held = [file.read(name).array for name, shape in shapes.items() if len(shape) > 1]
    timings = in_turn(
        {
            "inspect weights": lambda: layers(path),
            "mean, from the file": lambda: means(path),
            "mean, in memory": lambda: [array.mean() for array in held],
        },
        rounds,
    )
    ratios = {
        f"inspect weights/{other}": timings.ratio("inspect weights", other)
        for other in ("mean, from the file", "mean, in memory")
    }
    largest = max(array.nbytes for array in held) / 1e6
    _, peak = inspected("weights", path)
    report(timings, ratios, peak_mb=peak, wanted_mb=3 * largest + 150, rounds=rounds)


def measure_storage(folder: Path, rounds: int) -> None:
    """Seconds and peak memory of the process."""
    found = {}
    for what in ("dense", "members"):
        path = folder / f"{what}.safetensors"
        note(f"writing a gigabyte, {what}")
        if what == "dense":
            write_dense(path, copies=10)
        else:
            write_members(path, 10)
        size = path.stat().st_size
        if size < GIGABYTE:
            raise SystemExit(f"{path.name} has {size} bytes only")
        runs = [inspected("storage", path) for _ in range(rounds)]
        found[what] = {
            "bytes": size,
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "fastest": min(seconds for seconds, _ in runs),
            "peak_mb": max(peak for _, peak in runs),
        }
        path.unlink()
    report(storage=found, rounds=rounds)


MEASURES = {"weights": measure_weights, "storage": measure_storage}


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("inspection", __doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        MEASURES[args.what](Path(folder), args.rounds)


if __name__ == "__main__":
    main()
