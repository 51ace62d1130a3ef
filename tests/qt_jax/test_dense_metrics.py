"""Segmentation metrics against those of a classifier on the flattened pixels, and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from qt_jax import metrics
from qt_jax import metrics as dense
from qt_jax.errors import InvalidInput

RNG = np.random.default_rng(0)
LOGITS = (4 * RNG.standard_normal((7, 6, 5, 9))).astype(np.float32)
REFERENCE = (LOGITS + RNG.standard_normal(LOGITS.shape)).astype(np.float32)
LABELS = np.where(RNG.random((7, 5, 9)) < 0.5, REFERENCE.argmax(1), RNG.integers(0, 6, (7, 5, 9)))


def rows(logits):
    return logits.transpose(0, 2, 3, 1).reshape(-1, logits.shape[1])


@pytest.mark.parametrize("values", [1, 600, 2**22])
@pytest.mark.parametrize("reference", [None, REFERENCE])
def test_every_pixel_is_a_sample_of_the_classifiers_metrics(monkeypatch, values, reference):
    monkeypatch.setattr(dense, "VALUES", values)
    found = dense.dense_metrics(LOGITS, LABELS.astype(np.uint8), reference)
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
    assert dense.dense_metrics(LOGITS, LABELS)["miou"] == pytest.approx(wanted, rel=1e-12)


def test_miou_of_small_cases():
    assert metrics.miou([0, 0], [0, 0], 5) == 1.0
    assert metrics.miou([0, 0], [0, 1], 5) == 0.25  # class 1 is in the labels alone: 0
    assert metrics.miou([0, 1], [0, 0], 5) == 0.25  # class 1 is in the decisions alone: 0
    assert metrics.miou([1], [0], 2) == 0.0


def test_pixel_accuracy_is_top1():
    decisions = LOGITS.argmax(1)
    assert metrics.pixel_accuracy(decisions, LABELS) == dense.dense_metrics(LOGITS, LABELS)["top1"]


def test_infinite_ratio_is_none():
    same = dense.dense_metrics(LOGITS, LABELS, LOGITS)
    assert (same["sqnr_db"], same["logit_mse"], same["agreement"]) == (None, 0.0, 1.0)
    assert dense.dense_metrics(LOGITS, LABELS, 0 * LOGITS)["sqnr_db"] is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dense.dense_metrics(LOGITS, LABELS[:, 1:]), r"got \(7, 6, 5, 9\) and \(7, 4, 9\)"),
        (lambda: dense.dense_metrics(rows(LOGITS), LABELS), r"must have the shape \(n, classes, height"),
        (lambda: dense.dense_metrics(LOGITS, LABELS, REFERENCE[1:]), "must have one shape"),
        (lambda: dense.dense_metrics(LOGITS, LABELS + 5), r"labels must be integers in \[0, 5\]"),
        (lambda: metrics.confusion_matrix([0.5], [0], 2), r"decisions must be integers in \[0, 1\]"),
        (lambda: metrics.confusion_matrix([0], [-1], 2), r"labels must be integers in \[0, 1\]"),
        (lambda: metrics.confusion_matrix([], [], 2), "not be empty"),
        (lambda: metrics.confusion_matrix([0], [0], 0), "num_classes must be an int of at least 1"),
        (lambda: metrics.pixel_accuracy([0], [0, 1]), r"one shape and not be empty, got \(1,\) and \(2,\)"),
        (lambda: metrics.mean_iou(np.zeros((2, 3))), r"square matrix of counts, got shape \(2, 3\)"),
        (lambda: metrics.mean_iou(np.zeros((2, 2))), "square matrix of counts"),
    ],
)
def test_wrong_input(call, says):
    with pytest.raises(InvalidInput, match=says):
        call()
