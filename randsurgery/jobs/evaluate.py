"""``eval``: accuracy of a file on a dataset."""

from __future__ import annotations

from randsurgery.format.recipe import DatasetSpec
from randsurgery.jobs.hub import local_file
from randsurgery.jobs.inputs import DataOptions, open_test_split, pick_device
from randsurgery.surgery.bases import open_checkpoint
from randsurgery.surgery.modules import build
from randsurgery.training.evaluate import Evaluation, evaluate


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
) -> tuple[Evaluation, DatasetSpec, bool]:
    """Evaluate one member of a file on a test split, with its recorded preprocessing."""
    where, file = pick_device(device), local_file(file)
    with open_checkpoint(file, base) as checkpoint:
        who = checkpoint.member(member)
        data, dataset, fell_back = open_test_split(checkpoint, who, options, where, workers)
        model = build(checkpoint, who.name).to(where)
    return evaluate(model, data, batch_size=batch_size, amp=amp), dataset, fell_back
