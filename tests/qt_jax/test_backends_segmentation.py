"""Test the harness on a segmenter: logits (n, classes, height, width), one class per pixel."""

import json

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qt_jax import metrics
from qt_jax.backends import evaluate
from qt_jax.backends.judging import choose
from qt_jax.backends.measurement import measure
from qt_jax.errors import InvalidInput

MODEL = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 6, 5] input) => (float[batch, 4, 6, 5] logits)
    <float[4, 3, 1, 1] kernel = {1, 0.5, 0, -0.3, 1, 0, 0, 0.2, 1, -1, -1, -1}> {
        logits = Conv(input, kernel)
    }""")
POOLED = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 6, 5] input) => (float[batch, 3] logits) <int64[2] axes = {2, 3}> {
        logits = ReduceMean<axes = [2, 3], keepdims = 0>(input)
    }""")
del POOLED.graph.initializer[:]
RNG = np.random.default_rng(0)
CALIBRATION, IMAGES = (RNG.normal(0, 1, (n, 3, 6, 5)).astype(np.float32) for n in (8, 12))
SESSION = onnxruntime.InferenceSession(MODEL.SerializeToString(), providers=["CPUExecutionProvider"])
LOGITS = SESSION.run(None, {"input": IMAGES})[0]
LABELS = np.where(RNG.random((12, 6, 5)) < 0.7, LOGITS.argmax(1), 3).astype(np.uint8)


def run(folder, **changes):
    arguments = {"model": MODEL, "calibration": CALIBRATION, "test_set": (IMAGES, LABELS)} | changes
    chosen = {"backends": "onnxruntime", "schemes": ["int4w-pt-minmax"], "runtimes": ["reference"]}
    return evaluate(**arguments, **chosen, folder=folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return folder, run(folder)


def logits_of(folder, row):
    return np.load((folder / row["log"]).with_name("outputs") / "0.npy")


def test_a_record_is_judged_pixel_by_pixel(rows):
    folder, (reference, quantized) = rows
    for row in (reference, quantized):
        decisions = logits_of(folder, row).argmax(1)
        assert (row["status"], row["n"]) == ("ok", 12)
        assert row["top1"] == metrics.pixel_accuracy(decisions, LABELS)
        assert row["miou"] == metrics.miou(decisions, LABELS, 4)
        assert row["reference_top1"] == reference["top1"] and row["reference_miou"] == reference["miou"]
        assert sum(n for n, *_ in row["reliability"]) == LABELS.size
        assert "predictions" not in row
        json.dumps(row, allow_nan=False)
    exact, found = logits_of(folder, reference), logits_of(folder, quantized)
    assert reference["sqnr_db"] is None and "no meaning for the reference" in reference["reason"]
    assert quantized["sqnr_db"] == pytest.approx(metrics.sqnr_db(exact, found), rel=1e-9)
    assert quantized["logit_mse"] == pytest.approx(metrics.logit_mse(exact, found), rel=1e-9)
    assert quantized["agreement"] == np.mean(exact.argmax(1) == found.argmax(1)) < 1.0


def test_a_second_run_finds_its_records(rows):
    folder, first = rows
    assert run(folder) == first


def test_limit_takes_the_first_images(tmp_path):
    reference, _ = run(tmp_path, limit=5)
    assert (reference["n"], reference["top1"]) == (
        5,
        metrics.pixel_accuracy(LOGITS[:5].argmax(1), LABELS[:5]),
    )


def test_broken_logits_make_a_record():
    reference = {"logits": LOGITS}
    task, _, _ = choose(reference, LABELS)
    flat = measure(task, {"logits": LOGITS.reshape(12, -1)}, reference, LABELS)
    assert flat["status"] == "invalid" and "top1" not in flat
    assert flat["reason"] == "logits have shape (12, 120), expected (12, 4, 6, 5)"
    broken = LOGITS.copy()
    broken[3, 0, 2, 2] = np.nan
    found = measure(task, {"logits": broken}, reference, LABELS)
    assert found["reason"] == "logits of 1 of 12 images are not finite"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"test_set": (IMAGES, LABELS[:, :5])},
            r"\(12, 5, 5\) fit none of the float model's outputs: logits float32 \(12, 4, 6, 5\)",
        ),
        ({"test_set": (IMAGES, LABELS[:, 0, 0])}, r"\(12,\) fit none of the float model's outputs"),
        ({"model": POOLED}, r"fit none of the float model's outputs: logits float32 \(12, 3\)"),
        ({"test_set": (IMAGES, LABELS[:, 0])}, r"\(12, 5\) fit none of the float model's outputs"),
        (
            {"test_set": (IMAGES, LABELS + 1)},
            r"the first 4: with 4 classes they must be in \[0, 3\]. If 4 marks .* --void-label 4",
        ),
    ],
)
def test_wrong_input(change, message, tmp_path):
    with pytest.raises(InvalidInput, match=message):
        run(tmp_path, **change)
