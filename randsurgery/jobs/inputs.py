"""Which images a network sees: dataset, preprocessing, device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch

from randsurgery.errors import IncompatibleError, UsageError
from randsurgery.format.checkpoint import (
    Checkpoint,
)
from randsurgery.format.recipe import (
    DatasetSpec,
    InputSpec,
)
from randsurgery.jobs.sources import SourceSpec
from randsurgery.surgery.architectures import ArgValue, build_meta, check_name, spec_of
from randsurgery.training.data import Data, open_data
from randsurgery.training.settings import input_for


@dataclass(frozen=True)
class DataOptions:
    """What the user said of the data. None: recorded in the file, else the dataset's default."""

    dataset: str | None = None
    data_dir: str | None = None
    download: bool = False
    num_classes: int | None = None
    img_size: int | None = None
    in_chans: int | None = None


def pick_device(name: str) -> torch.device:
    """``auto``: CUDA, else Apple's, else the CPU. Raises UsageError for a device not there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:160]
        raise UsageError(f"--device {name} is not available here ({reason})") from None
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
    if recorded is not None:
        return recorded, False
    if data_dir is not None:
        return DatasetSpec(name="folder"), False
    return DatasetSpec(name="digits"), True


def look_for(source: SourceSpec, dataset: str, options: DataOptions) -> InputSpec:
    """Preprocessing for a network built from an architecture's name."""
    arch = source.name.partition(".")[0]
    cfg = timm.get_pretrained_cfg(check_name(arch), allow_unregistered=True)
    return input_for(dataset, cfg.to_dict() if cfg else {}, options.img_size, options.in_chans)


def takes_img_size(source: SourceSpec, size: int) -> bool:
    """True if the architecture must be told the image size (position embeddings, windows)."""
    cfg = timm.get_pretrained_cfg(source.name.partition(".")[0], allow_unregistered=True)
    native = cfg.input_size[-1] if cfg else size
    if native == size:
        return False
    try:
        build_meta(spec_of(source.name.partition(".")[0], {**source.args, "img_size": size}))
    except IncompatibleError:
        return False
    return True


def opener(
    dataset: DatasetSpec, look: InputSpec, options: DataOptions, device: torch.device, workers: int
) -> Callable[[Any], Data]:
    def open_split(split: Any) -> Data:
        return open_data(
            dataset,
            look,
            split,
            data_dir=options.data_dir,
            download=options.download,
            device=device,
            workers=workers,
        )

    return open_split


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
    return Checkpoint(recipe, checkpoint.payloads, checkpoint.bases)


def model_arguments(source: SourceSpec, look: InputSpec, classes: int) -> dict[str, ArgValue]:
    args: dict[str, ArgValue] = {"num_classes": classes, **source.args}
    if look.channels != 3:
        args["in_chans"] = look.channels
    if "img_size" not in args and takes_img_size(replace(source, args=args), look.size[0]):
        args["img_size"] = look.size[0]
    return args
