"""Test onnxruntime's schemes against the ONNX reference evaluator and numpy."""

import warnings

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import numpy_helper, version_converter

from qt_jax.backends import Refused, evaluate
from qt_jax.backends.ort import BACKEND, OPTIMIZED, REFERENCE
from qt_jax.export import storage

CLASSES, CHANNELS, SIZE = 4, 8, 8
SCHEMES = {scheme.name: scheme for scheme in BACKEND.schemes}
RNG = np.random.default_rng(0)
CALIBRATION, IMAGES = (
    RNG.standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)
    + RNG.normal(0, 1, (n, 3, 1, 1)).astype(np.float32)
    for n in (70, 101)
)

GRAPH = f"""<ir_version: 10, opset_import: ["" : 17]>
net (float[batch, 3, {SIZE}, {SIZE}] input) => (float[batch, {CLASSES}] logits) {{
    stem = Conv<pads = [1, 1, 1, 1]>(input, "stem/kernel", "stem/bias")
    stem_relu = Relu(stem)
    block = Conv<pads = [1, 1, 1, 1]>(stem_relu, "block/kernel", "block/bias")
    sum = Add(stem_relu, block)
    sum_relu = Relu(sum)
    mean = GlobalAveragePool(sum_relu)
    flat = Flatten(mean)
    logits = Gemm<transB = 1>(flat, "head/kernel", "head/bias")
}}"""


def conv_net():
    """Build a graph such as the export writes, with random weights."""
    shapes = {"stem": (CHANNELS, 3, 3, 3), "block": (CHANNELS, CHANNELS, 3, 3), "head": (CLASSES, CHANNELS)}
    model = onnx.parser.parse_model(GRAPH)
    for layer, shape in shapes.items():
        kernel = RNG.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        for name, values in (("kernel", kernel), ("bias", RNG.normal(0, 0.1, shape[0]))):
            model.graph.initializer.append(
                numpy_helper.from_array(values.astype(np.float32), f"{layer}/{name}")
            )
    onnx.checker.check_model(model, full_check=True)
    return model


MODEL = conv_net()
REFERENCE_LOGITS = onnxruntime.InferenceSession(
    MODEL.SerializeToString(), providers=["CPUExecutionProvider"]
).run(None, {"input": IMAGES})[0]
LABELS = REFERENCE_LOGITS.argmax(axis=1)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Change to a scratch folder, because compiling leaves files in the working directory."""
    monkeypatch.chdir(tmp_path)


def compile_in(folder, scheme, model=MODEL, calibration=CALIBRATION):
    folder.mkdir()
    onnx.save(model, folder / "source.onnx")
    return BACKEND.compile(folder / "source.onnx", calibration, SCHEMES[scheme], folder)


def compiled(folder, scheme, **changes):
    compile_in(folder / scheme, scheme, **changes)
    return onnx.load(folder / scheme / "model.onnx")


def logits(folder, scheme, runtime=REFERENCE, images=IMAGES, **changes):
    compile_in(folder, scheme, **changes)
    return BACKEND.load(folder, SCHEMES[scheme], runtime)(images)


def weight_integers(model, name):
    """Return the integers, scale and zero point behind `name` in a QDQ model."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return tuple(tensors[f"{name}_{suffix}"] for suffix in ("quantized", "scale", "zero_point"))


@pytest.mark.parametrize("scheme", ["fp32", "int8-pc-minmax", "int8-dynamic", "int4w-blocks"])
def test_a_graph_whose_weights_stand_in_a_second_file(scheme, tmp_path, monkeypatch):
    """Protobuf holds no message of 2 GB: everything that is read or written may be two files."""
    wanted = logits(tmp_path / "one", scheme)
    monkeypatch.setattr(storage, "LARGEST", 1000)
    folder = tmp_path / "two"
    folder.mkdir()
    storage.save(MODEL, folder / "source.onnx")
    assert (folder / "source.onnx.data").exists()
    made = BACKEND.compile(folder / "source.onnx", CALIBRATION, SCHEMES[scheme], folder)
    assert made.model_bytes == sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    for name in ("source.onnx", "source.onnx.data"):
        (folder / name).unlink()
    np.testing.assert_array_equal(BACKEND.load(folder, SCHEMES[scheme], REFERENCE)(IMAGES), wanted)


GRIDS = {8: (127, -127, 127), 4: (7.5, -8, 7), "narrow": (7, -7, 7)}
"""Steps up to max|w|, the least and the largest integer."""


@pytest.mark.parametrize(
    "scheme",
    [
        "int8-pt-minmax",
        "int8-pc-percentile",
        "int4w-pt-percentile",
        "int4w-pc-minmax",
        "int4w-narrow-pt-minmax",
        "int4w-narrow-pc-minmax",
        "int8-s8s8-pc-entropy",
    ],
)
def test_weight_integers_equal_rounding_on_the_documented_grid(scheme, tmp_path):
    model = compiled(tmp_path, scheme)
    for kernel in ("stem/kernel", "block/kernel", "head/kernel"):
        [values] = [numpy_helper.to_array(t) for t in MODEL.graph.initializer if t.name == kernel]
        integers, scale, zero_point = weight_integers(model, kernel)
        steps, *limits = GRIDS["narrow" if "narrow" in scheme else SCHEMES[scheme].weight_bits]
        axes = tuple(range(1, values.ndim)) if SCHEMES[scheme].per_channel else None
        largest = np.abs(values.astype(np.float64)).max(axis=axes, keepdims=True)
        expected_scale = largest / steps
        np.testing.assert_allclose(np.ravel(scale), np.ravel(expected_scale), rtol=1e-6)
        assert not np.any(zero_point.astype(np.int8))
        scaled = values / expected_scale
        clear = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5) > 1e-4  # ties may round either way in float32
        expected = np.clip(np.round(scaled), *limits)
        np.testing.assert_array_equal(integers.astype(np.int8)[clear], expected[clear])


OPERATORS = """<ir_version: 10, opset_import: ["" : 17]>
net (float[batch, 2, 3, 3] input) => (float[batch, 4] logits) {
    up = ConvTranspose(input, up_kernel)
    mean = GlobalAveragePool(up)
    flat = Flatten(mean)
    hidden = Gemm(flat, hidden_kernel, hidden_bias)
    positive = Relu(hidden)
    logits = MatMul(positive, head_kernel)
}"""


@pytest.mark.parametrize("granularity", ["pt", "pc"])
def test_narrow_grid_has_the_channels_that_onnxruntime_takes_by_itself(granularity, tmp_path):
    """Expect scales of 15 / 14 of the wide grid's for every operator, and 1 for a channel of zeros."""
    kernels = {"up_kernel": (2, 3, 2, 2), "hidden_kernel": (3, 5), "hidden_bias": (5,), "head_kernel": (5, 4)}
    model = onnx.parser.parse_model(OPERATORS)
    for name, shape in kernels.items():
        values = RNG.standard_normal(shape).astype(np.float32)
        if name == "hidden_kernel":
            values[:, 2] = 0
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    images = RNG.standard_normal((8, 2, 3, 3)).astype(np.float32)
    wide, narrow = (
        compiled(tmp_path, f"{prefix}-{granularity}-minmax", model=model, calibration=images)
        for prefix in ("int4w", "int4w-narrow")
    )
    for name in ("up_kernel", "hidden_kernel", "head_kernel"):
        _, wide_scale, _ = weight_integers(wide, name)
        integers, scale, zero_point = weight_integers(narrow, name)
        ratio = np.full(scale.shape, 15 / 14)
        if name == "hidden_kernel" and granularity == "pc":
            ratio[2] = 1
        np.testing.assert_allclose(scale, ratio * wide_scale, rtol=1e-6)
        assert np.abs(integers.astype(np.int8)).max() == 7 and not zero_point.astype(np.int8).any()


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_activation_ranges_are_those_of_the_calibration_images(method, tmp_path):
    """Put an outlier into a ragged last batch: 1050 images are 16 batches of 64 and one of 26."""
    spiked = np.tile(CALIBRATION, (15, 1, 1, 1))
    spiked[-1, 0, 0, 0] = 40.0
    model = compiled(tmp_path, f"int8-pt-{method}", calibration=spiked)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    scale, zero_point = tensors["input_scale"], tensors["input_zero_point"]
    assert zero_point.dtype == np.uint8
    low, high = (0 - float(zero_point)) * scale, (255 - float(zero_point)) * scale
    if method == "minmax":
        expected = spiked.min(), spiked.max()
    else:
        expected = np.quantile(spiked, [0.00005, 0.99995])
        assert expected[1] < 20
    np.testing.assert_allclose((low, high), expected, atol=2 * 40 / 1024 + scale)


def test_signed_activations_are_symmetric_and_sixteen_bits_finer(tmp_path):
    largest = np.abs(CALIBRATION).max()
    for scheme, steps in (("int8-s8s8-pc-minmax", 127.5), ("int16act-pc-minmax", 32767.5)):
        tensors = {t.name: numpy_helper.to_array(t) for t in compiled(tmp_path, scheme).graph.initializer}
        assert tensors["input_zero_point"] == 0 and np.issubdtype(
            tensors["input_zero_point"].dtype, np.signedinteger
        )
        np.testing.assert_allclose(tensors["input_scale"], largest / steps, rtol=0.01)


@pytest.mark.parametrize("scheme", ["int8-pt-minmax", "int8-pc-percentile", "int8-dynamic"])
def test_run_equals_the_onnx_reference_evaluator(scheme, tmp_path):
    """Compare with a second implementation of the graph. Requantization may round a few ties differently."""
    newer = version_converter.convert_version(MODEL, 21)  # the evaluator's oldest DequantizeLinear is 19
    compile_in(tmp_path / "c", scheme, model=newer)
    session = BACKEND.load(tmp_path / "c", SCHEMES[scheme], REFERENCE)
    found = np.concatenate([session(IMAGES[i : i + 1]) for i in range(20)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="onnx.reference")
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load(tmp_path / "c" / "model.onnx"))
        expected = np.concatenate([evaluator.run(None, {"input": IMAGES[i : i + 1]})[0] for i in range(20)])
    quantum = np.ptp(REFERENCE_LOGITS) / 255
    assert np.abs(found - expected).max() <= 2 * quantum


def test_int4_result_does_not_depend_on_the_opset_of_the_export(tmp_path):
    """Compare both: below opset 21 ONNX Runtime uses its own 4-bit DequantizeLinear, from 21 the standard."""
    newer = version_converter.convert_version(MODEL, 21)
    np.testing.assert_array_equal(
        logits(tmp_path / "old", "int4w-pc-minmax"), logits(tmp_path / "new", "int4w-pc-minmax", model=newer)
    )


def test_operators_tell_integer_kernels_from_float_ones(tmp_path):
    integer = compile_in(tmp_path / "u8", "int8-pc-minmax").operators
    assert integer["QLinearConv"] == {"integer": 2, "float": 0} and "Conv" not in integer
    weights = compile_in(tmp_path / "w4", "int4w-pc-minmax").operators
    assert sum(weights["Conv"].values()) == weights["Conv"]["float"] == 2
    assert compile_in(tmp_path / "f", "fp32").operators["Gemm"] == {"integer": 0, "float": 1}


def test_operator_format_and_optimization_change_little(tmp_path):
    expected = logits(tmp_path / "a", "int8-pc-minmax")
    quantum = np.ptp(REFERENCE_LOGITS) / 255
    for place, scheme, runtime in (
        ("b", "int8-pc-minmax", OPTIMIZED),
        ("c", "int8-qop-pc-minmax", REFERENCE),
    ):
        assert np.abs(logits(tmp_path / place, scheme, runtime) - expected).max() <= 2.5 * quantum


def test_blocks_of_four_bits_only_reach_matmuls(tmp_path):
    """Compare with numpy: blocks of 32 weights per column (here 8), on the grid [-8, 7] of the largest."""
    model = compiled(tmp_path, "int4w-blocks")
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 1 and kinds.count("Conv") == 2 and "Gemm" not in kinds
    found = BACKEND.load(tmp_path / "int4w-blocks", SCHEMES["int4w-blocks"], REFERENCE)(IMAGES)
    tensors = {
        tensor.name: numpy_helper.to_array(tensor).astype(np.float64) for tensor in MODEL.graph.initializer
    }
    kernel = tensors["head/kernel"]
    step = np.take_along_axis(kernel, np.abs(kernel).argmax(axis=1)[:, None], 1) / -8
    rounded = np.clip(np.round(kernel / step), -8, 7) * step
    features = np.linalg.lstsq(kernel, (REFERENCE_LOGITS - tensors["head/bias"]).T, rcond=None)[0]
    assert np.abs(kernel @ features - (REFERENCE_LOGITS - tensors["head/bias"]).T).max() < 1e-4
    error = np.abs(found - REFERENCE_LOGITS).max()
    assert 0 < error <= (np.abs(rounded - kernel).sum(axis=1).max()) * 4 * np.abs(IMAGES).max()


def test_graph_without_matmuls_is_refused_for_blocks(tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[b, 3] x) => (float[b, 3] y) { y = Relu(x) }'
    )
    with pytest.raises(Refused, match="no matmul"):
        compile_in(tmp_path / "b", "int4w-blocks", model=model)


def test_static_quantization_without_calibration_images_says_so(tmp_path):
    with pytest.raises(Refused, match="needs calibration images"):
        compile_in(tmp_path / "c", "int8-pt-minmax", calibration=CALIBRATION[:0])


def test_every_scheme_keeps_its_promise_of_fidelity(tmp_path):
    rows = evaluate(
        MODEL,
        CALIBRATION,
        (IMAGES, LABELS),
        backends="onnxruntime",
        runtimes=["reference"],
        jobs=2,
        folder=tmp_path,
    )
    assert [row["scheme"] for row in rows] == list(SCHEMES)
    assert {row["status"] for row in rows} == {"ok"}
    reference, quantized = rows[0], {row["scheme"]: row for row in rows[1:]}
    assert (reference["top1"], reference["sqnr_db"], reference["calibration"]) == (1.0, None, None)
    assert quantized["int8-pc-percentile"]["calibration"] == {"n": 70, "method": "percentile 99.99"}
    assert quantized["int8-dynamic"]["calibration"] is None and quantized["int8-dynamic"]["dynamic"]
    for name, row in quantized.items():
        floor = 10 if name.startswith("int4") else 22 if "entropy" in name else 28
        assert row["sqnr_db"] > floor, name
        assert row["agreement"] == row["top1"]  # the labels are the reference's own decisions
    assert quantized["int4w-pc-minmax"]["sqnr_db"] < quantized["int8-pc-minmax"]["sqnr_db"]


def test_latency_is_that_of_single_images_and_throughput_that_of_batches(tmp_path):
    choice = {"backends": "onnxruntime", "runtimes": ["optimized"], "folder": tmp_path}
    for scheme, batch in (("int8-pc-minmax", 100), ("int8-dynamic", 1)):
        row = evaluate(MODEL, CALIBRATION, (IMAGES, LABELS), schemes=[scheme], **choice)[-1]
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p99"] and row["reason"] is None
        assert row["throughput_batch"] == batch and row["throughput_ips"] > 0
        np.testing.assert_allclose(row["cost"], 1e6 * row["throughput_ips"] ** -1 / 3600 * price(row))


def price(row):
    return float(row["cost_source"].split(" at ")[1].split()[0])
