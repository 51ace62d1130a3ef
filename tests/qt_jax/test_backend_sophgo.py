"""Test Sophgo: its description, helpers that do not need tpu-mlir, and (vendor) real compiles."""

import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from qt_jax.backends import environments, evaluate, sophgo
from qt_jax.backends.protocol import Refused
from qt_jax.backends.sophgo import BACKEND, FLOAT, complaint, operators, read

LOWERED = """
    %1 = "top.Input"(%arg0) {scale = [1.0]} : (tensor<1x3xf32>) -> tensor<1x3x!quant.calibrated<f32<-2.0:2.0>>>
    %2 = "tpu.Cast"(%1) {with_scale = true} : (tensor<1x3x!quant.calibrated<f32<-2.0:2.0>>>) -> tensor<1x3x!quant.uniform<i8:f32, 0.01>> loc(#loc2)
    %5 = "tpu.MatMul"(%2, %3, %4) {q = 0 : i64} : (tensor<1x3x!quant.uniform<i8:f32, 0.01>>, tensor<3x4xsi8>, none) -> tensor<1x4x!quant.uniform<u4:f32, 0.1>> loc(#loc3)
    %6 = "tpu.Softmax"(%5) {q = 0 : i64} : (tensor<1x4xbf16>) -> tensor<1x4xbf16> loc(#loc4)
    %7 = "tpu.GenericCpu"(%6) {q = 0 : i64} : (tensor<1x4xbf16>) -> tensor<1x4xsi8> loc(#loc5)
    %8 = "tpu.Reshape"(%7) : (tensor<1x4xsi8>) -> tensor<4xsi8> loc(#loc6)
"""  # noqa: E501


def test_operators_by_the_tensors_they_touch():
    assert operators(LOWERED) == {
        "Cast": {"integer": 0, "float": 1, "host": 0},
        "MatMul": {"integer": 1, "float": 0, "host": 0},
        "Softmax": {"integer": 0, "float": 1, "host": 0},
        "GenericCpu": {"integer": 0, "float": 0, "host": 1},
    }


def test_all_schemes_start_from_the_float_one():
    float_scheme, *others = BACKEND.schemes
    assert float_scheme.name == FLOAT and float_scheme.source is None
    assert {scheme.source for scheme in others} == {("sophgo", FLOAT)}
    chips = {scheme.name.split("-")[0] for scheme in others}
    assert chips == {"bm1684", "bm1684x", "bm1688", "cv181x"}


def test_only_integers_are_calibrated():
    for scheme in BACKEND.schemes:
        assert (scheme.calibration is None) == (scheme.activation_bits > 8) == (scheme.per_channel is None)


def test_a_complaint_is_the_last_error():
    assert complaint("error: first\nfailed to lower Foo\nbye\r\n") == "failed to lower Foo"
    assert complaint("bye") == "bye"
    assert complaint("\n") == "it said nothing"


def model(opset, operator="Relu"):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 192] logits) {{
        changed = {operator}(input)
        logits = Flatten(changed)
    }}"""
    return onnx.parser.parse_model(text)


def test_new_opsets_are_read_as_the_newest_known(tmp_path):
    onnx.save(model(21), tmp_path / "new.onnx")
    onnx.save(model(17), tmp_path / "old.onnx")
    assert [read(tmp_path / name).opset_import[0].version for name in ("new.onnx", "old.onnx")] == [19, 17]
    assert read(tmp_path / "new.onnx").ir_version == 9


def test_operators_newer_than_that_are_refused(tmp_path):
    onnx.save(model(21, "Gelu"), tmp_path / "new.onnx")
    with pytest.raises(Refused, match="Gelu of opset 21"):
        read(tmp_path / "new.onnx")


def test_a_failing_program_is_refused_with_its_words(tmp_path, monkeypatch):
    tools = tmp_path / "python" / "tools"
    tools.mkdir(parents=True)
    (tools / "model_deploy.py").write_text("import sys; print('NotImplementedError: Foo'); sys.exit(3)")
    monkeypatch.setenv("TPUC_ROOT", str(tmp_path))
    monkeypatch.setattr(sophgo.sys, "executable", sys.executable)
    with pytest.raises(Refused, match="model_deploy ended with 3: NotImplementedError: Foo"):
        sophgo._tool("model_deploy", tmp_path)


NETWORK = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 4] logits) <float[4, 3, 3, 3] kernel> {
        convolved = Conv<pads = [1, 1, 1, 1]>(input, kernel)
        positive = Relu(convolved)
        mean = GlobalAveragePool(positive)
        logits = Flatten(mean)
    }""")


REFUSED = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 3] logits) {
        logits = Det(input)
    }""")


def run(model, images, folder, schemes=None):
    """Return the backend's own records, without the float reference that `evaluate` adds."""
    test_set = (images, np.zeros(len(images), np.int64))
    found = evaluate(model, images, test_set, backends=["sophgo"], schemes=schemes, folder=folder)
    return {record["scheme"]: record for record in found if record["backend"] == "sophgo"}


@pytest.fixture
def installed():
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(20, 3, 8, 8)).astype(np.float32)


@pytest.mark.vendor
def test_every_chip_runs(installed, images, tmp_path):
    """Run 20 images: one whole batch and a part of the next."""
    network = onnx.ModelProto()
    network.CopyFrom(NETWORK)
    del network.graph.initializer[:]
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    network.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
    names = [FLOAT, "bm1688-int8", "bm1684x-int8", "cv181x-int8", "bm1684-int8", "bm1688-w4int8"]
    found = run(network, images, tmp_path, names)
    assert {name: record["status"] for name, record in found.items()} == dict.fromkeys(names, "ok")
    assert found[FLOAT]["sqnr_db"] > 100
    assert all(record["sqnr_db"] > 15 for record in found.values())
    assert found["bm1688-int8"]["operators"]["Conv2D"] == {"integer": 1, "float": 0, "host": 0}


@pytest.mark.vendor
def test_an_unknown_operator_is_refused(installed, images, tmp_path):
    [record] = run(REFUSED, images, tmp_path, ["bm1688-f32"]).values()
    assert record["status"] == "refused"
    assert "Det" in record["reason"]
