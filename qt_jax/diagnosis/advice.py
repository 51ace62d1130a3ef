"""Measure how sensitive each layer is, try remedies, and advise those that make more images right.

A `Meter` measures graphs on one set of images. It keeps each measurement in a file, so that nothing is
measured twice, not even by a later run.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from qt_jax import records
from qt_jax.diagnosis.layers import Activation, kernel_sizes, kernels
from qt_jax.diagnosis.remedies import Deployment, Finding, Use, findings
from qt_jax.diagnosis.simulation import FLOAT, Precision, logits_of
from qt_jax.export.storage import model_sha256
from qt_jax.metrics import classification_metrics

MOST_LAYERS = 3
"""Number of layers for which more bits are tried, the most sensitive first."""

Progress = Callable[[str], object]
"""Is called with the name of each step as the step begins."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Hold what was measured on a set of n images.

    Attributes:
      top1: Top-1 accuracy, in [0, 1].
      sqnr_db: SQNR of the logits against the reference in dB; None where the two are equal.
      correct: bool `(n,)`, True for the images whose decision is right.
    """

    top1: float
    sqnr_db: float | None
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class Meter:
    """Measure graphs on one set of images, and keep the measurements.

    Attributes:
      images: float32 `(n, ...)`, as the graphs take them.
      labels: integers `(n,)`.
      reference: Logits `(n, classes)` of the float graph.
      kept: JSON-lines file of measurements, keyed by the content of graph and images. New ones are appended.
    """

    images: np.ndarray
    labels: np.ndarray
    reference: np.ndarray
    kept: Path

    def measure(self, model: onnx.ModelProto, label: str) -> Measurement:
        """Return the measurement of a graph; measure it and keep it as `label` if it is not kept yet."""
        key = self.key(model)
        for row in records.read(self.kept):
            if row["key"] == key:
                return _decoded(row, len(self.labels))
        logits = logits_of(model, self.images)
        metrics = classification_metrics(logits, self.labels, self.reference)
        correct = np.argmax(logits, axis=1) == self.labels
        row = {"key": key, "what": label, "top1": metrics["top1"], "sqnr_db": metrics["sqnr_db"]}
        row["correct"] = np.packbits(correct).tobytes().hex()
        records.append(self.kept, row)
        return _decoded(row, len(self.labels))

    def key(self, model: onnx.ModelProto) -> str:
        """Return the SHA-256 of the graph, the images, the labels and the reference."""
        return hashlib.sha256(model_sha256(model).encode() + self._data).hexdigest()

    @functools.cached_property
    def _data(self) -> bytes:
        """Return the SHA-256 of the arrays, which do not change between measurements."""
        digest = hashlib.sha256()
        for array in (self.images, self.labels, self.reference):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


def _decoded(row: records.Record, n: int) -> Measurement:
    bits = np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)
    return Measurement(row["top1"], row["sqnr_db"], np.unpackbits(bits)[:n].astype(bool))


def is_significant_gain(before: Measurement, after: Measurement) -> bool:
    """Tell whether `after` is right on more images than chance explains.

    This is McNemar's test at about two standard deviations: b - c > 2 sqrt(b + c), where b images are right
    only in `after` and c images are right only in `before`.

    >>> one = Measurement(0.0, None, np.zeros(9, bool))
    >>> is_significant_gain(one, Measurement(1.0, None, np.ones(9, bool))), is_significant_gain(one, one)
    (True, False)
    """
    won = np.count_nonzero(after.correct & ~before.correct)
    lost = np.count_nonzero(before.correct & ~after.correct)
    return bool(won - lost > 2.0 * np.sqrt(won + lost))


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Hold the measurements with only one layer rounded, and with all layers but this one rounded."""

    alone: Measurement
    all_but: Measurement


@dataclasses.dataclass(frozen=True)
class Trial:
    """Hold a finding whose remedy was tried, the measurement with it, and whether it is advised."""

    finding: Finding
    result: Measurement
    advised: bool


def sensitivities(deployment: Deployment, meter: Meter, progress: Progress) -> dict[str, Sensitivity]:
    """Return the sensitivity of each layer, in the order of the graph.

    `progress` is called with the name of each layer as its measurement begins.
    """
    found = {}
    for name, precision in deployment.precisions.items():
        progress(name)
        alone = dataclasses.replace(deployment, precisions={name: precision})
        rest = dataclasses.replace(deployment, precisions={**deployment.precisions, name: FLOAT})
        found[name] = Sensitivity(
            meter.measure(alone.simulated(), f"{name} alone"),
            meter.measure(rest.simulated(), f"all but {name}"),
        )
    return found


def advise(
    deployment: Deployment, activations: Mapping[str, Activation], meter: Meter, progress: Progress
) -> tuple[Deployment, list[Trial]]:
    """Try remedies; return the deployment with all that help, and every trial in order.

    The remedies of `findings` are tried first. Then more bits are tried for the layers that still cost most.
    A remedy is advised if, on top of those before it, it makes more images right than chance would. Of
    several remedies for one layer, the cheapest is advised that is as good as the best but for chance.
    """
    trials: list[Trial] = []
    for finding in findings(kernels(deployment.model), activations, deployment.bounds):
        deployment = _tried([finding], deployment, meter, trials, progress)
    for alternatives in _more_bits(deployment, meter, progress):
        deployment = _tried(alternatives, deployment, meter, trials, progress)
    return deployment, trials


def _tried(
    alternatives: list[Finding], deployment: Deployment, meter: Meter, trials: list[Trial], progress: Progress
) -> Deployment:
    """Try alternative remedies for one layer, the cheapest first, and append the trials to `trials`.

    Returns:
      The deployment with the advised remedy, or as it was if none is advised.
    """
    now = meter.measure(deployment.simulated(), "all, so far")
    candidates = [finding.remedy.apply(deployment) for finding in alternatives]
    results = []
    for finding, candidate in zip(alternatives, candidates, strict=True):
        label = f"{finding.layer}: {finding.remedy.text}"
        progress(label)
        results.append(meter.measure(candidate.simulated(), label))
    best = max(results, key=lambda result: result.top1)
    good = [is_significant_gain(now, result) and not is_significant_gain(result, best) for result in results]
    chosen = good.index(True) if any(good) else None
    trials += [
        Trial(finding, result, place == chosen)
        for place, (finding, result) in enumerate(zip(alternatives, results, strict=True))
    ]
    return deployment if chosen is None else candidates[chosen]


def _more_bits(deployment: Deployment, meter: Meter, progress: Progress) -> Iterator[list[Finding]]:
    """Yield the precisions of `wider` for each of the layers that cost most images when rounded by itself."""
    float_top1 = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float").top1
    costs = {}
    for name, precision in deployment.precisions.items():
        progress(f"{name} alone")
        alone = dataclasses.replace(deployment, precisions={name: precision})
        costs[name] = float_top1 - meter.measure(alone.simulated(), f"{name} alone").top1
    for name in sorted(costs, key=lambda name: -costs[name])[:MOST_LAYERS]:
        if costs[name] <= 0:
            return
        evidence = f"rounded alone it costs {100 * costs[name]:.2f} points"
        yield [
            Finding("sensitive layer", name, evidence, Use(name, precision))
            for precision in wider(deployment.precisions[name])
        ]


def wider(precision: Precision) -> list[Precision]:
    """Return more precise precisions than `precision`, the cheapest first.

    These are one scale per channel, then twice the bits of weights, then 16-bit inputs too, then floating
    point.

    >>> [str(wide) for wide in wider(Precision(4, 8))]
    ['w4a8 pc', 'w8a8 pc', 'w8a16 pc', 'float']
    """
    assert precision.weights is not None
    channels = dataclasses.replace(precision, per_channel=True)
    twice = dataclasses.replace(channels, weights=2 * precision.weights)
    steps = [channels, twice, dataclasses.replace(twice, inputs=16), FLOAT]
    return [step for step in steps if step != precision]


def kernel_bytes(deployment: Deployment) -> int:
    """Return the bytes of all kernels on their bits, without scales and biases.

    A weight in floating point takes 4 bytes.
    """
    widths = {name: precision.weights for name, precision in deployment.precisions.items()}
    return sum(size * (widths.get(name) or 32) for name, size in kernel_sizes(deployment.model).items()) // 8
