"""Measure low-bit graphs on one set of samples, and tell gains from chance.

With one label for each image a graph is judged by the images on which it is right. Otherwise it is judged by
the SQNR of its outputs against the float graph, and a metric of the labels is shown beside it. A `Meter`
keeps each measurement in a file, so that nothing is measured twice, not even by a later run.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qt_jax import records
from qt_jax.backends.arrays import scan
from qt_jax.backends.fidelity import Output, small_part
from qt_jax.backends.judging import Criterion, metric_key, score
from qt_jax.backends.protocol import Batch, by_name
from qt_jax.diagnosis.running import tensors
from qt_jax.errors import InvalidInput
from qt_jax.export.storage import model_sha256

LEAST_GAIN_DB = 1.0
"""SQNR in dB by which a remedy must raise that of the whole set to be advised: a fifth of the noise."""

ENOUGH_DB = 40.0
"""SQNR in dB from which on no remedy counts as a gain: the noise is then a hundredth of the outputs."""

LEAST_DB = -300.0
"""SQNR in dB of noise without a signal, and of outputs that are not finite."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Hold what was measured on a set of n images.

    Attributes:
      value: Metric of the labels, such as top-1 in [0, 1]. None without labels.
      sqnr_db: SQNR of the outputs against the reference in dB, the lowest of several outputs. None where they
        are equal.
      cosine: Cosine between outputs and reference, the lowest of several outputs.
      by_image: bool `(n,)`, True for the images whose decision is right. Or float32 `(n,)`, the SQNR of each
        image in dB, infinite where nothing differs.
    """

    value: float | None
    sqnr_db: float | None
    cosine: float
    by_image: np.ndarray

    @property
    def counts(self) -> bool:
        """Tell whether right images are counted, rather than decibels."""
        return self.by_image.dtype == bool

    @property
    def score(self) -> float:
        """Return what remedies are compared by: top-1, or the SQNR in dB; larger is better."""
        if self.counts:
            assert self.value is not None
            return self.value
        return math.inf if self.sqnr_db is None else self.sqnr_db

    @property
    def is_enough(self) -> bool:
        """Tell whether decibels are measured and there are `ENOUGH_DB`."""
        return not self.counts and self.score >= ENOUGH_DB

    @property
    def worst_db(self) -> float | None:
        """Return the lowest SQNR of an image in dB; None where images are counted, or nothing differs."""
        worst = math.inf if self.counts else float(self.by_image.min())
        return worst if math.isfinite(worst) else None


def is_significant_gain(before: Measurement, after: Measurement) -> bool:
    """Tell whether `after` is better than `before` by more than chance explains.

    Images that `after` judges better are won, those that it judges worse are lost. The test is b - c >
    2 sqrt(b + c), for b images won and c lost, at about two standard deviations. Where right images are
    counted this is McNemar's test: won are the images that are right only in `after`. Where decibels are
    measured it is a sign test, and the SQNR of the whole set must also rise by `LEAST_GAIN_DB` below
    `ENOUGH_DB`. Any change passes a sign test on enough images, so it alone would advise changes that nobody
    would notice. The mean alone would advise what helps a few images with large outputs.

    >>> one = Measurement(0.0, None, 1.0, np.zeros(9, bool))
    >>> all_right = Measurement(1.0, None, 1.0, np.ones(9, bool))
    >>> is_significant_gain(one, all_right), is_significant_gain(one, one)
    (True, False)
    """
    won = np.count_nonzero(after.by_image > before.by_image)
    lost = np.count_nonzero(before.by_image > after.by_image)
    gained = min(after.score, ENOUGH_DB) - min(before.score, ENOUGH_DB)
    return bool((before.counts or gained >= LEAST_GAIN_DB) and won - lost > 2.0 * np.sqrt(won + lost))


@dataclasses.dataclass(frozen=True)
class Meter:
    """Measure graphs on one set of images, and keep the measurements.

    Attributes:
      samples: Arrays `(n, ...)` by input, or the array of the only input, as the graphs take them.
      reference: Outputs `(n, ...)` of the float graph whose SQNR is measured, by name.
      kept: JSON-lines file of measurements, keyed by the content of graph and samples. New ones are appended.
      task: Says what is judged, and by which metric of the labels if there are any.
      labels: Labels `(n, ...)`; None without.
      whole: Outputs without a batch axis, of a graph that takes one image at once.
    """

    samples: Batch
    reference: Mapping[str, np.ndarray]
    kept: Path
    task: Criterion
    labels: np.ndarray | None = None
    whole: frozenset[str] = frozenset()

    @property
    def counts(self) -> bool:
        """Tell whether graphs are judged by the images on which they are right."""
        one_each = self.labels is not None and self.labels.ndim == 1
        return one_each and self.task.kind in ("classes", "binary")

    def measure(self, model: onnx.ModelProto, label: str) -> Measurement:
        """Return the measurement of a graph; measure it and keep it as `label` if it is not kept yet."""
        key = self.key(model)
        if key not in self._known:
            found = self._measured(model)
            row = {"key": key, "what": label, "value": found.value, "sqnr_db": found.sqnr_db}
            row |= {"cosine": found.cosine, "n": len(found.by_image)}
            packed = np.packbits(found.by_image) if self.counts else found.by_image
            row["correct" if self.counts else "by_image"] = packed.tobytes().hex()
            if self.task.metric is not None:
                row |= {"metric": self.task.metric, self.task.metric: found.value}
            records.append(self.kept, row)
            self._known[key] = found
        return self._known[key]

    def key(self, model: onnx.ModelProto) -> str:
        """Return the SHA-256 of the graph, the samples, the labels and the reference."""
        return hashlib.sha256(model_sha256(model).encode() + self._data).hexdigest()

    @functools.cached_property
    def _data(self) -> bytes:
        """Return the SHA-256 of the arrays, which do not change between measurements."""
        metric = self.task.metric if self.task.own is None else metric_key(self.task.own)
        about = f"{metric} {self.task.judged} {self.task.void_label} {self._small} "
        digest = hashlib.sha256(about.encode())
        arrays = {**by_name(self.samples, [""]), **{f"output {k}": v for k, v in self.reference.items()}}
        if self.labels is not None:
            arrays["labels of images"] = self.labels
        for name, array in arrays.items():
            digest.update(f"{name} {scan(array).digest} ".encode())
        return digest.digest()

    @functools.cached_property
    def _small(self) -> dict[str, tuple[str, int, list[int]]]:
        """Return output, axis and slices of each small part that is judged by itself, by name."""
        if self.task.kind is not None:
            return {}
        found = {name: small_part(output) for name, output in self.reference.items()}
        return {f"small part of {name}": (name, *part) for name, part in found.items() if part is not None}

    @functools.cached_property
    def _known(self) -> dict[str, Measurement]:
        """Return the measurements that are kept, by key."""
        return {row["key"]: _decoded(row) for row in records.read(self.kept) if "cosine" in row}

    def _measured(self, model: onnx.ModelProto) -> Measurement:
        """Run the graph, and compare its outputs with the reference, batch by batch."""
        labelled = self.task.judged if self.task.metric is not None else ()
        sums: dict[str, list[np.ndarray]] = {name: [] for name in (*self.reference, *self._small)}
        outputs: dict[str, list[np.ndarray]] = {name: [] for name in labelled}
        start = 0
        names = [*self.reference, *labelled]
        for batch in image_outputs(model, names, self.samples, self.whole):
            stop = start + len(next(iter(batch.values())))
            for name, wanted in self.reference.items():
                sums[name].append(power_sums(wanted[start:stop], batch[name], name))
            for part, (name, axis, slices) in self._small.items():
                wanted, output = self.reference[name][start:stop], batch[name]
                small = power_sums(np.take(wanted, slices, axis), np.take(output, slices, axis), name)
                sums[part].append(small)
            start = stop
            for name in labelled:
                outputs[name].append(batch[name])
        by_output = {name: np.concatenate(parts) for name, parts in sums.items()}
        joined = {name: _joined(parts) for name, parts in outputs.items()}
        value = score(self.task, joined, self.labels)["value"] if labelled else None
        return _measurement(by_output, value, self._right(joined) if self.counts else None)

    def _right(self, outputs: Mapping[str, Any]) -> np.ndarray:
        """Return for each image whether the decision is right."""
        assert self.labels is not None
        output = outputs[self.task.judged[0]].reshape(len(self.labels), -1)
        if self.task.kind == "binary":
            return (output[:, 0] > self.task.threshold) == self.labels.astype(bool)
        return output.argmax(axis=1) == self.labels


def image_outputs(
    model: onnx.ModelProto, names: Iterable[str], samples: Batch, whole: Collection[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield outputs by name, each with an axis of images in front, for one batch after another.

    Args:
      model: Graph to run.
      names: Its outputs to yield.
      samples: Arrays `(n, ...)` by input, or the array of the only input.
      whole: Outputs without a batch axis, of a graph that takes one image at once.
    """
    for batch in tensors(model, names, samples, optimize=True):
        yield {name: output[None] if name in whole else output for name, output in batch.items()}


def collected(
    model: onnx.ModelProto, samples: Batch, names: Iterable[str], whole: Collection[str]
) -> dict[str, Output]:
    """Return outputs of all samples by name; the arguments are those of `image_outputs`.

    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
    >>> node = onnx.helper.make_node("Neg", ["x"], ["y"])
    >>> opset = [onnx.helper.make_opsetid("", 17)]
    >>> model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opset)
    >>> collected(model, np.ones((1, 2), np.float32), ["y"], ())["y"].tolist()
    [[-1.0, -1.0]]
    """
    wanted = list(names)
    batches = list(image_outputs(model, wanted, samples, whole))
    return {name: _joined([batch[name] for batch in batches]) for name in wanted}


def _joined(parts: Sequence[np.ndarray]) -> Output:
    """Join the batches of an output; where its size varies, return an array for each image."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    return [image for part in parts for image in part]


def power_sums(reference: np.ndarray, found: np.ndarray, name: str) -> np.ndarray:
    """Return sums over the elements of each image, in float64 `(n, 4)`.

    They are those of reference^2, (reference - found)^2, reference * found and found^2.

    Raises:
      InvalidInput: The two have different shapes, because the size of the output depends on what is seen.

    >>> power_sums(np.float32([[3.0, 4.0]]), np.float32([[3.0, 4.5]]), "logits").tolist()
    [[25.0, 0.25, 27.0, 29.25]]
    """
    if reference.shape != found.shape:
        raise InvalidInput(
            f"The output {name!r} has shape {reference.shape} in the float graph and {found.shape} on low "
            "bits: its size depends on the numbers. Judge outputs before such a selection, with --output."
        )
    x, y = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, found))
    error = x - y
    pairs = ((x, x), (error, error), (x, y), (y, y))
    return np.stack([np.einsum("ij,ij->i", one, other) for one, other in pairs], axis=1)


def decibels(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return 10 log10(signal / noise), infinite without noise, at least `LEAST_DB`.

    >>> decibels(np.array([100.0, 1.0, 0.0]), np.array([1.0, 0.0, 1.0])).tolist()
    [20.0, inf, -300.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10.0 * (np.log10(signal) - np.log10(noise))
    return np.where(noise == 0.0, np.inf, np.fmax(ratio, LEAST_DB))


def _measurement(
    by_output: Mapping[str, np.ndarray], value: float | None, right: np.ndarray | None
) -> Measurement:
    """Sum up `power_sums` of all images by output."""
    totals = np.array([sums.sum(axis=0) for sums in by_output.values()])
    ratio = float(decibels(totals[:, 0], totals[:, 1]).min())
    norms = np.sqrt(totals[:, 0] * totals[:, 3])
    cosine = np.nan_to_num(np.divide(totals[:, 2], norms, out=np.ones(len(totals)), where=norms != 0))
    images = np.min([decibels(sums[:, 0], sums[:, 1]) for sums in by_output.values()], axis=0)
    by_image = images.astype(np.float32) if right is None else right
    return Measurement(value, ratio if math.isfinite(ratio) else None, float(cosine.min()), by_image)


def _decoded(row: records.Record) -> Measurement:
    """Return the measurement that a row keeps."""
    if "correct" in row:
        bits = np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)
        by_image = np.unpackbits(bits)[: row["n"]].astype(bool)
    else:
        by_image = np.frombuffer(bytes.fromhex(row["by_image"]), np.float32)
    return Measurement(row["value"], row["sqnr_db"], row["cosine"], by_image)
