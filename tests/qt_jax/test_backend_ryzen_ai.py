"""Test AMD's Quark: its description, its helpers, and (vendor) the real quantizer."""

import sys
import types

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qt_jax.backends import environments, evaluate
from qt_jax.backends.ryzen_ai import (
    BACKEND,
    EXTENSIONS,
    _one_builder,
    _reader,
    count_operators,
    count_products,
)
from tests.qt_jax.vendor_networks import RECURRENT, SOUND_AND_IMAGE, samples

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}


def test_schemes_are_quarks_configurations():
    assert SCHEMES["xint8"].calibration == "power-of-two MinMSE"
    assert (SCHEMES["a16w8"].weight_bits, SCHEMES["a16w8"].activation_bits) == (8, 16)
    assert SCHEMES["bf16"].per_channel is None
    assert SCHEMES["bfp16"].weight_bits == 9  # 8 and an eighth of an exponent of 8
    assert all(scheme.calibration is None for name, scheme in SCHEMES.items() if name.startswith(("mx", "b")))
    assert not any(runtime.timed for runtime in BACKEND.runtimes)


def test_integer_operators_stand_between_integers():
    quantize, dequantize = "QuantizeLinear", "DequantizeLinear"
    nodes = [
        (dequantize, ["xq"], ["x"]),
        (dequantize, ["wq"], ["w"]),
        ("Conv", ["x", "w", "bias"], ["c"]),
        ("Relu", ["c"], ["r"]),
        ("Constant", [], ["two"]),
        ("Mul", ["r", "two"], ["m"]),
        (quantize, ["m", "s"], ["mq"]),
        (dequantize, ["mq"], ["n"]),
        ("Softmax", ["n"], ["p"]),
        ("BFPQuantizeDequantize", ["p"], ["b"]),
        ("Conv", ["b", "w"], ["out"]),
    ]
    assert count_operators(nodes) == {
        "Conv": {"float": 1, "integer": 1},
        "Mul": {"integer": 1},
        "Relu": {"integer": 1},
        "Softmax": {"float": 1},
    }


def test_images_are_read_one_by_one_and_again():
    pytest.importorskip("onnxruntime")
    images = np.arange(6, dtype=np.float32).reshape(3, 2)
    reader = _reader({"input": images, "other": images[:, :1]})
    for _ in range(2):
        assert [batch["input"].tolist() for batch in iter(reader.get_next, None)] == [
            [[0, 1]],
            [[2, 3]],
            [[4, 5]],
        ]
        reader.rewind()
    assert reader.get_next()["other"].tolist() == [[0]]
    assert len(reader) == 3


def test_a_stale_build_is_unlocked(tmp_path, monkeypatch):
    monkeypatch.setenv(EXTENSIONS, str(tmp_path / "extensions"))
    stale = tmp_path / "extensions" / "operators" / "lock"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with _one_builder():
        assert not stale.exists()


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not there: install g++" in BACKEND.available()
    monkeypatch.setenv("CXX", sys.executable)
    assert BACKEND.available() is None


def test_a_layer_with_a_float_kernel_is_no_integer_one():
    nodes = [
        ("DequantizeLinear", ["xq"], ["x"]),
        ("DequantizeLinear", ["wq"], ["w"]),
        ("GRU", ["x", "kernel", "recurrent"], ["h"]),
        ("QuantizeLinear", ["h"], ["hq"]),
        ("DequantizeLinear", ["hq"], ["g"]),
        ("Squeeze", ["g", "axes"], ["f"]),
        ("Gemm", ["f", "w"], ["l"]),
        ("QuantizeLinear", ["l"], ["lq"]),
    ]
    assert count_operators(nodes) == {"GRU": {"float": 1}, "Gemm": {"integer": 1}, "Squeeze": {"integer": 1}}
    assert count_products(nodes) == (1, 2)


def test_the_session_feeds_by_name_and_returns_every_output(tmp_path, monkeypatch):
    monkeypatch.setenv(EXTENSIONS, str(tmp_path))
    asked = []

    class InferenceSession:
        def __init__(self, path, options, providers):
            asked.append((path, options.graph_optimization_level, options.registered))

        def get_inputs(self):
            return [types.SimpleNamespace(name="x"), types.SimpleNamespace(name="y")]

        def run(self, outputs, feeds):
            return [feeds["x"] + 1, feeds["y"] + 2]

    class SessionOptions:
        def register_custom_ops_library(self, path):
            self.registered = path

    runtime = types.ModuleType("onnxruntime")
    runtime.InferenceSession, runtime.SessionOptions = InferenceSession, SessionOptions
    runtime.GraphOptimizationLevel = types.SimpleNamespace(ORT_DISABLE_ALL="off")
    quark = types.ModuleType("quark.onnx")
    quark.get_library_path = lambda: "operators.so"
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "quark", types.ModuleType("quark"))
    monkeypatch.setitem(sys.modules, "quark.onnx", quark)
    session = BACKEND.load(tmp_path, SCHEMES["xint8"], BACKEND.runtimes[0])
    first, second = session({"y": np.zeros(2), "x": np.zeros(3)})
    np.testing.assert_array_equal(first, [1, 1, 1])
    np.testing.assert_array_equal(second, [2, 2])
    assert asked == [(str(tmp_path / "model.onnx"), "off", "operators.so")]


def _network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 5] logits) {
        stem = Conv<pads = [1, 1, 1, 1]>(input, k, b)
        stem_relu = Relu(stem)
        mean = GlobalAveragePool(stem_relu)
        flat = Flatten(mean)
        logits = Gemm<transB = 1>(flat, w, c)
    }""")
    for name, shape in {"k": (16, 3, 3, 3), "b": (16,), "w": (5, 16), "c": (5,)}.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


@pytest.mark.vendor
@pytest.mark.parametrize(("scheme", "least_db"), [("xint8", 15), ("a16w8", 25), ("bf16", 35), ("bfp16", 25)])
def test_real_quantizer_is_near_float(scheme, least_db, tmp_path):
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)
    rng = np.random.default_rng(1)
    calibration, images = (rng.normal(size=(n, 3, 8, 8)).astype(np.float32) for n in (32, 64))
    test_set = images, np.zeros(64, np.int64)
    records = evaluate(
        _network(), calibration, test_set, backends=["ryzen-ai"], schemes=[scheme], folder=tmp_path
    )
    [record] = [record for record in records if record["backend"] == "ryzen-ai"]
    assert record["status"] == "ok", record["reason"]
    assert record["sqnr_db"] > least_db
    assert set(record["operators"]["Conv"]) == {"integer" if "8" in scheme else "float"}


@pytest.fixture
def installed():
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)


def records(model, scheme, folder, **settings):
    rows = evaluate(
        model,
        samples(model, 24, 1),
        samples(model, 16, 2),
        backends=["ryzen-ai"],
        schemes=[scheme],
        folder=folder,
        **settings,
    )
    return [row for row in rows if row["backend"] == "ryzen-ai"]


@pytest.mark.vendor
def test_several_inputs_and_a_layer_left_in_float(installed, tmp_path):
    [before] = records(SOUND_AND_IMAGE, "a8w8", tmp_path / "all")
    [after] = records(SOUND_AND_IMAGE, "a8w8", tmp_path / "left", float_layers="node_frames")
    for record, quantized in ((before, 4), (after, 3)):
        assert record["status"] == "ok", record["reason"]
        assert record["products"] == {"quantized": quantized, "total": 4}
        assert [(f["output"], f["shape"]) for f in record["fidelity"]] == [
            ("frames", [6, 12]),
            ("logits", [5]),
        ]
        assert all(f["sqnr_db"] > 20 for f in record["fidelity"])
    assert after["fidelity"][0]["sqnr_db"] > before["fidelity"][0]["sqnr_db"] + 1


@pytest.mark.vendor
def test_the_weights_of_a_recurrent_cell_stay_float(installed, tmp_path):
    [record] = records(RECURRENT, "a8w8", tmp_path)
    assert record["status"] == "ok", record["reason"]
    assert record["products"] == {"quantized": 1, "total": 2}
