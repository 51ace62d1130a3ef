"""Measure what a row puts out: make the keys of its record from its outputs, the float network's, and labels.

What is judged, and by what metric, is decided beforehand (`qt_jax.backends.judging`).
"""

import base64
import zlib

import numpy as np

from qt_jax import metrics
from qt_jax.backends.fidelity import Output, Outputs, count_broken, fidelity, row_slices
from qt_jax.backends.judging import Criterion, by_pixel, logits_of, score, shape_text
from qt_jax.errors import InvalidInput
from qt_jax.records import Record

NO_REFERENCE = "logit_mse, sqnr_db and agreement have no meaning for the reference itself"


def measure(
    criterion: Criterion, outputs: Outputs, reference: Outputs | None, labels: np.ndarray | None
) -> Record:
    """Return the keys of a record that come from outputs.

    Args:
      criterion: What is judged, from `judging.choose`.
      outputs: Outputs of the row; those of `criterion.judged` are read.
      reference: Outputs of the float network on the same samples; None where `outputs` are the reference.
      labels: Labels of the same samples; None without any.

    Returns:
      The metrics, `fidelity`, `status` and `reason`. The status is "invalid" if a shape is wrong or a value
      is not finite.
    """
    about = {
        "metric": criterion.metric,
        "judged": list(criterion.judged),
        "not_judged": list(criterion.not_judged),
        "larger_is_better": criterion.larger_is_better if criterion.metric else None,
    }
    own = {name: outputs[name] for name in criterion.judged}
    wanted = own if reference is None else {name: reference[name] for name in criterion.judged}
    for name, output in own.items():
        if (problem := _problem(name, output, wanted[name])) is not None:
            return about | {"status": "invalid", "reason": problem}
    found: Record = {"status": "ok", "reason": NO_REFERENCE if reference is None else None, "fidelity": None}
    if criterion.kind == "classes":
        assert labels is not None
        found |= _class_metrics(criterion, own, None if reference is None else wanted, labels)
        found |= {"value": found["top1"], "reference_value": found["reference_top1"]}
    elif criterion.kind is not None:
        try:
            found |= score(criterion, own, labels)
        except InvalidInput as error:
            if reference is None:
                raise
            return about | {"status": "invalid", "reason": str(error)}
        found["reference_value"] = score(criterion, wanted, labels)["value"]
        if criterion.kind == "binary" and labels is not None and labels.ndim == 1:
            [output] = own.values()
            found["predictions"] = _packed(np.asarray(output).ravel() > criterion.threshold)
    if reference is not None:
        compared = fidelity(wanted, own)
        found |= _summary(compared, small_parts=criterion.kind is None)
        if other := {it["output"]: it["other_shape"] for it in compared if it["other_shape"]}:
            text = ", ".join(
                f"{name} has another shape for {n} of {len(own[name])} samples" for name, n in other.items()
            )
            found["reason"] = f"{text}, which are not compared"
            if any(n == len(own[name]) for name, n in other.items()):
                found["status"] = "invalid"
    found["n"] = len(next(iter(own.values())))
    return about | found


def _problem(name: str, output: Output, reference: Output) -> str | None:
    """Return what is wrong with an output of a row: its shape, or numbers that are not finite."""
    if isinstance(output, np.ndarray) != isinstance(reference, np.ndarray) or len(output) != len(reference):
        return f"{name} has {shape_text(output)}, expected {shape_text(reference)}"
    shapes = [one.shape for one in (output, reference) if isinstance(one, np.ndarray)]
    if len(set(shapes)) > 1:
        return f"{name} have shape {shapes[0]}, expected {shapes[1]}"
    if (broken := count_broken(output)) > 0:
        return f"{name} of {broken} of {len(output)} images are not finite"
    return None


def _class_metrics(
    criterion: Criterion, outputs: Outputs, reference: Outputs | None, labels: np.ndarray
) -> Record:
    """Return the metrics of a classifier or a segmenter. A classifier's decisions are among them."""
    [name] = criterion.judged
    output = np.asarray(outputs[name])
    wanted = None if reference is None else np.asarray(reference[name])
    if labels.ndim > 1:
        logits, pixels = by_pixel(output, labels)
        floating = None if wanted is None else by_pixel(wanted, labels)[0]
        return metrics.dense_metrics(logits, pixels, floating, criterion.void_label)
    logits = logits_of(output, labels)
    floating = None if wanted is None else logits_of(wanted, labels)
    own = metrics.classification_metrics(logits, labels, floating)
    scores = logits
    if _are_probabilities(logits if floating is None else floating):
        scores = np.log(np.maximum(logits, np.finfo(np.float32).tiny))
        own |= {
            key: value
            for key, value in metrics.classification_metrics(scores, labels).items()
            if key in ("nll", "brier", "ece")
        }
    top1 = own["top1"] if floating is None else float(np.mean(floating.argmax(axis=1) == labels))
    return own | {
        "reference_top1": top1,
        "reliability": _reliability(scores, labels),
        "predictions": _packed(logits.argmax(axis=1)),
    }


def _are_probabilities(outputs: np.ndarray) -> bool:
    """Tell whether all rows of `(n, classes)` are probabilities, which need no softmax."""
    for part in row_slices(outputs):
        rows = outputs[part]
        if rows.min() < 0 or not np.allclose(rows.sum(axis=1, dtype=np.float64), 1, atol=1e-3):
            return False
    return True


def _reliability(logits: np.ndarray, labels: np.ndarray) -> list[list[float | int | None]]:
    """Return `metrics.reliability`, a few samples at a time."""
    parts = row_slices(logits)
    if len(parts) == 1:
        return metrics.reliability(logits, labels)
    sums = np.zeros((3, metrics.BINS))
    for part in parts:
        for place, (n, confidence, accuracy) in enumerate(metrics.reliability(logits[part], labels[part])):
            if n:
                sums[:, place] += n, n * (confidence or 0.0), n * (accuracy or 0.0)
    return [[int(n), p / n, c / n] if n else [0, None, None] for n, p, c in sums.T.tolist()]


def _packed(decisions: np.ndarray) -> str:
    """Return decisions as text: 16-bit integers, compressed, in base 64."""
    return base64.b64encode(zlib.compress(decisions.astype("<u2").tobytes(), 9)).decode()


def _summary(found: list[Record], small_parts: bool) -> Record:
    """Return the keys that stand for all judged outputs: the lowest SQNR and cosine.

    With `small_parts`, the small part of an output counts as an output.
    """
    compared = list(found)
    if small_parts:
        compared += [it["small_part"] for it in found if it["small_part"] is not None]
    ratios = [it["sqnr_db"] for it in compared if it["sqnr_db"] is not None]
    worst = [it["worst_image"]["sqnr_db"] for it in compared if it["worst_image"]["sqnr_db"] is not None]
    cosines = [it["cosine"] for it in compared if it["cosine"] is not None]
    return {
        "fidelity": found,
        "sqnr_db": min(ratios, default=None),
        "cosine": min(cosines, default=None),
        "worst_sqnr_db": min(worst, default=None),
        "logit_mse": found[0]["mse"] if len(found) == 1 else None,
    }
