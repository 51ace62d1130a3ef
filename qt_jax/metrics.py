"""Judge logits: against the labels, and against the logits of the float network.

`classification_metrics` judges a classifier, `dense_metrics` a segmenter. Both return the metrics of a record
under a record's keys. The other functions compute one metric each.

Every function takes numpy or jax arrays of any real dtype, computes in numpy float64 and returns Python
numbers. A classifier's logits are `(n, classes)`, its labels `(n,)` integers in [0, classes). A segmenter's
logits are `(n, classes, height, width)`, its labels `(n, height, width)`, and each pixel counts as one
sample. Softmax and its logarithm are those of the shifted logits, so that no logit of float32 overflows. The
class that a network predicts is the one with the largest logit, and among equal logits the one with the
lowest index.

All functions raise InvalidInput for arrays that are empty, of the wrong shape or of the wrong kind, and for
labels out of range. They also refuse logits that are not finite: NaN would compare as wrong and hide a broken
backend. (`dense_metrics` expects finite logits, and does not check them.)
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import ArrayLike

from qt_jax.errors import InvalidInput

BINS = 15
"""Number of confidence bins of the expected calibration error."""

CHUNK_LOGITS = 2**22
"""Number of a segmenter's logits that are judged together: 32 MiB in float64, and a few times that in all."""


def classification_metrics(
    logits: ArrayLike, labels: ArrayLike, reference: ArrayLike | None = None
) -> dict[str, float | int | None]:
    """Return the metrics of a classifier's record, under a record's keys.

    Args:
      logits: `(n, classes)`, of the network or backend under test.
      labels: `(n,)` integers.
      reference: `(n, classes)`, the float network's logits on the same samples.

    Returns:
      n, top1, top5, nll, brier, ece (15 bins), logit_mse, sqnr_db, agreement. None stands for what has no
      value: top5 with fewer than five classes, the last three without a reference, and an infinite sqnr_db,
      because JSON has no infinity. Where sqnr_db is None, logit_mse tells equal logits (0) from a reference
      of zeros.

    >>> metrics = classification_metrics([[2.0, 0.0], [0.0, 1.0]], [0, 0])
    >>> metrics["n"], metrics["top1"], metrics["top5"], metrics["sqnr_db"]
    (2, 0.5, None, None)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    wanted = None if reference is None else np.asarray(reference)
    parts = list(_chunks(logits.shape)) if logits.ndim == 2 and logits.size else []
    if len(parts) < 2:
        return _classifier_part(logits, labels, wanted)
    if wanted is not None and wanted.shape != logits.shape:
        raise InvalidInput(f"reference and test must have one shape, got {wanted.shape} and {logits.shape}")
    _check_labels(labels, *logits.shape)
    found = [
        _classifier_part(logits[part], labels[part], None if wanted is None else wanted[part])
        for part in parts
    ]
    return _joined_parts(found, logits, labels, wanted, parts)


def _classifier_part(
    logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None
) -> dict[str, float | int | None]:
    """Return `classification_metrics` of samples that fit into memory."""
    checked, _ = _labelled(logits, labels)
    ratio = math.inf if reference is None else sqnr_db(reference, logits)
    return {
        "n": len(checked),
        "top1": top_k(logits, labels),
        "top5": top_k(logits, labels, k=5) if checked.shape[1] >= 5 else None,
        "nll": nll(logits, labels),
        "brier": brier(logits, labels),
        "ece": expected_calibration_error(logits, labels),
        "logit_mse": None if reference is None else logit_mse(reference, logits),
        "sqnr_db": ratio if math.isfinite(ratio) else None,
        "agreement": None if reference is None else agreement(reference, logits),
    }


def _joined_parts(
    found: list[dict[str, float | int | None]],
    logits: np.ndarray,
    labels: np.ndarray,
    reference: np.ndarray | None,
    parts: list[slice],
) -> dict[str, float | int | None]:
    """Join the metrics of parts: means by their numbers of samples, ECE from bins, SQNR from sums."""
    sizes = [part["n"] for part in found]
    joined: dict[str, float | int | None] = {
        key: None if found[0][key] is None else float(np.average([it[key] for it in found], weights=sizes))
        for key in ("top1", "top5", "nll", "brier", "logit_mse", "agreement")
    }
    gaps, signal, noise = np.zeros(BINS), 0.0, 0.0
    for part in parts:
        checked, own = _labelled(logits[part], labels[part])
        members, confidence, correct = _confidence_bins(checked, own, BINS)
        gaps += np.bincount(members, weights=correct - confidence, minlength=BINS)
        if reference is not None:
            exact = reference[part].astype(np.float64)
            signal += float((exact**2).sum())
            noise += float(((exact - checked) ** 2).sum())
    ratio = math.inf if reference is None else _decibels(signal, noise)
    joined |= {"ece": float(np.abs(gaps).sum() / len(logits)), "n": len(logits)}
    return joined | {"sqnr_db": ratio if math.isfinite(ratio) else None}


def top_k(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> float:
    """Return the fraction of samples whose label is among the `k` largest logits.

    Among equal logits the class with the lower index ranks first, as in `argmax` and `jax.lax.top_k`. A
    constant network is thus right only on the classes 0 ... k - 1.

    Raises:
      InvalidInput: k is not an int in [1, classes], or for any reason in the module's docstring.

    >>> logits = [[0.1, 0.9, 0.5], [0.3, 0.3, 0.0]]
    >>> top_k(logits, [2, 1]), top_k(logits, [2, 1], k=2)
    (0.0, 1.0)
    """
    logits, labels = _labelled(logits, labels)
    if _positive_int("k", k) > logits.shape[1]:
        raise InvalidInput(f"top-{k} needs at least {k} classes, the logits have {logits.shape[1]}")
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    ties_before = (logits == own) & (np.arange(logits.shape[1]) < labels[:, None])
    rank = (logits > own).sum(axis=1) + ties_before.sum(axis=1)
    return float((rank < k).mean())


def nll(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the negative log-likelihood of the labels in nats, -mean_i log softmax(logits_i)[label_i].

    >>> round(nll([[0.0, 0.0]], [1]), 4)
    0.6931
    """
    logits, labels = _labelled(logits, labels)
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(shifted).sum(axis=1)) - own).mean())


def brier(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the multi-class Brier score, mean_i sum_c (softmax(logits_i)[c] - [c = label_i])^2, in [0, 2].

    This is Brier's own definition (1950). It is summed over the classes, and neither halved nor divided by
    their number, so that two classes give twice the score known from binary tasks.

    >>> brier([[0.0, 0.0]], [1])
    0.5
    """
    logits, labels = _labelled(logits, labels)
    errors = _softmax(logits)
    errors[np.arange(len(labels)), labels] -= 1.0
    return float((errors**2).sum(axis=1).mean())


def _softmax(logits: np.ndarray) -> np.ndarray:
    # The quotient, unlike exp(log-softmax), puts C equal logits at exactly 1 / C, where ECE has bin edges.
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Return the gap between confidence and accuracy, sum_m n_m / n |accuracy_m - confidence_m|, in [0, 1].

    The confidence of a sample is its largest softmax probability. The `bins` are equally wide and closed on
    the right, ((m - 1) / bins, m / bins]. A confidence of exactly 1 is in the last bin, and a confidence on
    an edge in the bin below it. Empty bins count nothing. Guo et al. 2017, "On Calibration of Modern Neural
    Networks".

    Raises:
      InvalidInput: `bins` is not an int of at least 1, or for any reason in the module's docstring.

    >>> expected_calibration_error([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], [1, 1, 1, 0])
    0.25
    """
    logits, labels = _labelled(logits, labels)
    members, confidence, correct = _confidence_bins(logits, labels, bins)
    gaps = np.bincount(members, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _confidence_bins(
    logits: np.ndarray, labels: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the bin, the confidence and the correctness of each sample."""
    bins = _positive_int("bins", bins)
    confidence = _softmax(logits).max(axis=1)
    return _bin(confidence, bins), confidence, logits.argmax(axis=1) == labels


def _bin(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each confidence, counted from 0."""
    upper_edges = np.arange(1, bins + 1) / bins
    return np.searchsorted(upper_edges, confidence, side="left")


def reliability(logits: ArrayLike, labels: ArrayLike, bins: int = BINS) -> list[list[float | int | None]]:
    """Return samples, mean confidence and accuracy of each bin of `expected_calibration_error`.

    Confidence and accuracy are None in an empty bin.

    >>> reliability([[0.0, 0.0], [0.0, 0.0]], [1, 0], bins=2)
    [[2, 0.5, 0.5], [0, None, None]]
    """
    logits, labels = _labelled(logits, labels)
    members, confidence, correct = _confidence_bins(logits, labels, bins)
    counts = np.bincount(members, minlength=bins)
    return _means(counts, *(np.bincount(members, weights=x, minlength=bins) for x in (confidence, correct)))


def _means(
    counts: Iterable[float], confidence: Iterable[float], correct: Iterable[float]
) -> list[list[float | int | None]]:
    """Return [samples, mean confidence, accuracy] of each bin from its sums."""
    return [
        [int(n), float(p / n), float(c / n)] if n else [0, None, None]
        for n, p, c in zip(counts, confidence, correct, strict=True)
    ]


def logit_mse(reference: ArrayLike, test: ArrayLike) -> float:
    """Return the mean squared difference of two arrays of one shape, mean (reference - test)^2.

    >>> logit_mse([[1.0, 2.0]], [[1.0, 4.0]])
    2.0
    """
    reference, test = _pair(reference, test)
    return float(((reference - test) ** 2).mean())


def sqnr_db(reference: ArrayLike, test: ArrayLike) -> float:
    """Return the SQNR in decibels, 10 log10(sum reference^2 / sum (reference - test)^2).

    The signal to quantization-noise ratio is infinite if the two arrays are equal, and minus infinity if only
    the reference is all zeros.

    >>> round(sqnr_db([[3.0, 4.0]], [[3.0, 4.5]]), 9), sqnr_db([[1.0]], [[1.0]])
    (20.0, inf)
    """
    reference, test = _pair(reference, test)
    return _decibels(float((reference**2).sum()), float(((reference - test) ** 2).sum()))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10.0 * (math.log10(signal) - math.log10(noise)) if signal > 0.0 else -math.inf


def agreement(reference: ArrayLike, test: ArrayLike) -> float:
    """Return the fraction of samples on which two `(n, classes)` logits predict the same class.

    >>> agreement([[0.0, 1.0], [2.0, 1.0]], [[0.5, 0.6], [0.0, 1.0]])
    0.5
    """
    reference, test = _pair(_logits("reference", reference), _logits("test", test))
    return float((reference.argmax(axis=1) == test.argmax(axis=1)).mean())


def dense_metrics(
    logits: ArrayLike, labels: ArrayLike, reference: ArrayLike | None = None, void_label: int | None = None
) -> dict[str, float | int | list | None]:
    """Return the metrics of a segmenter's record, under a record's keys.

    Images are judged a few at a time, so that memory does not grow with their number.

    Args:
      logits: Finite, `(n, classes, height, width)`, of the network or backend under test.
      labels: `(n, height, width)` integers in [0, classes), or `void_label`.
      reference: Finite, `(n, classes, height, width)`, the float network's logits on the same images.
      void_label: The label of pixels that have no class, 255 in many data sets. They count in nothing that
        compares with labels. SQNR, MSE and agreement with the reference are over all pixels.

    Returns:
      n (images); top1 (pixel accuracy), nll, brier and ece (15 bins), all over pixels and defined as for
      classifiers; top5 (always None); miou (see `mean_iou`); logit_mse, sqnr_db and agreement (over pixels),
      which are None without a reference, sqnr_db also where it is infinite; reliability, as `reliability`
      with pixels as samples; reference_top1 and reference_miou, of the reference, or of the logits if there
      is none.

    Raises:
      InvalidInput: The shapes do not belong together, labels are not classes, or all are void.

    >>> logits = np.zeros((1, 2, 1, 2)); logits[0, 1] = [[1.0, -1.0]]
    >>> metrics = dense_metrics(logits, np.array([[[1, 1]]]))
    >>> metrics["n"], metrics["top1"], metrics["miou"], metrics["agreement"]
    (1, 0.5, 0.25, None)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    wanted = None if reference is None else np.asarray(reference)
    _check_dense(logits, labels, wanted)
    classes = logits.shape[1]
    sums = _Sums(classes, void_label)
    for part in _chunks(logits.shape):
        sums.add(logits[part], labels[part], None if wanted is None else wanted[part])
    pixels = int(sums.confusion.sum())
    if not pixels:
        raise InvalidInput(f"all labels are the void label {void_label}: there is nothing to compare with")
    confusion = sums.confusion
    of_reference = confusion if reference is None else sums.reference_confusion
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
        "reference_top1": float(np.trace(of_reference) / pixels),
        "reference_miou": mean_iou(of_reference),
        "reliability": _means(counts, confidence, correct),
    }
    if reference is not None:
        found |= {"logit_mse": sums.noise / logits.size, "agreement": sums.agreed / labels.size}
        ratio = _decibels(sums.signal, sums.noise)
        found["sqnr_db"] = ratio if math.isfinite(ratio) else None
    return found


def _check_dense(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> None:
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
    """Slice the images into chunks of at most `CHUNK_LOGITS` logits, but at least one image."""
    size = max(1, CHUNK_LOGITS // math.prod(shape[1:]))
    return (slice(start, start + size) for start in range(0, shape[0], size))


class _Sums:
    """Add up what the metrics need over the pixels seen so far."""

    def __init__(self, classes: int, void_label: int | None = None):
        self.void_label = void_label
        self.confusion, self.reference_confusion = np.zeros((2, classes, classes), np.int64)
        self.bins = np.zeros((3, BINS))
        """Number of pixels, their summed confidence and their correct decisions, for each confidence bin."""
        self.nll = self.brier = self.noise = self.signal = 0.0
        self.agreed = 0

    def add(self, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None) -> None:
        """Add some images."""
        decisions = logits.argmax(axis=1)
        known = np.ones(labels.shape, bool) if self.void_label is None else labels != self.void_label
        if known.any():
            self.confusion += self._counts(decisions, labels, known)
            self._calibration(logits.astype(np.float64), np.where(known, labels, 0), decisions, known)
        if reference is not None:
            wanted = reference.argmax(axis=1)
            if known.any():
                self.reference_confusion += self._counts(wanted, labels, known)
            self.agreed += int((wanted == decisions).sum())
            exact = reference.astype(np.float64)
            self.signal += float((exact**2).sum())
            self.noise += float(((exact - logits) ** 2).sum())

    def _counts(self, decisions: np.ndarray, labels: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Return the confusion matrix of the pixels that have a class."""
        return confusion_matrix(decisions[known], labels[known], len(self.confusion))

    def _calibration(
        self, logits: np.ndarray, labels: np.ndarray, decisions: np.ndarray, known: np.ndarray
    ) -> None:
        """Add to NLL, Brier score and bins. The largest logit shifts the softmax, as for classifiers."""
        shifted = logits - logits.max(axis=1, keepdims=True)
        weights = np.exp(shifted)
        total = weights.sum(axis=1, keepdims=True)
        probabilities = weights / total
        own = labels[:, None].astype(np.int64)
        right = np.take_along_axis(probabilities, own, axis=1)
        losses = (np.log(total) - np.take_along_axis(shifted, own, axis=1))[:, 0]
        scores = (probabilities**2).sum(axis=1) - (2.0 * right - 1.0)[:, 0]
        self.nll += float(losses[known].sum())
        self.brier += float(scores[known].sum())
        confidence = probabilities.max(axis=1)[known]
        members = _bin(confidence, BINS)
        correct = (decisions == labels)[known]
        for row, values in enumerate((None, confidence, correct)):
            self.bins[row] += np.bincount(members, weights=values, minlength=BINS)


def confusion_matrix(decisions: ArrayLike, labels: ArrayLike, num_classes: int) -> np.ndarray:
    """Count how often class j was decided where class i was right.

    Args:
      decisions, labels: Integers in [0, num_classes), of any one shape: one per image, or one per pixel.
      num_classes: Number of classes.

    Returns:
      int64 `(num_classes, num_classes)`, with that count at [i, j].

    >>> confusion_matrix([0, 1, 1], [0, 1, 0], 2).tolist()
    [[1, 1], [0, 1]]
    """
    classes = _positive_int("num_classes", num_classes)
    decisions, labels = _alike(decisions, labels)
    for name, values in (("decisions", decisions), ("labels", labels)):
        if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() >= classes:
            raise InvalidInput(f"{name} must be integers in [0, {classes - 1}], the class indices")
    pairs = classes * labels.ravel().astype(np.int64) + decisions.ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def pixel_accuracy(decisions: ArrayLike, labels: ArrayLike) -> float:
    """Return the fraction of decisions that are right, for integers of any one shape. All pixels count alike.

    >>> pixel_accuracy([[0, 1], [1, 1]], [[0, 1], [0, 1]])
    0.75
    """
    decisions, labels = _alike(decisions, labels)
    return float((decisions == labels).mean())


def miou(decisions: ArrayLike, labels: ArrayLike, num_classes: int) -> float:
    """Return the mean intersection over union of a segmentation: `mean_iou` of its `confusion_matrix`.

    >>> round(miou([[0, 0], [1, 1]], [[0, 1], [1, 1]], num_classes=3), 4)
    0.5833
    """
    return mean_iou(confusion_matrix(decisions, labels, num_classes))


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean over classes of intersection / union, from a confusion matrix (c, c).

    For one class it is TP / (TP + FP + FN). Pixels are summed over the whole test set before they are
    divided, so that the result is not a mean over images. A class that is neither in the labels nor in the
    decisions is left out. A class that is in only one of the two counts 0. Everingham et al. 2015, "The
    PASCAL Visual Object Classes Challenge".

    >>> mean_iou(np.array([[1, 1, 0], [0, 2, 0], [0, 0, 0]])) == (1 / 2 + 2 / 3) / 2
    True
    """
    confusion = _finite("confusion", confusion)
    if confusion.ndim != 2 or len(set(confusion.shape)) != 1 or not confusion.any():
        raise InvalidInput(f"confusion must be a square matrix of counts, got shape {confusion.shape}")
    both = np.diagonal(confusion)
    either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
    present = either > 0
    return float((both[present] / either[present]).mean())


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the area under the ROC curve of a binary score, in [0, 1].

    It is the chance that a sample of class 1 has a higher score than one of class 0, where equal scores count
    half: (R_1 - n_1 (n_1 + 1) / 2) / (n_1 n_0), with R_1 the sum of the mean ranks of class 1 (Mann and
    Whitney 1947).

    Args:
      scores: Real numbers, of any shape.
      labels: 0 or 1 for each score, of the same shape.

    Raises:
      InvalidInput: The shapes differ, a score is not finite, or there are not both classes.

    >>> roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])
    0.75
    """
    values, classes = _finite("scores", scores).ravel(), np.asarray(labels).ravel()
    ones = int(np.count_nonzero(classes))
    zeros = len(classes) - ones
    if classes.shape != values.shape or not ones or not zeros or not np.isin(classes, (0, 1)).all():
        raise InvalidInput(
            f"the area under the ROC curve needs one label, 0 or 1, for each score, and both classes: got "
            f"{len(classes)} labels, {ones} of them not 0, for {len(values)} scores"
        )
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0
    total = float(ranks[places][classes == 1].sum())
    return (total - ones * (ones + 1) / 2.0) / (ones * zeros)


def _labelled(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return logits in float64 and labels in int64, after checking that they belong together."""
    logits, labels = _logits("logits", logits), np.asarray(labels)
    _check_labels(labels, *logits.shape)
    return logits, labels.astype(np.int64)


def _check_labels(labels: np.ndarray, n: int, classes: int) -> None:
    """Raise InvalidInput unless there are `n` labels, integers in [0, classes)."""
    if labels.shape != (n,):
        raise InvalidInput(f"labels must have the shape (n,) = {(n,)}, got {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InvalidInput(f"labels must be integer class indices, got dtype {labels.dtype}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        raise InvalidInput(
            f"{int(outside.sum())} of {labels.size} labels are out of range, the first {labels[outside][0]}: "
            f"with {classes} classes they must be in [0, {classes - 1}]"
        )


def _logits(name: str, values: ArrayLike) -> np.ndarray:
    """Return logits `(n, classes)` in float64."""
    values = _finite(name, values)
    if values.ndim != 2:
        raise InvalidInput(f"{name} must have the shape (n, classes), got {values.shape}")
    return values


def _pair(reference: ArrayLike, test: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays of one shape in float64."""
    reference, test = _finite("reference", reference), _finite("test", test)
    if reference.shape != test.shape:
        raise InvalidInput(f"reference and test must have one shape, got {reference.shape} and {test.shape}")
    return reference, test


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    """Return a non-empty array of finite numbers in float64."""
    try:
        values = np.asarray(values)
        if np.iscomplexobj(values):
            raise TypeError(f"got dtype {values.dtype}")
        values = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} must be an array of real numbers: {error}") from error
    if values.size == 0:
        raise InvalidInput(f"{name} is empty, of shape {values.shape}: there is nothing to measure")
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if nan or infinite:
        raise InvalidInput(
            f"{name}: {nan + infinite} of {values.size} values are not finite ({nan} NaN, {infinite} "
            "infinite); mend the network or the backend that computed them"
        )
    return values


def _alike(decisions: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return two non-empty arrays of one shape."""
    decisions, labels = np.asarray(decisions), np.asarray(labels)
    if decisions.shape != labels.shape or not labels.size:
        shapes = f"{decisions.shape} and {labels.shape}"
        raise InvalidInput(f"decisions and labels must have one shape and not be empty, got {shapes}")
    return decisions, labels


def _positive_int(name: str, value: int) -> int:
    """Return `value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InvalidInput(f"{name} must be an int of at least 1, got {value!r}")
    return int(value)
