"""Run one float model through backends and schemes; one record for each, whatever becomes of it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from qt_jax.backends.ort import FP32, OnnxRuntime, single_input
from qt_jax.backends.protocol import Artifact, Backend, Scheme
from qt_jax.backends.registry import select
from qt_jax.errors import InvalidInput
from qt_jax.metrics import classification_metrics
from qt_jax.reporting.provenance import provenance
from qt_jax.reporting.records import Record, new_record

UNMEASURED = "latency, cycles, energy and cost were not measured"
REFERENCE = "logit_mse, sqnr_db and agreement have no meaning for the reference itself"


def evaluate(
    model: onnx.ModelProto | str | Path,
    calibration: np.ndarray,
    test_set: tuple[np.ndarray, np.ndarray],
    *,
    backends: str | Sequence[str] = "all",
    schemes: Sequence[str] | None = None,
    identity: Mapping[str, Any] = MappingProxyType({}),
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Accuracy and fidelity of a float classifier under every backend and scheme.

    FP32 in ONNX Runtime comes first and always: it is the reference of `logit_mse`, `sqnr_db` and
    `agreement`. A scheme that fails gives a record with its status and reason; the others go on.

    Args:
        model: a float ONNX model, or the path of one, with one image input and logits as first output.
        calibration: `(n, ...)` float32, as the model's input takes it (NCHW for our exports).
        test_set: images `(n, ...)` float32, as `calibration`, and labels `(n,)` integers.
        backends: "all", or names from `BACKENDS`.
        schemes: names of the schemes to run besides the reference; None for all.
        identity: keys that say whose records these are: run, task, model, method, seed, checkpoint.
        on_record: called with each record as soon as it is complete.

    Returns records (see `qt_jax.reporting.records`) in the order in which they ran.

    Raises:
        InvalidInput: an unknown backend or scheme, arrays that do not fit, a model that does not run.

    Example:
        >>> import onnx.parser
        >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
        ... g (float[b, 3] input) => (float[b, 3] logits) { logits = Relu(input) }''')
        >>> images = np.eye(3, dtype=np.float32)
        >>> [record] = evaluate(model, images, (images, np.arange(3)), schemes=["fp32"], identity={"seed": 0})
        >>> record["scheme"], record["top1"], record["seed"]
        ('fp32', 1.0, 0)
    """
    jobs = _jobs(select(backends), schemes)
    model = _load(model)
    test_images, test_labels = test_set
    _check_arrays(model, calibration, test_images, test_labels)

    records = []

    def keep(record: Record) -> None:
        records.append(record)
        if on_record is not None:
            on_record(record)

    started = time.perf_counter()
    reference, measured = _reference(model, calibration, test_images, test_labels)
    keep(_record(OnnxRuntime(), FP32, calibration, identity, measured, started))
    for backend, scheme in jobs:
        started = time.perf_counter()
        measured = _attempt(backend, scheme, model, calibration, test_images, test_labels, reference)
        keep(_record(backend, scheme, calibration, identity, measured, started))
    return records


def _jobs(backends: Iterable[Backend], names: Sequence[str] | None) -> list[tuple[Backend, Scheme]]:
    """What is to be run after the reference. Raises InvalidInput for a scheme that no backend offers."""
    offered = [(backend, scheme) for backend in backends for scheme in backend.schemes]
    if names is not None:
        known = {scheme.name for _, scheme in offered} | {FP32.name}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InvalidInput(
                f"No chosen backend offers the schemes {unknown}: choose among {sorted(known)}."
            )
        offered = [(backend, scheme) for backend, scheme in offered if scheme.name in names]
    return [(b, s) for b, s in offered if (b.name, s) != (OnnxRuntime.name, FP32)]


def _load(model: onnx.ModelProto | str | Path) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        return onnx.load(model)
    except Exception as error:
        raise InvalidInput(
            f"{model} cannot be read as an ONNX model: {error}. Delete it and export it again."
        ) from error


def _check_arrays(
    model: onnx.ModelProto, calibration: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> None:
    name = single_input(model)
    [dims] = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name == name]
    expected = [dim.dim_value or None for dim in dims]
    for what, array in (("calibration", calibration), ("test images", images)):
        fits = array.ndim == len(expected) and all(
            want in (None, got) for want, got in zip(expected[1:], array.shape[1:], strict=True)
        )
        if array.dtype != np.float32 or not fits:
            raise InvalidInput(
                f"{what} is {array.dtype} {array.shape}, but the model's input {name!r} takes float32 (n, "
                f"{', '.join(str(want or '*') for want in expected[1:])}): our exports are channels-first."
            )
    if not len(images) or labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise InvalidInput(
            f"test labels must be one integer an image for at least one image, "
            f"got {labels.dtype} {labels.shape} for {len(images)} images."
        )


def _reference(
    model: onnx.ModelProto, calibration: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, Record]:
    """Float logits and their record keys. Raises InvalidInput where they are nothing to compare with."""
    ort = OnnxRuntime()
    try:
        artifact = ort.compile(model, calibration, FP32)
        logits = ort.run(artifact, images)
    except Exception as error:
        raise InvalidInput(f"ONNX Runtime cannot run the float model to compare with: {error}") from error
    measured = _measure(artifact, logits, labels, None)
    if measured["status"] != "ok":
        raise InvalidInput(f"The float model is no reference to compare with: {measured['reason']}.")
    return logits, measured


def _attempt(
    backend: Backend,
    scheme: Scheme,
    model: onnx.ModelProto,
    calibration: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    reference: np.ndarray,
) -> Record:
    """Compile and run one scheme; never raises, since one vendor's crash must not stop the others."""
    missing = backend.available()
    if missing is not None:
        return {"status": "unavailable", "reason": missing}
    try:
        artifact = backend.compile(model, calibration, scheme)
        return _measure(artifact, backend.run(artifact, images), labels, reference)
    except Exception as error:
        return {"status": "crashed", "reason": f"{type(error).__name__}: {error}"}


def _measure(
    artifact: Artifact, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None
) -> Record:
    """The record keys that come from logits; `reference` is None where these are the reference themselves."""
    about = {"runtime": artifact.runtime, "model_bytes": artifact.model_bytes}
    expected = (len(labels), *logits.shape[1:2]) if reference is None else reference.shape
    if logits.shape != expected:
        return about | {
            "status": "invalid",
            "reason": f"logits have shape {logits.shape}, expected {expected}",
        }
    broken = int(np.sum(~np.isfinite(logits).all(axis=1)))
    if broken:
        return about | {
            "status": "invalid",
            "reason": f"logits of {broken} of {len(labels)} images are not finite",
        }
    reason = f"{REFERENCE}; {UNMEASURED}" if reference is None else UNMEASURED
    return about | classification_metrics(logits, labels, reference) | {"status": "ok", "reason": reason}


def _record(
    backend: Backend,
    scheme: Scheme,
    calibration: np.ndarray,
    identity: Mapping[str, Any],
    measured: Record,
    started: float,
) -> Record:
    quantized = scheme.calibration is not None
    return new_record(
        **identity,
        backend=backend.name,
        vendor=backend.vendor,
        kind=backend.kind,
        scheme=scheme.name,
        weight_bits=scheme.weight_bits,
        activation_bits=scheme.activation_bits,
        per_channel=scheme.per_channel,
        dynamic=scheme.dynamic,
        calibration={"n": len(calibration), "method": scheme.calibration} if quantized else None,
        seconds=round(time.perf_counter() - started, 3),
        **measured,
        **provenance(backend.packages),
    )
