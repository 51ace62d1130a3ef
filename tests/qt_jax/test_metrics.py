"""Check the metrics of classifiers against scikit-learn, and those of segmenters against the former."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from qt_jax import metrics
from qt_jax.errors import InvalidInput


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3.0, size=(200, 7)).astype(np.float32)
    return logits, rng.integers(0, 7, 200)


def logits_of(probabilities):
    return np.log(np.asarray(probabilities, np.float64))


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_equals_sklearn(batch, k):
    logits, labels = batch
    if k == 7:
        assert metrics.top_k(logits, labels, k) == 1.0
    else:
        assert metrics.top_k(logits, labels, k) == sklearn.metrics.top_k_accuracy_score(
            labels, logits.astype(np.float64), k=k, labels=range(7)
        )


def test_top_k_gives_ties_to_the_lower_index():
    constant = np.zeros((4, 4))
    assert [metrics.top_k(constant, np.arange(4), k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert metrics.top_k([[1.0, 2.0, 2.0]], [1]) == 1.0
    assert metrics.top_k([[1.0, 2.0, 2.0]], [2]) == 0.0
    assert metrics.top_k([[1.0, 2.0, 2.0]], [2], k=2) == 1.0


def test_nll_equals_sklearn(batch):
    logits, labels = batch
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    expected = sklearn.metrics.log_loss(labels, probabilities, labels=range(7))
    assert metrics.nll(logits, labels) == pytest.approx(expected, rel=1e-12)


def test_nll_is_stable_for_huge_logits():
    huge = np.array([[1e38, -1e38, 0.0]], np.float32)
    assert metrics.nll(huge, [0]) == 0.0 and math.copysign(1.0, metrics.nll(huge, [0])) == 1.0
    assert metrics.nll(huge, [1]) == pytest.approx(2e38, rel=1e-6)
    assert metrics.brier(huge, [1]) == 2.0
    assert metrics.nll([[1000.0, 1000.0]], [1]) == pytest.approx(math.log(2))


def test_brier_equals_sklearn_and_hand(batch):
    logits, labels = batch
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    expected = sklearn.metrics.brier_score_loss(labels, probabilities, labels=range(7), scale_by_half=False)
    assert metrics.brier(logits, labels) == pytest.approx(expected, rel=1e-12)
    assert metrics.brier(logits_of([[0.7, 0.2, 0.1]]), [1]) == pytest.approx(0.49 + 0.64 + 0.01)
    assert metrics.brier([[100.0, -100.0]], [0]) == pytest.approx(0.0)


def ece_by_hand(logits, labels, bins):
    """Bin by bin, as Guo et al. write it: I_m = ((m - 1) / bins, m / bins]."""
    probabilities = scipy.special.softmax(logits.astype(np.float64), axis=1)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for m in range(1, bins + 1):
        members = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if members.any():
            error += members.mean() * abs(correct[members].mean() - confidence[members].mean())
    return error


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 1000])
def test_ece_equals_a_loop_over_bins(batch, bins):
    logits, labels = batch
    assert metrics.expected_calibration_error(logits, labels, bins) == pytest.approx(
        ece_by_hand(logits, labels, bins), rel=1e-10
    )


def test_ece_by_hand():
    # 0.55 and 0.95 fall in their own bins of ten: (|0 - 0.55| + |1 - 0.95|) / 2; in one bin errors cancel
    logits = logits_of([[0.55, 0.45], [0.05, 0.95]])
    assert metrics.expected_calibration_error(logits, [1, 1], bins=10) == pytest.approx(0.3)
    assert metrics.expected_calibration_error(logits, [1, 1], bins=1) == pytest.approx(0.25)


def test_ece_of_confidence_one_is_in_the_last_bin():
    certain = np.array([[1e4, 0.0], [1e4, 0.0], [0.0, 1e4], [0.0, 1e4]])
    assert metrics.expected_calibration_error(certain, [0, 0, 1, 1]) == 0.0
    assert metrics.expected_calibration_error(certain, [0, 1, 1, 1]) == 0.25
    assert metrics.expected_calibration_error(certain, [1, 1, 0, 0]) == 1.0


def test_ece_puts_an_edge_in_the_bin_below():
    # confidence exactly 1/2 with two bins: below the edge, hence apart from the wrong 0.75
    logits = np.concatenate([np.zeros((1, 2)), logits_of([[0.75, 0.25]])])
    assert metrics.expected_calibration_error(logits, [0, 1], bins=2) == pytest.approx((0.5 + 0.75) / 2)
    assert metrics.expected_calibration_error(logits, [0, 1], bins=1) == pytest.approx(0.125)


@pytest.mark.parametrize("classes", range(2, 50))
def test_equal_logits_have_a_confidence_exactly_on_an_edge(classes):
    # one sample on the edge 1 / classes, right; one just above it, wrong: in two bins they cannot cancel
    logits = np.zeros((2, classes))
    logits[1, 0] = 1e-9
    error = metrics.expected_calibration_error(logits, [0, 1], bins=classes)
    assert error == pytest.approx(0.5, abs=1e-6)


@given(
    st.integers(1, 40), st.integers(2, 9), st.integers(1, 30), st.floats(0.01, 100.0), st.integers(0, 10**6)
)
def test_bounds(n, classes, bins, scale, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(scale=scale, size=(n, classes)), rng.integers(0, classes, n)
    assert 0.0 <= metrics.expected_calibration_error(logits, labels, bins) <= 1.0
    assert 0.0 <= metrics.brier(logits, labels) <= 2.0
    assert metrics.nll(logits, labels) >= 0.0
    accuracies = [metrics.top_k(logits, labels, k) for k in range(1, classes + 1)]
    assert accuracies == sorted(accuracies) and accuracies[-1] == 1.0
    assert accuracies[0] == (logits.argmax(axis=1) == labels).mean()


def test_logit_mse_equals_sklearn(batch):
    logits, _ = batch
    noisy = logits + np.float32(0.1) * np.roll(logits, 1, axis=0)
    expected = sklearn.metrics.mean_squared_error(logits.astype(np.float64), noisy.astype(np.float64))
    assert metrics.logit_mse(logits, noisy) == pytest.approx(expected, rel=1e-12)
    assert metrics.logit_mse(logits, logits) == 0.0


def test_sqnr_in_decibels(batch):
    logits, _ = batch
    reference = logits.astype(np.float64)
    for db in (-10.0, 0.0, 20.0, 60.0):
        assert metrics.sqnr_db(reference, reference * (1 + 10 ** (-db / 20))) == pytest.approx(db, abs=1e-6)
    assert metrics.sqnr_db(reference, reference) == math.inf
    assert metrics.sqnr_db(np.zeros(3), np.zeros(3)) == math.inf
    assert metrics.sqnr_db(np.zeros(3), np.ones(3)) == -math.inf
    assert metrics.sqnr_db(np.ones(3), np.zeros(3)) == 0.0


def test_agreement():
    reference = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    test = np.array([[0.0, 0.1, 0.2], [1.0, 3.0, 2.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    assert metrics.agreement(reference, test) == 0.75


def test_jax_and_low_precision_inputs(batch):
    logits, labels = batch
    expected = metrics.classification_metrics(logits, labels, logits * 2)
    arrays = jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(logits) * 2
    assert metrics.classification_metrics(*arrays) == expected
    half = jnp.asarray(logits, jnp.bfloat16)
    assert metrics.nll(half, labels) == metrics.nll(np.asarray(half.astype(jnp.float32)), labels)
    integers = np.array([[3, 1], [0, 2]], np.int8)
    assert metrics.nll(integers, [0, 1]) == metrics.nll(integers.astype(np.float64), [0, 1])


def test_record_keys(batch):
    logits, labels = batch
    alone = metrics.classification_metrics(logits, labels)
    keys = ["n", "top1", "top5", "nll", "brier", "ece", "logit_mse", "sqnr_db", "agreement"]
    assert list(alone) == keys and alone["n"] == 200
    assert [key for key in keys if alone[key] is None] == ["logit_mse", "sqnr_db", "agreement"]
    compared = metrics.classification_metrics(logits, labels, reference=logits * 1.1)
    assert alone.items() - {(key, None) for key in keys} <= compared.items()
    assert compared["sqnr_db"] == pytest.approx(20 * math.log10(11), rel=1e-5)
    assert compared["logit_mse"] == metrics.logit_mse(logits * 1.1, logits)
    assert compared["agreement"] == 1.0
    assert all(type(value) in (int, float) for value in compared.values())
    assert json.loads(json.dumps(compared, allow_nan=False)) == compared


def test_record_has_no_infinity_and_no_top5_of_few_classes():
    few = metrics.classification_metrics([[1.0, 0.0]], [0], reference=[[1.0, 0.0]])
    assert few["top5"] is None and few["sqnr_db"] is None and few["logit_mse"] == 0.0
    zeros = metrics.classification_metrics([[1.0, 0.0]], [0], reference=[[0.0, 0.0]])
    assert zeros["sqnr_db"] is None and zeros["logit_mse"] == 0.5
    assert metrics.classification_metrics(np.zeros((1, 5)), [4])["top5"] == 1.0


GOOD = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: metrics.top_k(np.zeros(3), [0]), r"logits must have the shape \(n, classes\), got \(3,\)"),
        (lambda: metrics.nll(GOOD, [0, 1, 2]), r"labels must have the shape \(n,\) = \(2,\), got \(3,\)"),
        (lambda: metrics.nll(GOOD, [[0], [1]]), r"labels must have the shape"),
        (lambda: metrics.brier(np.zeros((0, 3)), np.zeros(0, int)), "logits is empty"),
        (lambda: metrics.brier(np.zeros((3, 0)), np.zeros(3, int)), "logits is empty"),
        (lambda: metrics.nll(GOOD, [0.0, 1.0]), "labels must be integer class indices, got dtype float64"),
        (lambda: metrics.nll(GOOD, [-1, 3]), r"2 of 2 labels are out of range, the first -1: .* \[0, 2\]"),
        (
            lambda: metrics.nll([[np.nan, 0.0, np.inf]], [0]),
            r"logits: 2 of 3 values .* \(1 NaN, 1 infinite\)",
        ),
        (lambda: metrics.nll([["a", "b"]], [0]), "logits must be an array of real numbers"),
        (lambda: metrics.nll(GOOD * 1j, [0, 1]), "logits must be an array of real numbers"),
        (lambda: metrics.top_k(GOOD, [0, 1], k=4), "top-4 needs at least 4 classes, the logits have 3"),
        (lambda: metrics.top_k(GOOD, [0, 1], k=0), "k must be an int of at least 1, got 0"),
        (
            lambda: metrics.expected_calibration_error(GOOD, [0, 1], bins=0),
            "bins must be an int of at least 1",
        ),
        (lambda: metrics.expected_calibration_error(GOOD, [0, 1], bins=2.5), "bins must be an int"),
        (lambda: metrics.expected_calibration_error(GOOD, [0, 1], bins=True), "bins must be an int"),
        (lambda: metrics.logit_mse(GOOD, GOOD[:1]), r"must have one shape, got \(2, 3\) and \(1, 3\)"),
        (lambda: metrics.sqnr_db([], []), "reference is empty"),
        (lambda: metrics.sqnr_db([1.0], [np.nan]), "test: 1 of 1 values are not finite"),
        (lambda: metrics.agreement(np.zeros(3), np.zeros(3)), "reference must have the shape"),
        (lambda: metrics.classification_metrics(GOOD, [0, 1], GOOD[:1]), "must have one shape"),
        (lambda: metrics.classification_metrics(GOOD, [0, 5]), "1 of 2 labels are out of range"),
    ],
)
def test_wrong_input_is_refused(call, complaint):
    with pytest.raises(InvalidInput, match=complaint):
        call()


RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.standard_normal((7, 6, 5, 9))).astype(np.float32)
REFERENCE = (LOGITS + RNG.standard_normal(LOGITS.shape)).astype(np.float32)
LABELS = np.where(RNG.random((7, 5, 9)) < 0.5, REFERENCE.argmax(1), RNG.integers(0, 6, (7, 5, 9)))


def rows(logits):
    return logits.transpose(0, 2, 3, 1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize("values", [1, 600, 2**22])
@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_every_pixel_is_a_sample_of_the_classifiers_metrics(monkeypatch, values, reference):
    monkeypatch.setattr(metrics, "CHUNK_LOGITS", values)
    found = metrics.dense_metrics(LOGITS, LABELS.astype(np.uint8), reference)
    other = None if reference is None else rows(reference)
    expected = metrics.classification_metrics(rows(LOGITS), LABELS.ravel(), other)
    for key in ("top1", "nll", "brier", "ece", "logit_mse", "sqnr_db", "agreement"):
        assert found[key] == (None if expected[key] is None else pytest.approx(expected[key], rel=1e-12)), key
    assert (found["n"], found["top5"]) == (7, None)
    bins = metrics.reliability(rows(LOGITS), LABELS.ravel())
    for mine, wanted in zip(found["reliability"], bins, strict=True):
        assert mine == (wanted if wanted[0] == 0 else pytest.approx(wanted, rel=1e-12))
    judge = LOGITS if reference is None else reference
    assert found["reference_top1"] == pytest.approx(metrics.top_k(rows(judge), LABELS.ravel()), rel=1e-12)
    assert found["reference_miou"] == metrics.miou(judge.argmax(1), LABELS, 6)


@pytest.mark.parametrize("classes", [6, 9])
def test_miou_and_confusion_equal_scikit_learn(classes):
    """With 9 classes three are absent from both and do not count."""
    decisions = LOGITS.argmax(1)
    confusion = metrics.confusion_matrix(decisions, LABELS, classes)
    expected = sklearn_confusion(LABELS.ravel(), decisions.ravel(), labels=range(classes))
    np.testing.assert_array_equal(confusion, expected)
    wanted = jaccard_score(LABELS.ravel(), decisions.ravel(), labels=range(6), average="macro")
    assert metrics.miou(decisions, LABELS, classes) == pytest.approx(wanted, rel=1e-12)
    assert metrics.dense_metrics(LOGITS, LABELS)["miou"] == pytest.approx(wanted, rel=1e-12)


def test_miou_of_small_cases():
    assert metrics.miou([0, 0], [0, 0], 5) == 1.0
    assert metrics.miou([0, 0], [0, 1], 5) == 0.25  # class 1 is in the labels alone: 0
    assert metrics.miou([0, 1], [0, 0], 5) == 0.25  # class 1 is in the decisions alone: 0
    assert metrics.miou([1], [0], 2) == 0.0


def test_pixel_accuracy_is_top1():
    decisions = LOGITS.argmax(1)
    assert metrics.pixel_accuracy(decisions, LABELS) == metrics.dense_metrics(LOGITS, LABELS)["top1"]


def test_infinite_ratio_is_none():
    same = metrics.dense_metrics(LOGITS, LABELS, LOGITS)
    assert (same["sqnr_db"], same["logit_mse"], same["agreement"]) == (None, 0.0, 1.0)
    assert metrics.dense_metrics(LOGITS, LABELS, 0 * LOGITS)["sqnr_db"] is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: metrics.dense_metrics(LOGITS, LABELS[:, 1:]), r"got \(7, 6, 5, 9\) and \(7, 4, 9\)"),
        (lambda: metrics.dense_metrics(rows(LOGITS), LABELS), r"must have the shape \(n, classes, height"),
        (lambda: metrics.dense_metrics(LOGITS, LABELS, REFERENCE[1:]), "must have one shape"),
        (lambda: metrics.dense_metrics(LOGITS, LABELS + 5), r"labels must be integers in \[0, 5\]"),
        (lambda: metrics.confusion_matrix([0.5], [0], 2), r"decisions must be integers in \[0, 1\]"),
        (lambda: metrics.confusion_matrix([0], [-1], 2), r"labels must be integers in \[0, 1\]"),
        (lambda: metrics.confusion_matrix([], [], 2), "not be empty"),
        (lambda: metrics.confusion_matrix([0], [0], 0), "num_classes must be an int of at least 1"),
        (lambda: metrics.pixel_accuracy([0], [0, 1]), r"one shape and not be empty, got \(1,\) and \(2,\)"),
        (lambda: metrics.mean_iou(np.zeros((2, 3))), r"square matrix of counts, got shape \(2, 3\)"),
        (lambda: metrics.mean_iou(np.zeros((2, 2))), "square matrix of counts"),
    ],
)
def test_wrong_input_of_segmentation_is_refused(call, says):
    with pytest.raises(InvalidInput, match=says):
        call()
