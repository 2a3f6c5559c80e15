"""edge-popup against supermasks on Fashion-MNIST: the second table of docs/papers.md.

Ramanujan et al., Section 4.4: conv2 and conv4, four distributions of the weights, each algorithm
with its own learning rate; random masks and dense training beside them. Three seeds each, all with
the same images and epochs. Results are appended to a file, one JSON object a run; runs that are
there already are not repeated.

    python -m benchmarks.supermasks run --data-dir DIR --results results.jsonl
    python -m benchmarks.supermasks table --results results.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import randsurgery
from benchmarks.papers import SEEDS, Results, Splits, load
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.surgery.edge_popup import Popup
from randsurgery.surgery.initialisers import Init
from randsurgery.surgery.learning import learn_plan
from randsurgery.surgery.modules import build, harvest
from randsurgery.surgery.supermask import Supermask
from randsurgery.surgery.supermask_scores import Sampler
from randsurgery.training.evaluate import evaluate
from randsurgery.training.loop import fit
from randsurgery.training.settings import TrainSettings

NETWORKS = ("conv2", "conv4")
INITS: tuple[Init, ...] = ("signed-constant", "kaiming-normal", "xavier-constant", "xavier-normal")
K = "0.5"
SAMPLES = 10
POPUP = TrainSettings(epochs=3, batch_size=128, lr=0.1, crop_padding=2)
SUPERMASK = replace(POPUP, lr=200.0, weight_decay=0.0)
DENSE = replace(POPUP, lr=0.01)


@dataclass(frozen=True)
class Row:
    """A way to find a network, from weights of one distribution."""

    init: Init
    wish: Popup | Supermask | None
    settings: TrainSettings


def rows() -> dict[str, Row]:
    """The rows of one network, by name."""
    found = {"dense": Row("kaiming-normal", None, DENSE)}
    random = Popup(K, mask="random")
    found["random mask, signed-constant"] = Row("signed-constant", random, replace(POPUP, epochs=1))
    for init in INITS:
        found[f"edge-popup, {init}"] = Row(init, Popup(K), POPUP)
    for init in INITS:
        found[f"supermask, {init}"] = Row(init, Supermask(), SUPERMASK)
    rescaled = Supermask(rescale=True)
    found["supermask, rescaled, xavier-normal"] = Row("xavier-normal", rescaled, SUPERMASK)
    return found


def run_one(network: str, row: Row, seed: int, data: Splits) -> dict[str, Any]:
    """Train one network; accuracy with the fixed mask, and of ten samples where masks have
    probabilities."""
    began = time.perf_counter()
    args = {"width": 0.25, "img_size": 28, "num_classes": data.classes}
    start = randsurgery.make_recipe(network, row.init, seed=seed, args=args)
    model = build(start)
    if row.wish is None:
        learn_plan(model, start)
    else:
        randsurgery.attach(model, replace(row.wish, seed=seed))
    last = fit(model, data.train, data.test, replace(row.settings, seed=seed))[-1]
    found: dict[str, Any] = {"accuracy": last["test_accuracy"], "kept": 1.0}
    if row.wish is not None:
        scored = isinstance(row.wish, Supermask)
        ended = harvest(start, model.eval(), scores=scored)
        found["kept"] = kept_share(ended)
        if scored:
            found["sampled"] = sampled(ended, data)
    return {**found, "seconds": round(time.perf_counter() - began, 1)}


def kept_share(ended: Checkpoint) -> float:
    """The share of masked weights that are kept."""
    overlays = {n: t.overlays[0] for n, t in ended.member().tensors.items() if t.overlays}
    kept = {n: o.count for n, o in overlays.items() if o.kind == "mask"}
    return sum(kept.values()) / sum(ended.recipe.tensors[name].size for name in kept)


def sampled(ended: Checkpoint, data: Splits) -> float:
    """The mean accuracy of ten sampled networks."""
    model: nn.Module = build(ended)
    sampler, found = Sampler(ended), []
    for seed in range(SAMPLES):
        sampler.put(model, seed)
        found.append(evaluate(model, data.test).accuracy)
    return statistics.mean(found)


def run(data: Splits, results: Results) -> None:
    """All rows of both networks."""
    for seed in SEEDS:
        for network in NETWORKS:
            for name, row in rows().items():
                if not results.has(network, name, seed):
                    results.add(network, name, seed, **run_one(network, row, seed, data))


def table(results: Results) -> str:
    """The runs as a Markdown table: share kept, mean and spread of the accuracy in percent."""
    lines = [
        "| network | | kept | accuracy | mean of ten samples | seeds |",
        "|---|---|---|---|---|---|",
    ]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in results.all:
        found.setdefault((record["network"], record["row"]), []).append(record)
    for (network, row), runs in sorted(found.items(), key=lambda one: one[0][0]):
        kept = statistics.mean(record["kept"] for record in runs)
        figures = [_figure([r[key] for r in runs if key in r]) for key in ("accuracy", "sampled")]
        lines.append(f"| {network} | {row} | {kept:.1%} | {' | '.join(figures)} | {len(runs)} |")
    return "\n".join(lines)


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser("supermasks", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--results", default="results.jsonl")
    args = parser.parse_args()
    results = Results(args.results)
    if args.what == "table":
        print(table(results))
    else:
        run(load(args.data_dir), results)


if __name__ == "__main__":
    main()
