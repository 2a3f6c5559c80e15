"""``predict``: what a file's network says of images, as CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from randsurgery.errors import DataError, IncompatibleError, UsageError
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.container import check_output, write_atomically
from randsurgery.format.members import members_named
from randsurgery.format.recipe import Member
from randsurgery.format.shards import check_not_input
from randsurgery.jobs.inputs import (
    DataOptions,
    assumed_text,
    look_for_file,
    open_split,
    pick_device,
)
from randsurgery.jobs.networks import open_network
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.ensembles import Ensemble, check_engine, settled, temperature
from randsurgery.surgery.modules import build
from randsurgery.training.data import Data
from randsurgery.training.datasets import open_images
from randsurgery.training.images import Failure, find_images
from randsurgery.training.predict import Prediction, predict


@dataclass(frozen=True)
class Together:
    """Several members that predict as one. members: None is all of the file."""

    members: tuple[str, ...] | None = None
    engine: str = "auto"


@dataclass(frozen=True)
class PredictPlan:
    """A prediction, checked and ready to run.

    ``dataset``: its name, None for images by path. ``names``: the classes', if the file says them.
    ``output``: None if the lines go elsewhere. ``strict``: stop at the first failure.
    """

    model: nn.Module | Ensemble
    data: Data
    dataset: str | None
    names: tuple[str, ...]
    notes: tuple[str, ...]
    output: Path | None
    top: int = 5
    batch_size: int = 256
    amp: bool = False
    strict: bool = False
    temperature: float = 1.0

    def close(self) -> None:
        """Close the file, of which an ensemble reads its members as it needs them."""
        if isinstance(self.model, Ensemble):
            self.model.close()

    def path(self, index: int) -> str:
        """Where an image lies: its file, bytes that are no UTF-8 as ``\\xff``; or test/INDEX in a
        dataset whose images are no files."""
        if not self.data.paths:
            return f"test/{index}"
        # by bytes: whatever the locale takes file names for
        return os.fsencode(self.data.paths[index]).decode("utf-8", "backslashreplace")

    def name(self, label: int) -> str:
        """The class's name, or its number as text; empty for an image without label."""
        if label < 0:
            return ""
        return self.names[label] if label < len(self.names) else str(label)


@dataclass
class Tally:
    """What has been done so far: images with a line, and (path, reason) of those without."""

    images: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        failures = [{"path": path, "reason": why} for path, why in self.failures]
        return {"images": self.images, "failures": failures}


def prepare(
    network: SourceSpec,
    inputs: Sequence[str],
    options: DataOptions,
    output: str | None,
    *,
    member: str | None = None,
    together: Together | None = None,
    top: int = 5,
    batch_size: int = 256,
    workers: int = 0,
    amp: bool = False,
    device: str = "auto",
    strict: bool = False,
    force: bool = False,
) -> PredictPlan:
    """Check file, images and output, and build the network, or with ``together`` several. Raises
    RandsurgeryError; writes nothing."""
    if inputs and (options.dataset is not None or options.data_dir is not None):
        raise UsageError("images and --dataset or --data-dir exclude each other; give one of them")
    target = None if output is None else check_output(output, force=force)
    paths = find_images(inputs)
    if target is not None:
        check_not_input(target, (*network.inputs, *paths))
    where = pick_device(device)
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        checkpoint = stack.enter_context(open_network(network, options, notes))
        who, model = _network(checkpoint, member, together, where)
        model = model.to(where)
        if inputs:
            look = look_for_file(checkpoint.recipe, who, "folder", options)
            data, dataset = open_images(paths, look, where, workers), None
        else:
            shown = open_split(checkpoint, who, options, where, workers)
            data, dataset = shown.data, shown.dataset.name
            if shown.fell_back:
                notes.append("no images given, no dataset given or recorded: using digits")
            notes += [shown.told] if shown.told else []
        if checkpoint.recipe.input_of(who) is None:
            notes.append(assumed_text(data.spec))
        plain = model.backbone if isinstance(model, Ensemble) else model
        if getattr(plain, "num_classes", None) == 0:
            raise IncompatibleError(
                f"{network.name}: the network has no classifier, so nothing to predict"
            )
        if isinstance(model, Ensemble):
            stack.pop_all()  # members are read as they are needed
    return PredictPlan(
        model, data, dataset, who.classes or (), tuple(notes), target, top, batch_size, amp, strict,
        temperature(who),
    )  # fmt: skip


def _network(
    checkpoint: Checkpoint, member: str | None, together: Together | None, where: torch.device
) -> tuple[Member, nn.Module | Ensemble]:
    """What predicts, and the (first) member that says what it expects to see."""
    if together is None:
        who = checkpoint.member(member)
        return who, build(checkpoint, who.name)
    engine = settled(check_engine(together.engine), where)
    return (
        members_named(checkpoint, together.members)[0],
        Ensemble(checkpoint, together.members, engine=engine),
    )


def run(plan: PredictPlan, tally: Tally, on_result: Callable[[str, str | None], None]) -> int:
    """Write the CSV to the plan's output, whole or not at all; returns its bytes. For ``tally``
    and ``on_result`` see ``lines``."""
    assert plan.output is not None
    return write_atomically(plan.output, lines(plan, tally, on_result))


def lines(
    plan: PredictPlan,
    tally: Tally,
    on_result: Callable[[str, str | None], None],
    shown: Callable[[str], str] = str,
) -> Iterator[bytes]:
    """The CSV in UTF-8, line by line.

    ``tally`` counts as the lines are taken. ``on_result`` is told each image's path and, if it
    failed, why. ``shown`` is applied to each field. Raises DataError if no image can be read or,
    if the plan is strict, one cannot.
    """
    for result in predict(
        plan.model,
        plan.data,
        top=plan.top,
        batch_size=plan.batch_size,
        amp=plan.amp,
        temperature=plan.temperature,
    ):
        path = plan.path(result.index)
        if isinstance(result, Failure):
            if plan.strict:
                raise DataError(f"{path}: {result.reason}; nothing was written (--strict)")
            tally.failures.append((path, result.reason))
            on_result(path, result.reason)
            continue
        if tally.images == 0:
            yield _line(_header(plan, result))
        tally.images += 1
        on_result(path, None)
        yield _line([shown(value) for value in _row(plan, path, result)])
    if tally.images == 0:
        raise DataError(
            f"no image could be used ({len(tally.failures):,} failed, named above); nothing was "
            "written"
        )


UNCERTAINTY = ("entropy", "mutual_information", "disagreement")


def _header(plan: PredictPlan, first: Prediction) -> list[str]:
    numbers = range(1, len(first.classes) + 1)
    ranked = [f"{what}_{rank}" for rank in numbers for what in ("class", "probability")]
    label = [] if plan.dataset is None else ["label"]
    unsure = [] if first.uncertainty is None else UNCERTAINTY
    return ["path", "class", "probability", *unsure, *ranked, *label]


def _row(plan: PredictPlan, path: str, found: Prediction) -> list[str]:
    ranked = [
        value
        for label, share in zip(found.classes, found.probabilities, strict=True)
        for value in (plan.name(label), f"{share:.6g}")
    ]
    label = [] if plan.dataset is None else [plan.name(found.label)]
    unsure = [f"{value:.6g}" for value in found.uncertainty or ()]
    return [path, *ranked[:2], *unsure, *ranked, *label]


def _line(row: list[str]) -> bytes:
    # written with \r\n, so that the csv module of every Python quotes a lone \r; ended with \n
    text = io.StringIO(newline="")
    csv.writer(text).writerow(row)
    return (text.getvalue().removesuffix("\r\n") + "\n").encode()
