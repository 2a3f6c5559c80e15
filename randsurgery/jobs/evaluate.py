"""``eval``: accuracy of a file on a dataset."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from randsurgery.errors import IncompatibleError
from randsurgery.format.recipe import DatasetSpec
from randsurgery.jobs.hub import local_file
from randsurgery.jobs.inputs import DataOptions, look_for_file, opener, pick_device, resolve_dataset
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.modules import build
from randsurgery.surgery.supermask import Sampler
from randsurgery.training.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class Report:
    """What ``eval`` found. ``fixed``: the file as it stands. ``samples``: of sampled masks, one
    evaluation each (Zhou et al.)."""

    dataset: DatasetSpec
    fell_back: bool  # on digits: no dataset was given or recorded
    fixed: Evaluation
    samples: tuple[Evaluation, ...] = ()

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
        found = {"dataset": self.dataset.name, **self.fixed.to_json()}
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
    file: str,
    options: DataOptions,
    *,
    member: str | None = None,
    base: str | None = None,
    batch_size: int = 256,
    workers: int = 0,
    amp: bool = False,
    device: str = "auto",
    samples: int = 0,
) -> Report:
    """Evaluate one member of a file on a test split, with its recorded preprocessing; with
    ``samples``, as many sampled masks, too, from seeds 0, 1, ..."""
    where, file = pick_device(device), local_file(file)
    with open_checkpoint(file, base) as checkpoint:
        who, recipe = checkpoint.member(member), checkpoint.recipe
        dataset, fell_back = resolve_dataset(options.dataset, options.data_dir, who.dataset)
        look = look_for_file(recipe, dataset.name, options)
        data = opener(dataset, look, options, where, workers)("test", who.classes)
        classes = who.head.classes if who.head else 0
        if classes and len(data.classes) > classes:
            raise IncompatibleError(
                f"{dataset.name} has {len(data.classes)} classes, the network {classes}; "
                f"choose another --dataset"
            )
        sampler = Sampler(checkpoint, who.name) if samples else None
        model = build(checkpoint, who.name).to(where)
    fixed = evaluate(model, data, batch_size=batch_size, amp=amp)
    found = []
    for seed in range(samples):
        assert sampler is not None
        sampler.put(model, seed)
        found.append(evaluate(model, data, batch_size=batch_size, amp=amp))
    return Report(dataset, fell_back, fixed, tuple(found))
