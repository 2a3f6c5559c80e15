"""Metrics of probabilities against slow twins with loops, known values, order, and refusals."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from randsurgery.errors import DataError, IncompatibleError, UsageError
from randsurgery.training import uncertainty
from randsurgery.training.temperature import HOTTEST, fit_temperature, mean_nll
from randsurgery.training.uncertainty import (
    EnsembleResult,
    EnsembleTally,
    Metrics,
    Separation,
    aurc,
    brier,
    disagreement,
    ece,
    entropy,
    log_loss,
    mean,
    mutual_information,
    pairwise_disagreement,
    risk_coverage,
    separation,
    top,
)

COLDEST = 1 / HOTTEST


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True)


def tally(
    members: np.ndarray | list[np.ndarray], labels: np.ndarray | None = None
) -> EnsembleResult:
    made = EnsembleTally()
    for number, member in enumerate(members):
        made.add(f"m{number}", member, labels)
    return made.result()


def same(one: EnsembleResult, other: EnsembleResult) -> bool:
    """Every figure and every array, to the last bit."""
    arrays = zip(asdict(one.images).values(), asdict(other.images).values(), strict=True)
    return repr(one.metrics) == repr(other.metrics) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays
    )


# --- twins ---------------------------------------------------------------------------------------


def twin_entropy(row: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in row if p > 0)


def twin_class(row: list[float]) -> int:
    best = 0
    for c, p in enumerate(row):
        if p > row[best]:
            best = c
    return best


def twin_ece(confidences: list[float], correct: list[bool], bins: int = 15) -> float:
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i, c in enumerate(confidences) if low < c <= high or (b == 0 and c == 0)]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            confidence = sum(confidences[i] for i in inside) / len(inside)
            total += len(inside) / len(confidences) * abs(accuracy - confidence)
    return total


def twin_risks(confidences: list[float], correct: list[bool]) -> list[float]:
    """The mean curve over every order in which no image follows a less confident one."""
    curves = []
    for order in itertools.permutations(range(len(confidences))):
        if all(confidences[a] >= confidences[b] for a, b in itertools.pairwise(order)):
            wrong = [not correct[i] for i in order]
            curves.append([sum(wrong[:n]) / n for n in range(1, len(order) + 1)])
    return [sum(points) / len(points) for points in zip(*curves, strict=True)]


def twin_metrics(rows: list[list[float]], labels: list[int]) -> Metrics:
    entropies = [twin_entropy(row) for row in rows]
    known = [(row, label) for row, label in zip(rows, labels, strict=True) if label >= 0]
    if not known:
        nan = math.nan
        return Metrics(nan, nan, nan, nan, nan, sum(entropies) / len(rows))
    correct = [twin_class(row) == label for row, label in known]
    confidences = [max(row) for row, _ in known]
    losses = [-math.log(row[label]) if row[label] else math.inf for row, label in known]
    squares = [sum((p - (c == label)) ** 2 for c, p in enumerate(row)) for row, label in known]
    risks = twin_risks(confidences, correct)
    return Metrics(
        accuracy=sum(correct) / len(known),
        nll=sum(losses) / len(known),
        brier=sum(squares) / len(known),
        ece=twin_ece(confidences, correct),
        aurc=sum(risks) / len(known),
        entropy=sum(entropies) / len(rows),
    )


# --- small arrays with ties, zeros and ones ------------------------------------------------------


@st.composite
def ensembles(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (M, N, C) from small whole weights, labels (N,), some perhaps -1."""
    members, images, classes = (draw(st.integers(1, high)) for high in (3, 5, 4))
    row = st.lists(st.integers(0, 3), min_size=classes, max_size=classes).filter(any)
    count = members * images
    weights = np.array(draw(st.lists(row, min_size=count, max_size=count)), np.float64)
    shares = (weights / weights.sum(axis=1, keepdims=True)).reshape(members, images, classes)
    lowest = draw(st.sampled_from([0, -1]))
    label = st.integers(lowest, classes - 1)
    labels = draw(st.lists(label, min_size=images, max_size=images))
    return shares.astype(draw(st.sampled_from([np.float32, np.float64]))), np.array(labels)


scored = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.25, 0.6, 0.9, 1.0]), st.booleans()),
    min_size=1,
    max_size=6,
)


def split(pairs: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([c for c, _ in pairs], np.float64), np.array([r for _, r in pairs], bool)


@settings(max_examples=150, deadline=None)
@given(ensembles())
def test_every_figure_agrees_with_its_twin(case: tuple[np.ndarray, np.ndarray]) -> None:
    members, labels = case
    found = tally(members, labels)
    rows = [[[float(p) for p in row] for row in member] for member in members]
    m, n, c = members.shape
    means = [[sum(rows[k][i][j] for k in range(m)) / m for j in range(c)] for i in range(n)]
    names = labels.tolist()

    assert asdict(found.metrics.ensemble) == near(asdict(twin_metrics(means, names)))
    assert list(found.metrics.members) == [f"m{k}" for k in range(m)]
    twins = [twin_metrics(member, names) for member in rows]
    for member, twin in zip(found.metrics.members.values(), twins, strict=True):
        assert asdict(member) == near(asdict(twin))
    assert found.metrics.mean_accuracy == near(sum(t.accuracy for t in twins) / m)
    assert (found.metrics.images, found.metrics.labelled) == (n, sum(y >= 0 for y in names))

    classes = [[twin_class(row) for row in member] for member in rows]
    chosen = [twin_class(row) for row in means]
    images = found.images
    assert images.labels.tolist() == names
    assert images.classes.tolist() == chosen
    assert images.member_classes.tolist() == classes
    assert images.confidence.tolist() == [max(row) for row in means]
    assert images.entropy.tolist() == near([twin_entropy(row) for row in means])
    for i in range(n):
        inner = sum(twin_entropy(rows[k][i]) for k in range(m)) / m
        assert images.mutual_information[i] == near(twin_entropy(means[i]) - inner)
        others = sum(classes[k][i] != chosen[i] for k in range(m))
        assert images.disagreement[i] == others / m
    pairs = list(itertools.combinations(range(m), 2))
    shares = [sum(classes[a][i] != classes[b][i] for i in range(n)) / n for a, b in pairs]
    assert found.metrics.disagreement == near(sum(shares) / len(pairs) if pairs else 0)
    assert found.metrics.mutual_information == near(images.mutual_information.mean())

    assert images.member_classes.dtype == images.classes.dtype == np.int32
    assert (images.entropy >= 0).all()
    assert (images.mutual_information >= 0).all()
    assert not np.signbit(images.entropy).any()


@settings(deadline=None)
@given(scored, st.integers(1, 20))
def test_the_calibration_error_agrees_with_its_twin(
    pairs: list[tuple[float, bool]], bins: int
) -> None:
    confidence, correct = split(pairs)
    expected = twin_ece(confidence.tolist(), correct.tolist(), bins)
    assert ece(confidence, correct, bins) == near(expected)


@settings(deadline=None)
@given(scored)
def test_the_risk_coverage_curve_is_the_mean_over_the_orders_of_equals(
    pairs: list[tuple[float, bool]],
) -> None:
    confidence, correct = split(pairs)
    coverage, risk = risk_coverage(confidence, correct)
    expected = twin_risks(confidence.tolist(), correct.tolist())
    assert coverage.tolist() == [n / len(pairs) for n in range(1, len(pairs) + 1)]
    assert risk.tolist() == near(expected)
    assert aurc(confidence, correct) == near(sum(expected) / len(expected))


@given(st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_the_mean_is_the_nearest_to_the_exact_one(values: list[float]) -> None:
    assert mean(np.array(values)) == mean(np.array(values[::-1])) == math.fsum(values) / len(values)


# --- known values --------------------------------------------------------------------------------


def test_known_values_of_two_members() -> None:
    one = np.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    two = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = tally([one, two], np.array([0, 1]))
    # the means are (3/4, 1/4, 0) and (1/2, 1/2, 0), whose tie goes to class 0
    three_quarters = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert asdict(found.metrics.ensemble) == near(
        {
            "accuracy": 0.5,
            "nll": -(math.log(0.75) + math.log(0.5)) / 2,
            "brier": (2 / 16 + 2 / 4) / 2,
            "ece": (0.25 + 0.5) / 2,
            "aurc": (0 + 1 / 2) / 2,
            "entropy": (three_quarters + math.log(2)) / 2,
        }
    )
    assert asdict(found.metrics.members["m0"]) == near(
        {"accuracy": 1, "nll": math.log(2) / 2, "brier": 0.25, "ece": 0.25, "aurc": 0,
         "entropy": math.log(2) / 2}
    )  # fmt: skip
    assert found.metrics.members["m1"].nll == math.inf
    assert found.metrics.members["m1"].brier == 1.0
    # wrong and right with confidence 1, either first: (1/2 + 1/2) / 2
    assert found.metrics.members["m1"].aurc == 0.5
    assert found.metrics.mean_accuracy == 0.75
    assert found.metrics.disagreement == 0.5
    assert found.images.disagreement.tolist() == [0, 0.5]
    information = [three_quarters - math.log(2) / 2, math.log(2)]
    assert found.images.mutual_information.tolist() == near(information)
    assert found.metrics.mutual_information == near(sum(information) / 2)


def test_known_values_of_each_image() -> None:
    shares = np.array([[0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0], [0.5, 0, 0, 0.5]], np.float32)
    labels = np.array([3, 1, 0])
    classes, confidence = top(shares)
    assert classes.tolist() == [0, 2, 0]
    assert confidence.tolist() == [0.25, 1, 0.5]
    assert entropy(shares).tolist() == near([math.log(4), 0, math.log(2)])
    assert log_loss(shares, labels).tolist() == near([math.log(4), math.inf, math.log(2)])
    assert brier(shares, labels).tolist() == [0.75, 2, 0.5]
    assert all(a.dtype == np.float64 for a in (confidence, entropy(shares), brier(shares, labels)))


def test_a_certain_and_right_classifier() -> None:
    found = tally([np.eye(4, dtype=np.float32)], np.arange(4)).metrics.ensemble
    assert found == Metrics(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert "-" not in repr(found)  # nor is any figure -0.0


def test_a_network_with_one_class_is_always_right_and_sure() -> None:
    found = tally(np.ones((2, 3, 1)), np.zeros(3, np.int64))
    assert found.metrics.ensemble == Metrics(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert found.metrics.disagreement == found.metrics.mutual_information == 0


def test_confidence_one_shares_the_last_bin() -> None:
    # in (14/15, 1]: mean confidence 0.975, accuracy 0.5; in two bins it would be 0.525
    assert ece(np.array([0.95, 1.0]), np.array([True, False])) == near(0.475)


@pytest.mark.parametrize("bins", [5, 10, 15, 20])  # np.linspace(0, 1, 11)[3] is above 0.3
def test_an_edge_belongs_to_the_bin_below_it(bins: int) -> None:
    right = np.array([True, False])
    for b in range(1, bins):
        below = np.array([b / bins, (b - 0.5) / bins])
        assert ece(below, right, bins) == near(abs(1 - below.sum()) / 2)
        above = np.array([b / bins, np.nextafter(b / bins, 1)])
        assert ece(above, right, bins) == near((1 - above[0] + above[1]) / 2)


def test_one_bin_compares_accuracy_with_mean_confidence() -> None:
    assert ece(np.array([0.0, 0.4, 0.8]), np.array([True, True, False]), bins=1) == near(4 / 15)


def test_known_risk_coverage_curves() -> None:
    confidence = np.array([0.9, 0.8, 0.7, 0.6])
    coverage, risk = risk_coverage(confidence, np.array([True, False, True, False]))
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == near([0, 1 / 2, 1 / 3, 1 / 2])
    _, risk = risk_coverage(np.full(4, 0.5), np.array([True, False, False, False]))
    assert risk.tolist() == near([0.75] * 4)
    best = aurc(confidence, np.array([True, True, True, False]))
    worst = aurc(confidence, np.array([False, True, True, True]))
    assert (best, worst) == near((1 / 16, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4))


def test_of_no_images_a_figure_is_not_a_number() -> None:
    nothing, none = np.zeros(0), np.zeros(0, bool)
    assert math.isnan(mean(nothing))
    assert math.isnan(ece(nothing, none))
    assert math.isnan(aurc(nothing, none))
    assert [len(a) for a in risk_coverage(nothing, none)] == [0, 0]


def test_disagreement_counts_pairs_of_members_and_members_against_the_ensemble() -> None:
    classes = np.array([[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]], np.int32)
    assert pairwise_disagreement(classes) == near((1 / 4 + 3 / 4 + 2 / 4) / 3)
    assert disagreement(classes, np.zeros(4, np.int32)).tolist() == near([0, 2 / 3, 2 / 3, 1 / 3])
    assert pairwise_disagreement(classes[:1]) == 0


def test_mutual_information_is_never_negative_for_rounding() -> None:
    assert mutual_information(np.array([1.0, 2.0]), np.array([1.0 + 1e-15, 0.5])).tolist() == [
        0,
        1.5,
    ]


# --- order, blocks, one member -------------------------------------------------------------------


def drawn(m: int, n: int, c: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random probabilities (M, N, C), rounded so that some confidences are equal, and labels."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(c, 0.3), size=(m, n)).round(2) + 0.01
    shares /= shares.sum(axis=2, keepdims=True)
    return shares.astype(np.float32), rng.integers(-1, c, n)


def test_no_figure_depends_on_the_order_of_images() -> None:
    members, labels = drawn(3, 400, 7)
    order = np.random.default_rng(1).permutation(400)
    found, other = tally(members, labels), tally(members[:, order], labels[order])
    assert repr(found.metrics) == repr(other.metrics)
    assert np.array_equal(found.images.entropy[order], other.images.entropy)
    assert np.array_equal(found.images.classes[order], other.images.classes)


@pytest.mark.parametrize("elements", [1, 7, 100])
def test_blocks_of_rows_change_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    members, labels = drawn(3, 50, 7)
    found, before = tally(members, labels), fit_temperature(np.log(members), labels)
    monkeypatch.setattr(uncertainty, "_ELEMENTS", elements)
    assert same(tally(members, labels), found)
    assert fit_temperature(np.log(members), labels) == before


def test_one_after_another_is_all_at_once() -> None:
    members, labels = drawn(4, 60, 5)
    made = EnsembleTally()
    before: list[EnsembleResult] = []
    for count, member in enumerate(members, 1):
        alone = made.add(f"m{count - 1}", member, labels)
        found = made.result()
        before.append(found)
        assert all(same(r, tally(members[:n], labels)) for n, r in enumerate(before, 1))
        assert alone == found.metrics.members[f"m{count - 1}"]
        assert alone == tally([member], labels).metrics.ensemble
        whole = members[:count].astype(np.float64)
        inner = np.mean([entropy(member) for member in whole], axis=0)
        expected = tally([whole.mean(axis=0)], labels)
        assert asdict(found.metrics.ensemble) == near(asdict(expected.metrics.ensemble))
        assert found.images.mutual_information == near(entropy(whole.mean(axis=0)) - inner)


def test_one_member_is_the_ensemble() -> None:
    members, labels = drawn(1, 40, 5)
    found = tally(members, labels)
    assert found.metrics.members == {"m0": found.metrics.ensemble}
    assert found.metrics.mean_accuracy == found.metrics.ensemble.accuracy
    assert found.metrics.disagreement == found.metrics.mutual_information == 0
    assert not found.images.mutual_information.any()
    assert not found.images.disagreement.any()


def test_members_probabilities_are_not_kept() -> None:
    size, tracing = 2000 * 500 * 8, tracemalloc.is_tracing()  # bytes of the sum, in float64
    tracemalloc.start()
    try:
        made = EnsembleTally()
        member = np.full((2000, 500), 1 / 500, np.float32)
        start = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for number in range(8):
            made.add(f"m{number}", member)
        made.result()
        kept, peak = (value - start for value in tracemalloc.get_traced_memory())
    finally:
        if not tracing:
            tracemalloc.stop()
    assert size <= kept < 1.1 * size
    assert peak < 2.5 * size  # the sum and some blocks, not eight members


def test_what_is_given_is_not_changed() -> None:
    members, labels = drawn(2, 30, 4)
    before = members.copy(), labels.copy()
    found = tally(members, labels)
    fit_temperature(members, labels)
    labels[:] = 0  # nor is it shared
    assert np.array_equal(members, before[0])
    assert np.array_equal(found.images.labels, before[1])


# --- labels --------------------------------------------------------------------------------------

LABELLED = ("accuracy", "nll", "brier", "ece", "aurc")


def test_images_without_labels_have_what_needs_none() -> None:
    members, labels = drawn(3, 30, 4)
    found = tally(members)
    assert same(found, tally(members, np.full(30, -1)))
    assert all(math.isnan(getattr(found.metrics.ensemble, name)) for name in LABELLED)
    assert math.isnan(found.metrics.mean_accuracy)
    assert found.metrics.labelled == 0
    other = tally(members, labels)
    assert found.metrics.ensemble.entropy == other.metrics.ensemble.entropy
    assert found.metrics.mutual_information == other.metrics.mutual_information
    assert found.metrics.disagreement == other.metrics.disagreement
    images = replace(found.images, labels=other.images.labels)
    assert same(replace(other, images=images), other)


def test_metrics_are_those_of_the_labelled_images() -> None:
    members, labels = drawn(3, 60, 4)
    known = labels >= 0
    assert 0 < known.sum() < 60
    found = tally(members, labels).metrics
    other = tally(members[:, known], labels[known]).metrics
    for name in LABELLED:
        assert getattr(found.ensemble, name) == getattr(other.ensemble, name)
    assert found.mean_accuracy == other.mean_accuracy
    assert (found.images, found.labelled) == (60, known.sum())


# --- JSON ----------------------------------------------------------------------------------------


def test_json_holds_plain_values_and_none_for_what_is_not_finite() -> None:
    found = tally([np.eye(2)[[0, 0]], np.full((2, 2), 0.5)], np.array([0, 1])).metrics
    plain = found.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["members"]["m0"] == {
        "accuracy": 0.5, "nll": None, "brier": 1.0, "ece": 0.5, "aurc": 0.5, "entropy": 0.0,
    }  # fmt: skip
    assert plain["ensemble"] == asdict(found.ensemble)
    assert plain["mean_accuracy"] == 0.5
    assert (plain["images"], plain["labelled"]) == (2, 2)
    assert set(plain) == {*asdict(found), "mean_accuracy"}


def test_json_of_unlabelled_images() -> None:
    plain = tally(np.full((2, 3, 2), 0.5)).metrics.to_json()
    json.dumps(plain, allow_nan=False)
    for metrics in (plain["ensemble"], *plain["members"].values()):
        assert [metrics[name] for name in LABELLED] == [None] * 5
    assert plain["mean_accuracy"] is None
    assert plain["ensemble"]["entropy"] == near(math.log(2))
    assert plain["disagreement"] == 0


# --- out of distribution -------------------------------------------------------------------------


def twin_separation(inside: list[float], outside: list[float]) -> Separation:
    wins = sum(1.0 if o > i else 0.5 if o == i else 0.0 for i in inside for o in outside)
    for threshold in sorted(inside):
        if 100 * sum(i <= threshold for i in inside) >= 95 * len(inside):
            break
    taken = sum(o <= threshold for o in outside)
    return Separation(wins / (len(inside) * len(outside)), taken / len(outside))


values = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=60)


@settings(deadline=None)
@given(values, values)
def test_separation_agrees_with_its_twin_and_with_scikit_learn(
    inside: list[float], outside: list[float]
) -> None:
    found = separation(np.array(inside), np.array(outside))
    assert found == twin_separation(inside, outside)
    familiar = np.repeat([1, 0], [len(inside), len(outside)])
    assert roc_auc_score(familiar, [-v for v in inside + outside]) == near(found.auroc)
    fpr, tpr, _ = roc_curve(familiar, [-v for v in inside + outside], drop_intermediate=False)
    assert found.fpr95 == fpr[np.argmax(tpr >= 0.95)]
    assert json.dumps(found.to_json(), allow_nan=False)


def test_known_separations() -> None:
    low, high = np.arange(20.0), np.arange(20.0, 40)
    assert separation(low, high) == Separation(1.0, 0.0)
    assert separation(high, low) == Separation(0.0, 1.0)
    assert separation(low, low) == Separation(0.5, 0.95)
    # nineteen of twenty inside images are accepted, up to the score 18
    assert separation(low, np.array([18.0, 18.5, 19.0, 50.0])).fpr95 == 0.25
    assert separation(np.array([1.0]), np.array([1.0])) == Separation(0.5, 1.0)


def test_separation_needs_images_of_both_kinds() -> None:
    with pytest.raises(DataError, match="0 in-distribution, 2 out-of-distribution"):
        separation(np.zeros(0), np.zeros(2))
    with pytest.raises(DataError, match="2 in-distribution, 0 out-of-distribution"):
        separation(np.zeros(2), np.zeros(0))


# --- temperature ---------------------------------------------------------------------------------


def twin_nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    losses = []
    for i, label in enumerate(labels.tolist()):
        shares = []
        for member in logits.tolist():
            powers = [math.exp((z - max(member[i])) / temperature) for z in member[i]]
            shares.append(powers[label] / sum(powers))
        if label >= 0:
            losses.append(-math.log(sum(shares) / len(shares)))
    return sum(losses) / len(losses)


@settings(max_examples=50, deadline=None)
@given(ensembles(), st.sampled_from([0.05, 0.7, 1.0, 3.0, 20.0]))
def test_the_mean_nll_agrees_with_its_twin(
    case: tuple[np.ndarray, np.ndarray], temperature: float
) -> None:
    logits, labels = case[0] * np.float32(4), case[1]
    found = mean_nll(logits, labels, temperature)
    if (labels >= 0).any():
        assert found == near(twin_nll(logits, labels, temperature))
        powers = np.exp(logits.astype(np.float64) / temperature)
        shares = powers / powers.sum(axis=2, keepdims=True)
        assert found == near(tally(shares, labels).metrics.ensemble.nll)
    else:
        assert math.isnan(found)


def sampled(members: int, images: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits of members that say the same, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(images, 5)) * 3 * temperature
    noise = rng.gumbel(size=logits.shape)
    return np.repeat(logits[None], members, axis=0), (logits / temperature + noise).argmax(axis=1)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.5, 8.0])
def test_a_known_temperature_is_found(members: int, temperature: float) -> None:
    logits, labels = sampled(members, 4000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from([0.5, 2, 8]))
def test_no_temperature_is_better_than_the_one_found(seed: int, members: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(members, 12, 3)) * size
    labels = np.where(rng.random(12) < 0.7, logits.mean(axis=0).argmax(1), rng.integers(0, 3, 12))
    labels[:2] = rng.integers(-1, 3, 2)
    found = fit_temperature(logits, labels)
    least = twin_nll(logits, labels, found)
    assert mean_nll(logits, labels, found) <= mean_nll(logits, labels, 1.0)
    assert COLDEST <= found <= HOTTEST
    for other in (COLDEST, HOTTEST, 1, found * 1.01, found / 1.01, *np.geomspace(0.06, 19, 8)):
        if COLDEST <= other <= HOTTEST:
            assert least <= twin_nll(logits, labels, other) + 1e-9


def test_the_temperature_scales_with_the_logits_and_is_the_same_each_time() -> None:
    logits, labels = sampled(2, 300, 1.0)
    logits[1] += np.random.default_rng(2).normal(size=logits[1].shape)
    found = fit_temperature(logits, labels)
    assert fit_temperature(4 * logits, labels) == pytest.approx(4 * found, rel=1e-4)
    assert fit_temperature(logits, labels) == found
    assert fit_temperature(list(logits), labels) == found  # one by one


def test_images_without_labels_do_not_count_for_the_temperature() -> None:
    logits, labels = sampled(2, 200, 2.0)
    unknown = np.arange(200) % 3 == 0
    found = fit_temperature(logits, np.where(unknown, -1, labels))
    assert found == fit_temperature(logits[:, ~unknown], labels[~unknown])


def test_the_temperature_stays_within_its_bounds() -> None:
    logits = np.array([[[1.0, 0.0], [0.0, 1.0]]])
    assert fit_temperature(logits / 10, np.array([0, 1])) == COLDEST
    assert fit_temperature(logits, np.array([1, 0])) == HOTTEST


def test_where_every_temperature_is_as_good_it_is_one() -> None:
    assert fit_temperature(np.zeros((2, 3, 4)), np.array([0, 1, 2])) == 1
    assert fit_temperature(np.array([[[3.0], [5.0]]]), np.array([0, 0])) == 1
    assert fit_temperature(np.array([[[9e9, 0.0]]]), np.array([0])) == 1


def test_large_logits_overflow_nowhere() -> None:
    logits = np.array([[[1e30, 0.0], [0.0, 1e30]], [[5.0, 1.0], [1.0, 1e30]]], np.float32)
    assert COLDEST <= fit_temperature(logits, np.array([1, 1])) <= HOTTEST


# --- refusals ------------------------------------------------------------------------------------


def test_a_temperature_needs_labels_and_finite_logits() -> None:
    with pytest.raises(DataError, match="none has a label"):
        fit_temperature(np.zeros((1, 2, 3)), np.array([-1, -1]))
    with pytest.raises(DataError, match="none has a label"):
        fit_temperature(np.zeros((1, 0, 3)), np.zeros(0, np.int64))
    with pytest.raises(DataError, match="label 3, the network 3 classes"):
        fit_temperature(np.zeros((1, 2, 3)), np.array([0, 3]))
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(DataError, match="finite logits"):
            fit_temperature(np.array([[[0.0, value]]]), np.array([0]))


def test_a_refused_member_leaves_no_trace() -> None:
    members, labels = drawn(3, 20, 4)
    labels[0] = 1
    made = EnsembleTally()
    with pytest.raises(DataError, match="no members"):
        made.result()
    with pytest.raises(DataError, match="no images"):
        made.add("m0", np.zeros((0, 4)))
    with pytest.raises(DataError, match="label 4, the network 4 classes"):
        made.add("m0", members[0], np.full(20, 4))
    made.add("m0", members[0], labels)
    broken = members[1].copy()
    for value in (math.nan, math.inf):
        broken[7, 2] = value
        with pytest.raises(DataError, match=r"'m1'.*NaN or infinity for 1 images.* 7;"):
            made.add("m1", broken, labels)
    with pytest.raises(UsageError, match="'m0' is given twice"):
        made.add("m0", members[1], labels)
    with pytest.raises(IncompatibleError, match=r"'m1' gives \[20, 5\].*\[20, 4\]"):
        made.add("m1", np.full((20, 5), 0.2), labels)
    with pytest.raises(DataError, match="other labels than the first"):
        made.add("m1", members[1], np.roll(labels, 1))
    with pytest.raises(DataError, match="other labels than the first"):
        made.add("m1", members[1])
    for number in (1, 2):
        made.add(f"m{number}", members[number], labels)
    assert same(made.result(), tally(members, labels))


def test_the_module_needs_numpy_alone_until_it_is_asked_for_more() -> None:
    code = "import sys, randsurgery.training.uncertainty; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded
    assert not loaded & {"torch", "timm", "sklearn", "scipy"}
