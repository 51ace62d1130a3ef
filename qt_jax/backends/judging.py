"""Judge what a network puts out: against labels, if there are any, and against the float network.

`choose` finds out from the outputs of the float network and the labels what can be compared, `score` computes
the metric. Both serve the harness and the diagnosis.

==================================  ======================  ===============================================
labels                              output                  metric
==================================  ======================  ===============================================
none                                any                     none: fidelity to the float network alone
`(n,)` integers                     `(n, classes)`          top-1 and what `classification_metrics` gives
`(n, ...)` integers                 `(n, classes, ...)`     the same by pixel, and mIoU (`dense_metrics`)
0 or 1, of the output's shape       float                   accuracy, and area under the ROC curve
integers, of the output's shape     integers                accuracy: the share of equal elements
floats, of the output's shape       float                   mean absolute error
anything                            any                     a metric of the user's own
==================================  ======================  ===============================================

Axes of one element at the end of an output do not count.
"""

import hashlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax import metrics
from qt_jax.backends.fidelity import Output, Outputs, row_slices, small_part
from qt_jax.errors import InvalidInput
from qt_jax.records import Record

Metric = Callable[[Mapping[str, Output], np.ndarray | None], float]
"""A metric of the user's own: maps the judged outputs by name, and the labels as they were given (None
without labels), to one number. Larger is better, unless the function has an attribute `larger_is_better` that
is False."""

MOST_RANKED = 2**22
"""Number of binary labels up to which the area under the ROC curve is computed, which sorts them all."""


@dataclass(frozen=True)
class Criterion:
    """Say what of a network is judged, and by what.

    Attributes:
      kind: "classes", "binary", "equal", "error" or "own"; None without labels.
      metric: The metric's name in a record; None without labels.
      judged: Names of the outputs that are judged.
      not_judged: Names of the others.
      own: The user's metric; None for another kind.
      void_label: The label of pixels without a class; None if there is no such label.
      threshold: Score from which on a binary output decides for class 1.
    """

    kind: str | None
    metric: str | None
    judged: tuple[str, ...]
    not_judged: tuple[str, ...] = ()
    own: Metric | None = None
    void_label: int | None = None
    threshold: float = 0.0

    @property
    def larger_is_better(self) -> bool:
        """Tell whether a larger value of the metric is better."""
        return self.kind != "error" and bool(getattr(self.own, "larger_is_better", True))


class Choice(NamedTuple):
    """Hold how a network is judged, what looks wrong with it or its labels, and what else is to be said."""

    criterion: Criterion
    warnings: list[str]
    notes: list[str]


def plain_labels(labels: np.ndarray) -> np.ndarray:
    """Return labels `(n, 1)` or `(n, 1, height, width)` without the second axis, and bools as integers.

    >>> plain_labels(np.array([[True], [False]]))
    array([1, 0])
    """
    if labels.ndim in (2, 4) and labels.shape[1] == 1:
        labels = labels[:, 0]
    return labels.astype(np.int64) if labels.dtype.kind == "b" else labels


def load_metric(metric: str | Metric) -> Metric:
    """Return a metric: the callable itself, or the one that "module:function" names.

    Raises:
      InvalidInput: There is no such function.

    >>> load_metric("math:hypot").__name__
    'hypot'
    """
    if not isinstance(metric, str):
        if not callable(metric):
            raise InvalidInput(f"metric {metric!r} is not callable: give a function of outputs and labels.")
        return metric
    module, _, name = metric.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(
            f"The metric {metric!r} cannot be loaded ({error}): give module:function, with a module that "
            "Python finds from here."
        ) from error
    if not callable(found):
        raise InvalidInput(f"The metric {metric!r} is not a function.")
    return found


def metric_name(metric: str | Metric) -> str:
    """Return the name of a metric in records, "module:function".

    >>> metric_name(math.hypot), metric_name("math:hypot")
    ('math:hypot', 'math:hypot')
    """
    if isinstance(metric, str):
        return metric
    return f"{getattr(metric, '__module__', '')}:{getattr(metric, '__qualname__', type(metric).__name__)}"


def metric_key(metric: str | Metric) -> str:
    """Return what decides the values of a metric: its name, its code, and the file of its module."""
    function: Any = load_metric(metric)
    code = getattr(function, "__code__", None)
    parts = [metric_name(metric), repr(getattr(function, "larger_is_better", True))]
    if code is not None:
        closed = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        parts += [code.co_code.hex(), repr(code.co_consts), repr(closed)]
    with suppress(TypeError, OSError):
        parts.append(Path(inspect.getfile(function)).read_text(encoding="utf-8"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def choose(
    reference: Outputs,
    labels: np.ndarray | None,
    *,
    metric: str | Metric | None = None,
    void_label: int | None = None,
    left_out: Sequence[str] = (),
) -> Choice:
    """Find out how the outputs of a network are judged.

    Args:
      reference: Outputs of the float network.
      labels: What the data set holds as labels, `(n, ...)`; None if nothing.
      metric: A metric of the user's own, or its name.
      void_label: The label of pixels without a class.
      left_out: Names of outputs that the user or the harness has left out before.

    Returns:
      The criterion, warnings and notes. Where the labels fit several outputs, all are judged by their
      fidelity, and a note says so.

    Raises:
      InvalidInput: The labels fit no output.
    """
    names = tuple(reference)
    if metric is not None:
        own = Criterion("own", metric_name(metric), names, tuple(left_out), own=load_metric(metric))
        return Choice(own, [], [])
    if labels is None:
        return Choice(Criterion(None, None, names, tuple(left_out)), [], _small_notes(reference))
    if void_label is not None and labels.ndim == 1:
        raise InvalidInput(
            "--void-label is for labels of pixels, and there is one label per image: leave it out."
        )
    if _is_one_hot(labels):
        raise InvalidInput(
            f"Labels of shape {labels.shape} hold a single 1 in each row: give the class of each sample, as "
            "labels.argmax(axis=1) gives it."
        )
    kinds = {name: _kind(output, labels) for name, output in reference.items()}
    fitting, notes = _fitting(kinds, reference, labels, void_label)
    if not fitting:
        raise InvalidInput(_no_fit(reference, labels))
    if len(fitting) > 1:
        notes += _small_notes(reference)
        return Choice(Criterion(None, None, names, tuple(left_out)), [], notes)
    [name] = fitting
    kind = kinds[name]
    others = tuple(other for other in names if other != name)
    title = {"classes": "top1", "binary": "accuracy", "equal": "accuracy", "error": "mean_error"}[str(kind)]
    threshold = 0.5 if kind == "binary" and _within_unit(np.asarray(reference[name])) else 0.0
    chosen = Criterion(kind, title, (name,), (*others, *left_out), void_label=void_label, threshold=threshold)
    if kind == "classes":
        _check_classes(np.asarray(reference[name]), labels, void_label)
    return Choice(chosen, _warnings(chosen, reference, labels), notes)


def _fitting(
    kinds: Mapping[str, str | None], reference: Outputs, labels: np.ndarray, void_label: int | None
) -> tuple[list[str], list[str]]:
    """Return the outputs that the labels may be meant for, and what is to be said if there were several.

    An output with too few classes is not meant. Of several, one with just as many classes as the labels is.
    """
    known = labels if void_label is None else labels[labels != void_label]
    needed = int(known.max(initial=0)) + 1
    classes = {name: np.shape(reference[name])[1] for name, kind in kinds.items() if kind == "classes"}
    named = [name for name, kind in kinds.items() if kind is not None]
    if len(named) < 2:
        return named, []
    enough = [name for name in named if classes.get(name, needed) >= needed] or named
    exact = [name for name in enough if classes.get(name) == needed]
    if len(enough) == 1:
        return enough, []
    if len(exact) == 1:
        others = ", ".join(name for name in enough if name != exact[0])
        return exact, [
            f"The labels fit the outputs {exact[0]} and {others}. {exact[0]} is judged by them, since it has "
            "as many classes as they have. Choose another with --output."
        ]
    listed = " and ".join((", ".join(enough[:-1]), enough[-1]))
    return enough, [
        f"The labels fit the outputs {listed}, so none is judged by them: choose one with --output. All are "
        "compared with the float network."
    ]


def _are_bits(labels: np.ndarray) -> bool:
    """Tell whether all labels are 0 or 1."""
    if labels.dtype.kind == "f":
        return bool(np.isin(labels, (0, 1)).all())
    return bool(labels.size and labels.min() >= 0 and labels.max() <= 1)


def _are_both(labels: np.ndarray) -> bool:
    """Tell whether there are labels of both classes, and few enough for the area under the ROC curve."""
    return bool(labels.any() and not labels.all()) and labels.size <= MOST_RANKED


def _is_one_hot(labels: np.ndarray) -> bool:
    """Tell whether labels `(n, classes)` mark one class for each sample."""
    if labels.ndim != 2 or labels.shape[1] < 2 or not _are_bits(labels):
        return False
    return bool((labels.sum(axis=1) == 1).all())


def _no_fit(reference: Outputs, labels: np.ndarray) -> str:
    shapes = ", ".join(f"{name} {shape_text(it)}" for name, it in reference.items())
    return (
        f"Labels of {labels.dtype} {labels.shape} fit none of the float model's outputs: {shapes}. Classes "
        "need an output (n, classes) and integers (n,). Other labels need the output's own shape. Leave the "
        "labels out to compare with the float network alone, or give --metric module:function."
    )


def shape_text(output: Output) -> str:
    """Write the type and the shape of an output."""
    if isinstance(output, np.ndarray):
        return f"{output.dtype} {output.shape}"
    return f"{output[0].dtype}, of a shape that varies"


def _kind(output: Output, labels: np.ndarray) -> str | None:
    """Return how an output can be compared with labels; None if it cannot."""
    if not isinstance(output, np.ndarray) or output.dtype.kind not in "biuf":
        return None
    integers, floats = labels.dtype.kind in "biu", output.dtype.kind == "f"
    own, wanted = _trimmed(output.shape, labels.ndim), labels.shape
    if integers and labels.ndim > 1 and labels.shape[-1] == 1:
        return _kind(output, labels[..., 0])
    if own == wanted:
        if integers:
            binary = floats and _are_bits(labels)
            return "binary" if binary else None if floats else "equal"
        return "error" if labels.dtype.kind == "f" and floats else None
    shape = _trimmed(output.shape, labels.ndim + 1)
    if floats and integers and shape[:1] + shape[2:] == wanted and len(shape) > 1:
        if shape[1] > 1:
            return "classes"
        return "binary" if _are_bits(labels) else None
    if labels.dtype.kind == "f" and floats and labels.ndim > 1 and labels.shape[-1] == 1:
        return _kind(output, labels[..., 0])
    return None


def _trimmed(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Drop axes of one element from the end of a shape, but keep `rank` axes."""
    while len(shape) > rank and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _within_unit(output: np.ndarray) -> bool:
    return bool(output.min() >= 0 and output.max() <= 1)


def _check_classes(logits: np.ndarray, labels: np.ndarray, void_label: int | None) -> None:
    """Raise InvalidInput for labels that are not classes of the logits."""
    classes = logits.shape[1]
    known = labels if void_label is None else labels[labels != void_label]
    outside = (known < 0) | (known >= classes)
    if not known.size:
        raise InvalidInput(f"All labels are the void label {void_label}: there is nothing to compare with.")
    if outside.any():
        first = known[outside][0]
        remedy = (
            f" If {first} marks pixels without a class, give --void-label {first}." if labels.ndim > 1 else ""
        )
        raise InvalidInput(
            f"{int(outside.sum())} of {labels.size} labels are out of range, the first {first}: with "
            f"{classes} classes they must be in [0, {classes - 1}].{remedy}"
        )


def constant_outputs(reference: Outputs) -> list[str]:
    """Return a warning for each output that is the same for all samples.

    >>> constant_outputs({"y": np.ones((3, 2))})[0][:44]
    'The float network puts out the same y for al'
    """
    return [
        f"The float network puts out the same {name} for all {len(output)} test samples, so that its figures "
        "say nothing. Check its weights and how the samples are scaled."
        for name, output in reference.items()
        if isinstance(output, np.ndarray) and len(output) > 1 and _is_constant(output)
    ]


def _is_constant(output: np.ndarray) -> bool:
    return all(bool((output[part] == output[:1]).all()) for part in row_slices(output))


def _warnings(criterion: Criterion, reference: Outputs, labels: np.ndarray) -> list[str]:
    """Return what looks wrong with the float network or the labels."""
    found = []
    output = np.asarray(reference[criterion.judged[0]])
    if criterion.kind in ("classes", "binary", "equal") and labels.size > 1 and len(labels) > 1:
        known = labels if criterion.void_label is None else labels[labels != criterion.void_label]
        if (known == known.flat[0]).all():
            found.append(
                f"All test labels are {known.flat[0]}: an accuracy says nothing then. Shuffle the data set "
                "before taking its first images."
            )
            return found
    if criterion.kind == "classes" and labels.ndim == 1:
        right = float(np.mean(logits_of(output, labels).argmax(axis=1) == labels))
        chance = 1 / output.shape[1]
        if right <= chance + 2 * math.sqrt(chance * (1 - chance) / len(labels)):
            found.append(
                f"The float network itself is right on {100 * right:.1f} % of {len(labels)} images, which "
                f"cannot be told from chance ({100 * chance:.1f} %). Check that the images are scaled and "
                "laid out as in training, and the order of the classes."
            )
    if criterion.kind == "binary" and _are_both(labels):
        area = metrics.roc_auc(output, labels)
        ones, zeros = int(np.sum(labels != 0)), int(np.sum(labels == 0))
        if area <= 0.5 + 2 * math.sqrt((ones + zeros + 1) / (12 * ones * zeros)):
            found.append(
                f"The float network's area under the ROC curve is {area:.2f}, which cannot be told from "
                "chance (0.50). Check that the images are scaled and laid out as in training, and what label "
                "1 means."
            )
    return found


def logits_of(output: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return logits as `(n, classes)`, or for labels of pixels with four axes."""
    if labels.ndim == 1:
        return output.reshape(output.shape[:2])
    return output.reshape(*output.shape[:2], 1, -1) if labels.ndim != 3 else output.reshape(output.shape[:4])


def score(criterion: Criterion, outputs: Outputs, labels: np.ndarray | None) -> Record:
    """Return `value`, the metric of the outputs. A binary criterion has `accuracy`, `auc`, `threshold` too.

    Raises:
      InvalidInput: The user's metric fails or gives no finite number.
    """
    if criterion.kind == "own":
        return {"value": _own(criterion, outputs, labels)}
    assert labels is not None
    output = np.asarray(outputs[criterion.judged[0]])
    if criterion.kind == "classes":
        if labels.ndim == 1:
            return {"value": float(np.mean(logits_of(output, labels).argmax(axis=1) == labels))}
        return {
            "value": metrics.dense_metrics(*by_pixel(output, labels), void_label=criterion.void_label)["top1"]
        }
    output = output.reshape(labels.shape)
    if criterion.kind == "error":
        total = sum(float(np.abs(output[p].astype(np.float64) - labels[p]).sum()) for p in row_slices(output))
        return {"value": total / output.size}
    if criterion.kind == "equal":
        return {"value": float(np.mean(output == labels))}
    accuracy = float(np.mean((output > criterion.threshold) == labels.astype(bool)))
    return {
        "value": accuracy,
        "accuracy": accuracy,
        "auc": metrics.roc_auc(output, labels) if _are_both(labels) else None,
        "threshold": criterion.threshold,
    }


def _own(criterion: Criterion, outputs: Outputs, labels: np.ndarray | None) -> float:
    assert criterion.own is not None
    try:
        given = {
            name: it.copy() if isinstance(it, np.ndarray) else [one.copy() for one in it]
            for name, it in outputs.items()
        }
        value = float(criterion.own(given, None if labels is None else labels.copy()))
    except Exception as error:
        raise InvalidInput(
            f"The metric {criterion.metric} fails: {type(error).__name__}: {error}. It is called with the "
            "judged outputs by name and the labels."
        ) from error
    if not math.isfinite(value):
        raise InvalidInput(f"The metric {criterion.metric} gives {value}: it must give a finite number.")
    return value


def by_pixel(output: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits of pixels, and labels of the same pixels."""
    logits = logits_of(output, labels)
    return logits, labels.reshape(len(labels), *logits.shape[2:])


def _small_notes(reference: Outputs) -> list[str]:
    """Name the outputs that have small parts."""
    sentences = []
    for name, output in reference.items():
        if (found := small_part(output)) is not None:
            axis, slices = found
            sentences.append(
                f"The output {name} has parts of very different size: {len(slices)} of "
                f"{np.shape(output)[axis]} slices along axis {axis} ({_ranges(slices)}) are over 30 dB below "
                "the largest. They are compared by themselves too, and the lower SQNR counts."
            )
    return sentences


def _ranges(places: list[int]) -> str:
    """Write sorted integers briefly.

    >>> _ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
