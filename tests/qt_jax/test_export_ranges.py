"""Check learned grids, trained integers behind a folded batch norm, calibration, and the ranges file."""

import dataclasses
import hashlib
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export import save, to_onnx
from qt_jax.export.encodings import BIAS_LIMIT, read_ranges, write_ranges
from qt_jax.export.ranges import check_complete, float_activations, tensor_ranges

CONFIG = qt.QuantConfig()
IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
CALIBRATION = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))


class Residual(nn.Module):
    """Apply a stem, a residual convolution with a shortcut, and a head, with a batch norm behind each."""

    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(use_running_average=True, name=name)

        conv = {"kernel_size": (3, 3), "padding": 1, "use_bias": False}
        x = nn.relu(norm("norm1")(nn.Conv(4, name="stem", **conv)(x)))
        x = nn.relu(x + norm("norm2")(nn.Conv(4, name="inner", **conv)(x)))
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2)))


def observed(model, config, inputs, change=lambda variables: variables):
    """Return variables whose ranges have seen one batch."""
    variables = jax.jit(model.init)(jax.random.key(1), inputs)
    variables = change(qt.attach_statistics(model, variables, config, inputs))
    with qt.quant_trim(config, 0.0, train=True):
        _, statistics = jax.jit(partial(model.apply, mutable=["batch_stats"]))(variables, inputs)
    return jax.tree.map(np.array, {**variables, **statistics})


def uneven_norms(variables):
    """Draw gains of both signs, and a dead channel with a bias."""
    params = variables["params"]
    for name in ("norm1", "norm2"):
        params[name]["scale"] = jnp.array([1.5, -0.7, 0.0, 0.2], jnp.float32)
        params[name]["bias"] = jnp.array([0.1, 0.2, 0.9, -0.3], jnp.float32)
    return variables


@pytest.fixture(scope="module")
def residual():
    variables = observed(Residual(), CONFIG, IMAGES, uneven_norms)
    model = to_onnx(Residual().apply, variables, IMAGES.shape[1:])
    return model, variables, tensor_ranges(model, variables, CONFIG, CALIBRATION)


def initializer(model, name):
    return next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


@pytest.mark.parametrize("layer", ["stem", "inner", "head"])
def test_folded_kernels_have_the_trained_integers(residual, layer):
    model, variables, ranges = residual
    raw = variables["params"][layer]["kernel"].astype(np.float64)
    high = float(variables["batch_stats"][layer]["quant_kernel"]["high"])
    trained = np.clip(np.rint(raw / (high / 127)), -127, 127)
    if layer != "head":
        trained = trained.transpose(3, 2, 0, 1) * np.array([1, -1, 0, 1]).reshape(-1, 1, 1, 1)
    encoding = ranges.tensors[f"{layer}/kernel"]
    assert (encoding.source, len(encoding.scale)) == ("learned", trained.shape[0 if layer != "head" else 1])
    np.testing.assert_array_equal(encoding.integers(initializer(model, f"{layer}/kernel")), trained)


def test_scale_is_the_learned_one_times_the_gain(residual):
    _, variables, ranges = residual
    scale = float(variables["batch_stats"]["inner"]["quant_kernel"]["high"]) / 127
    gains = np.array([1.5, 0.7, 0.2]) / np.sqrt(1.0 + 1e-5)
    found = np.array(ranges.tensors["inner/kernel"].scale)[[0, 1, 3]]
    np.testing.assert_allclose(found, scale * gains, rtol=1e-5)


def test_bias_of_a_dead_channel_fits_int32(residual):
    model, _, ranges = residual
    bias = initializer(model, "inner/bias").astype(np.float64)
    products = np.float64(ranges.inputs["inner"].scale[0]) * np.array(ranges.tensors["inner/kernel"].scale)
    assert np.all(np.abs(bias / products) <= BIAS_LIMIT + 2**9)
    assert abs(bias[2] / products[2]) > 2**30


def test_sources_and_shared_grids(residual):
    _, variables, ranges = residual
    sources = {name: encoding.source for name, encoding in ranges.tensors.items()}
    assert sources["input"] == "learned"
    assert sources["Relu"] == "calibrated"  # the shortcut reads it too: the layer requantizes
    assert ranges.inputs["inner"].high == (float(variables["batch_stats"]["inner"]["quant_input"]["high"]),)
    assert ranges.tensors["Relu"].high > ranges.inputs["inner"].high
    assert ranges.tensors["GlobalAveragePool"] == ranges.tensors["Flatten"] == ranges.inputs["head"]
    assert sources["logits"] == "calibrated"


def test_zero_points_are_shifted_to_signed(residual):
    _, _, ranges = residual
    assert ranges.tensors["Relu"].zero_point == (-128,)
    low, high = (float(value[0]) for value in (ranges.tensors["input"].low, ranges.tensors["input"].high))
    assert ranges.tensors["input"].zero_point == (round(-low / ((high - low) / 255)) - 128,)


def test_every_tensor_has_a_range_and_a_missing_one_is_named(residual):
    model, _, ranges = residual
    assert set(float_activations(model)) == {"input"} | {node.output[0] for node in model.graph.node}
    tensors = {name: value for name, value in ranges.tensors.items() if name not in ("Add", "stem/kernel")}
    with pytest.raises(InvalidInput, match=r"no range for Add, stem/kernel \(2 tensors"):
        check_complete(model, dataclasses.replace(ranges, tensors=tensors))


def test_one_scale_a_kernel_is_the_largest(residual):
    model, variables, ranges = residual
    one = tensor_ranges(model, variables, CONFIG, CALIBRATION, per_channel=False).tensors["inner/kernel"]
    assert (one.axis, one.scale) == (None, (max(ranges.tensors["inner/kernel"].scale),))


def test_file_round_trip(residual, tmp_path):
    model, _, ranges = residual
    write_ranges(ranges, tmp_path / "ranges.json")
    assert read_ranges(tmp_path / "ranges.json") == ranges
    save(model, tmp_path / "model.onnx")
    digest = hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert (ranges.model_sha256, ranges.opset) == (digest, 17)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "ranges.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"ranges\.json (is not a ranges file|has version 9)"):
        read_ranges(tmp_path / "ranges.json")


class Upsampled(nn.Module):
    """Enlarge what a convolution makes, for another one."""

    method: str

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="before")(x))
        x = jax.image.resize(x, (x.shape[0], 16, 16, 4), self.method)
        return nn.Conv(3, (1, 1), name="behind")(x)


@pytest.mark.parametrize(("method", "source"), [("bilinear", "calibrated"), ("nearest", "learned")])
def test_what_an_interpolation_reads_is_not_clipped_at_the_range_behind_it(method, source):
    """Nearest neighbours clip alike before and behind; means of neighbours have a narrower range."""
    model = Upsampled(method)
    variables = observed(model, CONFIG, IMAGES)
    graph = to_onnx(model.apply, variables, IMAGES.shape[1:])
    tensors = tensor_ranges(graph, variables, CONFIG, CALIBRATION).tensors
    assert {tensors[name].source for name in ("Relu", "Resize")} == {source}
    assert tensors["Relu"].grid == tensors["Resize"].grid


def test_skipped_layer_keeps_a_range_of_its_own(residual):
    model, variables, _ = residual
    config = qt.QuantConfig(rules=(qt.Rule("inner", skip=True),))
    ranges = tensor_ranges(model, variables, config, CALIBRATION)
    encoding = ranges.tensors["inner/kernel"]
    assert "inner" not in ranges.inputs and "inner" not in ranges.kernels
    assert encoding.source == "folded kernel"
    peak = np.abs(initializer(model, "inner/kernel")).max(axis=(1, 2, 3))
    np.testing.assert_allclose(np.array(encoding.high)[peak > 0], peak[peak > 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (qt.QuantConfig(activations=qt.QuantSpec(6, symmetric=False)), "6 bits"),
        (qt.QuantConfig(activations=qt.QuantSpec(axis=-1)), "along axis -1"),
        (qt.QuantConfig(weights=qt.QuantSpec(symmetric=False)), "'stem' are asymmetric"),
        (qt.QuantConfig(outputs=qt.QuantSpec()), "'stem' has an output site"),
    ],
)
def test_specs_without_a_qdq_form(residual, config, message):
    model, variables, _ = residual
    with pytest.raises(InvalidInput, match=message):
        tensor_ranges(model, variables, config, CALIBRATION)


def with_leaf(variables, layer, site, leaf, value):
    statistics = {**variables["batch_stats"][layer][site], leaf: np.asarray(value, np.float32)}
    changed = {**variables["batch_stats"][layer], site: statistics}
    return {**variables, "batch_stats": {**variables["batch_stats"], layer: changed}}


def test_ranges_that_cannot_be_used(residual):
    model, variables, _ = residual
    with pytest.raises(InvalidInput, match="'inner/quant_kernel' has seen no batch"):
        tensor_ranges(model, with_leaf(variables, "inner", "quant_kernel", "count", 0), CONFIG, CALIBRATION)
    with pytest.raises(InvalidInput, match="'head/quant_input' holds a range that is not finite"):
        tensor_ranges(model, with_leaf(variables, "head", "quant_input", "high", np.nan), CONFIG, CALIBRATION)
    with pytest.raises(InvalidInput, match="no layer of this graph has learned ranges"):
        tensor_ranges(model, {"params": variables["params"]}, CONFIG, CALIBRATION)


def test_calibration_inputs_are_checked(residual):
    model, variables, _ = residual
    for wrong in (CALIBRATION[:0], {"images": CALIBRATION}):
        with pytest.raises(InvalidInput, match="the graph reads input"):
            tensor_ranges(model, variables, CONFIG, wrong)
    with pytest.raises(InvalidInput, match="no finite range for input"):
        tensor_ranges(model, variables, CONFIG, np.full_like(CALIBRATION, np.nan))


def test_per_channel_statistics_of_attention_projections():
    """The scales of the last feature axis are repeated over the heads, as the kernel's columns are."""
    config = qt.QuantConfig(weights=qt.QuantSpec(axis=-1))
    model = nn.DenseGeneral((2, 3), name="query")
    tokens = np.random.default_rng(1).normal(size=(8, 5, 4)).astype(np.float32)
    variables = observed(model, config, tokens)

    def flat(variables, x):
        return model.apply(variables, x).reshape(x.shape[0], 5, 6)

    graph = to_onnx(flat, variables, (5, 4))
    encoding = tensor_ranges(graph, variables, config, tokens).tensors["kernel"]
    assert encoding.axis == 1
    high = np.asarray(variables["batch_stats"]["quant_kernel"]["high"], np.float64)
    np.testing.assert_allclose(encoding.scale, np.tile(high / 127, 2), rtol=1e-6)


def test_a_kernel_on_flattened_images_keeps_its_learned_grid():
    """The rows are permuted to channels-first order, whatever the number of channels."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(3, (3, 3), padding=1, name="conv")(x))
            return nn.Dense(4, name="head")(x.reshape(len(x), -1))

    net, config = Net(), qt.QuantConfig()
    images = np.asarray(jax.random.normal(jax.random.key(0), (8, 4, 5, 2)))
    variables = qt.attach_statistics(net, net.init(jax.random.key(1), images), config, images)
    with qt.quant_trim(config, 0.0, train=True):
        _, seen = net.apply(variables, images, mutable=["batch_stats"])
    model = to_onnx(net.apply, variables, (4, 5, 2))
    ranges = tensor_ranges(model, variables | seen, config, images.transpose(0, 3, 1, 2))
    assert ranges.tensors["head/kernel"].source == "learned"
