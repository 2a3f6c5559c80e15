"""Accuracy against bytes: what a network is worth when only a part of it is learned and stored.

Each point is a run of the command line on Fashion-MNIST: the same conv4 of width 0.25, five
epochs, a tenth of the training images held out, the best epoch by them kept, test accuracy and
file size as the file has them. Runs that are in the results already are not repeated.

    python -m benchmarks.tradeoff run --data-dir DIR --results tradeoff.jsonl
    python -m benchmarks.tradeoff draw --results tradeoff.jsonl --output docs/tradeoff.png
    python -m benchmarks.tradeoff table --results tradeoff.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NETWORK = ("conv4", "--width", "0.25")
DATA = ("--dataset", "torch/fashion_mnist", "--epochs", "5", "--val-split", "0.1", "--keep", "best")

POINTS: dict[str, tuple[str, ...]] = {
    "dense": ("train",),
    "edge-popup 0.5": ("popup", "--k", "0.5"),
    "edge-popup 0.3": ("popup", "--k", "0.3"),
    "edge-popup 0.1": ("popup", "--k", "0.1"),
    "supermask": ("popup", "--algorithm", "supermask"),
    "partial 0.4": ("freeze", "--fraction", "0.4"),
    "partial 0.1": ("freeze", "--fraction", "0.1"),
    "fixed classifier": ("train", "--head", "hadamard"),
}
"""Each point's command and its options; a plan of ``freeze`` is trained."""

GROUPS = {
    "dense": "dense", "edge-popup": "edge-popup", "supermask": "supermask",
    "partial": "partial training", "fixed": "fixed classifier",
}  # fmt: skip
"""What points are called in the figure, by the first word of their name."""


def command(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """What a command of the program says as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "randsurgery", *arguments, "--json", "-q"],
        cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def point(name: str, seed: int, data_dir: str) -> dict[str, Any]:
    """One run: test accuracy and bytes of the file that it wrote."""
    first, *options = POINTS[name]
    own, data = ("--seed", str(seed)), (*DATA, "--data-dir", data_dir)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        out = ("-o", "net.safetensors")
        if first == "freeze":
            plan = ("freeze", *NETWORK, *options, *own, "--num-classes", "10", "--img-size", "28")
            command((*plan, "-o", "plan.safetensors"), folder)
            found = command(("train", "plan.safetensors", *own, *data, *out), folder)
        else:
            found = command((first, *NETWORK, *options, *own, *data, *out), folder)
        return {
            "name": name,
            "seed": seed,
            "bytes": found["bytes"],
            "dense_bytes": found["dense_bytes"],
            "accuracy": found["metrics"]["test_accuracy"],
        }


def read(path: str) -> list[dict[str, Any]]:
    """The runs so far."""
    file = Path(path)
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def run(data_dir: str, results: str, seeds: int) -> None:
    """Every point for as many seeds."""
    done = {(one["name"], one["seed"]) for one in read(results)}
    for seed in range(seeds):
        for name in POINTS:
            if (name, seed) in done:
                continue
            found = point(name, seed, data_dir)
            print(found, file=sys.stderr)
            with Path(results).open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def means(results: str) -> dict[str, tuple[float, float, int]]:
    """Mean bytes, mean accuracy and seeds of each point that was run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in read(results):
        found.setdefault(one["name"], []).append(one)
    return {
        name: (
            sum(one["bytes"] for one in runs) / len(runs),
            sum(one["accuracy"] for one in runs) / len(runs),
            len(runs),
        )
        for name, runs in found.items()
    }


def table(results: str) -> None:
    """The points as rows of a page."""
    print("| | file | test accuracy | seeds |\n|---|---|---|---|")
    for name, (size, accuracy, seeds) in means(results).items():
        print(f"| {name} | {size / 1000:,.1f} kB | {accuracy:.1%} | {seeds} |")


def draw(results: str, output: str) -> None:
    """The points as a figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    markers = dict(zip(GROUPS, "sovD^", strict=True))
    groups: dict[str, list[tuple[str, float, float]]] = {}
    for name, (size, accuracy, _) in means(results).items():
        groups.setdefault(name.split()[0], []).append((name, size / 1000, 100 * accuracy))
    for group, points in groups.items():
        points.sort(key=lambda one: one[1])
        line = "-" if len(points) > 1 else ""
        axes.plot(
            [size for _, size, _ in points], [accuracy for _, _, accuracy in points],
            marker=markers[group], linestyle=line, label=GROUPS[group],
        )  # fmt: skip
        for name, size, accuracy in points if len(points) > 1 else ():
            axes.annotate(name.split()[-1], (size, accuracy), (4, -11), textcoords="offset points",
                          fontsize=8)  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xscale("log")
    axes.set_xticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.set_xlabel("file, kB")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("Fashion-MNIST, conv4 of width 0.25, five epochs", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(output)


def main() -> None:
    """Run, draw or print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "draw", "table"))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--results", default="tradeoff.jsonl")
    parser.add_argument("--output", default="docs/tradeoff.png")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    if given.what == "run":
        run(given.data_dir, given.results, given.seeds)
    elif given.what == "draw":
        draw(given.results, given.output)
    else:
        table(given.results)


if __name__ == "__main__":
    main()
