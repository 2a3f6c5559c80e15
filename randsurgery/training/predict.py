"""What a module says of each image of a split."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from randsurgery.errors import IncompatibleError
from randsurgery.surgery.ensembles import Ensemble
from randsurgery.training.data import Data
from randsurgery.training.evaluate import autocast, evaluating
from randsurgery.training.images import Failure


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, best first, with their probabilities (softmax).

    ``index``: the image's in the split. ``label``: -1 if there is none. ``uncertainty``: of an
    ensemble, entropy and mutual information in nats, and the share of members that disagree.
    """

    index: int
    label: int
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]
    uncertainty: tuple[float, float, float] | None = None


@torch.inference_mode()
def predict(
    model: nn.Module | Ensemble,
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
    with evaluating(model):
        for part in data.parts(batch_size):
            yield from part.failures
            if not part.indices:
                continue
            with autocast(part.images.device, amp):
                order, shares, unsure = _ranked(model, part.images, temperature, top)
            rows = zip(
                part.indices, part.labels.tolist(), order.tolist(), shares.tolist(), unsure,
                strict=True,
            )  # fmt: skip
            for index, label, classes, probabilities, uncertainty in rows:
                if math.isnan(probabilities[0]):
                    yield Failure(index, "the network's output is not a number")
                else:
                    yield Prediction(
                        index, label, tuple(classes), tuple(probabilities), uncertainty
                    )


Unsure = list[tuple[float, float, float] | None]
Ranked = tuple[torch.Tensor, torch.Tensor, Unsure]
"""Classes and probabilities of B images, both (B, top), and each one's uncertainty, if known."""


def _ranked(
    model: nn.Module | Ensemble, images: torch.Tensor, temperature: float, top: int
) -> Ranked:
    if isinstance(model, Ensemble):
        found = model.predict(images)
        said = found.probabilities.float().cpu()
        columns = (found.entropy, found.mutual_information, found.disagreement)
        unsure: Unsure = [(h, i, d) for h, i, d in torch.stack(columns, dim=1).tolist()]
        order = said.sort(descending=True, stable=True).indices[:, :top]
        return order, said.gather(1, order), unsure
    logits = model(images)
    if logits.ndim != 2:
        raise IncompatibleError(
            f"the network gives outputs of shape {list(logits.shape)}, expected [images, classes]"
        )
    logits = logits.float().cpu() / temperature
    # shares may be equal where logits are not
    order = logits.sort(descending=True, stable=True).indices[:, :top]
    return order, logits.softmax(dim=1).gather(1, order), [None] * len(logits)
