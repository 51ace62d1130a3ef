"""onnxruntime's schemes against the ONNX reference evaluator and numpy; the harness against fake vendors."""

import logging
import tempfile
import warnings

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, version_converter

from qt_jax.backends import BACKENDS, Artifact, Scheme, evaluate
from qt_jax.backends.registry import select
from qt_jax.errors import InvalidInput
from qt_jax.reporting.records import FIELDS, STATUSES

CLASSES, CHANNELS, SIZE = 4, 8, 8
ORT = BACKENDS["onnxruntime"]
SCHEMES = {scheme.name: scheme for scheme in ORT.schemes}
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
    """What the export yields, with random weights."""
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
REFERENCE = ORT.run(ORT.compile(MODEL, CALIBRATION, SCHEMES["fp32"]), IMAGES)
LABELS = REFERENCE.argmax(axis=1)


def compiled(scheme, model=MODEL, calibration=CALIBRATION):
    return onnx.load_from_string(ORT.compile(model, calibration, SCHEMES[scheme]).payload[0])


def weight_integers(model, name):
    """The integers, scale and zero point behind `name` in a QDQ model."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return tuple(tensors[f"{name}_{suffix}"] for suffix in ("quantized", "scale", "zero_point"))


def test_scheme_names_are_those_of_the_issue():
    assert set(SCHEMES) == {"fp32", "int8-dynamic"} | {
        f"{bits}-{granularity}-{method}"
        for bits in ("int8", "int4w")
        for granularity in ("pt", "pc")
        for method in ("minmax", "percentile")
    }


@pytest.mark.parametrize(
    "scheme", ["int8-pt-minmax", "int8-pc-percentile", "int4w-pt-percentile", "int4w-pc-minmax"]
)
@pytest.mark.parametrize("kernel", ["stem/kernel", "block/kernel", "head/kernel"])
def test_weight_integers_equal_rounding_on_the_documented_grid(scheme, kernel):
    [values] = [numpy_helper.to_array(t) for t in MODEL.graph.initializer if t.name == kernel]
    integers, scale, zero_point = weight_integers(compiled(scheme), kernel)
    four = SCHEMES[scheme].weight_bits == 4
    axes = tuple(range(1, values.ndim)) if SCHEMES[scheme].per_channel else None
    largest = np.abs(values.astype(np.float64)).max(axis=axes, keepdims=True)
    expected_scale = 2 * largest / 15 if four else largest / 127
    np.testing.assert_allclose(np.ravel(scale), np.ravel(expected_scale), rtol=1e-6)
    assert not np.any(zero_point.astype(np.int8))
    scaled = values / expected_scale
    clear = np.abs(np.abs(scaled - np.floor(scaled)) - 0.5) > 1e-4  # ties may round either way in float32
    expected = np.clip(np.round(scaled), *((-8, 7) if four else (-127, 127)))
    np.testing.assert_array_equal(integers.astype(np.int8)[clear], expected[clear])


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_activation_ranges_are_those_of_the_calibration_images(method):
    """Over a ragged last batch, which holds an outlier: 1050 images are 16 batches of 64 and one of 26."""
    spiked = np.tile(CALIBRATION, (15, 1, 1, 1))
    spiked[-1, 0, 0, 0] = 40.0
    model = compiled(f"int8-pt-{method}", calibration=spiked)
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


@pytest.mark.parametrize("scheme", ["int8-pt-minmax", "int8-pc-percentile", "int8-dynamic"])
def test_run_equals_the_onnx_reference_evaluator(scheme):
    """A second implementation of the same graph; requantization may round a few ties the other way."""
    newer = version_converter.convert_version(MODEL, 21)  # the evaluator's oldest DequantizeLinear is 19
    artifact = ORT.compile(newer, CALIBRATION, SCHEMES[scheme])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="onnx.reference")
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(onnx.load_from_string(artifact.payload[0]))
        expected = np.concatenate([evaluator.run(None, {"input": IMAGES[i : i + 1]})[0] for i in range(20)])
    quantum = np.ptp(REFERENCE) / 255
    assert np.abs(ORT.run(artifact, IMAGES[:20]) - expected).max() <= 2 * quantum


def test_int4_result_does_not_depend_on_the_opset_of_the_export():
    """Below opset 21 ONNX Runtime uses its own 4-bit DequantizeLinear, from 21 on the standard one."""
    newer = version_converter.convert_version(MODEL, 21)
    results = [
        ORT.run(ORT.compile(model, CALIBRATION, SCHEMES["int4w-pc-minmax"]), IMAGES)
        for model in (MODEL, newer)
    ]
    np.testing.assert_array_equal(*results)


def test_dynamic_logits_of_an_image_do_not_depend_on_its_neighbours():
    artifact = ORT.compile(MODEL, CALIBRATION[:0], SCHEMES["int8-dynamic"])
    np.testing.assert_array_equal(ORT.run(artifact, IMAGES)[7:8], ORT.run(artifact, IMAGES[7:8]))


def test_every_scheme_keeps_its_promise_of_fidelity():
    records = evaluate(
        MODEL, CALIBRATION, (IMAGES, LABELS), identity={"method": "float", "seed": 3, "run": "r"}
    )
    assert [record["scheme"] for record in records] == list(SCHEMES)
    assert {record["status"] for record in records} == {"ok"}
    for record in records:
        assert set(FIELDS) <= set(record) and record["status"] in STATUSES
        assert record["reason"]
        assert (record["method"], record["seed"], record["run"]) == ("float", 3, "r")
        assert (record["n"], record["model_bytes"] > 0, record["seconds"] > 0) == (len(IMAGES), True, True)
        assert "graph optimizations off" in record["runtime"]
        assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    reference, quantized = records[0], {record["scheme"]: record for record in records[1:]}
    assert (reference["top1"], reference["sqnr_db"], reference["calibration"]) == (1.0, None, None)
    assert quantized["int8-pc-percentile"]["calibration"] == {"n": 70, "method": "percentile 99.99"}
    assert quantized["int8-dynamic"]["calibration"] is None and quantized["int8-dynamic"]["dynamic"]
    for name, record in quantized.items():
        floor = 10 if name.startswith("int4") else 28
        assert record["sqnr_db"] > floor, name
        assert record["agreement"] == record["top1"]  # the labels are the reference's own decisions
    assert quantized["int4w-pc-minmax"]["sqnr_db"] < quantized["int8-pc-minmax"]["sqnr_db"]


def test_quiet_and_without_leftovers(capfd, caplog, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before, model = logging.getLogger().handlers[:], MODEL.SerializeToString()
    for scheme in ("int4w-pc-percentile", "int8-dynamic"):
        ORT.run(ORT.compile(MODEL, CALIBRATION, SCHEMES[scheme]), IMAGES)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records and logging.getLogger().handlers == before and not logging.getLogger().filters
    assert not list(tmp_path.iterdir())
    assert MODEL.SerializeToString() == model


class FakeVendor:
    """A backend that fails in the way its scheme is named after."""

    name, vendor, kind, packages = "fake", "Nobody", "vendor simulator", ("numpy",)
    schemes = tuple(Scheme(name, 8, 8, False, "minmax") for name in ("crash", "nan", "shape", "exact"))

    def available(self):
        return None

    def compile(self, model, calibration, scheme):
        if scheme.name == "crash":
            raise RuntimeError("unsupported operator Foo")
        return Artifact(scheme.name, None, "fake runtime")

    def run(self, artifact, inputs):
        logits = REFERENCE.copy()
        if artifact.payload == "nan":
            logits[2] = np.nan
        return logits[:, :2] if artifact.payload == "shape" else logits


class AbsentVendor(FakeVendor):
    name = "absent"

    def available(self):
        return "absent-sdk is not installed: install it"


def test_failures_become_records_and_the_others_go_on(monkeypatch):
    for backend in (FakeVendor(), AbsentVendor()):
        monkeypatch.setitem(BACKENDS, backend.name, backend)
    seen = []
    records = evaluate(
        MODEL, CALIBRATION, (IMAGES, LABELS), backends=["absent", "fake"], on_record=seen.append
    )
    assert seen == records
    outcome = {
        (record["backend"], record["scheme"]): (record["status"], record["reason"]) for record in records
    }
    assert outcome[("onnxruntime", "fp32")][0] == "ok"
    assert all(
        outcome[("absent", s.name)] == ("unavailable", AbsentVendor().available()) for s in FakeVendor.schemes
    )
    assert outcome[("fake", "crash")] == ("crashed", "RuntimeError: unsupported operator Foo")
    assert outcome[("fake", "nan")] == ("invalid", "logits of 1 of 101 images are not finite")
    assert outcome[("fake", "shape")] == ("invalid", "logits have shape (101, 2), expected (101, 4)")
    exact = records[-1]
    assert (exact["status"], exact["agreement"], exact["logit_mse"]) == ("ok", 1.0, 0.0)
    assert exact["sqnr_db"] is None and exact["model_bytes"] is None


def test_only_the_chosen_schemes_run_after_the_reference(tmp_path):
    assert select("all") == list(BACKENDS.values())
    onnx.save(MODEL, tmp_path / "m.onnx")
    records = evaluate(
        tmp_path / "m.onnx", CALIBRATION, (IMAGES, LABELS), schemes=["int8-dynamic"], backends="onnxruntime"
    )
    assert [record["scheme"] for record in records] == ["fp32", "int8-dynamic"]


def broken_file(folder):
    path = folder / "half.onnx"
    path.write_bytes(MODEL.SerializeToString()[:100])
    return path


def two_inputs():
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1]))
    return model


def unrunnable():
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    model.graph.node[0].op_type = "NoSuchOperator"
    return model


def nan_weights():
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    model.graph.initializer[-1].raw_data = np.full(CLASSES, np.nan, np.float32).tobytes()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backends": ["tensorrt"]}, "Unknown backends"),
        ({"schemes": ["int3"]}, "No chosen backend offers"),
        ({"model": "absent.onnx"}, "absent.onnx cannot be read"),
        ({"model": broken_file}, "half.onnx cannot be read"),
        ({"model": two_inputs()}, "exactly one input"),
        ({"model": unrunnable()}, "cannot run the float model"),
        ({"model": nan_weights()}, "no reference to compare with: logits of 101 of 101"),
        ({"test_set": (IMAGES.transpose(0, 2, 3, 1), LABELS)}, "channels-first"),
        ({"test_set": (IMAGES.astype(np.float64), LABELS)}, "float64"),
        ({"calibration": CALIBRATION[0]}, "calibration is float32"),
        ({"test_set": (IMAGES, LABELS[:5])}, "one integer an image"),
        ({"test_set": (IMAGES[:0], LABELS[:0])}, "at least one image"),
        ({"test_set": (IMAGES, LABELS + 50)}, "label"),
    ],
)
def test_input_the_user_can_mend(change, message, tmp_path):
    if callable(change.get("model")):
        change = {"model": change["model"](tmp_path)}
    arguments = {
        "model": MODEL,
        "calibration": CALIBRATION,
        "test_set": (IMAGES, LABELS),
    } | change
    with pytest.raises(InvalidInput, match=message):
        evaluate(**arguments)


def test_static_quantization_without_calibration_images_says_so():
    record = evaluate(MODEL, CALIBRATION[:0], (IMAGES, LABELS), schemes=["int8-pt-minmax"])[-1]
    assert record["status"] == "crashed" and "needs calibration images" in record["reason"]
