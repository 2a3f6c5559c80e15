"""Which images a network sees: dataset, preprocessing, device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch

from randsurgery.errors import IncompatibleError, UsageError, reason
from randsurgery.format.checkpoint import Checkpoint
from randsurgery.format.generator import permutation
from randsurgery.format.recipe import Member, Recipe
from randsurgery.format.specs import DatasetSpec, InputSpec, ModelSpec
from randsurgery.jobs.holdout import fingerprint
from randsurgery.jobs.sources import SourceSpec, architecture_name
from randsurgery.jobs.splits import Request, check_classes, open_for_evaluation
from randsurgery.surgery.architectures import ArgValue, build_meta, check_name, spec_of
from randsurgery.surgery.initialisers import parse_fraction
from randsurgery.training.catalogue import input_for, shown_as
from randsurgery.training.data import Data
from randsurgery.training.folders import Part


@dataclass(frozen=True)
class DataOptions:
    """What the user said of the data. None: recorded in the file, else the dataset's default.
    ``say``: told of what takes a while."""

    dataset: str | None = None
    data_dir: str | None = None
    download: bool = False
    num_classes: int | None = None
    img_size: int | None = None
    in_chans: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    any_classes: bool = False
    skip_bad: bool = False
    say: Callable[[str], None] = field(default=lambda _: None, compare=False)

    @property
    def folder(self) -> str | None:
        """``data_dir``, with ~ as the shell has it."""
        return None if self.data_dir is None else os.path.expanduser(self.data_dir)

    def request(
        self,
        dataset: DatasetSpec,
        look: InputSpec,
        device: torch.device,
        workers: int,
        known: tuple[str, ...] | None,
    ) -> Request:
        """What is to be opened. ``known``: the class names of the file that will see it."""
        return Request(
            dataset, look, self.folder, self.download, device, workers, known,
            self.any_classes, self.skip_bad, say=self.say,
        )  # fmt: skip


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA, else Apple's, else the CPU. Raises UsageError for a device not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"unknown --device {name!r}, expected auto, cpu, cuda, cuda:N or mps"
        ) from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = reason(error, 160)
        why = "" if said.startswith("Could not run") else f" ({said})"
        raise UsageError(f"--device {name} is not available here{why}") from None
    return device


def resolve_dataset(
    name: str | None, data_dir: str | None, recorded: DatasetSpec | None
) -> tuple[DatasetSpec, bool]:
    """The dataset: option, else folder, else recorded, else digits; True if digits was fallen
    back on, so that the caller can say so."""
    if name is not None:
        if recorded is not None and name == recorded.name:
            return recorded, False
        return DatasetSpec(name=name), False
    folder = data_dir is not None
    if recorded is not None and not (folder and recorded.name == "digits"):
        return recorded, False
    if folder:
        return DatasetSpec(name="folder"), False
    return DatasetSpec(name="digits"), True


def look_for(source: SourceSpec, dataset: str, options: DataOptions) -> InputSpec:
    """Preprocessing for a network built from an architecture's name."""
    arch = source.name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(check_name(arch), allow_unregistered=True)
    own = {**(cfg.to_dict() if cfg else {}), **source.look}
    return input_for(
        dataset, own, options.img_size, options.in_chans,
        options.crop_pct, options.interpolation,
    )  # fmt: skip


def look_for_file(recipe: Recipe, member: Member, dataset: str, options: DataOptions) -> InputSpec:
    """Preprocessing for a network in a file: the option, else as recorded, else as the dataset
    looks, at the image size the network was built for if it was built for one. Raises
    IncompatibleError for another image size or number of channels than the network takes."""
    assert recipe.model is not None
    name = architecture_name(recipe)
    args = recipe.model.args
    size, channels = args.get("img_size"), args.get("in_chans", 3)
    if options.in_chans not in (None, channels):
        raise IncompatibleError(
            f"--in-chans {options.in_chans}: the file's network takes images of {channels} channels"
        )
    native = native_size(name)
    if size is None and takes_img_size(recipe.model, native + 32):
        size = native
    if isinstance(size, int) and options.img_size not in (None, size):
        raise IncompatibleError(
            f"--img-size {options.img_size}: the file's network was built for {size} pixels"
        )
    if (recorded := recipe.input_of(member)) is not None:
        return shown_as(
            recorded,
            img_size=options.img_size,
            crop_pct=options.crop_pct,
            interpolation=options.interpolation,
        )
    fixed = replace(
        options,
        img_size=options.img_size or (size if isinstance(size, int) else None),
        in_chans=channels if isinstance(channels, int) else None,
    )
    return look_for(SourceSpec(name), dataset, fixed)


def look_facts(look: InputSpec) -> dict[str, Any]:
    """Preprocessing as options say it."""
    return {
        "img_size": look.size[0],
        "in_chans": look.channels,
        "interpolation": look.interpolation,
        "crop_pct": float.fromhex(look.crop),
    }


def native_size(arch: str) -> int:
    """The image size an architecture is built for unless told otherwise, in pixels."""
    cfg = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    return int(cfg.input_size[-1]) if cfg else 224


def takes_img_size(model: ModelSpec, size: int) -> bool:
    """True if the architecture must be told the image size (position embeddings, windows)."""
    try:
        build_meta(model.model_copy(update={"args": {**model.args, "img_size": size}}))
    except IncompatibleError:
        return False
    return True


@dataclass(frozen=True)
class Shown:
    """The images that a file's network is shown. ``split``: which, for people ("test");
    ``fell_back``: digits, since no dataset was given or recorded; ``told``: what was found;
    ``assumed``: what there is to say of the preprocessing where the network's file records none."""

    data: Data
    dataset: DatasetSpec
    split: Part
    fell_back: bool
    told: str
    assumed: str = ""


def open_split(
    checkpoint: Checkpoint,
    member: Member,
    options: DataOptions,
    device: torch.device,
    workers: int,
    part: Part = "test",
) -> Shown:
    """The split that a file's network is shown, with the preprocessing recorded in the file. Raises
    DataError, or IncompatibleError if the dataset has more classes than the network, or others."""
    dataset, fell_back = resolve_dataset(options.dataset, options.data_dir, member.dataset)
    look = look_for_file(checkpoint.recipe, member, dataset.name, options)
    asked = options.request(dataset, look, device, workers, member.classes)
    data, dataset, told = open_for_evaluation(asked, member, part)
    classes = member.head.classes if member.head else 0
    if classes and len(data.classes) > classes:
        raise IncompatibleError(
            f"{dataset.name} has {len(data.classes)} classes, the network {classes}; "
            f"choose another --dataset"
        )
    check_classes(data.classes, asked)
    _check_numbers(data, dataset, member, options)
    assumed = "" if checkpoint.recipe.input_of(member) else assumed_text(data.spec)
    return Shown(data, dataset, part, fell_back, told, assumed)


def _check_numbers(data: Data, dataset: DatasetSpec, member: Member, options: DataOptions) -> None:
    """Raises IncompatibleError for fewer classes than those of a network that names none and has
    not been trained on this dataset: which of its outputs are meant is not known."""
    classes = member.head.classes if member.head else 0
    same = member.dataset is not None and member.dataset.name == dataset.name
    if member.classes or same or options.any_classes or not 0 < len(data.classes) < classes:
        return
    raise IncompatibleError(
        f"{dataset.name} has {len(data.classes)} classes and the network {classes} without names, "
        "so that it is not known which are which; --any-classes takes them by their numbers"
    )


def assumed_text(look: InputSpec) -> str:
    """What there is to say where no preprocessing is recorded."""
    return f"no preprocessing is recorded: using {look_text(look)}"


def look_text(look: InputSpec) -> str:
    """Preprocessing in words."""
    height, width = look.size
    mean, std = (
        ", ".join(f"{float.fromhex(value):.4g}" for value in values)
        for values in (look.mean, look.std)
    )
    return (
        f"{height} x {width} pixels, {look.interpolation}, crop {float.fromhex(look.crop):.4g}, "
        f"mean {mean}, deviation {std}"
    )


def describe(
    checkpoint: Checkpoint,
    look: InputSpec,
    dataset: DatasetSpec | None,
    names: tuple[str, ...],
    classes: int,
) -> Checkpoint:
    """The checkpoint with what its user needs next: input, dataset, class names."""
    member = checkpoint.member()
    labels = names if len(names) == classes else None
    member = member.model_copy(update={"dataset": dataset, "classes": labels})
    recipe = checkpoint.recipe.model_copy(update={"input": look, "members": (member,)})
    return replace(checkpoint, recipe=recipe)


def model_arguments(source: SourceSpec, look: InputSpec, classes: int) -> dict[str, ArgValue]:
    """The architecture's arguments for these images and classes."""
    args: dict[str, ArgValue] = {"num_classes": classes, **source.args}
    if look.channels != 3 or source.checkpoint:  # which may be for others
        args["in_chans"] = look.channels
    arch, size = source.name.partition(".")[0], look.size[0]
    if "img_size" in args or size == native_size(arch):
        return args
    model = spec_of(arch, args)
    # an architecture that takes sizes but not this one is to say so, before any image is read
    if takes_img_size(model, size) or takes_img_size(model, native_size(arch) + 32):
        return {**args, "img_size": size}
    return args


def without_idle_size(source: SourceSpec) -> SourceSpec:
    """The source without an image size that its architecture does not ask for, because it takes
    images of any size."""
    size = source.args.get("img_size")
    if source.is_file or not isinstance(size, int):
        return source
    others = {key: value for key, value in source.args.items() if key != "img_size"}
    arch = check_name(source.name.partition(".")[0])
    model, native = spec_of(arch, others), native_size(arch)
    if takes_img_size(model, size) or takes_img_size(model, native + 32):
        return source
    return replace(source, args=others)


def calibration_images(count: int, share: str, seed: int) -> npt.NDArray[np.intp]:
    """The images of a test split, by index, that a temperature is fitted on."""
    chosen = max(1, int(parse_fraction(share, "--share") * count))
    return permutation(count, seed=seed, stream="calibration")[:chosen]


HELD_OUT_SPLIT = "validation images of training"
"""The split that a temperature was fitted on, where that is no split of the dataset's own."""


CALIBRATED = "calibrated_on"
"""In provenance: what tells the split that a temperature was fitted on from others."""


def fitted(shown: Shown, members: Iterable[Member], root: str | None) -> npt.NDArray[np.bool_]:
    """Which images of a split some member's temperature was fitted on. Shape (N,). A folder is
    known by its images."""
    count, name = len(shown.data), shown.dataset.name
    split = {"test": shown.dataset.test_split, "validation": HELD_OUT_SPLIT}.get(shown.split)
    found, mark = np.zeros(count, dtype=bool), ""
    for member in members:
        known = member.calibration
        if known is None or (known.dataset, known.split) != (name, split):
            continue
        mark = mark or fingerprint(shown.data, root)
        if name != "folder" or member.provenance.get(CALIBRATED) == mark:
            found[calibration_images(count, known.share, known.seed)] = True
    return found


def unfitted(found: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_] | None:
    """The other images; None for all of them, if none was fitted on, and if none is left."""
    return ~found if found.any() and not found.all() else None
