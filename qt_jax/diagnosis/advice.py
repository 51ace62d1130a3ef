"""Sensitivity of layers, and the remedies that help: each is tried, and kept if more images are right.

Accuracy and fidelity of graphs on one set of images; what was measured once is read back.
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
from qt_jax.metrics import classification_metrics


@dataclasses.dataclass(frozen=True)
class Measurement:
    """`top1` in [0, 1]; `sqnr_db` of the logits against the reference, None where equal; `correct` `(n,)`."""

    top1: float
    sqnr_db: float | None
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class Meter:
    """What graphs are measured on.

    Attributes:
      images: float32 `(n, ...)`, as the graphs take them.
      labels: integers `(n,)`.
      reference: logits `(n, classes)` of the float graph.
      kept: JSON-lines file of what was measured, by content of graph and images; it grows.
    """

    images: np.ndarray
    labels: np.ndarray
    reference: np.ndarray
    kept: Path

    def measure(self, model: onnx.ModelProto, label: str) -> Measurement:
        """The graph's measurement, from `kept` if it is there, else made now and kept under `label`."""
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
        """SHA-256 of the graph, the images, the labels and the reference."""
        return hashlib.sha256(model.SerializeToString(deterministic=True) + self._data).hexdigest()

    @functools.cached_property
    def _data(self) -> bytes:
        """SHA-256 of the arrays, which do not change between measurements."""
        digest = hashlib.sha256()
        for array in (self.images, self.labels, self.reference):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.digest()


def _decoded(row: records.Record, n: int) -> Measurement:
    bits = np.frombuffer(bytes.fromhex(row["correct"]), np.uint8)
    return Measurement(row["top1"], row["sqnr_db"], np.unpackbits(bits)[:n].astype(bool))


def gains(before: Measurement, after: Measurement) -> bool:
    """Whether `after` is right more often by more than chance: b - c > 2 sqrt(b + c), with b images that it
    alone decides rightly and c that `before` alone does (McNemar's test, about two standard deviations).

    >>> one = Measurement(0.0, None, np.zeros(9, bool))
    >>> gains(one, Measurement(1.0, None, np.ones(9, bool))), gains(one, one)
    (True, False)
    """
    won = np.count_nonzero(after.correct & ~before.correct)
    lost = np.count_nonzero(before.correct & ~after.correct)
    return bool(won - lost > 2.0 * np.sqrt(won + lost))


MOST_LAYERS = 3
"""So many layers are given more bits, the most sensitive first."""

Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """One layer rounded alone, and all but this one."""

    alone: Measurement
    all_but: Measurement


@dataclasses.dataclass(frozen=True)
class Trial:
    """A finding whose remedy was tried: what it gave, and whether it is advised."""

    finding: Finding
    result: Measurement
    advised: bool


def sensitivities(deployment: Deployment, meter: Meter, tell: Tell) -> dict[str, Sensitivity]:
    """Layer -> its sensitivity, in the order of the graph; `tell` hears of each layer as it begins."""
    found = {}
    for name, precision in deployment.precisions.items():
        tell(name)
        alone = dataclasses.replace(deployment, precisions={name: precision})
        rest = dataclasses.replace(deployment, precisions={**deployment.precisions, name: FLOAT})
        found[name] = Sensitivity(
            meter.measure(alone.simulated(), f"{name} alone"),
            meter.measure(rest.simulated(), f"all but {name}"),
        )
    return found


def advise(
    deployment: Deployment, activations: Mapping[str, Activation], meter: Meter, tell: Tell
) -> tuple[Deployment, list[Trial]]:
    """The deployment with all remedies that help, and every trial in order.

    First what is wrong with tensors (`findings`), then more bits for the layers that still cost most. A
    remedy is advised if it makes more images right than chance would, on top of those before it; of several
    for one layer the cheapest that is as good as the best but for chance.
    """
    trials: list[Trial] = []
    for finding in findings(kernels(deployment.model), activations, deployment.bounds):
        deployment = _tried([finding], deployment, meter, trials, tell)
    for alternatives in _more_bits(deployment, meter, tell):
        deployment = _tried(alternatives, deployment, meter, trials, tell)
    return deployment, trials


def _tried(
    alternatives: list[Finding], deployment: Deployment, meter: Meter, trials: list[Trial], tell: Tell
) -> Deployment:
    """The deployment after the trial of remedies for one layer, the cheapest first, which go to `trials`."""
    now = meter.measure(deployment.simulated(), "all, so far")
    candidates = [finding.remedy.apply(deployment) for finding in alternatives]
    results = []
    for finding, candidate in zip(alternatives, candidates, strict=True):
        tell(f"{finding.layer}: {finding.remedy.text}")
        what = f"{finding.layer}: {finding.remedy.text}"
        results.append(meter.measure(candidate.simulated(), what))
    best = max(results, key=lambda result: result.top1)
    good = [gains(now, result) and not gains(result, best) for result in results]
    chosen = good.index(True) if any(good) else None
    trials += [
        Trial(finding, result, place == chosen)
        for place, (finding, result) in enumerate(zip(alternatives, results, strict=True))
    ]
    return deployment if chosen is None else candidates[chosen]


def _more_bits(deployment: Deployment, meter: Meter, tell: Tell) -> Iterator[list[Finding]]:
    """For each of the layers that cost most images when rounded alone: a scale a channel, twice the bits of
    weights, 16-bit inputs too, floating point."""
    float_top1 = meter.measure(dataclasses.replace(deployment, precisions={}).simulated(), "float").top1
    costs = {}
    for name, precision in deployment.precisions.items():
        tell(f"{name} alone")
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
    """More precise ones than `precision`, the cheapest first.

    >>> [str(wide) for wide in wider(Precision(4, 8))]
    ['w4a8 pc', 'w8a8 pc', 'w8a16 pc', 'float']
    """
    assert precision.weights is not None
    channels = dataclasses.replace(precision, per_channel=True)
    twice = dataclasses.replace(channels, weights=2 * precision.weights)
    steps = [channels, twice, dataclasses.replace(twice, inputs=16), FLOAT]
    return [step for step in steps if step != precision]


def kernel_bytes(deployment: Deployment) -> int:
    """Bytes of all kernels on their bits, 4 each for those in floating point; without scales and biases."""
    widths = {name: precision.weights for name, precision in deployment.precisions.items()}
    return sum(size * (widths.get(name) or 32) for name, size in kernel_sizes(deployment.model).items()) // 8
