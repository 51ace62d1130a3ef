"""Test Sophgo: its description, helpers that do not need tpu-mlir, and (vendor) real compiles."""

import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from qt_jax.backends import environments, evaluate, sophgo
from qt_jax.backends.protocol import Refused
from qt_jax.backends.sophgo import BACKEND, FLOAT, complaint, layers, operators, read
from tests.qt_jax.vendor_networks import TWO_IMAGES, samples

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


CONVERTED = """
    %0 = "top.Input"(%arg0) {pad = 0 : i64} : (tensor<1x3x8x8xf32>) -> tensor<1x3x8x8xf32> loc(#loc1)
    %3 = "top.Conv"(%0, %1, %2) {do_relu = true} : (tensor<1x3x8x8xf32>) -> tensor<1x4x8x8xf32> loc(#loc4)
    %6 = "top.Add"(%3, %5) {do_relu = false} : (tensor<1x4x8x8xf32>) -> tensor<1x4x8x8xf32> loc(#loc5)
    %7 = "top.MatMul"(%6, %8) {left = false} : (tensor<1x4xf32>) -> tensor<1x5xf32> loc(#loc6)
    return %6, %7 : tensor<1x4x8x8xf32>, tensor<1x5xf32> loc(#loc)
#loc1 = loc("image")
#loc4 = loc("active_Relu")
#loc5 = loc("sum_Add")
#loc6 = loc("logits_Gemm")
"""


def test_layers_are_found_under_the_name_of_what_they_were_fused_with():
    graph = onnx.parser.parse_graph("""net (float[b, 3, 8, 8] image)
        => (float[b, 4, 8, 8] sum, float[b, 5] logits) {
        stem = Conv(image, k)
        active = Relu(stem)
        other = Conv(active, l)
        sum = Add(other, active)
        logits = Gemm(sum, w)
    }""")
    for node in graph.node:
        node.name = f"node_{node.output[0]}"
    named = layers(graph, CONVERTED)
    assert named == {
        "node_stem": "active_Relu",
        "node_active": "active_Relu",
        "node_sum": "sum_Add",
        "node_logits": "logits_Gemm",
    }  # the other convolution is not there, and the addition is not taken for it
    assert (
        sophgo._float_table(named, ["node_stem", "node_logits"], "bm1688")
        == "active_Relu F32\nlogits_Gemm F32\n"
    )
    assert sophgo._float_table(named, ["node_stem"], "cv181x") == "active_Relu BF16\n"
    with pytest.raises(Refused, match="'node_other'"):
        sophgo._float_table(named, ["node_other"], "bm1688")


def test_outputs_have_the_shapes_of_the_converted_graph():
    network = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        net (float[b, 4, 8, 8] x) => (float[b, 4, 8, 8] sum, int64[b, 5] logits) { sum = Relu(x) }""")
    assert sophgo._outputs(network, CONVERTED) == [([4, 8, 8], "float32"), ([5], "int64")]
    with pytest.raises(Refused, match="do not begin with the batch"):
        sophgo._outputs(
            network, CONVERTED.replace("tensor<1x5xf32> loc(#loc)\n", "tensor<2x5xf32> loc(#loc)\n")
        )


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


@pytest.mark.vendor
def test_several_inputs_and_outputs_and_a_layer_left_in_float(installed, tmp_path):
    settings = {"backends": ["sophgo"], "schemes": ["bm1688-int8-max"], "folder": tmp_path}
    data = samples(TWO_IMAGES, 20, 1)
    rows = [
        row
        for layers in (None, "node_map")
        for row in evaluate(TWO_IMAGES, data, data, float_layers=layers, **settings)
        if row["backend"] == "sophgo"
    ]
    for row in rows:
        assert row["status"] == "ok", row["reason"]
        assert [(f["output"], f["shape"]) for f in row["fidelity"]] == [("map", [4, 8, 8]), ("logits", [5])]
        assert all(f["sqnr_db"] > 25 for f in row["fidelity"])
    assert [row["operators"]["Conv2D"]["float"] for row in rows] == [0, 1]
    assert rows[1]["fidelity"][0]["sqnr_db"] > rows[0]["fidelity"][0]["sqnr_db"]
