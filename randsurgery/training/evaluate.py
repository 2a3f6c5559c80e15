"""Accuracy and loss of a module on a split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.utils import AverageMeter
from torch import nn
from torch.nn import functional as F

from randsurgery.errors import DataError
from randsurgery.training.data import Data


@dataclass(frozen=True)
class Evaluation:
    """Shares in [0, 1], mean cross entropy in nats, number of images."""

    accuracy: float
    top5_accuracy: float
    loss: float
    images: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no NaN or infinity, so such a loss is None."""
        return {**asdict(self), "loss": self.loss if math.isfinite(self.loss) else None}


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

    Raises DataError if the labels exceed the network's classes.
    """
    was_training = model.training
    model.eval()
    losses, images_seen, first, fifth, at = AverageMeter(), 0, 0, 0, 0
    for images, labels in data.evaluation(batch_size):
        if chosen is not None:
            here = torch.from_numpy(chosen[at : at + len(labels)]).to(labels.device)
            at += len(labels)
            images, labels = images[here], labels[here]
            if not len(labels):
                continue
        with autocast(images.device, amp):
            logits = model(images)
        logits = logits.float() / temperature
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"the dataset has label {int(labels.max())}, the network {logits.shape[1]} classes"
            )
        count = len(labels)
        losses.update(float(F.cross_entropy(logits, labels)), count)
        # counted, not averaged: the shares are exact and independent of the batch size
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        images_seen, first, fifth = (
            images_seen + count,
            first + int(best[:, 0].sum()),
            fifth + int(best.sum()),
        )
        if on_batch is not None:
            on_batch(count)
    model.train(was_training)
    seen = max(images_seen, 1)
    return Evaluation(first / seen, fifth / seen, losses.avg, images_seen)


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
