"""How good a classifier's or an ensemble's probabilities are, and how sure it is.

N images, C classes, M members. Probabilities are (N, C), float32 or float64, rows summing to 1;
sums are taken in float64 and, over images, exactly, so that no figure depends on their order.
A label is a class, or -1 for an image without one. Entropies and losses are in nats.

Members come one after another to an ``EnsembleTally``, which keeps the sum of their probabilities
and not the probabilities themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from randsurgery.errors import DataError, IncompatibleError, UsageError

Floats = NDArray[np.floating[Any]]
Doubles = NDArray[np.float64]
Classes = NDArray[np.int32]
Labels = NDArray[np.int64]
Bools = NDArray[np.bool_]

BINS = 15  # of the calibration error; Guo et al. 2017, Table 1
_ELEMENTS = 1 << 18  # of a block of rows: its temporaries stay in the cache


# --- what is reported ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """Figures of one set of probabilities.

    All but ``entropy`` are over the labelled images, and NaN if there are none.

    accuracy   share of images whose likeliest class is the label; of equal ones the lower class
    nll        mean of -log p[label], nats; infinite if one is 0
    brier      mean Brier score, in [0, 2]
    ece        expected calibration error, 15 bins, in [0, 1]
    aurc       area under the risk-coverage curve, in [0, 1]
    entropy    mean entropy, nats, in [0, log C]
    """

    accuracy: float
    nll: float
    brier: float
    ece: float
    aurc: float
    entropy: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; JSON has no NaN or infinity, so such a figure is None."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class EnsembleMetrics:
    """Figures of an ensemble, which says the mean of its members' probabilities.

    images, labelled     how many there are, and how many of them have a label
    ensemble             of the mean probabilities
    members              of each member, by name, in the order they were added
    disagreement         see ``pairwise_disagreement``
    mutual_information   mean of ``mutual_information``, nats
    """

    images: int
    labelled: int
    ensemble: Metrics
    members: Mapping[str, Metrics]
    disagreement: float
    mutual_information: float

    @property
    def mean_accuracy(self) -> float:
        """The mean of the members' accuracies, NaN without labels."""
        return mean(np.array([member.accuracy for member in self.members.values()]))

    def to_json(self) -> dict[str, Any]:
        """Plain values, None for what is not finite."""
        own = {
            "mean_accuracy": self.mean_accuracy,
            "disagreement": self.disagreement,
            "mutual_information": self.mutual_information,
        }
        return {
            "images": self.images,
            "labelled": self.labelled,
            "ensemble": self.ensemble.to_json(),
            "members": {name: member.to_json() for name, member in self.members.items()},
            **_plain(own),
        }


@dataclass(frozen=True)
class PerImage:
    """What an ensemble says of each image.

    labels               (N,) int64, -1 where there is none
    classes              (N,) int32, the likeliest of the mean probabilities
    confidence           (N,) float64, the probability of that class
    entropy              (N,) float64, of the mean probabilities, nats
    mutual_information   (N,) float64, nats
    disagreement         (N,) float64, share of members whose class is another
    member_classes       (M, N) int32
    """

    labels: Labels
    classes: Classes
    confidence: Doubles
    entropy: Doubles
    mutual_information: Doubles
    disagreement: Doubles
    member_classes: Classes


@dataclass(frozen=True)
class EnsembleResult:
    """An ensemble's figures and what they are made of."""

    metrics: EnsembleMetrics
    images: PerImage


@dataclass(frozen=True)
class Separation:
    """How well a score tells unfamiliar images from familiar ones; see ``separation``."""

    auroc: float
    fpr95: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _plain(values: dict[str, float]) -> dict[str, Any]:
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


# --- of each image -------------------------------------------------------------------------------


def top(probabilities: Floats) -> tuple[Classes, Doubles]:
    """The likeliest class (N,), of equal ones the lower, and its probability (N,): the confidence
    of Hendrycks & Gimpel 2017, the "maximum softmax probability"."""
    classes = probabilities.argmax(axis=1).astype(np.int32)
    return classes, chosen(probabilities, classes)


def entropy(probabilities: Floats) -> Doubles:
    """-sum_c p_c log p_c of each row (N,), nats, in [0, log C]; 0 log 0 is 0."""
    p = probabilities.astype(np.float64, copy=False)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    sums: Doubles = np.einsum("nc,nc->n", p, logs)
    return 0.0 - sums  # never -0.0


def log_loss(probabilities: Floats, labels: Labels) -> Doubles:
    """-log p[label] of each row (N,), nats; infinite where p[label] is 0. Its mean is the NLL."""
    with np.errstate(divide="ignore"):
        return -np.log(chosen(probabilities, labels))


def brier(probabilities: Floats, labels: Labels) -> Doubles:
    """sum_c (p_c - [c = label])^2 of each row (N,), in [0, 2] (Brier 1950). Its mean is the Brier
    score."""
    missed = probabilities.astype(np.float64)
    missed[np.arange(len(labels)), labels] -= 1
    squares: Doubles = np.einsum("nc,nc->n", missed, missed)
    return squares


def mutual_information(entropy_of_mean: Doubles, mean_entropy: Doubles) -> Doubles:
    """H(mean_m p_m) - mean_m H(p_m) of each image (N,), nats, in [0, log M]: what the members know
    differently (Depeweg et al. 2018; BALD's quantity). Never negative, but for rounding."""
    return np.maximum(entropy_of_mean - mean_entropy, 0.0)


def disagreement(member_classes: Classes, classes: Classes) -> Doubles:
    """The share (N,) of members (M, N) whose class is not the ensemble's (N,)."""
    share: Doubles = (member_classes != classes).mean(axis=0)
    return share


def chosen(probabilities: Floats, classes: NDArray[Any]) -> Doubles:
    found: Doubles = probabilities[np.arange(len(classes)), classes].astype(np.float64)
    return found


# --- of many images ------------------------------------------------------------------------------


def mean(values: NDArray[Any]) -> float:
    """The mean of (N,) from their exact sum, the same in any order, never -0.0; NaN of none."""
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


def ece(confidence: Doubles, correct: Bools, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, Section 2, equation 3) of (N,) confidences in
    [0, 1]: sum over bins of (images in it / N) |accuracy - mean confidence|. NaN without images.

    Bins are of equal width, ((b - 1) / B, b / B], 0 belonging to the first; 1 is in the last.
    """
    if not len(confidence):
        return math.nan
    inner = np.arange(1, bins) / bins  # each edge correctly rounded, unlike linspace's
    which = np.searchsorted(inner, confidence, side="left")
    gaps = []
    for b in range(bins):
        inside = which == b
        surplus = math.fsum([*confidence[inside].tolist(), -float(correct[inside].sum())])
        gaps.append(abs(surplus))
    return math.fsum(gaps) / len(confidence)


def risk_coverage(confidence: Doubles, correct: Bools) -> tuple[Doubles, Doubles]:
    """The risk-coverage curve (El-Yaniv & Wiener 2010): coverage n / N and risk, the share of
    errors among the n most confident images, for n = 1..N; each (N,).

    Where equal confidences make the n images ambiguous, the risk is the mean over their orders.
    """
    count = len(confidence)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    wrong = np.bincount(group, weights=~correct, minlength=len(sizes))
    first, wrong_before = np.cumsum(sizes) - sizes, np.cumsum(wrong) - wrong
    n = np.arange(1, count + 1)
    at = np.repeat(np.arange(len(sizes)), sizes)
    expected = wrong_before[at] + wrong[at] * (n - first[at]) / sizes[at]
    return n / max(count, 1), expected / n


def aurc(confidence: Doubles, correct: Bools) -> float:
    """Area under the risk-coverage curve (Geifman et al. 2019): the mean of its N risks, in
    [0, 1], lower is better. NaN without images."""
    return mean(risk_coverage(confidence, correct)[1])


def pairwise_disagreement(member_classes: Classes) -> float:
    """The share of images on which two members (M, N) name different classes, averaged over the
    pairs (Fort et al. 2019, without dividing by the error rate). 0 for one member."""
    pairs = list(itertools.combinations(member_classes, 2))
    different = sum(int(np.count_nonzero(one != other)) for one, other in pairs)
    return different / (len(pairs) * member_classes.shape[1]) if pairs else 0.0


def separation(inside: Doubles, outside: Doubles) -> Separation:
    """How well a score that is higher for unfamiliar images separates ``inside`` (N,), the
    in-distribution images, from ``outside`` (M,), the out-of-distribution ones.

    auroc   the share of pairs in which the outside image scores higher, equal ones counting half
            (Hendrycks & Gimpel 2017; outside is the positive class)
    fpr95   the share of outside images taken for inside ones (inside is the positive class) when
            images are accepted up to the lowest score that accepts 95% of the inside ones
            (Liang et al. 2018)

    Raises DataError if either has no images.
    """
    if not len(inside) or not len(outside):
        raise DataError(
            f"separation needs images of both kinds: {len(inside)} in-distribution, "
            f"{len(outside)} out-of-distribution; give a dataset that is not empty"
        )
    scores, pairs = np.sort(inside), len(inside) * len(outside)
    below = int(np.searchsorted(scores, outside, side="left").sum())
    not_above = int(np.searchsorted(scores, outside, side="right").sum())
    accepted = -(-95 * len(inside) // 100)  # rounded up, in whole numbers
    taken = int(np.count_nonzero(outside <= scores[accepted - 1]))
    return Separation((below + not_above) / (2 * pairs), taken / len(outside))


# --- members, one after another ------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """Of each image (N,); log_loss and brier of the labelled ones alone, in their order."""

    classes: Classes
    confidence: Doubles
    entropy: Doubles
    log_loss: Doubles
    brier: Doubles


def check_labels(labels: Labels, classes: int) -> None:
    highest = int(labels.max())
    if highest >= classes:
        raise DataError(
            f"the dataset has label {highest}, the network {classes} classes; give a dataset or a "
            "network whose classes are the other's"
        )


def blocks(count: int, width: int) -> Iterator[slice]:
    """Slices of rows ``width`` wide, so that temporaries stay small."""
    step = max(1, _ELEMENTS // max(width, 1))
    return (slice(start, start + step) for start in range(0, count, step))


def _facts(probabilities: Floats, labels: Labels, divisor: int) -> _Facts:
    """Of probabilities / divisor, which are never held as a whole."""
    found = []
    for rows in blocks(*probabilities.shape):
        p, known = probabilities[rows].astype(np.float64) / divisor, labels[rows] >= 0
        named = labels[rows][known]
        found.append(
            (*top(p), entropy(p), log_loss(p[known], named), brier(p[known], named)),
        )
    return _Facts(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _metrics(facts: _Facts, labels: Labels) -> Metrics:
    known = labels >= 0
    correct, confidence = facts.classes[known] == labels[known], facts.confidence[known]
    return Metrics(
        accuracy=mean(correct),
        nll=mean(facts.log_loss),
        brier=mean(facts.brier),
        ece=ece(confidence, correct),
        aurc=aurc(confidence, correct),
        entropy=mean(facts.entropy),
    )


class EnsembleTally:
    """The figures of an ensemble whose members come one after another.

    It keeps the sum of the probabilities (N, C) in float64, 400 MB for 50,000 images of 1000
    classes, and of each member its classes (N,) and its metrics.
    """

    def __init__(self) -> None:
        self._sum: Doubles = np.zeros((0, 0))
        self._labels: Labels = np.zeros(0, np.int64)
        self._entropy: Doubles = np.zeros(0)
        self._classes: list[Classes] = []
        self._members: dict[str, Metrics] = {}

    def add(self, name: str, probabilities: Floats, labels: Labels | None = None) -> Metrics:
        """Counts a member in and gives its own metrics.

        ``probabilities`` (N, C) are those of the same images, in the same order, for each member;
        so are ``labels`` (N,), None if no image has one. A member that is refused leaves no trace.

        Raises UsageError for a name that was added before, IncompatibleError for another shape
        than the first member's, DataError if there are no images, if a label is no class or not
        the first member's, or if a probability is not a finite number.
        """
        labels = np.full(len(probabilities), -1) if labels is None else labels.astype(np.int64)
        self._check(name, probabilities, labels)
        facts = _facts(probabilities, labels, 1)
        broken = np.flatnonzero(~np.isfinite(facts.entropy))
        if len(broken):
            raise DataError(
                f"member {name!r}: expected probabilities, found NaN or infinity for "
                f"{len(broken)} images, the first number {broken[0]}; leave the member out"
            )
        if not self._members:
            self._sum = np.zeros(probabilities.shape)
            self._labels, self._entropy = labels, np.zeros(len(labels))
        self._sum += probabilities
        self._entropy += facts.entropy
        self._classes.append(facts.classes)
        self._members[name] = _metrics(facts, labels)
        return self._members[name]

    def _check(self, name: str, probabilities: Floats, labels: Labels) -> None:
        if not probabilities.size:
            raise DataError(f"member {name!r}: no images; give a dataset that is not empty")
        check_labels(labels, probabilities.shape[1])
        if not self._members:
            return
        if name in self._members:
            raise UsageError(f"member {name!r} is given twice; name each member once")
        if probabilities.shape != self._sum.shape:
            raise IncompatibleError(
                f"member {name!r} gives {list(probabilities.shape)} images and classes, the first "
                f"member {list(self._sum.shape)}; an ensemble's members share both"
            )
        if not np.array_equal(labels, self._labels):
            raise DataError(
                f"member {name!r} comes with other labels than the first; evaluate all members on "
                "the same images in the same order"
            )

    def result(self) -> EnsembleResult:
        """The figures so far; more members may follow. Raises DataError without a member."""
        members = len(self._members)
        if not members:
            raise DataError("the ensemble has no members; give at least one")
        facts = _facts(self._sum, self._labels, members)
        member_classes = np.stack(self._classes)
        information = mutual_information(facts.entropy, self._entropy / members)
        metrics = EnsembleMetrics(
            images=len(self._labels),
            labelled=int(np.count_nonzero(self._labels >= 0)),
            ensemble=_metrics(facts, self._labels),
            members=dict(self._members),
            disagreement=pairwise_disagreement(member_classes),
            mutual_information=mean(information),
        )
        images = PerImage(
            labels=self._labels,
            classes=facts.classes,
            confidence=facts.confidence,
            entropy=facts.entropy,
            mutual_information=information,
            disagreement=disagreement(member_classes, facts.classes),
            member_classes=member_classes,
        )
        return EnsembleResult(metrics, images)
