"""Test Qualcomm's AIMET: its description, its count of operators, and (vendor) the real quantizer."""

import json

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from qt_jax.backends import environments, evaluate
from qt_jax.backends.aimet import BACKEND, count_operators
from qt_jax.backends.protocol import Compiled
from tests.qt_jax.vendor_process import compile_all, run_all

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}


def test_names_and_descriptions_agree():
    assert len(SCHEMES) == len(BACKEND.schemes) == 20
    for name, scheme in SCHEMES.items():
        assert scheme.weight_bits == (4 if "int4w" in name else 8)
        assert scheme.activation_bits == (16 if "int16act" in name else 8)
        assert scheme.per_channel == ("v73" in name or "-pc-" in name)
        assert ("-cle-" in name) == scheme.calibration.endswith("equalized")
        assert ("minmax" in name) == scheme.calibration.startswith("minmax")
    assert BACKEND.leaves_float and not any(runtime.timed for runtime in BACKEND.runtimes)


def test_integer_operators_have_quantized_kernels_and_results():
    nodes = [
        ("Conv", ["x", "k", "b"], ["c"]),  # its Relu is quantized
        ("Relu", ["c"], ["r"]),
        ("Shape", ["r"], ["shape"]),  # no floating-point result
        ("Flatten", ["r"], ["f"]),
        ("Gemm", ["f", "float kernel"], ["g"]),
        ("Sigmoid", ["g"], ["s"]),  # its operand is not quantized
    ]
    floats, constants = set("xcrfgs"), {"k", "b", "float kernel"}
    assert count_operators(nodes, floats, constants, {"x", "k", "r", "s"}) == {
        "Conv": {"integer": 1},
        "Flatten": {"integer": 1},
        "Gemm": {"float": 1},
        "Relu": {"integer": 1},
        "Sigmoid": {"float": 1},
    }


def with_weights(text: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """Parse a graph at opset 17; draw its weights, and name its nodes by their operators."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for node in model.graph.node:
        node.name = f"{node.op_type} of {node.output[0]}"
    return model


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, *shape)).astype(np.float32)


def reference(model, feeds):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)


def decibels(wanted, found) -> float:
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum())


NETWORK = with_weights(
    """net (float[batch, 3, 8, 8] input) => (float[batch, 5] logits) {
        stem = Conv<pads = [1, 1, 1, 1]>(input, k, b)
        stem_relu = Relu(stem)
        second = Conv(stem_relu, l, m)
        second_relu = Relu(second)
        mean = GlobalAveragePool(second_relu)
        flat = Flatten(mean)
        logits = Gemm(flat, w, c)
    }""",
    k=(16, 3, 3, 3),
    b=(16,),
    l=(16, 16, 3, 3),
    m=(16,),
    w=(16, 5),
    c=(5,),
)


@pytest.fixture(scope="module")
def installed():
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)


@pytest.mark.vendor
def test_every_scheme_runs_in_a_process_of_its_own(installed, tmp_path):
    calibration, data = images(64, 3, 8, 8), images(40, 3, 8, 8)
    compiled = compile_all(BACKEND, NETWORK, calibration, list(SCHEMES), tmp_path)
    found = run_all(BACKEND, data, list(SCHEMES), tmp_path)
    again = run_all(BACKEND, data, list(SCHEMES), tmp_path)
    [wanted] = reference(NETWORK, {"input": data})
    for name in SCHEMES:
        assert isinstance(compiled[name], Compiled), compiled[name]
        assert compiled[name].products == (3, 3)
        [logits] = found[name]
        assert logits.shape == wanted.shape and logits.dtype == np.float32
        np.testing.assert_array_equal(logits, again[name][0])
        assert decibels(wanted, logits) > (8 if "int4w" in name else 20), name


@pytest.mark.vendor
def test_a_row_of_the_harness(installed, tmp_path):
    test_set = images(40, 3, 8, 8), np.zeros(40, np.int64)
    found = evaluate(
        NETWORK,
        images(64, 3, 8, 8),
        test_set,
        backends=["aimet"],
        schemes=["htp-v73-int8-minmax"],
        folder=tmp_path,
    )
    [record] = [record for record in found if record["backend"] == "aimet"]
    assert record["status"] == "ok", record["reason"]
    assert record["sqnr_db"] > 20 and record["operators"]["Conv"] == {"integer": 2}


@pytest.mark.vendor
@pytest.mark.parametrize("flip", [1, -1])
def test_kernels_are_on_the_grid_that_the_docstring_tells(flip, installed, tmp_path):
    """Compare scales and results with numpy on a linear network. Negative weights reach one level further."""
    model = with_weights(
        """net (float[batch, 6, 8, 8] input) => (float[batch, 4] logits) {
            convolved = Conv(input, kernel, bias)
            mean = GlobalAveragePool(convolved)
            logits = Flatten(mean)
        }""",
        kernel=(4, 6, 1, 1),
        bias=(4,),
    )
    kernel = flip * numpy_helper.to_array(model.graph.initializer[0])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    data = images(48, 6, 8, 8) + images(48, 6, 1, 1)
    names = ["htp-v66-int4w-minmax", "htp-v73-int4w-int16act-minmax", "htp-v73-int8-minmax"]
    compile_all(BACKEND, model, data, names, tmp_path)
    found = run_all(BACKEND, data, names, tmp_path)
    [exact] = reference(model, {"input": data})
    for name in names:
        axes = (1, 2, 3) if SCHEMES[name].per_channel else (0, 1, 2, 3)
        half = 2 ** (SCHEMES[name].weight_bits - 1)
        scale = np.maximum(kernel.max(axes) / (half - 1), -kernel.min(axes) / half)
        encodings = json.loads((tmp_path / name / "model.encodings").read_text())
        [entry] = [entry for entry in encodings["param_encodings"] if entry["name"] == "kernel"]
        np.testing.assert_allclose(entry["scale"], np.atleast_1d(scale), rtol=1e-6)
        assert set(entry["offset"]) == {-half}
        if SCHEMES[name].weight_bits == 4:
            steps = np.reshape(scale, (-1, 1))
            levels = np.clip(np.floor(kernel[:, :, 0, 0] / steps + 0.5), -half, half - 1)
            bias = numpy_helper.to_array(model.graph.initializer[1])
            grid = data.mean((2, 3)) @ (levels * steps).T + bias
            assert np.linalg.norm(found[name][0] - grid) < 0.2 * np.linalg.norm(exact - grid)


@pytest.mark.vendor
def test_a_layer_stays_in_float(installed, tmp_path):
    """Only the head keeps its kernel, so that 4-bit kernels cost less. Another name is refused."""
    scheme = "htp-v73-int4w-minmax"
    calibration, data = images(64, 3, 8, 8), images(40, 3, 8, 8)
    [wanted] = reference(NETWORK, {"input": data})
    results = {}
    for layers in ([], ["Gemm of logits"], ["Conv of stem", "Conv of second", "Gemm of logits"]):
        folder = tmp_path / str(len(layers))
        compiled = compile_all(BACKEND, NETWORK, calibration, [scheme], folder, layers)[scheme]
        assert compiled.products == (3 - len(layers), 3)
        results[len(layers)] = decibels(wanted, run_all(BACKEND, data, [scheme], folder)[scheme][0])
    assert results[0] < results[1] < results[3] and results[3] > 30
    refused = compile_all(BACKEND, NETWORK, calibration, [scheme], tmp_path / "refused", ["nowhere"])
    assert refused[scheme].startswith("Refused") and "'nowhere'" in refused[scheme]


@pytest.mark.vendor
def test_several_inputs_and_outputs_keep_their_order(installed, tmp_path):
    """MatMul and Add are fused under a new name, and the float layer is found all the same."""
    model = with_weights(
        """net (float[batch, 6] x, float[batch, 4] y) => (float[batch, 4] z, float[batch, 4] sum) {
            product = MatMul(x, w)
            biased = Add(product, b)
            sum = Add(biased, y)
            z = Sigmoid(sum)
        }""",
        w=(6, 4),
        b=(4,),
    )
    data = {"x": images(40, 6), "y": images(40, 4)}
    scheme = "htp-v73-int8-minmax"
    wanted = reference(model, data)
    for layers, quantized in ([], 1), (["MatMul of product"], 0):
        folder = tmp_path / str(quantized)
        compiled = compile_all(BACKEND, model, data, [scheme], folder, layers)[scheme]
        assert compiled.products == (quantized, 1)
        found = run_all(BACKEND, data, [scheme], folder)[scheme]
        assert all(decibels(*pair) > 20 for pair in zip(wanted, found, strict=True))


@pytest.mark.vendor
def test_a_fixed_batch_is_calibrated_one_by_one(installed, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(NETWORK)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    scheme = "htp-v73-int8-minmax"
    compile_all(BACKEND, model, images(64, 3, 8, 8), [scheme], tmp_path)
    data = images(1, 3, 8, 8)
    found = run_all(BACKEND, data, [scheme], tmp_path)[scheme]
    assert decibels(reference(model, {"input": data})[0], found[0]) > 20
