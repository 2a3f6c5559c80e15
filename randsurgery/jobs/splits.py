"""The images that a job sees: which splits of a dataset, what is held out, of which classes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from randsurgery.errors import DataError, IncompatibleError, UsageError
from randsurgery.format.recipe import Member
from randsurgery.format.specs import DatasetSpec, InputSpec
from randsurgery.jobs.holdout import fingerprint, held_out, hold_out
from randsurgery.training.data import Data, Streamed, check_labelled
from randsurgery.training.datasets import check_name, folder_data, open_data, open_images
from randsurgery.training.folders import Folder, Part, read_folder
from randsurgery.training.images import Failure, find_images, refuse, unreadable
from randsurgery.training.layouts import part_of

FINGERPRINT = "validation_digest"
"""Among what provenance says of the images: what tells the validation images from others."""

MANY = 20_000
"""Images that take a while to check."""

Classes = tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What is to be opened, and how.

    ``known``: the class names of the file that will see the images. ``any_classes``: other names
    are taken by their numbers. ``val_split``, ``val_seed``: the share of the training images that
    is held out. ``skip_bad``: go on without images that cannot be read. ``say``: told of what
    takes a while.
    """

    dataset: DatasetSpec
    look: InputSpec
    data_dir: str | None = None
    download: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0
    known: Classes | None = None
    any_classes: bool = False
    skip_bad: bool = False
    val_split: str | None = None
    val_seed: int = 0
    say: Callable[[str], None] = field(default=lambda _: None, compare=False)


@dataclass(frozen=True)
class Splits:
    """The splits that a training job sees. ``dataset``: with the splits' names as they were found.
    ``notes``: what was found, for people."""

    dataset: DatasetSpec
    train: Data
    validation: Data | None
    test: Data | None
    classes: Classes
    notes: tuple[str, ...] = ()
    root: str | None = None  # of the folder that they lie in

    def to_json(self) -> dict[str, Any]:
        """Plain values, for provenance: images of each split, where they came from, and how many
        could not be read."""
        found: dict[str, Any] = {}
        for name in ("train", "validation", "test"):
            data: Data | None = getattr(self, name)
            if data is not None:
                found[f"{name}_images"] = len(data)
                found |= {f"{name}_from": data.where} if data.where else {}
                found |= {f"{name}_skipped": data.skipped} if data.skipped else {}
        if self.validation is not None:
            found[FINGERPRINT] = fingerprint(self.validation, self.root)
        return found


# --- for training --------------------------------------------------------------------------------


def open_for_training(asked: Request) -> Splits:
    """The training images, those to validate on if some are held out or lie in a folder of their
    own beside a test folder, and those to test on. Every image file is opened once, so that all
    that cannot be read are told before any work.

    Raises DataError for splits that are not there, and UsageError or IncompatibleError for a
    request that does not fit them.
    """
    check_name(asked.dataset)
    folder = _folder(asked)
    if folder is None:
        found = {
            "train": _named(asked, "train"),
            "test": _named(asked, "test"),
        }
        dataset = asked.dataset
    else:
        found, dataset = _of_folder(asked, folder)
    found = _readable(found, asked, scan=True)
    for data in found.values():
        check_labelled(data)
    if asked.val_split is not None:
        if "validation" in found:
            raise UsageError(
                f"--val-split holds out training images, but {asked.data_dir} has validation "
                f"images ({found['validation'].where}) beside test images; leave it out"
            )
        found["train"], found["validation"] = hold_out(
            found["train"], asked.val_split, asked.val_seed
        )
    train = found["train"]
    told = _told(found, train.classes, folder) if folder or asked.val_split is not None else []
    return Splits(
        dataset, train, found.get("validation"), found.get("test"), train.classes, tuple(told),
        asked.data_dir,
    )  # fmt: skip


def _folder(asked: Request) -> Folder | None:
    if asked.dataset.name != "folder":
        return None
    if asked.data_dir is None:
        raise DataError("dataset folder needs --data-dir FOLDER")
    return read_folder(asked.data_dir)


def _named(asked: Request, part: Any) -> Data:
    return open_data(
        asked.dataset,
        asked.look,
        part,
        data_dir=asked.data_dir,
        download=asked.download,
        device=asked.device,
        workers=asked.workers,
    )


def _of_folder(asked: Request, folder: Folder) -> tuple[dict[str, Data], DatasetSpec]:
    names = folder.classes
    if asked.known is not None and not asked.any_classes and set(names) <= set(asked.known):
        names = asked.known
    roles: dict[str, Part] = {"train": "train"}
    if "test" in folder.splits:
        roles["test"] = "test"
        if "validation" in folder.splits:
            roles["validation"] = "validation"
    elif "validation" in folder.splits or asked.val_split is None:
        roles["test"] = test_part(folder)
    found: dict[str, Data] = {
        role: folder_data(folder, part, asked.look, names, asked.device, asked.workers)
        for role, part in roles.items()
    }
    return found, asked.dataset.model_copy(update={"test_split": roles.get("test", "none")})


def test_part(folder: Folder) -> Part:
    """Which split of a folder is tested on: a test folder, else the validation folder. Raises
    DataError, naming the folders that are there."""
    if "test" in folder.splits:
        return "test"
    if "validation" not in folder.splits:
        for part in ("validation", "test"):  # there, without labels or images
            if part in folder.folders:
                folder.split(part)
        raise folder.no_split("validation", "test")
    return "validation"


def has_splits(root: str) -> bool:
    """True if a folder holds one that is named as a split."""
    inside = os.listdir(root) if os.path.isdir(root) else []
    return any(part_of(name) and os.path.isdir(os.path.join(root, name)) for name in inside)


def _told(found: dict[str, Data], classes: Sequence[str], folder: Folder | None) -> list[str]:
    """What was found, in one line."""
    parts: list[str] = []
    for name in ("train", "validation", "test"):
        if (data := found.get(name)) is not None:
            images = f"{name} {len(data):,}" + (" images" if not parts else "")
            plain = name == "train" or not data.where
            parts.append(images if plain else f"{images} ({data.where})")
    skipped = sum(data.skipped for data in found.values())
    ends = [f"{skipped:,} unreadable skipped"] if skipped else []
    if folder is not None:
        for part, own in folder.folders.items():
            count = folder.unlabelled.get(part, 0)
            what = "1 image" if count == 1 else f"{count:,} images"
            fault = f"has {what} without labels" if count else "is empty"
            ends += [f"{own}/ {fault}"] if part not in folder.splits else []
        ends += [f"{name}/ is not looked into" for name in folder.others[:3]]
        ends += [text] if (text := folder.left_out_text()) else []
    line = ", ".join([*parts, f"{len(classes):,} classes"])
    return ["; ".join([line, *ends])]


# --- for evaluation ------------------------------------------------------------------------------


def open_for_evaluation(
    asked: Request, member: Member, part: Part
) -> tuple[Data, DatasetSpec, str]:
    """One split, and what was found, in one line ("" of a whole dataset known by name). Validation
    images are those of a folder, else those that the file's training held out.

    Raises DataError for a split that is not there.
    """
    check_name(asked.dataset)
    folder = _folder(asked)
    held = held_out(member) if asked.dataset.name == _dataset_of(member) else None
    dataset = asked.dataset
    if folder is not None:
        data, dataset = _split_of_folder(asked, folder, member, part, held)
    else:
        if part == "validation" and held is None:
            raise DataError(
                f"{dataset.name}: no validation images: training held none out (--val-split)"
            )
        data = _named(asked, "test" if part == "test" else "train")
    data = _readable({part: data}, asked, scan=False)[part]
    if part != "test" and held is not None and not _own_validation(folder):
        rest, validation = hold_out(data, *held)
        data = rest if part == "train" else validation
        _check_held(validation, len(rest) if part == "train" else None, asked, member)
    told = _told({part: data}, data.classes, folder) if folder else []
    return data, dataset, "".join(told)


def _check_held(validation: Data, rest: int | None, asked: Request, member: Member) -> None:
    """Raises IncompatibleError unless these are the images that the training held out, and the
    ``rest`` as many: other training images may give another draw, of which some were trained on."""
    found = member.provenance.get("data")
    told = found if isinstance(found, dict) else {}
    same = told.get(FINGERPRINT) == fingerprint(validation, asked.data_dir)
    if not same or rest not in (None, told.get("train_images")):
        raise IncompatibleError(
            f"{asked.data_dir or asked.dataset.name}: its training images are not those that the "
            "file was trained on, so what was held out of them cannot be told; bring them as they "
            "were, or evaluate on --split test"
        )


def _own_validation(folder: Folder | None) -> bool:
    """True if validation images lie beside the test images, and so were not held out."""
    return folder is not None and {"test", "validation"} <= set(folder.splits)


def _split_of_folder(
    asked: Request, folder: Folder, member: Member, part: Part, held: tuple[str, int] | None
) -> tuple[Data, DatasetSpec]:
    names = asked.known if asked.known and not asked.any_classes else folder.classes
    chosen = part
    if part == "test":
        # a file that was tested on a test folder is not tested on validation images instead
        strict = member.dataset is not None and member.dataset.test_split == "test"
        strict = strict and _dataset_of(member) == "folder"
        if strict and "test" not in folder.splits and "validation" in folder.splits:
            raise DataError(
                f"{folder.root}: no test images: the file was tested on a test folder, so "
                f"{folder.splits['validation'].where} is not taken for one; bring it, or evaluate "
                "on --split validation"
            )
        chosen = test_part(folder)
    elif part == "validation" and not _own_validation(folder) and held is not None:
        chosen = "train"
    data = folder_data(folder, chosen, asked.look, names, asked.device, asked.workers)
    return data, asked.dataset.model_copy(update={"test_split": chosen})


def _dataset_of(member: Member) -> str | None:
    return None if member.dataset is None else member.dataset.name


def check_classes(found: Sequence[str], asked: Request) -> None:
    """Raises IncompatibleError for a dataset whose classes have other names than the file's."""
    known = asked.known
    if not known or not found or tuple(found) == known or asked.any_classes:
        return
    at = next((i for i, (a, b) in enumerate(zip(found, known, strict=False)) if a != b), None)
    if at is None:
        how = f"{len(found)} of them, the file {len(known)}"
    else:
        how = f"class {at} is {found[at]!r}, of the file {known[at]!r}"
    raise IncompatibleError(
        f"{asked.dataset.name} has other classes than the file was made for ({how}); choose its "
        "dataset, or pass --any-classes to go by their numbers"
    )


def open_outside(asked: Request) -> tuple[Data, str]:
    """Images of other things, whose classes do not matter: a dataset's test split, a folder's if it
    has splits, else all images of the folder; and what was found."""
    check_name(asked.dataset)
    if asked.dataset.name != "folder":
        return _named(asked, "test"), ""
    if asked.data_dir is not None and not has_splits(asked.data_dir):
        data: Data = open_images(
            find_images([asked.data_dir]), asked.look, asked.device, asked.workers
        )
        where = "all in the folder"
    else:
        folder = _folder(asked)
        assert folder is not None
        data = folder_data(
            folder, test_part(folder), asked.look, folder.classes, asked.device, asked.workers
        )
        where = data.where
    data = _readable({"test": data}, asked, scan=False)["test"]
    return data, f"{asked.data_dir}: {len(data):,} images ({where})"


# --- images that cannot be read ------------------------------------------------------------------


def _readable(found: dict[str, Data], asked: Request, *, scan: bool) -> dict[str, Data]:
    """The splits, without the images that cannot be read if that was asked for. Raises DataError
    naming all of them if not. Without ``scan`` they are looked for only if they are to be skipped:
    an evaluation tells them itself."""
    if not scan and not asked.skip_bad:
        return found
    files = {
        name: data for name, data in found.items() if isinstance(data, Streamed) and data.paths
    }
    if (count := sum(map(len, files.values()))) >= MANY:
        asked.say(f"checking {count:,} images")
    bad = {name: unreadable(data.paths, data.spec) for name, data in files.items()}
    if not any(bad.values()):
        return found
    if not asked.skip_bad:
        paths = [path for name in bad for path in found[name].paths]
        refuse(list(_shifted(bad.items(), found)), paths)
    return {name: _without(data, bad.get(name, []), name) for name, data in found.items()}


def _shifted(bad: Iterable[tuple[str, list[Failure]]], found: dict[str, Data]) -> Iterable[Failure]:
    """The failures of several splits, counted through."""
    start = 0
    for name, failures in bad:
        yield from (replace(one, index=one.index + start) for one in failures)
        start += len(found[name].paths)


def _without(data: Data, failures: Sequence[Failure], name: str) -> Data:
    gone = {one.index for one in failures}
    rest = [index for index in range(len(data)) if index not in gone]
    if not rest:
        raise DataError(f"none of the {len(data):,} {name} images can be read")
    kept = data.subset(rest)
    kept.skipped = len(gone)
    return kept
