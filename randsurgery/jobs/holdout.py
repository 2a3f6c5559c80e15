"""Training images that are held out to validate on, and how they are known again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from randsurgery.errors import DataError, UsageError
from randsurgery.format.canonical import canonical_json, digest
from randsurgery.format.generator import permutation
from randsurgery.format.recipe import Member
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.training.data import Data
from randsurgery.training.scan import identity

HELD_OUT = "held out of train"
"""Where held-out validation images come from, for people."""


def hold_out(train: Data, share: str, seed: int) -> tuple[Data, Data]:
    """The training images without a share of each class, and that share: floor(share * n) images,
    one at least, drawn by the seed.

    Raises UsageError for a share outside (0, 1), DataError for classes of one image.
    """
    part = parse_share(share)
    labels = train.labels
    if labels is None:
        raise DataError(
            "--val-split needs to know the training images' classes, which this dataset tells only "
            "image by image; use a dataset with validation images of its own"
        )
    held: list[int] = []
    for label in np.unique(labels).tolist():
        files = _files(train, np.flatnonzero(labels == label).tolist())
        if len(files) < 2:
            name = train.classes[label] if label < len(train.classes) else str(label)
            raise DataError(
                f"--val-split takes images of each class, but class {name} has {len(files)} "
                "training image; 2 are needed"
            )
        order = permutation(len(files), seed=seed, stream=f"validation-{label}")
        chosen = order[: max(1, int(part * len(files)))].tolist()
        held += [index for at in chosen for index in files[at]]
    rest = np.setdiff1d(np.arange(len(labels)), held)
    validation = train.subset(sorted(held), HELD_OUT)
    validation.skipped = 0  # it is told of the training images
    return train.subset(rest.tolist()), validation


def parse_share(text: str) -> Fraction:
    """``--val-split`` as an exact number. Raises UsageError outside (0, 1)."""
    share = parse_fraction(text, "--val-split")
    if share == 1:
        raise UsageError("--val-split must be below 1: it would leave nothing to train on")
    return share


def _files(data: Data, indices: Sequence[int]) -> list[list[int]]:
    """Images by the file that they are: links to one image are on one side, or it would be trained
    on and validated on."""
    if not data.paths:
        return [[index] for index in indices]
    found: dict[tuple[int, ...] | str, list[int]] = {}
    for index in indices:
        path = data.paths[index]
        found.setdefault(identity(path) if os.path.exists(path) else path, []).append(index)
    return list(found.values())


def fingerprint(data: Data, root: str | None) -> str:
    """What tells a set of images from others: of files, their paths below ``root`` and their
    classes; else their labels in order."""
    labels = [] if data.labels is None else data.labels.tolist()
    if not data.paths:
        return digest(canonical_json([len(data), labels]))
    rows = sorted(
        [os.path.relpath(path, root).replace(os.sep, "/"), data.classes[label]]
        for path, label in zip(data.paths, labels, strict=True)
    )
    return digest(canonical_json(rows))


def held_out(member: Member) -> tuple[str, int] | None:
    """The share of the training images that a member's training held out, and the seed of the
    draw, as its provenance says."""
    settings = member.provenance.get("settings")
    if not isinstance(settings, dict):
        return None
    share, seed = settings.get("val_split"), settings.get("val_seed", 0)
    if (
        not isinstance(share, str)
        or not isinstance(seed, int)
        or isinstance(seed, bool)
        or seed < 0
    ):
        return None
    return share, seed
