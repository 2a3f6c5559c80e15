"""Partial training and fixed classifiers on Fashion-MNIST: the table of docs/papers.md.

Each row learns another part of one random network (Kaiming normal), all for the same number of
epochs at the same settings, with three seeds for weights, order and augmentation. Results are
appended to a file, one JSON object a run; runs that are there already are not repeated.

    python -m benchmarks.papers run conv4 --data-dir DIR --results results.jsonl
    python -m benchmarks.papers run wrn --data-dir DIR --results results.jsonl
    python -m benchmarks.papers transfer --data-dir DIR --results results.jsonl
    python -m benchmarks.papers table --results results.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.specs import DatasetSpec
from randsurgery.surgery.heads import FixedKind, with_fixed_head, with_head
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import (
    Freeze,
    count_layers,
    everything,
    make_plan,
    with_plan,
    zero_filled,
)
from randsurgery.surgery.recipes import make_recipe
from randsurgery.training.catalogue import input_for
from randsurgery.training.data import Resident
from randsurgery.training.datasets import open_data
from randsurgery.training.loop import fit
from randsurgery.training.settings import TrainSettings

DATASET = "torch/fashion_mnist"
SEEDS = (0, 1, 2)
IMAGES = 20_000
"""The first so many training images: the rows are compared with each other, not with records."""
VALIDATION = 2_000
"""Those behind them, by which table4 chooses an optimiser."""


@dataclass(frozen=True)
class Network:
    """A network, its middle block, and how it is trained."""

    name: str
    args: dict[str, Any]
    block: tuple[str, ...]
    settings: TrainSettings


NETWORKS = {
    "conv4": Network(
        "conv4",
        {"width": 0.25, "img_size": 28},
        ("features.5", "features.7"),
        TrainSettings(epochs=2, batch_size=128, lr=0.01, crop_padding=2),
    ),
    "wrn": Network(
        "wrn_28_4",
        {"depth": 10, "widen_factor": 1},
        ("block2",),
        TrainSettings(epochs=1, batch_size=64, lr=0.1, crop_padding=2),
    ),
}


@dataclass(frozen=True)
class Row:
    """What one row of the table learns."""

    wish: Freeze | None = None
    zero: bool = False
    head: FixedKind | None = None


def sliced(fraction: str, **more: Any) -> Freeze:
    """A fraction of the filters of every layer but the classifier, one at least."""
    return Freeze(fraction=fraction, least=1, **more)


def rows_of(network: Network) -> dict[str, Row]:
    """The rows, by name."""
    rows = {"everything": Row()}
    for fraction in ("0.1", "0.4", "0.7"):
        rows[f"fraction {fraction}, rest random"] = Row(sliced(fraction))
        rows[f"fraction {fraction}, rest zero"] = Row(sliced(fraction), zero=True)
    for fraction in ("0.1", "0.4"):
        rows[f"fraction {fraction} along in"] = Row(sliced(fraction, dim="in"))
    if network.name != "conv4":  # which has no norms
        rows["norms only"] = Row(Freeze(only=("@norm",)))
    rows["one block"] = Row(Freeze(only=network.block))
    rows["fc only"] = Row(Freeze(only=("@head",)))
    rows["everything, orthonormal classifier"] = Row(head="orthonormal")
    rows["everything, hadamard classifier"] = Row(head="hadamard")
    return rows


@dataclass
class Splits:
    """Training and test images, read once, and the training images behind those that are used, to
    choose by."""

    train: Resident
    test: Resident
    validation: Resident
    classes: int = field(init=False)

    def __post_init__(self) -> None:
        self.classes = len(self.train.classes)

    def only(self, labels: range) -> Splits:
        """The images of some classes, labelled from 0 on."""
        return Splits(
            *(_of_classes(split, labels) for split in (self.train, self.test, self.validation))
        )


def _of_classes(split: Resident, labels: range) -> Resident:
    chosen = (split.labels >= labels.start) & (split.labels < labels.stop)
    names = tuple(split.classes[label] for label in labels)
    own = split.subset(chosen.nonzero()[0].tolist())
    return replace(own, targets=own.targets - labels.start, classes=names)


def load(data_dir: str) -> Splits:
    """Fashion-MNIST at its native size, as three equal channels; all test images."""
    look = input_for(DATASET, {})
    spec = DatasetSpec(name=DATASET)
    train = open_data(spec, look, "train", data_dir=data_dir)
    test = open_data(spec, look, "test", data_dir=data_dir)
    assert isinstance(train, Resident)
    assert isinstance(test, Resident)
    held = range(IMAGES, IMAGES + VALIDATION)
    return Splits(train.subset(range(IMAGES)), test, train.subset(held, "held out of train"))


def planned(start: Checkpoint, row: Row, seed: int = 0) -> Checkpoint:
    """The network with the row's plan."""
    if row.head is not None:
        start = with_fixed_head(start, row.head, seed=seed)
    if row.wish is None:
        return with_plan(start, everything(meta_module(start)))
    plan = make_plan(meta_module(start), row.wish)
    return zero_filled(start, plan) if row.zero else with_plan(start, plan)


def train(start: Checkpoint, data: Splits, settings: TrainSettings) -> tuple[nn.Module, Any]:
    """Learn the plan; the module and the record of the last epoch."""
    model = learn_plan(build(start), start)
    return model, fit(model, data.train, data.test, settings)[-1]


def counts(start: Checkpoint) -> dict[str, int]:
    """Learned and all parameters."""
    plan = start.member().plan
    assert plan is not None
    layers = count_layers(meta_module(start), plan)
    return {"learned": sum(r.learned for r in layers), "total": sum(r.total for r in layers)}


class Results:
    """A file of results that knows what it has."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, network: str, row: str, seed: int) -> bool:
        """True if that run is done."""
        key = (network, row, seed)
        return any((r["network"], r["row"], r["seed"]) == key for r in self.all)

    def add(self, network: str, row: str, seed: int, **found: Any) -> None:
        """Append a run."""
        record = {"network": network, "row": row, "seed": seed, **found}
        self.all.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{network} {row} seed {seed}: {found.get('accuracy')}", file=sys.stderr, flush=True)


def run_table(name: str, data: Splits, results: Results) -> None:
    """All rows of one network."""
    network = NETWORKS[name]
    for seed in SEEDS:
        for row_name, row in rows_of(network).items():
            if results.has(name, row_name, seed):
                continue
            began = time.perf_counter()
            args = {**network.args, "num_classes": data.classes}
            start = planned(
                make_recipe(network.name, "kaiming-normal", seed=seed, args=args), row, seed
            )
            settings = replace(network.settings, seed=seed)
            _, last = train(start, data, settings)
            results.add(
                name, row_name, seed, accuracy=last["test_accuracy"], epochs=settings.epochs,
                seconds=round(time.perf_counter() - began, 1), **counts(start),
            )  # fmt: skip


def run_transfer(data: Splits, results: Results) -> None:
    """A network trained on classes 0 to 4, then a part of it on classes 5 to 9."""
    network, first, second = NETWORKS["wrn"], data.only(range(5)), data.only(range(5, 10))
    parts = {
        "block2": Freeze(only=network.block, head="frozen"),
        "fc": Freeze(only=("@head",)),
        "block2 and fc": Freeze(only=(*network.block, "@head")),
    }
    for seed in SEEDS:
        if all(results.has("transfer", part, seed) for part in parts):
            continue
        args = {**network.args, "num_classes": 5}
        start = planned(make_recipe(network.name, "kaiming-normal", seed=seed, args=args), Row())
        settings = replace(network.settings, seed=seed)
        model, last = train(start, first, settings)
        results.add("transfer", "first five", seed, accuracy=last["test_accuracy"], **counts(start))
        learned = with_head(harvest(start, model), 5)
        for part, wish in parts.items():
            again = with_plan(learned, make_plan(meta_module(learned), wish))
            _, last = train(again, second, settings)
            results.add("transfer", part, seed, accuracy=last["test_accuracy"], **counts(again))


def table(results: Results) -> str:
    """The runs as a Markdown table: learned parameters, mean and spread of the accuracy."""
    lines = ["| network | learned | parameters | accuracy | seeds |", "|---|---|---|---|---|"]
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in results.all:
        rows.setdefault((record["network"], record["row"]), []).append(record)
    for (network, row), found in rows.items():
        values = [100 * record["accuracy"] for record in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        lines.append(
            f"| {network} | {row} | {found[0]['learned']:,} of {found[0]['total']:,} "
            f"| {statistics.mean(values):.1f} ± {spread:.1f} | {len(values)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser("papers", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "transfer", "table"])
    parser.add_argument("network", nargs="?", choices=list(NETWORKS))
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--results", default="results.jsonl")
    args = parser.parse_args()
    results = Results(args.results)
    if args.what == "table":
        print(table(results))
    elif args.what == "transfer":
        run_transfer(load(args.data_dir), results)
    else:
        run_table(args.network, load(args.data_dir), results)


if __name__ == "__main__":
    main()
