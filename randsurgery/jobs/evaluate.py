"""``eval``: accuracy of a file on a dataset."""

from __future__ import annotations

from randsurgery.errors import IncompatibleError
from randsurgery.format.recipe import DatasetSpec
from randsurgery.jobs.hub import local_file
from randsurgery.jobs.inputs import DataOptions, look_for_file, opener, pick_device, resolve_dataset
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
        model = build(checkpoint, who.name).to(where)
    return evaluate(model, data, batch_size=batch_size, amp=amp), dataset, fell_back
