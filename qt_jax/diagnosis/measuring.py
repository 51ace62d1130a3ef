"""Accuracy and fidelity of graphs on one set of images; what was measured once is read back."""

import dataclasses
import functools
import hashlib
from pathlib import Path

import numpy as np
import onnx

from qt_jax.diagnosis.simulation import logits_of
from qt_jax.metrics import classification_metrics
from qt_jax.reporting import records


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
