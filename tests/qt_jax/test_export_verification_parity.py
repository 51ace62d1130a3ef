"""Check that `parity` tells a QDQ graph that follows the JAX forward at lambda = 1 from a wrong one."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.errors import InvalidInput
from qt_jax.export import save, to_onnx, to_qdq
from qt_jax.export.deploy import deploy
from qt_jax.export.integers import deployed_config, quantize
from qt_jax.export.network import Deployable, Samples
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, integer_kernels, parity

CONFIG = qt.QuantConfig()
IMAGES = np.random.default_rng(0).normal(size=(48, 8, 8, 3)).astype(np.float32)
CALIBRATION = np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2))


class Net(nn.Module):
    """Apply a convolution with batch norm and a shortcut; return logits and features."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), padding=1, use_bias=False, name="stem")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = x + nn.Conv(6, (3, 3), padding=1, name="inner")(x)
        features = nn.Conv(2, (1, 1), name="features")(x)
        return nn.Dense(5, name="head")(jnp.mean(x, axis=(1, 2))), features


def fake_quant(config, variables, x):
    with qt.quant_trim(config, 1.0, train=False):
        return Net().apply(variables, x)


@pytest.fixture(scope="module")
def net():
    variables = jax.jit(Net().init)(jax.random.key(1), IMAGES)
    variables = qt.attach_statistics(Net(), variables, CONFIG, IMAGES)
    variables["batch_stats"]["norm"]["mean"] = jnp.linspace(-0.5, 0.5, 6)
    variables["params"]["norm"]["scale"] = jnp.linspace(-1.0, 2.0, 6)
    with qt.quant_trim(CONFIG, 0.0, train=True):
        _, seen = jax.jit(partial(Net().apply, mutable=["batch_stats"]))(variables, IMAGES)
    variables = jax.tree.map(np.array, {**variables, **seen})
    names = ("logits", "features")
    return variables, to_onnx(Net().apply, variables, IMAGES.shape[1:], opset=21, output_names=names)


def test_learned_sites_alone_follow_jax(net):
    variables, model = net
    ranges = tensor_ranges(model, variables, CONFIG, CALIBRATION)
    exact = insert_qdq(model, ranges, learned_only=True)
    found = parity(exact, partial(fake_quant, CONFIG), variables, IMAGES, ranges)
    assert found.keys() == {"logits", "features"} and found["logits"]["n"] == 48
    assert found["logits"]["top1_agreement"] == 1.0 and found["features"]["top1_agreement"] is None
    for output in found.values():
        assert output["equal_integers"] > 0.95 and output["largest_difference"] < 3
        assert output["sqnr_db"] > 45


def test_all_sites_are_integer_kernels_and_close(net):
    variables, model = net
    ranges = tensor_ranges(model, variables, CONFIG, CALIBRATION)
    full = insert_qdq(model, ranges)
    assert all(integer_kernels(full).values())
    found = parity(full, partial(fake_quant, CONFIG), variables, [IMAGES], ranges)
    assert found["logits"]["top1_agreement"] > 0.9 and found["logits"]["sqnr_db"] > 25
    assert found["features"]["largest_difference"] < 6


@pytest.mark.parametrize("mode", ["int4", "int16-act"])
def test_deployed_modes_follow_jax_under_the_deployed_config(net, mode):
    variables, model = net
    config = deployed_config(CONFIG, mode)
    ranges = tensor_ranges(model, variables, config, CALIBRATION)
    quantized = insert_qdq(model, ranges, learned_only=True)
    found = parity(quantized, partial(fake_quant, config), variables, IMAGES, ranges)
    assert found["logits"]["sqnr_db"] > (80 if mode == "int16-act" else 45)
    other = parity(quantized, partial(fake_quant, CONFIG), variables, IMAGES, ranges)
    assert other["logits"]["sqnr_db"] < found["logits"]["sqnr_db"] - 10


def test_wrong_scale_and_wrong_outputs_are_seen(net):
    variables, model = net
    ranges = tensor_ranges(model, variables, CONFIG, CALIBRATION)
    kernel = ranges.tensors["head/kernel"]
    doubled = dataclasses.replace(kernel, scale=tuple(2 * scale for scale in kernel.scale))
    wrong = insert_qdq(model, dataclasses.replace(ranges, tensors=ranges.tensors | {"head/kernel": doubled}))
    found = parity(wrong, partial(fake_quant, CONFIG), variables, IMAGES, ranges)
    right = parity(insert_qdq(model, ranges), partial(fake_quant, CONFIG), variables, IMAGES, ranges)
    assert found["logits"]["sqnr_db"] < right["logits"]["sqnr_db"]
    with pytest.raises(InvalidInput, match="outputs have shapes"):
        parity(wrong, lambda v, x: fake_quant(CONFIG, v, x)[0], variables, IMAGES, ranges)


def trained(model, images=IMAGES):
    """Return variables whose ranges have seen one batch."""
    variables = qt.attach_statistics(model, jax.jit(model.init)(jax.random.key(1), images), CONFIG, images)
    with qt.quant_trim(CONFIG, 0.0, train=True):
        _, seen = jax.jit(partial(model.apply, mutable=["batch_stats"]))(variables, images)
    return jax.tree.map(np.array, {**variables, **seen})


class Regressor(nn.Module):
    """Return one number for each image, by convolutions with one kind of padding."""

    padding: str

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Conv(4, (3, 3), padding=self.padding)(x))
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))


@pytest.mark.parametrize("padding", ["SAME", "CIRCULAR"])
def test_one_number_for_each_image_and_circular_padding(padding):
    """All pairs are in force, and no number between two layers is rounded twice."""
    net = Regressor(padding)
    variables = trained(net)
    model = to_onnx(net.apply, variables, IMAGES.shape[1:])
    quantized, ranges = quantize(model, variables, CONFIG, IMAGES, "int8")
    assert all(integer_kernels(quantized).values())
    (found,) = parity(quantized, fake_quant_forward(net.apply, CONFIG), variables, IMAGES, ranges).values()
    assert found["equal_integers"] == 1.0 and found["sqnr_db"] > 100
    assert found["top1_agreement"] is None and found["margins"] is None


@pytest.mark.parametrize(
    ("integers", "options"),
    [("int8", {"layout": "nhwc"}), ("int4", {"signed": True}), ("int16-act", {"per_channel": False})],
)
def test_one_call_makes_the_graph_that_deploy_writes(integers, options, net, tmp_path):
    variables, _ = net
    model = to_qdq(Net().apply, variables, (8, 8, 3), CONFIG, IMAGES, integers=integers, **options)
    save(model, tmp_path / "called.onnx")
    network = Deployable(Net().apply, variables, (8, 8, 3), CONFIG, Samples(IMAGES, IMAGES))
    deploy(network, tmp_path / "deployed.onnx", qdq=integers, **options)
    assert (tmp_path / "called.onnx").read_bytes() == (tmp_path / "deployed.onnx").read_bytes()


def test_what_one_call_refuses(net):
    variables, _ = net
    make = partial(to_qdq, Net().apply, variables, (8, 8, 3), CONFIG)
    with pytest.raises(InvalidInput, match="calibration holds 2 arrays, and the graph reads 1"):
        make([IMAGES, IMAGES])
    with pytest.raises(InvalidInput, match="from opset 21, not 17"):
        make(IMAGES, integers="int4", opset=17)
    with pytest.raises(InvalidInput, match="mode 'int2' is unknown"):
        make(IMAGES, integers="int2")
    plain = {**variables, "batch_stats": {"norm": variables["batch_stats"]["norm"]}}
    with pytest.raises(InvalidInput, match="no layer of this graph has learned ranges"):
        to_qdq(Net().apply, plain, (8, 8, 3), CONFIG, IMAGES)


@pytest.mark.parametrize("names", [("logits", "features"), {"logits": "features", "features": "logits"}])
def test_entries_of_a_dict_are_compared_with_their_own(net, names):
    variables, _ = net

    def apply(variables, x):
        return dict(zip(("logits", "features"), Net().apply(variables, x), strict=True))

    model = to_onnx(apply, variables, IMAGES.shape[1:], output_names=names)
    quantized, ranges = quantize(model, variables, CONFIG, IMAGES, "int8")
    found = parity(quantized, fake_quant_forward(apply, CONFIG), variables, IMAGES, ranges)
    assert set(found) == {"logits", "features"}
    assert all(row["sqnr_db"] > 25.0 for row in found.values())
