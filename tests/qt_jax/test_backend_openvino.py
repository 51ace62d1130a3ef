"""Test OpenVINO: its description, helpers that need none of Intel's packages, and (vendor) real compiles."""

from types import SimpleNamespace

import numpy as np
import onnx.parser
import pytest

from qt_jax.backends import environments, evaluate
from qt_jax.backends.openvino import BACKEND, _operators, brief
from tests.qt_jax.vendor_networks import CUBE, RECURRENT, SOUND_AND_IMAGE, samples

STATIC = [scheme for scheme in BACKEND.schemes if scheme.calibration is not None]


def test_telemetry_is_off():
    assert BACKEND.environment.variables == {"CI": "true", "NNCF_CI": "1"}


def test_names_and_bits_agree():
    for scheme in BACKEND.schemes:
        four = scheme.name.startswith("int4w")
        assert scheme.weight_bits == (32 if scheme.name == "fp32" else 4 if four else 8)
        assert (scheme.activation_bits == 16) == ("int16act" in scheme.name)
        assert scheme.per_channel == (None if scheme.name == "fp32" else "-pt-" not in scheme.name)
        assert not scheme.dynamic and scheme.source is None
    assert len({scheme.name for scheme in BACKEND.schemes}) == len(BACKEND.schemes)


@pytest.mark.parametrize("scheme", STATIC, ids=lambda scheme: scheme.name)
def test_calibration_names_range_and_bias_correction(scheme):
    ranges, bias = scheme.calibration.split(", ")
    assert ("minmax" in scheme.name) == (ranges == "minmax")
    assert ("accurate" in scheme.name) == bias.startswith("accurate")
    assert ("uncorrected" in scheme.name) == bias.startswith("no ")


def test_weight_only_looks_at_no_image():
    names = [scheme.name for scheme in BACKEND.schemes if scheme not in STATIC]
    assert names == ["fp32", "int8w-pc-sym", "int8w-pc-asym", "int4w-matmul-pc-sym", "int4w-matmul-pc-asym"]


def test_an_error_is_told_without_sources():
    message = "Check 'ok' failed at src/core/model.cpp:12:\n\n[ ERROR ]\nUnknown operator Foo\n"
    assert brief(message) == "Unknown operator Foo"
    assert brief("failed at a.cpp:1:") == "failed at a.cpp:1:"


def layer(kind, reads):
    return SimpleNamespace(
        get_rt_info=lambda: {"layerType": SimpleNamespace(astype=lambda _: kind)},
        input=lambda _: SimpleNamespace(
            get_element_type=lambda: SimpleNamespace(to_string=lambda: reads),
        ),
    )


def test_operators_are_counted_by_what_they_read():
    layers = [
        layer("Input", "f32"),
        layer("Convolution", "u8"),
        layer("Convolution", "f32"),
        layer("FullyConnected", "i8"),
        layer("Reorder", "u8"),
    ]
    assert _operators(SimpleNamespace(get_ordered_ops=lambda: layers)) == {
        "Convolution": {"integer": 1, "float": 1},
        "FullyConnected": {"integer": 1, "float": 0},
    }


NETWORK = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 4] logits) <float[4, 3, 3, 3] kernel, float[4] bias> {
        convolved = Conv<pads = [1, 1, 1, 1]>(input, kernel, bias)
        positive = Relu(convolved)
        mean = GlobalAveragePool(positive)
        logits = Flatten(mean)
    }""")
REFUSED = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 3] logits) {
        logits = Det(input)
    }""")


def filled(model):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    del copied.graph.initializer[:]
    copied.graph.initializer.extend(
        [onnx.numpy_helper.from_array(kernel, "kernel"), onnx.numpy_helper.from_array(bias, "bias")]
    )
    return copied


@pytest.fixture
def images():
    return np.random.default_rng(1).normal(size=(24, 3, 8, 8)).astype(np.float32)


def run(model, images, folder, schemes=None, **settings):
    """Return the backend's own records, without the float reference that `evaluate` adds."""
    found = evaluate(model, images, images, backends=["openvino"], schemes=schemes, folder=folder, **settings)
    return {record["scheme"]: record for record in found if record["backend"] == "openvino"}


@pytest.fixture
def installed():
    lack = environments.missing(BACKEND.environment)
    if lack:
        pytest.skip(lack)


@pytest.mark.vendor
def test_every_scheme_runs(installed, images, tmp_path):
    found = run(filled(NETWORK), images, tmp_path)
    assert set(found) == {scheme.name for scheme in BACKEND.schemes}
    assert {record["status"] for record in found.values()} == {"ok"}
    sqnr = {name: record["sqnr_db"] for name, record in found.items()}
    assert sqnr["fp32"] > 100
    assert all(value > 25 for name, value in sqnr.items() if name.startswith("int8-pc"))
    assert found["int8-pc-sym-mean"]["operators"]["Convolution"]["integer"] == 1


LINEAR = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 6, 8, 8] input) => (float[batch, 4] logits) <float[4, 6, 1, 1] kernel, float[4] bias> {
        convolved = Conv(input, kernel, bias)
        mean = GlobalAveragePool(convolved)
        logits = Flatten(mean)
    }""")


@pytest.mark.vendor
@pytest.mark.parametrize("granularity", ["pt", "pc"])
def test_four_bit_kernels_are_on_the_grid_of_seven_steps(granularity, installed, tmp_path):
    """Compare with numpy on a network that is linear except for 8-bit grids: kernels on [-7, 7], max|w| / 7.

    The correction may shift each class by a constant, so the means over images are subtracted.
    """
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 6, 1, 1)).astype(np.float32) * np.float32([1, 2, 4, 8])[:, None, None, None]
    images = rng.normal(size=(48, 6, 8, 8)).astype(np.float32)
    images += rng.normal(size=(48, 6, 1, 1)).astype(np.float32)
    model = onnx.ModelProto()
    model.CopyFrom(LINEAR)
    for name, values in (("kernel", kernel), ("bias", np.ones(4, np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    scheme = f"int4w-{granularity}-sym-minmax"
    [record] = run(model, images, tmp_path, [scheme]).values()
    assert record["status"] == "ok" and record["operators"]["Convolution"] == {"integer": 0, "float": 1}

    [path] = tmp_path.glob(f"work/openvino-{scheme}-cpu-run-*/outputs/0.npy")
    scale = np.abs(kernel).max(axis=(1, 2, 3) if granularity == "pc" else None, keepdims=True) / 7

    def centred(logits):
        return logits - logits.mean(axis=0)

    def answers(weights):
        return centred(images.mean(axis=(2, 3)) @ weights[:, :, 0, 0].T)

    found, grid = centred(np.load(path)), answers(np.round(kernel / scale) * scale)
    assert np.linalg.norm(found - grid) < 0.2 * np.linalg.norm(answers(kernel) - grid)


@pytest.mark.vendor
def test_an_unknown_operator_is_refused(installed, images, tmp_path):
    [record] = run(REFUSED, images, tmp_path, ["int8w-pc-sym"]).values()
    assert record["status"] == "refused"
    assert "Det" in record["reason"]


@pytest.mark.vendor
def test_inputs_go_by_name_and_outputs_keep_order_and_shape(installed, tmp_path):
    data = samples(SOUND_AND_IMAGE, 24, 1)
    found = run(SOUND_AND_IMAGE, data, tmp_path, ["fp32", "int8-pc-sym-minmax", "int8w-pc-sym"])
    least = {"fp32": 100, "int8-pc-sym-minmax": 25, "int8w-pc-sym": 30}
    for scheme, record in found.items():
        assert record["status"] == "ok", record["reason"]
        assert [(f["output"], f["shape"]) for f in record["fidelity"]] == [
            ("frames", [6, 12]),
            ("logits", [5]),
        ]
        assert all(f["sqnr_db"] > least[scheme] for f in record["fidelity"])
        assert scheme == "fp32" or record["products"] == {"quantized": 4, "total": 4}


@pytest.mark.vendor
@pytest.mark.parametrize(("layer", "output"), [("node_map", "map"), ("node_logits", "logits")])
def test_a_layer_left_in_float_is_counted_and_betters_its_output(layer, output, installed, tmp_path):
    """Leave a convolution and a Gemm that write outputs, whose operations are called by the outputs."""
    schemes, images = ["int4w-pc-sym-minmax", "int8w-pc-sym"], samples(CUBE, 24, 1)
    before = run(CUBE, images, tmp_path / "all", schemes)
    after = run(CUBE, images, tmp_path / "left", schemes, float_layers=layer)
    for scheme in schemes:
        assert after[scheme]["status"] == "ok", after[scheme]["reason"]
        assert before[scheme]["products"] == {"quantized": 3, "total": 3}
        assert after[scheme]["products"] == {"quantized": 2, "total": 3}
        [one], [two] = (
            [f["sqnr_db"] for f in rows[scheme]["fidelity"] if f["output"] == output]
            for rows in (before, after)
        )
        assert two > one + 1


@pytest.mark.vendor
def test_a_cell_is_refused_on_integers_and_found_by_its_weights(installed, tmp_path):
    images, scheme = samples(RECURRENT, 24, 1), "int8-pc-sym-minmax"
    [refused] = run(RECURRENT, images, tmp_path / "all", [scheme]).values()
    assert refused["status"] == "refused" and "GRUSequence" in refused["reason"]
    [left] = run(RECURRENT, images, tmp_path / "left", [scheme], float_layers="node_all").values()
    assert left["status"] == "ok", left["reason"]
    assert left["products"] == {"quantized": 1, "total": 2}
