"""From a file to a ready ResNet-50: ours against timm with a dense file.

The network is a ResNet-50 of 10 classes, signed-constant weights under masks of k = 0.3 (from
random scores, whose masks compress as badly as learned ones) and running statistics that are not
constant, so that they are stored. The same network is written as dense float32 safetensors. Both
files lie in the page cache when they are read.

    load     randsurgery.load(file)
    timm     timm.create_model("resnet50", num_classes=10, checkpoint_path=dense file)

Both give equal tensors, which is checked once. ``ratios`` also compares sizes: dense float32
weights plus float32 scores of the masked layers over our file (what training holds and a user
would have to keep), and the dense file over ours. ``memory`` is the growth of the resident set at
its peak during one load, in a fresh process, after imports and after loading a tiny network,
against the dense network + 1.3 of its largest tensor + 50 MB. It needs Linux; elsewhere it is null.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import randsurgery
from benchmarks.timing import Action, in_turn, note, parser_for, report

K = "0.3"
SLACK = 50_000_000
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def write_popup(path: Path, name: str, **args: int | float) -> nn.Module:
    """Write a popup file with random masks and stored statistics; the network as loaded again."""
    recipe = randsurgery.make_recipe(name, args={"num_classes": 10, **args})
    model = randsurgery.build(recipe)
    statistics = torch.Generator().manual_seed(0)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5, generator=statistics)
    randsurgery.attach(model, randsurgery.Popup(k=K))
    randsurgery.save(path, recipe, model)
    return randsurgery.load(path)


def load_dense(path: Path) -> nn.Module:
    """timm's way to a network with the values of a dense file."""
    model: nn.Module = timm.create_model("resnet50", num_classes=10, checkpoint_path=str(path))
    return model


def check_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Stop if the two networks differ in any tensor."""
    first, second = ours.state_dict(), theirs.state_dict()
    if first.keys() != second.keys() or not all(torch.equal(first[n], second[n]) for n in first):
        raise SystemExit("the two networks differ")


def size_ratios(file: Path, dense: Path, model: nn.Module) -> dict[str, float]:
    """File sizes, the larger over ours."""
    masked = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    weights = sum(p.numel() for p in model.parameters())
    trained = 4 * (weights + sum(w.numel() for w in masked))
    size = file.stat().st_size
    return {
        "(fp32 weights + scores)/file": trained / size,
        "dense file/file": dense.stat().st_size / size,
    }


# --- memory --------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    line = next(s for s in STATUS.read_text().splitlines() if s.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def print_growth(tiny: str, file: str) -> None:
    """In a process of its own: bytes by which the resident set grew at its peak, and at the end."""
    randsurgery.load(tiny)  # imports what loading needs
    CLEAR.write_text("5")  # the high-water mark starts at the present size
    before = _status("VmRSS")
    model = randsurgery.load(file)
    found = {"peak": _status("VmHWM") - before, "kept": _status("VmRSS") - before}
    assert isinstance(model, nn.Module)  # alive until here
    print(json.dumps(found))


def growth(tiny: Path, file: Path) -> dict[str, int]:
    """What ``print_growth`` prints in a fresh process."""
    code = "import sys; from benchmarks.rebuild import print_growth; print_growth(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tiny), str(file)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def memory(folder: Path, file: Path, model: nn.Module, rounds: int) -> dict[str, Any] | None:
    """Growth of resident memory over one load: the median of some processes, and its bound."""
    if not CLEAR.exists():
        return None
    tiny = folder / "tiny.safetensors"
    write_popup(tiny, "conv2", width=0.1)
    sizes = [t.numel() * t.element_size() for t in model.state_dict().values()]
    bound = sum(sizes) + 1.3 * max(sizes) + SLACK
    found = [growth(tiny, file) for _ in range(rounds)]
    peak = float(np.median([each["peak"] for each in found]))
    return {
        "peak_growth": peak,
        "kept_growth": float(np.median([each["kept"] for each in found])),
        "dense": sum(sizes),
        "largest_tensor": max(sizes),
        "bound": bound,
        "peak_growth/bound": peak / bound,
    }


def main() -> None:
    """Measure and print the report."""
    parser = parser_for("rebuild", __doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--memory-rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, dense = folder / "popup.safetensors", folder / "dense.safetensors"
        note("writing both files")
        model = write_popup(file, "resnet50")
        save_file(model.state_dict(), dense)
        check_equal(model, load_dense(dense))
        ratios = size_ratios(file, dense, model)
        sizes = {"file": file.stat().st_size, "dense": dense.stat().st_size}
        actions: dict[str, Action] = {
            "load": lambda: randsurgery.load(file),
            "timm": lambda: load_dense(dense),
        }
        timings = in_turn(actions, args.rounds, warm_up=2)
        ratios = {"load/timm": timings.ratio("load", "timm"), **ratios}
        grown = memory(folder, file, model, args.memory_rounds)
    report(timings, ratios, bytes=sizes, memory=grown, k=K, rounds=args.rounds)


if __name__ == "__main__":
    main()
