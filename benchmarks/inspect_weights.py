"""``inspect weights`` on the layers of a dense ResNet-50, against one pass of NumPy's mean over the
same bytes: read tensor by tensor from the same file, and, beside it, held in memory. Also the peak
memory of the whole command.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
from torch import nn

from benchmarks.timing import in_turn, parser_for, report
from randsurgery.format.container import Container, pack, write_atomically
from randsurgery.format.tensors import RawTensor
from randsurgery.inspection.weight_files import open_networks
from randsurgery.inspection.weights import WeightsReport, chosen, report_on

# a launcher of its own: Linux counts what a process was before it became another one
_PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_dense(path: Path) -> None:
    """A dense ResNet-50 with normal values."""
    model: nn.Module = timm.create_model("resnet50")
    rng = np.random.Generator(np.random.Philox(0))
    tensors = {
        name: RawTensor.of(rng.standard_normal(tuple(value.shape), dtype=np.float32))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    write_atomically(path, pack(tensors, {}))


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


def peak(path: Path) -> float:
    """Peak memory in MB of the whole command, a process of its own."""
    command = [sys.executable, "-m", "randsurgery", "inspect", "weights", str(path)]
    launcher = [sys.executable, "-c", _PEAK, *command]
    done = subprocess.run(launcher, check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024 / 1e6


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("inspect_weights", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.safetensors"
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
            args.rounds,
        )
        report(
            timings,
            {
                "inspect weights/mean, from the file": timings.ratio(
                    "inspect weights", "mean, from the file"
                ),
                "inspect weights/mean, in memory": timings.ratio(
                    "inspect weights", "mean, in memory"
                ),
            },
            file_bytes=path.stat().st_size,
            largest_bytes=max(array.nbytes for array in held),
            peak_mb=peak(path),
            rounds=args.rounds,
        )


if __name__ == "__main__":
    main()
