"""Temperature scaling (Guo et al. 2017, Section 4.2) of a classifier or an ensemble."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from randsurgery.errors import DataError
from randsurgery.training.uncertainty import (
    Doubles,
    Floats,
    Labels,
    blocks,
    check_labels,
    chosen,
    mean,
)

HOTTEST = 20.0  # temperatures from 1 / HOTTEST to this are searched


def fit_temperature(logits: Sequence[Floats] | Floats, labels: Labels) -> float:
    """The temperature (Guo et al. 2017, Section 4.2), one for all members, at which the mean of
    their softmax(logits / T) has the least NLL; for one member, ordinary temperature scaling.

    ``logits``: M members' (N, C), as an array (M, N, C) or one by one; ``labels`` (N,), images
    without one are left out. T is in [1/20, 20]. With several members the NLL may have more than
    one valley, so the best of 13 temperatures, of equal ones that nearest to 1, decides which is
    searched, to 1e-5 of T. The NLL found is never above that at T = 1.

    Raises DataError if no image has a label, if a label is no class, or if a logit is not finite.
    """
    from scipy.optimize import minimize_scalar

    if not (labels >= 0).any():
        raise DataError(
            "a temperature is fitted to labelled images, and none has a label; give a dataset with "
            "labels"
        )
    check_labels(labels, logits[0].shape[1])
    if not all(np.isfinite(member).all() for member in logits):
        raise DataError(
            "a temperature is fitted to finite logits, found NaN or infinity; leave the member out"
        )

    def loss(power: float) -> float:
        return mean_nll(logits, labels, HOTTEST**power)

    tried = [i / 6 for i in range(-6, 7)]
    losses = [loss(power) for power in tried]
    best = min(range(13), key=lambda i: (losses[i], abs(tried[i])))
    valley = tried[max(best - 1, 0)], tried[min(best + 1, 12)]
    found = minimize_scalar(loss, bounds=valley, method="bounded", options={"xatol": 3e-6})
    return float(HOTTEST ** (found.x if found.fun < losses[best] else tried[best]))


def mean_nll(logits: Sequence[Floats] | Floats, labels: Labels, temperature: float) -> float:
    """NLL, nats, of the mean of the members' softmax(logits / temperature); shapes as in
    ``fit_temperature``. From logarithms, so that it is finite at every temperature; NaN if no image
    has a label."""
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        return math.nan
    losses = []
    for part in blocks(len(known), logits[0].shape[1]):
        rows = known[part]
        logs = np.stack([_log_softmax_at(m[rows], labels[rows], temperature) for m in logits])
        highest = logs.max(axis=0)
        losses.append(-highest - np.log(np.exp(logs - highest).mean(axis=0)))
    return mean(np.concatenate(losses))


def _log_softmax_at(logits: Floats, labels: Labels, temperature: float) -> Doubles:
    """log softmax(logits / T)[label] of each row (N,)."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled /= temperature
    found = chosen(scaled, labels)
    sums: Doubles = np.exp(scaled, out=scaled).sum(axis=1)
    return found - np.log(sums)
