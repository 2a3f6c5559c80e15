"""Accuracy and loss of a module on a split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.utils import AverageMeter, accuracy
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
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Top-1 and top-5 accuracy and cross entropy, in evaluation mode.

    Raises DataError if the labels exceed the network's classes.
    """
    was_training = model.training
    model.eval()
    losses, first, fifth = AverageMeter(), AverageMeter(), AverageMeter()
    for images, labels in data.evaluation(batch_size):
        with autocast(images.device, amp):
            logits = model(images)
        logits = logits.float()
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"the dataset has label {int(labels.max())}, the network {logits.shape[1]} classes"
            )
        count = len(labels)
        losses.update(float(F.cross_entropy(logits, labels)), count)
        top1, top5 = accuracy(logits, labels, topk=(1, 5))  # a topk beyond the classes is cut
        first.update(float(top1) / 100, count)
        fifth.update(float(top5) / 100, count)
        if on_batch is not None:
            on_batch(count)
    model.train(was_training)
    return Evaluation(first.avg, fifth.avg, losses.avg, int(losses.count))
