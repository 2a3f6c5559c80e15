"""What a module says of each image of a split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from randsurgery.errors import IncompatibleError
from randsurgery.training.data import Data
from randsurgery.training.evaluate import autocast
from randsurgery.training.images import Failure


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first, with their probabilities (softmax).

    ``index``: the image's in the split. ``label``: -1 if there is none.
    """

    index: int
    label: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@torch.inference_mode()
def predict(
    model: nn.Module,
    data: Data,
    *,
    top: int = 5,
    batch_size: int = 256,
    amp: bool = False,
    temperature: float = 1.0,
) -> Iterator[Prediction | Failure]:
    """One result an image, in evaluation mode: the ``top`` likeliest classes, or all if there are
    fewer, of equal ones the lower first. A batch's failures come before its predictions.

    Raises IncompatibleError if the module's outputs are not (B, classes).
    """
    was_training = model.training
    model.eval()
    try:
        for part in data.parts(batch_size):
            yield from part.failures
            if not part.indices:
                continue
            with autocast(part.images.device, amp):
                logits = model(part.images)
            if logits.ndim != 2:
                raise IncompatibleError(
                    f"the network gives outputs of shape {list(logits.shape)}, expected "
                    "[images, classes]"
                )
            logits = logits.float().cpu() / temperature
            # shares may be equal where logits are not
            order = logits.sort(descending=True, stable=True).indices[:, :top]
            shares = logits.softmax(dim=1).gather(1, order)
            rows = zip(
                part.indices, part.labels.tolist(), order.tolist(), shares.tolist(), strict=True
            )
            for index, label, classes, probabilities in rows:
                if math.isnan(probabilities[0]):
                    yield Failure(index, "the network's output is not a number")
                else:
                    yield Prediction(index, label, tuple(classes), tuple(probabilities))
    finally:
        model.train(was_training)
