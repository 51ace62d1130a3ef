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
    assert fusion.outputs == ("depthwise_norm", "first_norm", "second_norm")


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


def drawn(variables, seed=5):
    """Return variables of which none is trivial: all lie between 0.5 and 1.5."""
    leaves, tree = jax.tree.flatten(variables)
    random = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [random.uniform(0.5, 1.5, x.shape).astype(np.float32) for x in leaves])


def norms_gain(variables, *path):
    """Compute gamma / sqrt(variance + epsilon) in float64."""
    scale, var = variables["params"], variables["batch_stats"]
    for key in path:
        scale, var = scale[key], var[key]
    return np.asarray(scale["scale"], np.float64) / np.sqrt(np.asarray(var["var"], np.float64) + 1e-5)


class ConvNorm(nn.Module):
    """Add a convolution and its batch norm to what comes in, and hand it on to the next block of a stack."""

    transposed: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        layer = partial(nn.ConvTranspose, transpose_kernel=True) if self.transposed else nn.Conv
        y = layer(3, (3, 3), use_bias=False, name="conv")(x)
        y = nn.BatchNorm(use_running_average=not train, name="norm")(y)
        z = nn.LayerNorm(name="layer_norm")(nn.Dense(3, name="dense")(x))  # folds into nothing
        return x + y + nn.relu(z), None


AXES = {"params": 0, "batch_stats": 0}


class Stack(nn.Module):
    """Scan over blocks, which may themselves be scanned."""

    transposed: bool = False
    nested: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        lift = partial(nn.scan, variable_axes=AXES, split_rngs={"params": True}, in_axes=nn.broadcast)
        block = lift(ConvNorm, length=4)
        if self.nested:
            block = lift(block, length=2)
        x, _ = block(self.transposed, name="blocks")(x, train)
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize(("transposed", "nested"), [(False, False), (True, False), (False, True)])
def test_scanned_layers_have_one_gain_for_each_kernel(transposed, nested):
    model, x = Stack(transposed, nested), jax.random.normal(jax.random.key(3), IMAGES)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(4), x))
    fusion = qt.find_fusion(model, variables, x)
    assert fusion.layers == ("blocks/conv",) and fusion.outputs == ("blocks/norm",)
    expected = norms_gain(variables, "blocks", "norm")
    assert expected.shape == ((2, 4, 3) if nested else (4, 3))
    np.testing.assert_allclose(jax.jit(fusion.gains)(variables)["blocks/conv"], expected, rtol=1e-6)
    attached = qt.attach_statistics(model, variables, qt.QuantConfig(folded=True), x)
    found = jax.jit(fusion.refresh)(attached)["batch_stats"]["blocks"]["conv"][GAIN]
    np.testing.assert_allclose(found, expected[..., None] if transposed else expected, rtol=1e-6)
    dense = attached["batch_stats"]["blocks"]["dense"][GAIN]
    np.testing.assert_array_equal(dense, np.ones_like(expected))


def test_the_grids_of_scanned_layers_lie_over_the_folded_kernels():
    model, x = Stack(), jax.random.normal(jax.random.key(3), IMAGES)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(4), x))
    fusion = qt.find_fusion(model, variables, x)
    variables = fusion.refresh(qt.attach_statistics(model, variables, FOLDED, x))

    @jax.jit
    def observed(variables):
        with qt.quant_trim(FOLDED, 0.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]

    highs = observed(variables)["blocks"]["conv"]["quant_kernel"]["high"]
    folded = np.asarray(variables["params"]["blocks"]["conv"]["kernel"], np.float64)
    folded = folded * norms_gain(variables, "blocks", "norm")[:, None, None, None]
    np.testing.assert_allclose(highs, np.abs(folded).max((1, 2, 3, 4)), rtol=1e-5)


class Cell(nn.Module):
    """Normalise a recurrent layer's output, whose kernel all steps share."""

    @nn.compact
    def __call__(self, carry, x):
        y = nn.Dense(3, use_bias=False, name="dense")(x)
        y = nn.BatchNorm(use_running_average=True, name="norm")(y)
        carry = jnp.tanh(carry + y)
        return carry, carry


@pytest.mark.parametrize("shared", [True, False])
def test_a_kernel_that_all_steps_share_folds_only_what_they_share(shared):
    axes = {"variable_broadcast": ["params", "batch_stats"]}
    if not shared:
        axes = {"variable_broadcast": "params", "variable_axes": {"batch_stats": 0}}
    model = nn.scan(Cell, **axes, split_rngs={"params": False}, in_axes=1, out_axes=1)()
    carry, x = jnp.zeros((2, 3)), jnp.ones((2, 5, 4))
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), carry, x))
    fusion = qt.find_fusion(model, variables, carry, x)
    assert fusion.layers == (("dense",) if shared else ())
    if shared:
        gains = fusion.gains(variables)["dense"]
        np.testing.assert_allclose(gains, np.tile(norms_gain(variables, "norm"), (5, 1)), rtol=1e-6)


class Lifted(nn.Module):
    """Fold a batch norm into a layer, one or both of which stand under a lifted transformation."""

    lift: object
    whole: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        if self.whole:
            return self.lift(ConvNorm)(name="block")(x)[0]
        y = self.lift(nn.Conv)(3, (3, 3), name="conv")(x)
        return x + nn.BatchNorm(use_running_average=not train, name="norm")(y)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
def test_jitted_and_checkpointed_layers_are_found_at_every_call(lift, whole):
    model, x = Lifted(lift, whole), jnp.ones(IMAGES)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    model.apply(variables, x)  # keeps a trace without the interceptor
    prefix, path = ("block/", ("block", "norm")) if whole else ("", ("norm",))
    for _ in range(2):
        fusion = qt.find_fusion(model, variables, x)
        assert (fusion.layers, fusion.outputs) == ((f"{prefix}conv",), (f"{prefix}norm",))
        gain = fusion.gains(variables)[f"{prefix}conv"]
        np.testing.assert_allclose(gain, norms_gain(variables, *path), rtol=1e-6)


def test_layers_that_vmap_stacks_fold_nothing_and_shared_ones_do():
    class Members(nn.Module):
        stacked: bool

        @nn.compact
        def __call__(self, x):
            axis = 0 if self.stacked else None
            axes = {"params": axis, "batch_stats": axis}
            dense = nn.vmap(nn.Dense, axes, split_rngs={"params": self.stacked}, in_axes=0)
            return nn.BatchNorm(use_running_average=True, name="norm")(dense(4, name="dense")(x))

    x = jnp.ones((4, 2, 3))
    for stacked in (True, False):
        model = Members(stacked)
        variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
        assert qt.find_fusion(model, variables, x).layers == (() if stacked else ("dense",))


class Branches(nn.Module):
    """Choose one of two layers, each with its batch norm, or of two ways to apply one layer."""

    same: bool

    @nn.compact
    def __call__(self, x):
        def branch(name, module, x):
            y = nn.Dense(3, name="dense" if module.same else f"{name}_dense")(x)
            return nn.BatchNorm(use_running_average=True, name="norm" if module.same else f"{name}_norm")(y)

        return x + nn.cond(x.sum() > 0, partial(branch, "left"), partial(branch, "right"), self, x)


@pytest.mark.parametrize("same", [True, False])
def test_branches_of_a_condition_are_followed(same):
    prefixes = ("",) if same else ("left_", "right_")
    dense, norm = (
        {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
        {"scale": jnp.ones(3), "bias": jnp.ones(3)},
    )
    params = {f"{p}dense": dense for p in prefixes} | {f"{p}norm": norm for p in prefixes}
    stats = {f"{p}norm": {"mean": jnp.ones(3), "var": jnp.arange(1.0, 4.0)} for p in prefixes}
    fusion = qt.find_fusion(Branches(same), {"params": params, "batch_stats": stats}, jnp.ones((2, 3)))
    assert set(fusion.outputs) == {f"{p}norm" for p in prefixes}
    assert set(fusion.layers) == (set() if same else {"left_dense", "right_dense"})
    for gain in fusion.gains({"params": params, "batch_stats": stats}).values():
        np.testing.assert_allclose(gain, 1 / np.sqrt(np.arange(1, 4) + 1e-5), rtol=1e-6)


class OwnNorm(nn.Module):
    """Hold statistics that are flat at first, and in training get the rank of the input."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        var = self.variable("batch_stats", "var", jnp.ones, (x.shape[-1],)).value
        return x * (scale * jax.lax.rsqrt(var.reshape(-1) + 1e-5)).reshape(1, 1, -1)


class OwnNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(OwnNorm(name="norm")(nn.Dense(4, name="dense")(x)))


def test_statistics_may_change_their_shape_but_not_their_size():
    model, x = OwnNormed(), jnp.ones((2, 5, 3))
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    fusion = qt.find_fusion(model, variables, x)
    expected = norms_gain(variables, "norm")
    attached = qt.attach_statistics(model, variables, qt.QuantConfig(folded=True), x)
    attached["batch_stats"]["norm"]["var"] = attached["batch_stats"]["norm"]["var"].reshape(1, 1, 4)
    found = fusion.refresh(attached)["batch_stats"]
    np.testing.assert_allclose(found["dense"][GAIN], expected, rtol=1e-6)
    assert found["norm"]["var"].shape == (1, 1, 4)
    variables["batch_stats"]["norm"]["var"] = jnp.ones(5)
    with pytest.raises(qt.InvalidInput, match=r"'batch_stats/norm/var' has shape \(5,\), and \(4,\) where"):
        fusion.gains(variables)
    with pytest.raises(qt.InvalidInput, match=r"lack 'batch_stats/norm/var'"):
        fusion.gains({"params": variables["params"]})


def test_stacked_gains_need_their_axis_in_front():
    axes = {"params": 0, "batch_stats": 1}
    model = nn.scan(ConvNorm, axes, split_rngs={"params": True}, in_axes=nn.broadcast, length=4)()
    x = jnp.ones(IMAGES)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    fusion = qt.find_fusion(model, variables, x)
    swapped = {**variables, "batch_stats": jax.tree.map(np.transpose, variables["batch_stats"])}
    np.testing.assert_allclose(fusion.gains(variables)["conv"], norms_gain(swapped, "norm"), rtol=1e-6)
    variables["batch_stats"]["conv"] = {GAIN: jnp.ones((3, 4))}
    with pytest.raises(
        qt.InvalidInput, match=r"gain of 'conv' has shape \(4, 3\), and its place .* \(3, 4\)"
    ):
        fusion.refresh(variables)


def test_layers_that_a_rule_leaves_out_are_passed_over():
    config = qt.QuantConfig(folded=True, rules=(qt.Rule("stem", skip=True),))
    model, variables, x = network()
    fusion = qt.find_fusion(model, variables, x)
    statistics = fusion.refresh(qt.attach_statistics(model, variables, config, x))["batch_stats"]
    assert "stem" not in statistics
    np.testing.assert_allclose(statistics["up"][GAIN][:, 0], norms_gain(variables, "up_norm"), rtol=1e-6)


def test_inputs_by_keyword_and_options_by_position():
    class Switched(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="dense")(x))
            return x + nn.Dense(4, name="second")(x)

    x = jnp.ones((2, 3))
    variables = Switched().init(jax.random.key(0), x, False)
    for fusion in (
        qt.find_fusion(Switched(), variables, x, False),
        qt.find_fusion(Switched(), variables, x=x, train=False),
    ):
        assert (fusion.layers, fusion.outputs) == (("dense",), ("norm", "second"))


def test_boxed_parameters_are_unboxed():
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, "model"))

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, kernel_init=kernel_init, use_bias=False, name="dense")(x)
            return nn.relu(
                nn.BatchNorm(True, scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))(x)
            )

    x = jnp.ones((2, 3))
    variables = Boxed().init(jax.random.key(0), x)
    gains = qt.find_fusion(Boxed(), variables, x).gains(variables)
    np.testing.assert_allclose(gains["dense"], np.full(4, 1 / np.sqrt(1 + 1e-5)), rtol=1e-6)


def test_what_is_no_linen_module_is_refused():
    class Wrapper:
        module = nn.Dense(2)

    with pytest.raises(qt.InvalidInput, match=r"Wrapper is not a Linen module.*`module` \(Dense\)"):
        qt.find_fusion(Wrapper(), {}, jnp.ones((1, 2)))


class Regularized(nn.Module):
    """Sow a loss twice, which is a tuple among the variables of `init`, and hold a list of parameters."""

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            self.sow("losses", "l2", (x**2).mean(0))
        scales = self.param("scales", lambda _: [jnp.ones((1, 10)), None, (2 * jnp.ones((1, 10)),)])
        x = nn.Dense(10, name="layer")(x * scales[0] / scales[2][0])
        return nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x)) + 1.0


def test_variables_that_hold_tuples_and_lists_are_told_apart():
    x = jax.random.normal(jax.random.key(0), (16, 10))
    variables = Regularized().init(jax.random.key(1), x)
    assert len(variables["losses"]["l2"]) == 2
    scale, var = jnp.arange(10.0) - 3, jnp.arange(10.0) + 0.5
    variables["params"]["norm"]["scale"], variables["batch_stats"]["norm"]["var"] = scale, var
    config = qt.QuantConfig(folded=True)
    without = {key: variables[key] for key in ("params", "batch_stats")}
    for given in (variables, without):
        fusion = qt.find_fusion(Regularized(), given, x)
        assert fusion.layers == ("layer",)
        for later in (variables, without):
            state = qt.attach_statistics(Regularized(), later, config, x)
            state = fusion.refresh(state)
            np.testing.assert_allclose(
                state["batch_stats"]["layer"][GAIN], scale / np.sqrt(np.asarray(var) + 1e-5), rtol=1e-6
            )
