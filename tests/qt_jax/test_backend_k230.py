"""Test Canaan's K230: its description, its helpers, and (vendor) the real compiler and simulator."""

import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qt_jax.backends import Refused, environments, evaluate
from qt_jax.backends.k230 import BACKEND, _failure, _fix_shapes, _make_executable, count_operators
from tests.qt_jax.vendor_networks import TWO_IMAGES, samples

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}
GRAPH = """
%main = fn(%input: f32[1,3,8,8]): // (f32[1,3,8,8]) -> f32[1,4]
{
  %0 = GNNELoad(%input): // u8[1,3,8,8]
  %1 = GNNELoadW(const(i8[4,3,3,3])): // i8[4,3,3,3]
  %2 = GNNELoadW(const(f16[1,1,4,7])): // f16[1,1,4,7]
  %3 = GNNEConv2D(%0, %1, %2, const(DeQParam : <123, 0.0161>), const(i64[2] : {1L,1L})): // f16[1,4,8,8]
  %4 = GNNEStore(%3, const(i64[4] : {1L,1L,1L,1L})): // f16[1,4,8,8]
  %5 = GNNELoad(%4): // f16[1,4,8,8]
  %6 = GNNEActivation(%0, %5, %2, const(i32 : 0)): // u8[1,4,8,8]
  %7 = GNNEConv2D(%5, %1, %2, const(i32 : 0)): // f16[1,4,8,8]
  %9 = GNNELSTM(%5, %1, const(i32 : 0)): // (u8[12,1,1,8], u8[1,1,1,8])
  %10 = GetItem(%9, const(i32 : 0)): // u8[12,1,1,8]
  %8 = Conv2D(PadMode.Constant, %7, const(f32[4,4,1,1])): // f32[1,4,8,8]
}"""


def test_schemes_quantize_every_channel_and_say_how():
    assert all(scheme.per_channel for scheme in SCHEMES.values())
    assert (SCHEMES["int8-pc-kld"].calibration, SCHEMES["int8-pc-minmax"].calibration) == ("kld", "minmax")
    assert (SCHEMES["int16w-pc-minmax"].weight_bits, SCHEMES["int16w-pc-minmax"].activation_bits) == (16, 8)
    assert (SCHEMES["int16act-pc-minmax"].weight_bits, SCHEMES["int16act-pc-minmax"].activation_bits) == (
        8,
        16,
    )
    assert BACKEND.available() is None


def test_operators_count_by_what_they_read_and_where_they_run():
    assert count_operators(GRAPH) == {
        "GNNEConv2D": {"integer": 1, "float": 1},
        "GNNEActivation": {"float": 1},  # one branch of the addition is float16
        "GNNELSTM": {"float": 1},  # reads a float16 tensor
        "Conv2D": {"host": 1},
    }


def test_shape_is_fixed_whatever_the_graph_left_open(tmp_path):
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[n, c, h] x) => (float[n, c, h] y) { y = Relu(x) }'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "open.onnx")
    names = _fix_shapes(tmp_path / "open.onnx", tmp_path / "fixed.onnx", np.zeros((2, 3, 5), np.float32))
    assert names == ["x"]
    [entry] = onnx.load(tmp_path / "fixed.onnx").graph.input
    assert [dimension.dim_value for dimension in entry.type.tensor_type.shape.dim] == [1, 3, 5]
    with pytest.raises(Refused, match="3 axes"):
        _fix_shapes(tmp_path / "open.onnx", tmp_path / "fixed.onnx", np.zeros((2, 3, 5, 5), np.float32))


def test_an_abort_over_an_operator_is_a_refusal():
    aborted = "Unhandled exception. System.NotSupportedException: "
    log = f"{aborted}Not Supported Onnx op: Det\n   at Nncase.Import()\n"
    refusal = _failure(log, -6)
    assert isinstance(refusal, Refused) and str(refusal) == "Not Supported Onnx op: Det"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("Unhandled exception. System.Exception: no\n   at X()", "Unhandled exception. System.Exception: no"),
        ("Traceback:\nRuntimeError: no such plugin\n", "RuntimeError: no such plugin"),
        ("", "it printed nothing"),
    ],
)
def test_other_failures_say_what_nncase_said(log, said):
    failure = _failure(log, -6)
    assert not isinstance(failure, Refused) and str(failure) == f"nncase ended with status -6: {said}"


def test_simulator_gets_its_run_bit_once(tmp_path, monkeypatch):
    extension = types.ModuleType("_nncase")
    extension.__file__ = str(tmp_path / "_nncase.so")
    monkeypatch.setitem(sys.modules, "_nncase", extension)
    program = tmp_path / "nncase.simulator.k230.sc"
    program.touch(mode=0o644)
    for _ in range(2):
        _make_executable()
        assert program.stat().st_mode & 0o777 == 0o755


def _network() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 18]>
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
@pytest.mark.parametrize(("scheme", "least_db"), [("int8-pc-minmax", 25), ("int16act-pc-minmax", 30)])
def test_real_simulator_is_near_float(scheme, least_db, tmp_path):
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)
    rng = np.random.default_rng(1)
    calibration, images = (rng.normal(size=(n, 3, 8, 8)).astype(np.float32) for n in (32, 8))
    labels = np.zeros(8, np.int64)
    records = evaluate(
        _network(),
        calibration,
        (images, labels),
        backends=["k230"],
        schemes=[scheme],
        folder=Path(tmp_path),
    )
    [record] = [record for record in records if record["backend"] == "k230"]
    assert record["status"] == "ok", record["reason"]
    assert record["sqnr_db"] > least_db
    assert record["operators"]["GNNEConv2D"] == {"integer": 2}


@pytest.mark.vendor
def test_several_inputs_and_outputs_keep_their_order(tmp_path):
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)
    calibration, images = samples(TWO_IMAGES, 24, 1), samples(TWO_IMAGES, 4, 2)
    rows = evaluate(
        TWO_IMAGES, calibration, images, backends=["k230"], schemes=["int8-pc-minmax"], folder=tmp_path
    )
    [record] = [row for row in rows if row["backend"] == "k230"]
    assert record["status"] == "ok", record["reason"]
    assert [(f["output"], f["shape"]) for f in record["fidelity"]] == [("map", [4, 8, 8]), ("logits", [5])]
    assert all(f["sqnr_db"] > 25 for f in record["fidelity"])
