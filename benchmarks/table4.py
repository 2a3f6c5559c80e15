"""Cheap ensembles on Fashion-MNIST: Table 4 of Rosenfeld & Tsotsos, and more beside it.

One network is trained whole for an epoch; from it start five members of every kind, each trained
for one more epoch with a seed of its own: the classifier and norms (fc), a slice of every layer's
filters (share), everything (full). Adam and SGD with momentum both run, and the better counts, as
in the paper: by the ensemble's accuracy on 2,000 training images that no member sees. Masks
(edge-popup) of one random network, two epochs each, are a further row. Three seeds. Results are
appended to a file, one JSON object a run; runs that are there already are not repeated.

    python -m benchmarks.table4 run NETWORK --data-dir DIR --results results.jsonl
    python -m benchmarks.table4 table --results results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.papers import SEEDS, Results, Splits, load
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.recipe import Plan
from randsurgery.format.specs import DatasetSpec
from randsurgery.jobs.sources import flatten
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest, meta_module
from randsurgery.surgery.plans import Freeze, count_layers, everything, make_plan, with_plan
from randsurgery.surgery.recipes import make_recipe
from randsurgery.training.data import Data
from randsurgery.training.datasets import open_data
from randsurgery.training.evaluate import outputs
from randsurgery.training.loop import fit
from randsurgery.training.settings import TrainSettings
from randsurgery.training.uncertainty import EnsembleResult, EnsembleTally, separation

MEMBERS = 5
KINDS = {
    "FC": None,
    "Share-Conv-0.9": "0.1",
    "Share-Conv-0.6": "0.4",
    "Share-Conv-0.3": "0.7",
    "Full": "1",
}
POPUP = "masks, k = 0.5"


@dataclass(frozen=True)
class Network:
    """A network, how many training images it sees, and how it is trained."""

    name: str
    args: dict[str, Any]
    images: int
    sgd: TrainSettings
    adam: TrainSettings
    popup: TrainSettings


def _network(name: str, args: dict[str, Any], images: int, sgd_lr: float) -> Network:
    sgd = TrainSettings(epochs=1, batch_size=64, lr=sgd_lr, crop_padding=2)
    adam = replace(sgd, opt="adam", lr=0.001, weight_decay=0.0)
    return Network(name, args, images, sgd, adam, replace(sgd, epochs=2, lr=0.1))


NETWORKS = {
    "conv4": _network("conv4", {"width": 0.25, "img_size": 28}, 20_000, 0.01),
    "densenet": _network("densenet_bc_100_12", {"depth": 22, "growth_rate": 8}, 10_000, 0.1),
}


def plan_of(start: Checkpoint, kind: str) -> Plan:
    """What a member of that kind learns."""
    shell, fraction = meta_module(start), KINDS[kind]
    if kind == "Full":
        return everything(shell)
    wish = Freeze(only=("@head",)) if fraction is None else Freeze(fraction=fraction, least=1)
    return make_plan(shell, wish)


def warmed(network: Network, settings: TrainSettings, seed: int, data: Splits) -> Checkpoint:
    """The start that all members share: everything trained for one epoch."""
    args = {**network.args, "num_classes": data.classes}
    start = make_recipe(network.name, "kaiming-normal", seed=seed, args=args)
    model = learn_plan(build(start), start)
    fit(model, data.train, None, replace(settings, seed=seed))
    return flatten(harvest(start, model.eval()))


def members(
    network: Network, kind: str, start: Checkpoint, settings: TrainSettings, seed: int, data: Splits
) -> tuple[list[Any], int]:
    """Five trained modules, and how many parameters they learned together."""
    found, learned = [], 0
    for index in range(MEMBERS):
        own = replace(settings, seed=1000 * (seed + 1) + index)
        model = build(start)
        if kind == POPUP:
            Popup("0.5", seed=own.seed).attach(model)
            learned += sum(p.numel() for p in model.parameters() if p.requires_grad)
        else:
            planned = with_plan(start, plan_of(start, kind))
            plan = planned.member().plan
            assert plan is not None
            learned += sum(row.learned for row in count_layers(meta_module(start), plan))
            learn_plan(model, planned)
        fit(model, data.train, None, own)
        found.append(model.eval())
    return found, learned


def together(modules: list[Any], data: Data, *, labelled: bool) -> EnsembleResult:
    """The modules' figures as an ensemble."""
    tally = EnsembleTally()
    for index, model in enumerate(modules):
        logits, labels = outputs(model, data)
        shares = torch.from_numpy(logits).softmax(dim=1).numpy()
        tally.add(str(index), shares, labels if labelled else None)
    return tally.result()


def run_one(
    network: Network, kind: str, start: Checkpoint, settings: TrainSettings, seed: int,
    data: Splits, far: Data,
) -> dict[str, Any]:  # fmt: skip
    """Train and evaluate one ensemble."""
    began = time.perf_counter()
    modules, learned = members(network, kind, start, settings, seed, data)
    inside = together(modules, data.test, labelled=True)
    outside = together(modules, far, labelled=False)
    chosen_by = together(modules, data.validation, labelled=True).metrics
    figures = inside.metrics
    return {
        "learned": learned,
        "mean_accuracy": figures.mean_accuracy,
        "accuracy": figures.ensemble.accuracy,
        "validation_accuracy": chosen_by.ensemble.accuracy,
        "nll": figures.ensemble.nll,
        "ece": figures.ensemble.ece,
        "mean_nll": float(np.mean([one.nll for one in figures.members.values()])),
        "mean_ece": float(np.mean([one.ece for one in figures.members.values()])),
        "disagreement": figures.disagreement,
        "auroc": separation(inside.images.entropy, outside.images.entropy).auroc,
        "auroc_information": separation(
            inside.images.mutual_information, outside.images.mutual_information
        ).auroc,
        "seconds": round(time.perf_counter() - began, 1),
    }


def run(network: Network, data_dir: str, results: Results) -> None:
    """All rows of one network."""
    data = load(data_dir)
    train = data.train.subset(range(network.images))
    data = replace(data, train=train)
    far = open_data(DatasetSpec(name="digits"), train.spec, "test")
    for seed in SEEDS:
        for opt, settings in (("sgd", network.sgd), ("adam", network.adam)):
            rows = [f"{kind}, {opt}" for kind in KINDS]
            if all(results.has(network.name, row, seed) for row in rows):
                continue
            start = warmed(network, settings, seed, data)
            for kind, row in zip(KINDS, rows, strict=True):
                if not results.has(network.name, row, seed):
                    found = run_one(network, kind, start, settings, seed, data, far)
                    results.add(network.name, row, seed, **found)
        if not results.has(network.name, POPUP, seed):
            args = {**network.args, "num_classes": data.classes}
            start = make_recipe(network.name, "signed-constant", seed=seed, args=args)
            found = run_one(network, POPUP, start, network.popup, seed, data, far)
            results.add(network.name, POPUP, seed, **found)


def table(results: Results) -> str:
    """The runs as Markdown tables: mean and spread over the seeds, percent where shares."""
    lines = []
    for name in dict.fromkeys(record["network"] for record in results.all):
        lines += [
            f"**{name}**",
            "",
            "| Model Type | optimiser | No. Params | Mean Accuracy | Ensemble Accuracy | NLL | ECE "
            "| members' NLL | disagreement | OOD AUROC | seeds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for kind in (*KINDS, POPUP):
            lines.append(_row(kind, *_better(results, name, kind)))
        lines.append("")
    return "\n".join(lines)


def _better(results: Results, network: str, kind: str) -> tuple[str, list[dict[str, Any]]]:
    """The optimiser with the higher mean ensemble accuracy on the validation images, and its runs.
    The test images choose nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in results.all:
        what, _, opt = record["row"].partition(", ")
        if record["network"] == network and (what == kind or record["row"] == kind):
            found.setdefault("sgd" if record["row"] == kind else opt, []).append(record)
    return max(
        found.items(), key=lambda one: statistics.mean(r["validation_accuracy"] for r in one[1])
    )


def _row(kind: str, opt: str, runs: list[dict[str, Any]]) -> str:
    def figure(key: str, scale: float, digits: int) -> str:
        values = [scale * record[key] for record in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"

    cells = [
        kind, opt, f"{runs[0]['learned']:,}", figure("mean_accuracy", 100, 1),
        figure("accuracy", 100, 1), figure("nll", 1, 3), figure("ece", 1, 3),
        figure("mean_nll", 1, 3), figure("disagreement", 100, 1), figure("auroc", 1, 3),
        str(len(runs)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser("table4", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("network", nargs="?", choices=list(NETWORKS), default="conv4")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--results", default="results.jsonl")
    args = parser.parse_args()
    results = Results(args.results)
    if args.what == "table":
        print(table(results))
    else:
        run(NETWORKS[args.network], args.data_dir, results)


if __name__ == "__main__":
    main()
