"""Check what `find_fusion` finds against the exporter, and against batch norm's own formula."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from onnx import numpy_helper

import qt_jax as qt
from qt_jax.export.ranges import tensor_ranges
from qt_jax.interception import GAIN

IMAGES = (2, 8, 8, 3)


class Net(nn.Module):
    """Show every way in which a layer meets, or does not meet, a batch norm."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.5, name=name)  # noqa: E731
        x = nn.relu(norm("stem_norm")(nn.Conv(8, (3, 3), name="stem")(x)))  # with a bias of its own
        y = nn.Conv(8, (3, 3), use_bias=False, feature_group_count=8, name="depthwise")(x)
        y = norm("depthwise_norm")(y)
        x = x + y
        before = nn.relu(nn.Conv(8, (1, 1), name="activated")(x))  # an activation stands between
        x = norm("late_norm")(before)
        twice = nn.Conv(8, (1, 1), name="twice")
        x = norm("first_norm")(twice(x)) + norm("second_norm")(twice(x))
        up = nn.ConvTranspose(4, (2, 2), (2, 2), transpose_kernel=True, use_bias=False, name="up")(x)
        x = jnp.mean(nn.relu(norm("up_norm")(up)), axis=(1, 2))
        return nn.Dense(5, name="head")(x)


def network(seed=0):
    """Return the network, and variables in which no batch norm is trivial."""
    x = jax.random.normal(jax.random.key(seed), IMAGES)
    variables = Net().init(jax.random.key(1), x)
    key = jax.random.key(2)
    noise = jax.tree.map(
        lambda leaf: (
            jnp.abs(leaf + 0.5 * jax.random.normal(jax.random.fold_in(key, leaf.size), leaf.shape)) + 0.1
        ),
        {"stats": variables["batch_stats"], "params": variables["params"]},
    )
    return Net(), {"params": noise["params"], "batch_stats": noise["stats"]}, x


def test_layers_and_outputs_are_found():
    model, variables, x = network()
    fusion = qt.find_fusion(model, variables, x)
    assert fusion.layers == ("stem", "depthwise", "up")
    assert fusion.outputs == ("depthwise_norm", "first_norm", "second_norm", "head")


def test_gains_are_batch_norms_own_formula():
    model, variables, x = network()
    gains = jax.jit(qt.find_fusion(model, variables, x).gains)(variables)
    for layer, gain in gains.items():
        norm = f"{layer}_norm"
        scale, var = variables["params"][norm]["scale"], variables["batch_stats"][norm]["var"]
        np.testing.assert_allclose(
            gain, np.asarray(scale, np.float64) / np.sqrt(np.asarray(var) + 1e-5), rtol=1e-6
        )


def test_models_without_batch_norm_have_no_gains():
    model, x = nn.Dense(3), jnp.ones((2, 4))
    fusion = qt.find_fusion(model, model.init(jax.random.key(0), x), x)
    assert fusion.layers == () and fusion.outputs == ()


class Shallow(nn.Module):
    """Hold one convolution and one batch norm."""

    transposed: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        layer = partial(nn.ConvTranspose, transpose_kernel=True) if self.transposed else nn.Conv
        x = layer(4, (3, 3), use_bias=False, name="conv")(x)
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


FOLDED = qt.QuantConfig(weights=qt.QuantSpec(4, quantile=1.0), activations=None, folded=True)


def prepared(transposed=False, config=FOLDED):
    """Return the shallow network with gains far from one and statistics filled by a training pass."""
    model = Shallow(transposed)
    x = jax.random.normal(jax.random.key(3), IMAGES)
    variables = model.init(jax.random.key(4), x)
    variables["params"]["norm"]["scale"] = jnp.array([0.1, 1.0, -3.0, 0.0])
    fusion = qt.find_fusion(model, variables, x)
    variables = fusion.refresh(qt.attach_statistics(model, variables, config, x))
    with qt.quant_trim(config, 0.0, train=True):
        statistics = model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
    return model, {**variables, "batch_stats": statistics}, x


@pytest.mark.parametrize("transposed", [False, True])
def test_the_grid_lies_over_the_folded_kernel(transposed):
    model, variables, x = prepared(transposed)
    with qt.quant_trim(FOLDED, 1.0, train=False):
        found = model.apply(variables, x)
    kernel = np.asarray(variables["params"]["conv"]["kernel"], np.float64)
    gain = np.asarray(variables["params"]["norm"]["scale"], np.float64) / np.sqrt(1 + 1e-5)
    gain = gain[:, None] if transposed else gain
    folded = kernel * gain
    scale = np.abs(folded).max() / 7
    integers = np.clip(np.round(folded / scale), -7, 7)
    rounded = np.where(gain == 0, kernel, integers * scale / np.where(gain == 0, 1, gain))
    params = {**variables["params"], "conv": {"kernel": jnp.asarray(rounded, jnp.float32)}}
    expected = model.apply({**variables, "params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_gains_are_those_of_the_exported_graph():
    model, variables, _ = prepared()
    graph = qt.to_onnx(model.apply, variables, IMAGES[1:]).graph
    exported = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    raw, gain = (np.asarray(leaf) for leaf in (variables["params"]["conv"]["kernel"], _gain(variables)))
    np.testing.assert_allclose(exported["conv/kernel"], np.transpose(raw * gain, (3, 2, 0, 1)), rtol=1e-5)


def _gain(variables):
    return variables["batch_stats"]["conv"][GAIN]


def test_lambda_zero_is_the_plain_network_and_the_gradient_the_identity():
    model, variables, x = prepared()
    plain = model.apply(variables, x)

    def output(lam, params):
        with qt.quant_trim(FOLDED, lam, train=False):
            return model.apply({**variables, "params": params}, x)

    np.testing.assert_array_equal(output(0.0, variables["params"]), plain)
    gradients = [
        jax.grad(lambda params, lam=lam: jnp.sum(output(lam, params)))(variables["params"])["conv"]["kernel"]
        for lam in (0.0, 1.0)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_refresh_follows_the_statistics_and_needs_a_place():
    model, variables, x = prepared()
    fusion = qt.find_fusion(model, variables, x)
    moved = flatten_dict(variables)
    moved["batch_stats", "norm", "var"] = jnp.full((4,), 4.0)
    fresh = fusion.refresh(unflatten_dict(moved))["batch_stats"]["conv"][GAIN]
    np.testing.assert_allclose(fresh, [0.05, 0.5, -1.5, 0.0], rtol=1e-5)
    with pytest.raises(qt.InvalidInput, match=r"no place for the gain of 'conv'.*folded=True"):
        fusion.refresh(model.init(jax.random.key(0), x))


def test_fused_outputs_get_a_grid():
    model, variables, x = network()
    outputs = qt.find_fusion(model, variables, x).outputs
    config = qt.QuantConfig(fused_outputs=outputs)
    variables = qt.attach_statistics(model, variables, config, x)
    with qt.quant_trim(config, 1.0, train=True):
        statistics = model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    ranged = {"/".join(path[:-2]) for path in flatten_dict(statistics) if "quant_output" in path}
    assert ranged == set(outputs)
    with (
        pytest.raises(qt.InvalidInput, match=r"'stem_nrom'.*find_fusion"),
        qt.quant_trim(qt.QuantConfig(fused_outputs=("stem_nrom",)), 0.0, train=False),
    ):
        model.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("transposed", [False, True])
def test_reverse_pruning_clips_the_folded_kernel(transposed):
    _, variables, _ = prepared(transposed)
    params, statistics = variables["params"], variables["batch_stats"]
    tx = optax.chain(optax.sgd(0.1), qt.reverse_pruning(0.8, every=1, folded=True))
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, batch_stats=statistics)
    kernel = np.asarray(params["conv"]["kernel"], np.float64)
    gain = np.asarray(statistics["conv"][GAIN], np.float64)
    tau = np.quantile(np.abs(kernel * gain), 0.8)
    bound = tau / np.where(gain == 0, 1e-300, np.abs(gain))
    clipped = optax.apply_updates(params, updates)["conv"]["kernel"]
    np.testing.assert_allclose(clipped, np.clip(kernel, -bound, bound), rtol=1e-5)
    assert np.abs(np.asarray(clipped) * gain).max() <= tau * (1 + 1e-6)


def test_spread_bounds_lie_below_tau_evenly_and_are_fixed():
    params = {"kernel": jnp.where(jnp.arange(40_000) % 2, 1.0, -1.0)}
    tx = qt.reverse_pruning(1.0, every=1, ema=1.0, spread=0.2)
    zero, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    updates, state = tx.update(zero, state, params)
    once = optax.apply_updates(params, updates)
    size = np.abs(np.asarray(once["kernel"], np.float64))
    assert 0.8 <= size.min() < 0.801 and 0.999 < size.max() <= 1.0
    np.testing.assert_allclose([size.mean(), size.std()], [0.9, 0.2 / np.sqrt(12)], rtol=5e-3)
    updates, _ = tx.update(zero, state, once)
    np.testing.assert_array_equal(optax.apply_updates(once, updates)["kernel"], once["kernel"])


def test_missing_gains_are_said():
    params = {"kernel": jnp.ones((3, 3))}
    tx = qt.reverse_pruning(folded=True)
    with pytest.raises(qt.InvalidInput, match=r"needs gains.*batch_stats="):
        tx.update(params, tx.init(params), params)


def test_a_layer_that_nothing_scales_has_gain_one():
    config = qt.QuantConfig(weights=qt.QuantSpec(4, quantile=1.0), activations=None, folded=True)
    model, variables, x = network()
    fusion = qt.find_fusion(model, variables, x)
    statistics = fusion.refresh(qt.attach_statistics(model, variables, config, x))["batch_stats"]
    np.testing.assert_array_equal(statistics["head"][GAIN], np.ones(5))
    with qt.quant_trim(config, 0.0, train=True):
        updated = model.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])[1]
    peak = np.abs(variables["params"]["head"]["kernel"]).max()
    assert updated["batch_stats"]["head"]["quant_kernel"]["high"] == peak


def test_attention_and_einsum_have_no_gain():
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(2, name="attention")(x)  # divides its query by sqrt(d)
            return nn.Einsum((4, 4), "...i,oi->...o", use_bias=False, name="einsum")(x) * jnp.ones((1, 1, 4))

    x = jnp.ones((1, 3, 4))
    assert qt.find_fusion(Other(), Other().init(jax.random.key(0), x), x).layers == ()


def test_a_rule_that_skips_a_layer_skips_its_fused_output():
    config = qt.QuantConfig(fused_outputs=("head",), rules=(qt.Rule("head", skip=True),))
    model, variables, x = network()
    statistics = qt.attach_statistics(model, variables, config, x)["batch_stats"]
    assert "head" not in statistics


@pytest.mark.parametrize("fold", [True, False])
def test_exported_scales_are_those_of_the_folded_kernel(fold):
    """Check a graph that keeps its batch norm: it gets, by channel, the scale that folding would give it."""
    config = qt.QuantConfig(
        weights=qt.QuantSpec(8, axis=-1, quantile=1.0),
        activations=qt.QuantSpec(8, symmetric=False),
        folded=True,
    )
    model, variables, x = prepared(config=config)
    graph = qt.to_onnx(model.apply, variables, IMAGES[1:], fold_batch_norm=fold)
    calibration = np.asarray(x).transpose(0, 3, 1, 2)
    found = tensor_ranges(graph, variables, config, calibration).tensors["conv/kernel"].scale
    statistics = variables["batch_stats"]["conv"]
    expected = np.maximum(np.asarray(statistics["quant_kernel"]["high"]) / 127, 1e-8)
    if not fold:
        gain = np.abs(np.asarray(statistics[GAIN]))
        expected = expected / np.where(gain == 0, 1, gain)
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-4)  # the last channel is dead: its gain is 0
