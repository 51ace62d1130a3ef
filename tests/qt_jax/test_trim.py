"""Check `quant_trim` on every kind of layer and transformation that it promises to reach."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt

CONFIG = qt.QuantConfig()


@functools.partial(jax.jit, static_argnums=(0, 2))
def ready(model, x, config=CONFIG):
    """Return variables with statistics, after one training pass that fills them."""
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), x), config, x)
    with qt.quant_trim(config, 0.0, train=True):
        _, updated = model.apply(variables, x, mutable=["batch_stats"])
    return {**variables, **updated}


@functools.partial(jax.jit, static_argnums=(0, 3), static_argnames=("lam", "config"))
def quantized(model, variables, x, lam=1.0, config=CONFIG):
    with qt.quant_trim(config, lam, train=False):
        return model.apply(variables, x)


@functools.partial(jax.jit, static_argnums=0)
def plain(model, variables, x):
    return model.apply(variables, x)


IMAGE = (2, 8, 8, 4)
LAYERS = {
    "Conv": (nn.Conv(6, (3, 3)), IMAGE),
    "grouped": (nn.Conv(8, (3, 3), feature_group_count=2), IMAGE),
    "depthwise": (nn.Conv(4, (3, 3), feature_group_count=4), IMAGE),
    "ConvLocal": (nn.ConvLocal(3, (3, 3)), IMAGE),
    "ConvTranspose": (nn.ConvTranspose(3, (2, 2), (2, 2)), IMAGE),
    "Dense": (nn.Dense(5), (3, 7)),
    "DenseGeneral": (nn.DenseGeneral((2, 3), axis=-1), (3, 7)),
    "Einsum": (nn.Einsum((7, 5), "...a,ab->...b"), (3, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_plain_layer_on_quantized_tensors(name):
    model, shape = LAYERS[name]
    x = jax.random.normal(jax.random.key(1), shape)
    variables = ready(model, x)
    stats, params = variables["batch_stats"], variables["params"]

    @jax.jit
    def on_quantized_tensors(params, stats, x):
        ranges, range_of_kernel = stats["quant_input"], stats["quant_kernel"]
        x_hat = qt.fake_quant(x, ranges["low"], ranges["high"], CONFIG.activations)
        ends = range_of_kernel["low"], range_of_kernel["high"]
        kernel = qt.fake_quant(params["kernel"], *ends, CONFIG.weights)
        return model.apply({"params": {**params, "kernel": kernel}}, x_hat)

    expected = on_quantized_tensors(params, stats, x)
    np.testing.assert_array_equal(quantized(model, variables, x), expected)
    assert not np.array_equal(expected, plain(model, {"params": params}, x))


class Block(nn.Module):
    """Hold a convolution and a batch norm, as the networks of the experiments do."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), dtype=self.dtype, name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype, name="norm")(x)
        return nn.Dense(3, dtype=self.dtype, name="head")(jnp.mean(nn.relu(x), (1, 2)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@jax.numpy_dtype_promotion("standard")  # Flax mixes float32 statistics with bfloat16 inputs
def test_lambda_zero_is_the_plain_network_to_the_bit(dtype):
    model = Block(dtype)
    x = jax.random.normal(jax.random.key(1), IMAGE).astype(dtype)
    variables = ready(model, x)
    plain_stats = {"norm": variables["batch_stats"]["norm"]}

    def loss(params, stats, lam=None):
        if lam is None:
            y, new = model.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        else:
            with qt.quant_trim(CONFIG, lam, train=True):
                y, new = model.apply(
                    {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"]
                )
        return jnp.sum(y**2), (y, new["batch_stats"]["norm"])

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    plain = step(variables["params"], plain_stats)
    blended = step(variables["params"], variables["batch_stats"], jnp.float32(0.0))
    chex.assert_trees_all_equal(plain, blended)


def test_one_trace_for_every_lambda():
    model, x = LAYERS["Dense"][0], jnp.ones((3, 7))
    variables = ready(model, x)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(variables, lam):
        with qt.quant_trim(CONFIG, lam, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])

    for lam in (0.0, 0.3, 1.0):
        _, updated = forward(variables, jnp.float32(lam))
        variables = {**variables, **updated}
    assert int(variables["batch_stats"]["quant_input"]["count"]) == 4


def test_statistics_are_frozen_in_evaluation_and_in_init():
    model, x = Block(), jax.random.normal(jax.random.key(1), IMAGE)
    variables = ready(model, x)
    with qt.quant_trim(CONFIG, 1.0, train=False):
        _, after = model.apply(variables, 9 * x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(after["batch_stats"], variables["batch_stats"])
    with qt.quant_trim(CONFIG, 1.0, train=True):
        fresh = model.init(jax.random.key(0), x)
    assert int(fresh["batch_stats"]["conv"]["quant_input"]["count"]) == 0


def test_first_batch_sets_the_range_and_later_ones_move_it():
    model, x = nn.Dense(2), jnp.linspace(-1.0, 3.0, 20).reshape(4, 5)
    config = qt.QuantConfig(activations=qt.QuantSpec(symmetric=False, quantile=1.0), momentum=0.9)
    variables = ready(model, x, config)
    assert float(variables["batch_stats"]["quant_input"]["high"]) == 3.0
    with qt.quant_trim(config, 1.0, train=True):
        _, updated = model.apply(variables, 2 * x, mutable=["batch_stats"])
    np.testing.assert_allclose(updated["batch_stats"]["quant_input"]["high"], 0.9 * 3 + 0.1 * 6, rtol=1e-6)
    np.testing.assert_allclose(updated["batch_stats"]["quant_input"]["low"], -0.9 - 0.2, rtol=1e-6)


def test_statistics_are_float32_and_params_untouched_in_bfloat16():
    model = nn.Dense(2, dtype=jnp.bfloat16)
    x = jnp.ones((4, 5))
    plain = model.init(jax.random.key(0), x)
    variables = ready(model, x)
    chex.assert_trees_all_equal(plain["params"], variables["params"])
    assert variables["batch_stats"]["quant_input"]["high"].dtype == jnp.float32
    assert quantized(model, variables, x).dtype == jnp.bfloat16


class SharedAndSetup(nn.Module):
    """Call one layer twice, in the style of `setup`."""

    def setup(self):
        self.layer = nn.Dense(7)

    def __call__(self, x):
        return self.layer(nn.relu(self.layer(x)))


class Remat(nn.Module):
    """Rematerialise a layer."""

    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(7, name="layer")(x)


class Scan(nn.Module):
    """Run three layers in one nn.scan, with a statistics axis."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, x, _: (nn.relu(layer(x)), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(nn.Dense(7, name="layer"), x, None)[0]


class Vmap(nn.Module):
    """Run three layers side by side in one nn.vmap."""

    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            axis_size=3,
            in_axes=None,
        )
        return layers(7, name="layer")(x)


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [(SharedAndSetup(), (), 1), (Remat(), (), 1), (Scan(), (3,), 1), (Vmap(), (3,), 1)],
    ids=["shared", "remat", "scan", "vmap"],
)
def test_transformed_modules(model, shape, count):
    x = jax.random.normal(jax.random.key(1), (3, 7))
    variables = ready(model, x)
    (seen,) = variables["batch_stats"].values()
    assert seen["quant_input"]["high"].shape == shape
    np.testing.assert_array_equal(seen["quant_input"]["count"], np.full(shape, count))
    assert np.ptp(np.asarray(seen["quant_kernel"]["high"])) > 0 or shape == ()

    def loss(params):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            y, _ = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.all(np.isfinite(leaf)) and np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_attention_projections_are_reached():
    model = nn.MultiHeadDotProductAttention(2, deterministic=True)
    x = jax.random.normal(jax.random.key(1), (2, 5, 8))
    assert set(ready(model, x)["batch_stats"]) == {"query", "key", "value", "out"}


def test_per_channel_weights_and_output_sites():
    config = qt.QuantConfig(weights=qt.QuantSpec(4, axis=-1), outputs=qt.QuantSpec(8, symmetric=False))
    model, x = nn.Conv(6, (3, 3)), jax.random.normal(jax.random.key(1), IMAGE)
    variables = ready(model, x, config)
    kernel, seen = np.asarray(variables["params"]["kernel"]), variables["batch_stats"]
    expected = np.quantile(np.abs(kernel.reshape(-1, 6)), 0.999, axis=0)
    np.testing.assert_allclose(seen["quant_kernel"]["high"], expected, rtol=1e-6)
    y = np.asarray(quantized(model, variables, x, config=config))
    assert len(np.unique(y)) <= 256
    assert "quant_output" in seen


def test_pooled_range_over_devices_is_that_of_the_whole_batch():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config = qt.QuantConfig(axis_name="data")
    model, x = nn.Dense(2), jax.random.normal(jax.random.key(1), (8, 5)) ** 3
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), x), CONFIG, x)

    def forward(config, variables, x):
        with qt.quant_trim(config, 1.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["quant_input"]

    spec = jax.sharding.PartitionSpec
    pooled = jax.shard_map(
        lambda x: forward(config, variables, x),
        mesh=mesh,
        in_specs=spec("data"),
        out_specs=spec(),
        check_vma=False,
    )(x)
    whole = forward(CONFIG, variables, x)
    sharded = jax.jit(lambda x: forward(CONFIG, variables, x))(
        jax.device_put(x, jax.sharding.NamedSharding(mesh, spec("data")))
    )
    chex.assert_trees_all_close(pooled, whole, rtol=1e-6)
    chex.assert_trees_all_close(sharded, whole, rtol=1e-6)


def test_unfinished_input_is_refused_with_a_remedy():
    model, x = nn.Dense(2), jnp.ones((3, 7))
    plain = model.init(jax.random.key(0), x)
    with pytest.raises(qt.InvalidInput, match="attach_statistics"):
        quantized(model, {**plain, "batch_stats": {}}, x)
    with pytest.raises(qt.InvalidInput, match=r"lambda must lie in \[0, 1\]"):
        quantized(model, plain, x, lam=1.5)
    with pytest.raises(qt.InvalidInput, match="another axis"):
        quantized(model, ready(model, x), x, config=qt.QuantConfig(weights=qt.QuantSpec(axis=-1)))
    compiled = jax.jit(model.apply).lower(plain, x).compile()
    with (
        pytest.raises(qt.InvalidInput, match="compiled ahead of time"),
        qt.quant_trim(CONFIG, 1.0, train=False),
    ):
        compiled(plain, x)
    with pytest.raises(qt.InvalidInput, match="near misses: 'head'"):
        ready(Block(), jnp.ones(IMAGE), qt.QuantConfig(rules=(qt.Rule("haed", skip=True),)))


def test_a_skipped_layer_is_left_alone():
    config = qt.QuantConfig(rules=(qt.Rule("head", skip=True),))
    variables = ready(Block(), jnp.ones(IMAGE), config)
    assert set(variables["batch_stats"]) == {"conv", "norm"}


def test_attach_keeps_what_is_there():
    model, x = Block(), jax.random.normal(jax.random.key(1), IMAGE)
    variables = ready(model, x)
    again = qt.attach_statistics(model, variables, CONFIG, x)
    chex.assert_trees_all_equal(variables, again)


class Scaled(nn.Dense):
    """Call the layer that this layer inherits from."""

    @nn.compact
    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


def test_a_subclass_that_calls_its_parent_is_quantized_once():
    x = jax.random.normal(jax.random.key(1), (3, 7))
    variables = ready(Scaled(4), x)
    assert int(variables["batch_stats"]["quant_input"]["count"]) == 1
    np.testing.assert_array_equal(
        quantized(Scaled(4), variables, x), 2.0 * quantized(nn.Dense(4), variables, x)
    )


def test_a_transposed_kernel_has_one_scale_for_each_output_channel():
    config = qt.QuantConfig(weights=qt.QuantSpec(4, axis=-1))
    model = nn.ConvTranspose(6, (2, 2), transpose_kernel=True)
    variables = ready(model, jnp.ones(IMAGE), config)
    assert variables["batch_stats"]["quant_kernel"]["high"].shape == (6,)


def test_one_bad_batch_does_not_poison_the_range():
    model, x = nn.Dense(2), jnp.ones((3, 7))
    variables = ready(model, x)
    with qt.quant_trim(CONFIG, 0.0, train=True):
        _, after = model.apply(variables, x * jnp.inf, mutable=["batch_stats"])
    chex.assert_trees_all_equal(after["batch_stats"]["quant_input"], variables["batch_stats"]["quant_input"])


def test_missing_statistics_of_the_model_itself_are_not_invented():
    variables = Block().init(jax.random.key(0), jnp.ones(IMAGE))
    with pytest.raises(qt.InvalidInput, match="norm/mean"):
        qt.attach_statistics(Block(), {"params": variables["params"]}, CONFIG, jnp.ones(IMAGE))


class Normalized(nn.Module):
    """Put a layer under a transformation that lifts parameters alone."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.WeightNorm(nn.Dense(4))(x))


def test_a_layer_that_cannot_be_reached_is_named_and_can_be_skipped():
    x = jnp.ones((3, 7))
    variables = Normalized().init(jax.random.key(0), x)
    with pytest.raises(qt.InvalidInput, match="skip=True"):
        qt.attach_statistics(Normalized(), variables, CONFIG, x)
    config = qt.QuantConfig(rules=(qt.Rule("Dense_0", skip=True),))
    assert set(qt.attach_statistics(Normalized(), variables, config, x)["batch_stats"]) == {"head"}


def test_a_model_that_is_not_linen_is_refused():
    with pytest.raises(qt.InvalidInput, match="is not a Linen module"):
        qt.attach_statistics(lambda x: x, {"params": {}}, qt.QuantConfig(), jnp.ones((1, 3)))
