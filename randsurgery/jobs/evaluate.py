"""``eval``: accuracy of a file on a dataset."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from randsurgery.jobs.inputs import (
    DataOptions,
    Shown,
    fitted,
    open_split,
    pick_device,
    unfitted,
)
from randsurgery.jobs.networks import open_network
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.ensembles import temperature
from randsurgery.surgery.modules import build
from randsurgery.surgery.supermask_scores import Sampler
from randsurgery.training.evaluate import Evaluation, evaluate
from randsurgery.training.folders import Part


@dataclass(frozen=True)
class Report:
    """What ``eval`` found. ``fixed``: the file as it stands. ``samples``: of sampled masks, one
    evaluation each (Zhou et al.)."""

    shown: Shown
    fixed: Evaluation
    names: tuple[str, ...] = ()  # of the classes
    samples: tuple[Evaluation, ...] = ()
    left_out: int = 0  # images that the member's temperature was fitted on
    flattering: bool = False  # it was fitted on all of these images
    notes: tuple[str, ...] = ()  # of how dense weights were read

    @property
    def mean(self) -> float:
        """The mean accuracy of the samples."""
        return statistics.mean(sample.accuracy for sample in self.samples)

    @property
    def deviation(self) -> float:
        """The samples' standard deviation, 0 of a single one."""
        if len(self.samples) < 2:
            return 0.0
        return statistics.stdev(sample.accuracy for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {
            "dataset": self.shown.dataset.name,
            "split": self.shown.split,
            **({"from": self.shown.data.where} if self.shown.data.where else {}),
            **({"skipped": self.shown.data.skipped} if self.shown.data.skipped else {}),
            **self.fixed.to_json(),
        }
        if not self.samples:
            return found
        sampled = {
            "count": len(self.samples),
            "mean_accuracy": self.mean,
            "deviation": self.deviation,
            "accuracies": [sample.accuracy for sample in self.samples],
        }
        return {**found, "samples": sampled}


def run_eval(
    network: SourceSpec,
    options: DataOptions,
    *,
    member: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    amp: bool = False,
    device: str = "auto",
    samples: int = 0,
    split: Part = "test",
) -> Report:
    """Evaluate a network, of a file one member, on a split, with its recorded preprocessing; with
    ``samples``, as many sampled masks, too, from seeds 0, 1, ..."""
    where, notes = pick_device(device), list[str]()
    with open_network(network, options, notes) as checkpoint:
        who = checkpoint.member(member)
        shown = open_split(checkpoint, who, options, where, workers, split)
        sampler = Sampler(checkpoint, who.name) if samples else None
        model = build(checkpoint, who.name).to(where)
    used = fitted(shown, [who], options.folder)
    how: dict[str, Any] = {
        "batch_size": batch_size,
        "amp": amp,
        "temperature": temperature(who),
        "chosen": unfitted(used),
    }
    data = shown.data
    fixed = evaluate(model, data, **how)
    found = []
    for seed in range(samples):
        assert sampler is not None
        sampler.put(model, seed)
        found.append(evaluate(model, data, **how))
    classes = who.head.classes if who.head else 0
    names = who.classes or data.classes
    names = names if len(names) >= classes else tuple(str(label) for label in range(classes))
    left_out = len(data) - fixed.images
    return Report(shown, fixed, names, tuple(found), left_out, bool(used.all()), tuple(notes))
