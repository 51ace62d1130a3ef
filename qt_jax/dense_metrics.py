"""What a segmenter's logits are judged by: the metrics of a classifier over all pixels, and mean IoU.

Each pixel counts as one sample of `qt_jax.metrics.classification_metrics`, with the same definitions and in
float64. Images are taken a few at a time, so that memory does not grow with their number.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from qt_jax.errors import InvalidInput
from qt_jax.metrics import confusion_matrix, mean_iou

BINS = 15
VALUES = 2**22
"""Logits that are looked at together: 32 MiB in float64, and a few times that in all."""


def dense_metrics(
    logits: ArrayLike, labels: ArrayLike, reference: ArrayLike | None = None
) -> dict[str, float | int | list | None]:
    """The metrics of a record of segmentation, under a record's keys.

    Args:
      logits: finite, `(n, classes, height, width)`, of the network or backend under test.
      labels: `(n, height, width)` integers in [0, classes).
      reference: finite, `(n, classes, height, width)`, the float network's logits on the same images.

    Returns:
      n (images); top1 (pixel accuracy), nll, brier, ece (15 bins), all over pixels; top5 (always None);
      miou (see `metrics.mean_iou`); logit_mse, sqnr_db and agreement (over pixels), None without a
      reference, sqnr_db also where it is infinite; reliability, as `metrics.reliability` with pixels as
      samples; reference_top1 and reference_miou, of the reference, or of the logits where there is none.

    Raises:
      InvalidInput: shapes that do not belong together, labels that are no classes.

    >>> logits = np.zeros((1, 2, 1, 2)); logits[0, 1] = [[1.0, -1.0]]
    >>> metrics = dense_metrics(logits, np.array([[[1, 1]]]))
    >>> metrics["n"], metrics["top1"], metrics["miou"], metrics["agreement"]
    (1, 0.5, 0.25, None)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    wanted = None if reference is None else np.asarray(reference)
    _check(logits, labels, wanted)
    classes = logits.shape[1]
    sums = _Sums(classes)
    for part in _chunks(logits.shape):
        sums.add(logits[part], labels[part], None if wanted is None else wanted[part])
    pixels = labels.size
    confusion = sums.confusion
    floating = confusion if reference is None else sums.reference_confusion
    counts, confidence, correct = sums.bins
    found = {
        "n": len(logits),
        "top1": float(np.trace(confusion) / pixels),
        "top5": None,
        "nll": sums.nll / pixels,
        "brier": sums.brier / pixels,
        "ece": float(np.abs(correct - confidence).sum() / pixels),
        "miou": mean_iou(confusion),
        "logit_mse": None,
        "sqnr_db": None,
        "agreement": None,
        "reference_top1": float(np.trace(floating) / pixels),
        "reference_miou": mean_iou(floating),
        "reliability": [
            [int(n), float(p / n), float(c / n)] if n else [0, None, None]
            for n, p, c in zip(counts, confidence, correct, strict=True)
        ],
    }
    if reference is not None:
        found |= {"logit_mse": sums.noise / logits.size, "agreement": sums.agreed / pixels}
        if sums.noise > 0.0 and sums.signal > 0.0:
            found["sqnr_db"] = 10.0 * (math.log10(sums.signal) - math.log10(sums.noise))
    return found


def _check(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> None:
    if logits.ndim != 4 or not logits.size or labels.shape != (len(logits), *logits.shape[2:]):
        raise InvalidInput(
            "logits must have the shape (n, classes, height, width) and labels (n, height, width), got "
            f"{logits.shape} and {labels.shape}"
        )
    if reference is not None and reference.shape != logits.shape:
        raise InvalidInput(
            f"reference and test must have one shape, got {reference.shape} and {logits.shape}"
        )


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of as many images as hold `VALUES` logits, at least one."""
    size = max(1, VALUES // math.prod(shape[1:]))
    return (slice(start, start + size) for start in range(0, shape[0], size))


class _Sums:
    """Sums over the pixels seen so far."""

    def __init__(self, classes: int):
        self.confusion, self.reference_confusion = np.zeros((2, classes, classes), np.int64)
        self.bins = np.zeros((3, BINS))
        """Pixels, their confidence and their correct decisions, by confidence."""
        self.nll = self.brier = self.noise = self.signal = 0.0
        self.agreed = 0

    def add(self, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> None:
        """Some images more."""
        classes = logits.shape[1]
        decisions = logits.argmax(axis=1)
        self.confusion += confusion_matrix(decisions, labels, classes)
        self._calibration(logits.astype(np.float64), labels, decisions)
        if reference is not None:
            wanted = reference.argmax(axis=1)
            self.reference_confusion += confusion_matrix(wanted, labels, classes)
            self.agreed += int((wanted == decisions).sum())
            exact = reference.astype(np.float64)
            self.signal += float((exact**2).sum())
            self.noise += float(((exact - logits) ** 2).sum())

    def _calibration(self, logits: np.ndarray, labels: np.ndarray, decisions: np.ndarray) -> None:
        """NLL, Brier score and bins; the softmax is shifted by the largest logit, as for classifiers."""
        shifted = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=1, keepdims=True)
        probabilities = weights / total
        own = labels[:, None].astype(np.int64)
        right = np.take_along_axis(probabilities, own, axis=1)
        self.nll += float((np.log(total) - np.take_along_axis(shifted, own, axis=1)).sum())
        self.brier += float((probabilities**2).sum() - (2.0 * right - 1.0).sum())
        confidence = probabilities.max(axis=1).ravel()
        edges = np.arange(1, BINS + 1) / BINS
        members = np.searchsorted(edges, confidence, side="left")
        correct = (decisions == labels).ravel()
        for row, values in enumerate((None, confidence, correct)):
            self.bins[row] += np.bincount(members, weights=values, minlength=BINS)
