"""Check that the diagnosis takes any network: inputs, dtypes, outputs, sizes, disks, and what it refuses."""

import errno
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qt_jax import records
from qt_jax.diagnosis import report
from qt_jax.diagnosis.__main__ import main
from qt_jax.diagnosis.diagnosis import calibrated
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.meter import Meter
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import Precision, everywhere
from qt_jax.diagnosis.subject import load_subject
from qt_jax.export import storage

RANDOM = np.random.default_rng(7)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def graph(signature, body, weights, opset=17):
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({signature[0]}) => ({signature[1]}) {{ {body} }}'
    )
    for name, value in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return model


def detector():
    """Make boxes (n, 4, 36) and scores (n, 3, 36) of images (n, 3, 12, 12)."""
    body = """[stem] a = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(images, k)
        b = Relu(a) [box] c = Conv<kernel_shape = [1, 1]>(b, p) [class] d = Conv<kernel_shape = [1, 1]>(b, q)
        boxes = Reshape(c, s4) e = Reshape(d, s3) scores = Sigmoid(e)"""
    held = {"k": normal(8, 3, 3, 3), "p": normal(4, 8, 1, 1), "q": normal(3, 8, 1, 1)}
    held |= {"s4": np.array([-1, 4, 36]), "s3": np.array([-1, 3, 36])}
    return graph(("float[n, 3, 12, 12] images", "float[n, 4, 36] boxes, float[n, 3, 36] scores"), body, held)


def run(folder, model, samples, *flags, calibration=None, name="model.onnx"):
    """Diagnose a graph; return the exit status and the page, if there is one."""
    onnx.save(model, folder / name)
    paths = []
    for stem, arrays in (("c", calibration or samples), ("t", samples)):
        path = folder / f"{stem}.npz"
        np.savez(path, **arrays)
        paths.append(str(path))
    arguments = [str(folder / name), "--calibration", paths[0], "--test", paths[1]]
    status = main([*arguments, "--out", str(folder / "out"), *flags])
    page = folder / "out" / "diagnosis.md"
    return status, page.read_text(encoding="utf-8") if page.exists() else ""


def kept(folder):
    return {row["what"]: row for row in records.read(folder / "out" / "diagnosis" / "measurements.jsonl")}


def flat(text):
    return " ".join(text.split())


def test_a_detector_without_labels_is_judged_by_all_its_outputs(tmp_path):
    images = normal(24, 3, 12, 12)
    status, page = run(tmp_path, detector(), {"images": images}, "--scheme", "int4w-pt", "--apply")
    assert status == 0
    assert "Judged: boxes, scores, by the SQNR against the float graph." in page
    assert "Rounded to int4w-pt, the outputs keep" in page and "Most noise comes in at" in page
    assert "worst image dB" in page and "top-1" not in page and "sign test" in page
    exported = onnxruntime.InferenceSession(tmp_path / "out" / "diagnosis" / "mended.onnx")
    assert [output.name for output in exported.get_outputs()] == ["boxes", "scores"]
    lowest = min(kept(tmp_path)["stem alone"]["sqnr_db"], kept(tmp_path)["box alone"]["sqnr_db"])
    assert kept(tmp_path)["all"]["sqnr_db"] <= lowest + 1


def test_an_output_is_chosen_and_the_others_are_named(tmp_path):
    images = normal(24, 3, 12, 12)
    status, page = run(tmp_path, detector(), {"images": images}, "--output", "scores")
    assert status == 0
    assert (
        "Judged: scores, by the SQNR against the float graph. Left out: boxes (choose with --output)." in page
    )
    assert run(tmp_path, detector(), {"images": images}, "--output", "masks")[0] == 2


def test_a_network_with_several_inputs_and_dtypes(tmp_path):
    body = """a = Gather(table, tokens) b = ReduceMean<axes = [1], keepdims = 0>(a) c = Add(b, features)
        [head] y = MatMul(c, w)"""
    model = graph(
        ("int64[n, 5] tokens, float[n, 8] features", "float[n, 3] y"),
        body,
        {"table": normal(11, 8), "w": normal(8, 3)},
    )
    samples = {"tokens": RANDOM.integers(0, 11, (30, 5)), "features": normal(30, 8)}
    status, page = run(tmp_path, model, samples, "--backends", "onnxruntime")
    assert status == 0 and "| head | w8a8 pt |" in page and "onnxruntime int8-pt-minmax" in page
    session = onnxruntime.InferenceSession(model.SerializeToString())
    [y] = session.run(None, samples)
    assert y.shape == (30, 3)
    wrong = {**samples, "tokens": samples["tokens"].astype(np.int32)}
    assert run(tmp_path, model, wrong)[0] == 2


def test_a_metric_of_ones_own_is_shown_beside_the_noise(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(
        "def nearest(outputs, labels):\n    return float(abs(outputs['scores'] - labels).mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = normal(24, 3, 12, 12)
    labels = RANDOM.random((24, 3, 36)).astype(np.float32)
    flags = ["--metric", "own_metric:nearest", "--scheme", "int4w-pt"]
    status, page = run(tmp_path, detector(), {"images": images, "labels": labels}, *flags)
    assert status == 0 and "by own\\_metric:nearest and the SQNR" in page and "the metric goes from" in page
    [scores] = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(["scores"], {"images": images})
    assert kept(tmp_path)["float"]["value"] == pytest.approx(np.abs(scores - labels).mean(), rel=1e-5)


def test_a_segmenter_with_a_void_label_is_judged_by_noise(tmp_path):
    model = graph(
        ("float[n, 3, 8, 8] x", "float[n, 5, 8, 8] y"),
        "y = Conv<kernel_shape = [1, 1]>(x, w)",
        {"w": normal(5, 3, 1, 1)},
    )
    x, labels = normal(12, 3, 8, 8), RANDOM.integers(0, 5, (12, 8, 8))
    labels[:, 0] = 255
    assert run(tmp_path, model, {"x": x, "labels": labels})[0] == 2
    status, page = run(tmp_path, model, {"x": x, "labels": labels}, "--void-label", "255")
    assert status == 0 and "by top-1 and the SQNR" in page and "| metric | SQNR dB |" in page


def test_a_graph_that_holds_a_batch_of_one_runs_one_by_one(tmp_path):
    model = graph(
        ("float[n, 8] x", "float[n, 4] y"),
        "a = Reshape(x, s) y = MatMul(a, w)",
        {"s": np.array([1, 8]), "w": normal(8, 4)},
    )
    status, page = run(tmp_path, model, {"x": normal(16, 8)}, "--apply")
    assert status == 0 and "measured on 16 images" in page


def test_a_batch_of_zero_is_an_open_one(tmp_path):
    model = detector()
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 0
    assert run(tmp_path, model, {"images": normal(8, 3, 12, 12)})[0] == 0


def test_arrays_come_as_npy_and_as_folders(tmp_path):
    onnx.save(detector(), tmp_path / "model.onnx")
    images = normal(8, 3, 12, 12)
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "parts").mkdir()
    for part in range(2):
        np.save(tmp_path / "parts" / f"{part}.npy", images[4 * part : 4 * part + 4])
    flags = [str(tmp_path / "model.onnx"), "--calibration", str(tmp_path / "x.npy")]
    for test in ("x.npy", "parts"):
        assert main([*flags, "--test", str(tmp_path / test), "--out", str(tmp_path / test[:1])]) == 0
    rows = [records.read(tmp_path / folder / "diagnosis" / "measurements.jsonl")[0]["key"] for folder in "xp"]
    assert rows[0] == rows[1]


def gru():
    signature = ("float[5, n, 3] x", "float[1, n, 4] y")
    body = "s, y = GRU<hidden_size = 4>(x, w, r)"
    return graph(signature, body, {"w": normal(1, 12, 3), "r": normal(1, 12, 4)})


def of_strings():
    return graph(("string[n, 8] x", "string[n, 8] y"), "y = Identity(x)", {})


def quantized():
    model = graph(
        ("float[n, 8] x", "float[n, 8] y"), "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)", {}
    )
    for name, value in (("s", np.float32(0.1)), ("z", np.int8(0))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return model


def of_integers():
    return graph(
        ("float[n, 8] x", "int64[n, 1] y"),
        "a = MatMul(x, w) y = ArgMax<axis = 1>(a)",
        {"w": normal(8, 4)},
    )


def without_layers():
    return graph(("float[n, 8] x", "float[n, 8] y"), "a = Flatten(x) y = Relu(a)", {})


@pytest.mark.parametrize(
    ("make", "samples", "message"),
    [
        (gru, {"x": normal(6, 5, 1, 3)}, "this one has 1 GRU, of another kind"),
        (without_layers, {"x": normal(6, 8)}, "this one has only Flatten, Relu"),
        (of_strings, {"x": np.full((6, 8), "a")}, "takes strings"),
        (quantized, {"x": normal(6, 8)}, "already quantized"),
        (of_integers, {"x": normal(6, 8)}, "y holds int64. Judge an output in floating point"),
    ],
)
def test_what_cannot_be_diagnosed_is_said_in_a_sentence(make, samples, message, tmp_path, capsys):
    assert run(tmp_path, make(), samples)[0] == 2
    assert message in flat(capsys.readouterr().err)


def test_data_on_another_scale_are_warned_of(tmp_path):
    images = RANDOM.random((16, 3, 12, 12)).astype(np.float32)
    status, page = run(tmp_path, detector(), {"images": 255 * images}, calibration={"images": images})
    assert status == 0 and "**Warning:** The test data of images reach from" in page


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_sentence(number, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(report, "write_whole", fail)
    assert run(tmp_path, detector(), {"images": normal(8, 3, 12, 12)})[0] == 2
    assert f"cannot be written: {os.strerror(number)}" in flat(capsys.readouterr().err)


def commands(folder):
    model, data, out = folder / "model.onnx", folder / "x.npy", folder / "out"
    flags = ["--calibration", str(data), "--test", str(data), "--out", str(out), "--apply"]
    return [sys.executable, "-m", "qt_jax.diagnosis", str(model), *flags, "--scheme", "int4w-pt"]


def test_two_diagnoses_share_a_folder_in_a_plain_locale(tmp_path):
    onnx.save(detector(), tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", normal(16, 3, 12, 12))
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    both = [
        subprocess.Popen(commands(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=plain)
        for _ in range(2)
    ]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    text = (tmp_path / "out" / "diagnosis.md").read_text(encoding="utf-8")
    assert "| floating point | – |" in text
    names = {path.name for path in (tmp_path / "out" / "diagnosis").iterdir()}
    assert {"mended.onnx", "mended.qdq.onnx", "measurements.jsonl", "noise.png"} <= names
    assert not [name for name in names if name.endswith(".partial")]


def test_a_graph_in_two_files_is_diagnosed_and_written(tmp_path, monkeypatch):
    """Take a small limit for that of protobuf, so that weights need a second file everywhere."""
    monkeypatch.setattr(storage, "LARGEST", 1000)
    status, page = run(tmp_path, detector(), {"images": normal(8, 3, 12, 12)}, "--scheme", "int4w-pt")
    assert status == 0
    model = graph(("float[n, 96] x", "float[n, 96] y"), "[head] y = MatMul(x, w)", {"w": normal(96, 96)})
    samples = {"x": normal(16, 96)}
    status, page = run(tmp_path, model, samples, "--scheme", "int4w-pt", "--apply")
    assert status == 0 and "## Files" in page
    written = tmp_path / "out" / "diagnosis" / "mended.qdq.onnx"
    assert storage.data_path(tmp_path / "out" / "diagnosis" / "mended.onnx").exists()
    [found] = onnxruntime.InferenceSession(written).run(None, samples)
    w = onnx.numpy_helper.to_array(model.graph.initializer[0])
    wanted = samples["x"].astype(np.float64) @ w
    assert np.square(found - wanted).sum() < 0.05 * np.square(wanted).sum()


@pytest.mark.slow
def test_a_graph_of_more_than_two_gigabytes(tmp_path):
    size = 16_600  # two kernels of 1.1 GB
    body = "[first] a = MatMul(x, w) [second] b = MatMul(a, u) y = MatMul(b, v)"
    model = graph((f"float[n, {size}] x", "float[n, 4] y"), body, {"v": normal(size, 4)})
    wide = np.full((size, size), 1e-4, np.float32)
    wide[np.arange(size), np.arange(size)] = 1.0
    for name in ("w", "u"):
        model.graph.initializer.append(onnx.numpy_helper.from_array(wide, name))
    del wide
    path = tmp_path / "model.onnx"
    storage.save(model, path)
    del model
    samples = normal(8, size)
    subject = load_subject(path, "wide", samples, samples, None)
    meter = Meter(subject.samples, subject.reference, tmp_path / "kept.jsonl", subject.task)
    bounds = calibrated(subject.model, subject.calibration)
    given = Deployment(subject.model, everywhere(layers_of(subject.model), Precision(8, 8)), bounds)
    assert list(given.precisions) == ["first", "second", "y"]
    found = meter.measure(given.simulated(), "all")
    assert 20 < found.sqnr_db < 60
