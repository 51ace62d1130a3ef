"""Hand-made records of networks that are no plain classifiers, for tests of tables, figures and reports."""

import base64
import zlib

import numpy as np

from qt_jax.records import new_record


def row(scheme, backend="onnxruntime", runtime="reference", **extra):
    """Make a record of one row, whose bits are in the name of its scheme."""
    bits = 4 if scheme.startswith("int4") else 32 if scheme == "fp32" else 8
    values = {
        **{"backend": backend, "scheme": scheme, "runtime": runtime, "method": None, "model": "net"},
        **{"status": "ok", "n": 200, "data": "hash", "per_channel": "-pt" not in scheme},
        **{"weight_bits": bits, "activation_bits": 8 if bits == 4 else bits},
        **{"vendor": "Microsoft", "kind": "CPU runtime", "float_layers": [], "warnings": []},
    }
    return new_record(**values | extra)


def output(name, sqnr_db, shape=(100, 4), **extra):
    """Make what a record says of one judged output."""
    worst = {"index": 7, "sqnr_db": None if sqnr_db is None else sqnr_db - 6, "cosine": 0.9}
    values = {"output": name, "shape": list(shape), "dtype": "float32", "sqnr_db": sqnr_db, "cosine": 0.9876}
    return (
        values | {"largest_error": 0.25, "largest_value": 12.5, "equal": None, "worst_image": worst} | extra
    )


def unlabelled(scheme, sqnr_db, **extra):
    """Make a record of a detector without labels, with two outputs of floats and one of integers."""
    about = {"judged": ["boxes", "scores", "classes"], "not_judged": ["anchors"], "metric": None}
    if sqnr_db is None:
        return row(scheme, **about | {"fidelity": None} | extra)
    fidelity = [
        output("boxes", sqnr_db),
        output("scores", sqnr_db + 5, (100,)),
        output("classes", None, (100,), dtype="int64", equal=0.975, cosine=None),
    ]
    found = {"sqnr_db": sqnr_db, "cosine": 0.9876, "worst_sqnr_db": sqnr_db - 6, "fidelity": fidelity}
    return row(scheme, **about | found | extra)


NPU = {"backend": "k230", "runtime": "simulator", "vendor": "Canaan", "kind": "vendor simulator", "n": 50}
GRID = {"backend": "grids", "runtime": "numpy", "vendor": "Qualcomm", "kind": "emulated convention"}

DETECTOR = [
    unlabelled("fp32", None),
    unlabelled("int8-pc", 36.0),
    unlabelled("int8-pt", 12.0),
    unlabelled("int8-pc-kld", 31.0, **NPU),
    unlabelled(
        "int8-pc", None, backend="npu", runtime="cmodel", status="refused", reason="no NonMaxSuppression"
    ),
]
"""A detector without labels. Only its row with per-tensor scales is broken."""


def judged(scheme, metric, value, reference, **extra):
    """Make a record of a network that labels judge by `metric`."""
    about = {
        "metric": metric,
        "value": value,
        "reference_value": reference,
        "judged": ["y"],
        "not_judged": [],
    }
    return row(scheme, **about | {"sqnr_db": None if scheme == "fp32" else 30.0, "cosine": 0.999} | extra)


def _regression(scheme, value, **extra):
    return judged(scheme, "mean_error", value, 0.03125, larger_is_better=False, **extra)


REGRESSION = [
    _regression("fp32", 0.03125, reference_value=None),
    _regression("int8-pc", 0.0315),
    _regression("int8-pt", 0.0325, latency_ms_p50=2.0),
    _regression("int4w-pc", 0.0625, latency_ms_p50=1.0, sqnr_db=11.0),
]
"""A regression, of whose mean error less is better."""


def _binary(scheme, value, **extra):
    return judged(scheme, "auc", value, 0.95, larger_is_better=True, **extra)


BINARY = [
    _binary("fp32", 0.95),
    _binary("int8-pc", 0.949),
    _binary("int8-minmax", 0.85, calibration={"n": 9, "method": "minmax"}, **NPU),
    _binary("int8-kld", 0.94, calibration={"n": 9, "method": "kld"}, **NPU),
]
"""A binary head with its area under the curve. Only calibration by the extremes breaks it."""

LABELS = np.random.default_rng(0).integers(0, 10, 200)


def _deciding(scheme, wrong, **extra):
    decisions = LABELS.copy()
    decisions[wrong] = (decisions[wrong] + 1) % 10
    top1 = float(np.mean(decisions == LABELS))
    kept = base64.b64encode(zlib.compress(decisions.astype("<u2").tobytes())).decode()
    about = {"metric": "top1", "value": top1, "top1": top1, "reference_value": 0.9, "reference_top1": 0.9}
    about |= {"judged": ["logits"], "not_judged": [], "larger_is_better": True, "predictions": kept}
    about |= {"warnings": ["All calibration images are of one class.", "The <test> images lie outside 0..1."]}
    return row(scheme, **about | {"sqnr_db": None if scheme == "fp32" else 30.0} | extra)


CLASSIFIER = [
    _deciding("fp32", slice(0, 20)),
    _deciding("int8-pc", slice(0, 21), products={"quantized": 9, "total": 9}),
    _deciding("int8-pc", slice(0, 60), products={"quantized": 8, "total": 9}, **NPU | {"n": 200}),
    _deciding("int8-htp", slice(0, 100), **GRID),
    _deciding("int4w-enpu", slice(0, 120), **GRID),
    row(
        "int8-gru",
        backend="openvino",
        runtime="cpu",
        status="invalid",
        reason="nothing was quantized: GRU is left in float",
        top1=0.9,
        reference_top1=0.9,
        products={"quantized": 0, "total": 9},
        float_layers=["/head/Gemm"],
    ),
]
"""A classifier with emulated conventions, a row that is partly and one that is wholly float, and warnings."""

TWINS = [
    *(
        _deciding(scheme, slice(0, wrong), method="quant-trim")
        for scheme, wrong in [("fp32", 20), ("int8-pc", 22)]
    ),
    *(
        _deciding(scheme, slice(0, wrong), method="float")
        for scheme, wrong in [("fp32", 20), ("int8-pc", 80)]
    ),
    _deciding("int4w-pc", slice(0, 24), method="quant-trim"),
    _deciding("int4w-pc", slice(0, 99), method="float"),
]
"""Quant-Trim, which keeps its accuracy, and its float twin, which does not."""

CASES = {
    "detector": DETECTOR,
    "regression": REGRESSION,
    "binary": BINARY,
    "classifier": CLASSIFIER,
    "twins": TWINS,
    "mixed": [record | {"model": "eye"} for record in DETECTOR] + [r | {"model": "ear"} for r in BINARY],
}
