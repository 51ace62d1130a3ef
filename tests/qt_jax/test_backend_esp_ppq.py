"""Test esp-ppq: its description, its helpers, and (vendor) the real quantizer."""

import pickle
import subprocess
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper

from qt_jax.backends import environments, evaluate
from qt_jax.backends.esp_ppq import BACKEND, THIRD_PARTY, _calibration_steps, _spell_out, count_operators
from qt_jax.backends.protocol import KINDS, Compiled
from tests.qt_jax.vendor_process import compile_all, run_all

SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}


def test_names_and_descriptions_agree():
    assert len(SCHEMES) == len(BACKEND.schemes)
    for name, scheme in SCHEMES.items():
        own = name.startswith("esp32")
        assert (scheme.vendor, scheme.kind) == (None, None) if own else scheme.kind == THIRD_PARTY
        assert scheme.weight_bits == (16 if "-int16-" in name else 8)
        assert scheme.activation_bits == (16 if "int16" in name else 8)
    assert THIRD_PARTY in KINDS
    assert SCHEMES["rknn-int8-mse"].vendor == "Rockchip" and not SCHEMES["rknn-int8-mse"].per_channel
    assert "rknn-int8-kl" not in SCHEMES  # PPQ refuses it for affine grids
    assert BACKEND.leaves_float and not any(runtime.timed for runtime in BACKEND.runtimes)


@pytest.mark.parametrize(
    ("size", "batch", "wanted"),
    [(3, 32, [1, 1, 1]), (64, 32, [8] * 8), (512, 32, [32] * 16), (4, 1, [1] * 4)],
)
def test_calibration_takes_eight_steps_if_it_can(size, batch, wanted):
    data = {"x": np.arange(size), "y": np.arange(size)}
    steps = list(_calibration_steps(data, batch))
    assert [len(step["x"]) for step in steps] == wanted
    np.testing.assert_array_equal(np.concatenate([step["y"] for step in steps]), data["y"])


def operation(kind, states, platform="ESPDL_INT8"):
    configs = [SimpleNamespace(state=SimpleNamespace(name=state)) for state in states]
    return SimpleNamespace(
        type=kind,
        platform=SimpleNamespace(name=platform),
        config=SimpleNamespace(input_quantization_config=configs),
    )


def test_integer_operators_have_quantized_operands_and_kernels():
    graph = SimpleNamespace(
        operations={
            "a": operation("Conv", ["ACTIVATED", "BAKED", "FP32"]),  # a float bias
            "b": operation("Conv", ["ACTIVATED", "FP32"]),
            "c": operation("Relu", ["OVERLAPPED"]),
            "d": operation("Shape", ["FP32"], "SOI"),
            "e": SimpleNamespace(type="Softmax", platform=SimpleNamespace(name="FP32")),
        }
    )
    assert count_operators(graph) == {
        "Conv": {"integer": 1, "float": 1},
        "Relu": {"integer": 1},
        "Softmax": {"float": 1},
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
        mean = GlobalAveragePool(stem_relu)
        flat = Flatten(mean)
        logits = Gemm(flat, w, c)
    }""",
    k=(16, 3, 3, 3),
    b=(16,),
    w=(16, 5),
    c=(5,),
)


def test_gemm_and_conv_are_spelled_out_without_change():
    model = onnx.ModelProto()
    model.CopyFrom(NETWORK)
    _spell_out(model.graph)
    stem, *_, gemm = model.graph.node
    assert [list(a.ints) for a in stem.attribute if a.name == "kernel_shape"] == [[3, 3]]
    assert [a.i for a in gemm.attribute if a.name == "transB"] == [1]
    data = {"input": images(4, 3, 8, 8)}
    np.testing.assert_allclose(reference(model, data)[0], reference(NETWORK, data)[0], rtol=1e-5, atol=1e-5)


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
    for name, scheme in SCHEMES.items():
        assert isinstance(compiled[name], Compiled), compiled[name]
        assert compiled[name].products == (1 if name.startswith("ascend") else 2, 2)  # its Gemm is float
        assert (compiled[name].model_bytes is None) == (scheme.kind == THIRD_PARTY)
        [logits] = found[name]
        assert logits.shape == wanted.shape and logits.dtype == np.float32
        np.testing.assert_array_equal(logits, again[name][0])
        assert decibels(wanted, logits) > 18, name


@pytest.mark.vendor
def test_a_row_of_the_harness(installed, tmp_path):
    test_set = images(40, 3, 8, 8), np.zeros(40, np.int64)
    found = evaluate(
        NETWORK,
        images(64, 3, 8, 8),
        test_set,
        backends=["esp-ppq"],
        schemes=["rknn-int8-minmax"],
        folder=tmp_path,
    )
    [record] = [record for record in found if record["backend"] == "esp-ppq"]
    assert record["status"] == "ok", record["reason"]
    assert record["sqnr_db"] > 18 and record["operators"]["Conv"] == {"integer": 1}


SCALES = """
import pathlib, pickle, sys
from esp_ppq.api import load_native_graph
found = {}
for folder in map(pathlib.Path, sys.argv[2:]):
    graph = load_native_graph(str(folder / "model.native"))
    [conv] = [it for it in graph.operations.values() if it.type == "Conv"]
    config = conv.config.input_quantization_config[1]
    found[folder.name] = config.scale.numpy(), config.quant_min, config.quant_max, int(config.rounding.value)
pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(found))
"""


def power_of_two(scale):
    return 2.0 ** np.ceil(np.log2(scale))


@pytest.mark.vendor
def test_kernels_are_on_the_grids_that_the_docstring_tells(installed, tmp_path):
    """Read the kernels' scales back from PPQ's files, and compare with numpy."""
    model = with_weights(
        """net (float[batch, 6, 8, 8] input) => (float[batch, 4, 8, 8] output) {
            output = Conv(input, kernel, bias)
        }""",
        kernel=(4, 6, 1, 1),
        bias=(4,),
    )
    kernel = numpy_helper.to_array(model.graph.initializer[0])
    whole, channel = np.abs(kernel).max(), np.abs(kernel).max((1, 2, 3))
    affine = (kernel.max() - kernel.min()) / 255
    wanted = {
        "esp32s3-int8-minmax": (power_of_two(whole / 127.5), -128, 127),
        "esp32-int8-kl": (power_of_two(whole / 127.5), -128, 127),
        "esp32p4-int8-minmax": (power_of_two(channel / 127.5), -128, 127),
        "esp32p4-int16act-minmax": (power_of_two(channel / 127.5), -128, 127),
        "esp32p4-int16-minmax": (power_of_two(channel / 32767.5), -32768, 32767),
        "rknn-int8-minmax": (affine, 0, 255),
        "snpe-int8-minmax": (affine, 0, 255),
        "tengine-int8-minmax": (affine, 0, 255),
        "metax-pt-int8-percentile": (affine, 0, 255),
        "tensorrt-int8-kl": (channel / 127.5, -128, 127),
        "openvino-int8-minmax": (channel / 127.5, -128, 127),
        "ascend-int8-minmax": (channel / 127.5, -128, 127),
        "ti-int8-percentile": (channel / 127.5, -128, 127),
        "openppl-int8-percentile": (channel / 127.5, -128, 127),
        "ncnn-int8-minmax": (channel / 127, -127, 127),
        "mnn-int8-minmax": (channel / 127, -127, 127),
        "metax-pc-int8-percentile": (channel / 127, -127, 127),
        "nxp-int8-percentile": (power_of_two(channel / 127.5), -128, 127),
        "fpga-int8-percentile": (power_of_two(whole / 127.5), -128, 127),
    }
    compiled = compile_all(BACKEND, model, images(16, 6, 8, 8), list(wanted), tmp_path)
    assert {type(reply) for reply in compiled.values()} == {Compiled}, compiled
    answer = tmp_path / "scales"
    folders = [tmp_path / name for name in wanted]
    python = environments.interpreter(BACKEND.environment)
    subprocess.run([python, "-c", SCALES, answer, *folders], check=True, capture_output=True)
    for name, (scale, least, most, _) in pickle.loads(answer.read_bytes()).items():
        np.testing.assert_allclose(scale, wanted[name][0], rtol=1e-6, err_msg=name)
        assert (least, most) == wanted[name][1:], name
        assert (np.size(scale) > 1) == SCHEMES[name].per_channel


@pytest.mark.vendor
def test_results_are_those_of_the_grid(installed, tmp_path):
    """Compare with numpy on a network that is linear but for 16-bit grids of activations."""
    model = with_weights(
        """net (float[batch, 6, 8, 8] input) => (float[batch, 4, 8, 8] output) {
            output = Conv(input, kernel, bias)
        }""",
        kernel=(4, 6, 1, 1),
        bias=(4,),
    )
    kernel, bias = (numpy_helper.to_array(tensor) for tensor in model.graph.initializer)
    data, scheme = images(16, 6, 8, 8), "esp32p4-int16act-minmax"
    compile_all(BACKEND, model, data, [scheme], tmp_path)
    [found] = run_all(BACKEND, data, [scheme], tmp_path)[scheme]
    scale = power_of_two(np.abs(kernel).max((1, 2, 3), keepdims=True) / 127.5)
    rounded = np.clip(np.rint(kernel / scale), -128, 127) * scale
    grid = np.einsum("oi,nihw->nohw", rounded[:, :, 0, 0], data) + bias[:, None, None]
    [exact] = reference(model, {"input": data})
    assert np.linalg.norm(found - grid) < 0.2 * np.linalg.norm(exact - grid)


@pytest.mark.vendor
def test_a_layer_stays_in_float_and_files_stay_as_they_are(installed, tmp_path):
    schemes = ["esp32s3-int8-kl", "tensorrt-int8-kl"]
    calibration = images(64, 3, 8, 8)
    compiled = compile_all(BACKEND, NETWORK, calibration, schemes, tmp_path / "head", ["Gemm of logits"])
    for name in schemes:
        assert compiled[name].products == (1, 2)
        assert compiled[name].operators["Gemm"] == {"float": 1}
    assert onnx.load(tmp_path / "head" / "source.onnx") == NETWORK  # esp-ppq overwrites what it is given
    refused = compile_all(BACKEND, NETWORK, calibration, schemes, tmp_path / "refused", ["nowhere"])
    assert all(reply.startswith("Refused") and "'nowhere'" in reply for reply in refused.values())


@pytest.mark.vendor
def test_several_inputs_and_outputs_keep_their_order(installed, tmp_path):
    model = with_weights(
        """net (float[batch, 6] x, float[batch, 4] y) => (float[batch, 4] z, float[batch, 4] sum) {
            product = MatMul(x, w)
            sum = Add(product, y)
            z = Sigmoid(sum)
        }""",
        w=(6, 4),
    )
    data = {"x": images(40, 6), "y": images(40, 4)}
    schemes = ["esp32p4-int8-minmax", "tensorrt-int8-kl"]
    compile_all(BACKEND, model, data, schemes, tmp_path)
    wanted = reference(model, data)
    for found in run_all(BACKEND, data, schemes, tmp_path).values():
        assert all(decibels(*pair) > 20 for pair in zip(wanted, found, strict=True))


@pytest.mark.vendor
def test_attention_that_fixes_the_batch_is_run_one_by_one(installed, tmp_path):
    model = with_weights(
        """net (float[batch, 5, 6] x) => (float[batch, 5, 6] y) {
            q = MatMul(x, w)
            k = MatMul(x, v)
            kt = Transpose<perm = [0, 2, 1]>(k)
            s = MatMul(q, kt)
            p = Softmax<axis = -1>(s)
            y = MatMul(p, x)
        }""",
        w=(6, 6),
        v=(6, 6),
    )
    data, scheme = images(20, 5, 6), "esp32p4-int16act-minmax"
    compile_all(BACKEND, model, data, [scheme], tmp_path)
    [found] = run_all(BACKEND, data, [scheme], tmp_path)[scheme]
    assert decibels(reference(model, {"x": data})[0], found) > 20
    assert (tmp_path / scheme / "one_by_one").exists()
