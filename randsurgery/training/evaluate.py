"""Accuracy and loss of a module on a split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.utils import AverageMeter
from torch import nn
from torch.nn import functional as F

from randsurgery.errors import DataError
from randsurgery.training.data import Data, check_labelled, unlabelled


@dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1], mean cross entropy in nats, number of images; and, image by image, the
    likeliest class ``said`` and the ``labels``, both (N,)."""

    accuracy: float
    top5_accuracy: float
    loss: float
    images: int
    said: npt.NDArray[np.int64] = field(compare=False, repr=False)
    labels: npt.NDArray[np.int64] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The figures; JSON has no NaN or infinity, so such a loss is None."""
        return {
            "accuracy": self.accuracy,
            "top5_accuracy": self.top5_accuracy,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "images": self.images,
        }


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; whatever happens, each part of the module then has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast on the device, or nothing."""
    if not enabled:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 256,
    amp: bool = False,
    temperature: float = 1.0,
    chosen: npt.NDArray[np.bool_] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Top-1 and top-5 accuracy and cross entropy, in evaluation mode, of logits / temperature.
    ``chosen``: which images count, by index; None for all.

    Raises DataError for images without a label, labels that exceed the network's classes, and
    images that cannot be read.
    """
    check_labelled(data)
    losses, fifth, at = AverageMeter(), 0, 0
    said, known = [], []
    with evaluating(model):
        for images, labels in data.evaluation(batch_size):
            start, at = at, at + len(labels)
            if int(labels.min()) < 0:
                missing = torch.nonzero(labels < 0)[:, 0] + start
                raise unlabelled(missing.tolist(), data.paths)
            if chosen is not None:
                here = torch.from_numpy(chosen[start:at]).to(labels.device)
                images, labels = images[here], labels[here]
                if not len(labels):
                    continue
            with autocast(images.device, amp):
                logits = model(images)
            logits = logits.float() / temperature
            if int(labels.max()) >= logits.shape[1]:
                raise DataError(
                    f"the dataset has label {int(labels.max())}, the network {logits.shape[1]} "
                    "classes"
                )
            losses.update(float(F.cross_entropy(logits, labels)), len(labels))
            # counted, not averaged: the shares are exact and independent of the batch size
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            fifth += int((best == labels[:, None]).sum())
            said.append(best[:, 0].cpu().numpy())
            known.append(labels.cpu().numpy().astype(np.int64))
            if on_batch is not None:
                on_batch(len(labels))
    if not known:
        raise DataError("the dataset has no images")
    first, every = np.concatenate(said), np.concatenate(known)
    right, count = int((first == every).sum()), len(every)
    return Evaluation(right / count, fifth / count, losses.avg, count, first, every)


@torch.inference_mode()
def outputs(
    run: Callable[[torch.Tensor], torch.Tensor],
    data: Data,
    *,
    batch_size: int = 256,
    amp: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """What ``run`` says of every image of a split, (..., images, classes), and the labels.

    ``run``: a module in evaluation mode, or members at once, with an axis of members before the
    images. Raises DataError for an image that cannot be read.
    """
    found, labels = [], []
    for images, known in data.evaluation(batch_size):
        with autocast(images.device, amp):
            said = run(images)
        found.append(said.float().cpu().numpy())
        labels.append(known.cpu().numpy().astype(np.int64))
        if on_batch is not None:
            on_batch(len(known))
    if not found:
        raise DataError("the dataset has no images")
    return np.concatenate(found, axis=-2), np.concatenate(labels)
