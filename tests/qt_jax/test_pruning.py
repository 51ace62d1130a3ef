"""Check reverse pruning: thresholds, exact bounds, schedules, dtypes and bad settings."""

import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qt_jax.errors import InvalidInput
from qt_jax.pruning import ReversePruningState, reverse_pruning

MASKED = optax.MaskedNode()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def network():
    return {
        "conv": {"kernel": normal(0, 3, 3, 4, 8), "bias": normal(1, 8) * 9},
        "norm": {"scale": normal(2, 8) * 9, "bias": normal(3, 8) * 9},
        "dense": {"kernel": normal(4, 8, 5)},
    }


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def apply(tx, params, state=None, updates=None):
    """One jitted update: the new params and state."""

    @jax.jit
    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params) if state is None else state
    return step(params, state, zeros_like(params) if updates is None else updates)


def test_tau_is_the_quantile_and_kernels_are_clipped_to_it():
    params = network()
    updates = jax.tree.map(lambda p: 0.1 * jnp.roll(p, 1), params)
    clipped, state = apply(reverse_pruning(0.9), params, updates=updates)
    for layer in ("conv", "dense"):
        new = np.asarray(params[layer]["kernel"] + updates[layer]["kernel"])
        tau = np.quantile(np.abs(new.astype(np.float64)), 0.9)
        np.testing.assert_allclose(state.tau[layer]["kernel"], tau, rtol=1e-6)
        np.testing.assert_allclose(clipped[layer]["kernel"], np.clip(new, -tau, tau), rtol=2e-6, atol=1e-7)
        assert np.abs(clipped[layer]["kernel"]).max() <= float(state.tau[layer]["kernel"])
        assert state.tau[layer]["kernel"].dtype == jnp.float32 and state.tau[layer]["kernel"].shape == ()
    assert state.count.dtype == jnp.int32 and int(state.count) == 1


def test_only_kernels_and_only_large_weights_are_touched():
    params, tx = network(), reverse_pruning(0.9)
    updates = jax.tree.map(lambda p: 0.1 * jnp.roll(p, 1), params)
    changed, state = jax.jit(tx.update)(updates, tx.init(params), params)
    assert state.tau["norm"] == {"scale": MASKED, "bias": MASKED} and state.tau["conv"]["bias"] == MASKED
    for layer, name in (("conv", "bias"), ("norm", "scale"), ("norm", "bias")):
        np.testing.assert_array_equal(changed[layer][name], updates[layer][name])
    for layer in ("conv", "dense"):
        given, got = np.asarray(updates[layer]["kernel"]), np.asarray(changed[layer]["kernel"])
        large = np.abs(np.asarray(params[layer]["kernel"]) + given) > float(state.tau[layer]["kernel"])
        assert 0.05 < large.mean() < 0.15
        np.testing.assert_array_equal(got[~large].view(np.int32), given[~large].view(np.int32))
        assert (got[large] != given[large]).all()


def test_idempotent_while_tau_is_fixed():
    params, tx = network(), reverse_pruning(0.8, every=1, ema=1.0)
    once, state = apply(tx, params)
    twice, again = apply(tx, once, state)
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    jax.tree.map(np.testing.assert_array_equal, again.tau, state.tau)


def test_tau_is_smoothed():
    first, second = {"kernel": normal(0, 300)}, {"kernel": 3 * normal(1, 300)}
    tx = reverse_pruning(0.9, every=1, ema=0.75)
    _, state = apply(tx, first)
    _, state = apply(tx, second, state)
    old, new = (np.quantile(np.abs(np.asarray(p["kernel"], np.float64)), 0.9) for p in (first, second))
    np.testing.assert_allclose(state.tau["kernel"], 0.75 * old + 0.25 * new, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({"every": 3}, {0, 3, 6, 9}),
        ({"every": 3, "start": 4}, {6, 9}),
        ({"every": 2, "start": 2, "stop": 6}, {2, 4}),
        ({"every": 1, "start": 8}, {8, 9}),
    ],
)
def test_acts_on_its_steps_only_and_is_traced_once(settings, due):
    params, traces = {"kernel": normal(0, 50)}, []
    tx = reverse_pruning(0.5, **settings)

    @jax.jit
    def step(updates, state):
        traces.append(state)
        return tx.update(updates, state, params)

    state, acted, updates = tx.init(params), set(), {"kernel": 0.01 * normal(1, 50)}
    for count in range(10):
        before = state
        changed, state = step(updates, state)
        assert int(state.count) == count + 1
        if (np.asarray(changed["kernel"]) != np.asarray(updates["kernel"])).any():
            acted.add(count)
        else:
            np.testing.assert_array_equal(state.tau["kernel"], before.tau["kernel"])
    assert acted == due and len(traces) == 1


def primitives(jaxpr):
    """Return the primitives of this level. Enter calls such as jit, but not the branches of a cond."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if "jaxpr" in equation.params:
            yield from primitives(equation.params["jaxpr"].jaxpr)


def test_quantiles_cost_nothing_on_other_steps():
    params, tx = network(), reverse_pruning()
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    outside = list(primitives(jaxpr.jaxpr))
    assert outside.count("cond") == 1 and not {"sort", "top_k", "clamp"} & {*outside}
    [cond] = [equation for equation in jaxpr.eqns if equation.primitive.name == "cond"]
    keep, project = (list(primitives(branch.jaxpr)) for branch in cond.params["branches"])
    assert keep == [] and project.count("sort") + project.count("top_k") == 2


@pytest.mark.parametrize(("axis", "channels"), [(-1, 8), (3, 8), (0, 3), (-2, 4)])
def test_per_channel(axis, channels):
    params = {"kernel": normal(0, 3, 3, 4, 8) * jnp.arange(1.0, 9.0).reshape(1, 1, 1, 8)}
    clipped, state = apply(reverse_pruning(0.7, axis=axis), params)
    kernel = np.moveaxis(np.asarray(params["kernel"], np.float64), axis, 0).reshape(channels, -1)
    tau = np.quantile(np.abs(kernel), 0.7, axis=1)
    assert state.tau["kernel"].shape == (channels,)
    np.testing.assert_allclose(state.tau["kernel"], tau, rtol=1e-6)
    result = np.moveaxis(np.asarray(clipped["kernel"]), axis, 0).reshape(channels, -1)
    np.testing.assert_allclose(result, np.clip(kernel, -tau[:, None], tau[:, None]), rtol=2e-6)
    assert (np.abs(result).max(axis=1) <= np.asarray(state.tau["kernel"])).all()


def test_large_kernels_are_sampled_fairly():
    params = {"kernel": normal(0, 3, 3, 64, 128) * jnp.arange(1.0, 129.0).reshape(1, 1, 1, 128)}
    _, sampled = apply(reverse_pruning(0.95, sample_size=4096), params)
    _, whole = apply(reverse_pruning(0.95, sample_size=10**6), params)
    np.testing.assert_allclose(whole.tau["kernel"], np.quantile(np.abs(params["kernel"]), 0.95), rtol=1e-5)
    np.testing.assert_allclose(sampled.tau["kernel"], whole.tau["kernel"], rtol=0.1)
    assert sampled.tau["kernel"] != whole.tau["kernel"]


# Exactness. With ema=1 a tau put into the state is the one that clips.
FIXED = reverse_pruning(every=1, ema=1.0)
FLOATS = (
    st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-3, 3, width=32)
    | st.sampled_from([0.0, 2.0**-126, 1.0])
)
PAIRS = st.tuples(hnp.arrays(np.float32, 32, elements=FLOATS), hnp.arrays(np.float32, 32, elements=FLOATS))


@jax.jit
def project(param, update, tau):
    state = ReversePruningState(jnp.zeros((), jnp.int32), {"kernel": tau})
    changed, _ = FIXED.update({"kernel": update}, state, {"kernel": param})
    with jax.numpy_dtype_promotion("standard"):
        return changed["kernel"], optax.apply_updates(param, changed["kernel"])


def check_projection(param, update, tau):
    """Check that |w| <= tau in the params' dtype, that clipped weights are right and small ones unchanged."""
    changed, inside = project(param, update, tau)
    with jax.numpy_dtype_promotion("standard"):
        outside = optax.apply_updates(param, changed)
    assert inside.dtype == outside.dtype == param.dtype
    old, given, bound = (np.asarray(x, np.float64) for x in (param, update, tau))
    new = np.asarray(np.float32(old) + np.float32(given), np.float64)
    spacing = float(jnp.finfo(param.dtype).eps) * np.maximum(np.abs(old), bound)
    narrow = tau.astype(param.dtype)
    if float(narrow) > bound:
        narrow = jnp.nextafter(narrow, jnp.zeros_like(narrow))
    large = np.abs(new) > float(narrow)
    for result in (np.asarray(inside, np.float64), np.asarray(outside, np.float64)):
        assert (np.abs(result) <= bound).all()
        assert (np.abs(result - np.clip(new, -bound, bound)) <= 4 * spacing)[large].all()
    np.testing.assert_array_equal(
        np.asarray(changed)[~large], np.asarray(update.astype(changed.dtype))[~large]
    )


DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]


@pytest.mark.parametrize(("param_dtype", "update_dtype"), DTYPES)
@given(PAIRS, st.floats(2.0**-99, 2.0**100, width=32) | st.floats(0.125, 4, width=32))
def test_bound_is_exact_for_extreme_magnitudes(param_dtype, update_dtype, arrays, tau):
    param, update = jnp.asarray(arrays[0], param_dtype), jnp.asarray(arrays[1], update_dtype)
    check_projection(param, update, jnp.float32(tau))


@pytest.mark.parametrize(("param_dtype", "update_dtype"), [*DTYPES, ("float32", "float16")])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_bound_is_exact_for_many_weights(param_dtype, update_dtype, scale):
    param, update = normal(0, 20_000).astype(param_dtype), (scale * normal(1, 20_000)).astype(update_dtype)
    for tau in (0.5, 0.1, 1 / 3, 1e-3):
        check_projection(param, update, jnp.float32(tau))


def test_the_nudge_is_needed():
    param, tau = np.asarray(normal(0, 20_000)), np.float32(1 / 3)
    naive = param + (np.clip(param, -tau, tau) - param)
    assert (np.abs(naive) > tau).sum() > 100


@pytest.mark.parametrize("constant_state", [False, True])
def test_bound_survives_fusion_with_the_optimizer(constant_state):
    # XLA fuses a multiplication and an addition, and inlines a cond whose predicate is known when compiling
    params, gradients = {"kernel": normal(0, 50_000)}, {"kernel": normal(1, 50_000)}
    target = np.asarray(params["kernel"]) - np.float32(0.1) * np.asarray(gradients["kernel"])
    tau = jnp.nextafter(jnp.abs(jnp.asarray(target)), jnp.float32(0.0))  # each weight just beyond its own
    tx = optax.chain(optax.sgd(0.1), reverse_pruning(every=1, ema=1.0, axis=0))
    state = (tx.init(params)[0], ReversePruningState(jnp.zeros((), jnp.int32), {"kernel": tau}))

    def step(params, state, gradients):
        updates, _ = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates)

    if constant_state:
        new = jax.jit(lambda params, gradients: step(params, state, gradients))(params, gradients)
    else:
        new = jax.jit(step)(params, state, gradients)
    assert (np.abs(new["kernel"]) <= np.asarray(tau)).all()


def test_float64():
    with jax.enable_x64(True):
        param = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=500))}
        clipped, state = apply(reverse_pruning(0.9), param)
        assert clipped["kernel"].dtype == jnp.float64 and state.tau["kernel"].dtype == jnp.float32
        largest = np.abs(np.asarray(clipped["kernel"])).max()
        assert largest <= float(state.tau["kernel"]) and largest > float(state.tau["kernel"]) * (1 - 1e-9)


def test_low_precision_kernels_keep_their_dtype():
    params = {"kernel": normal(0, 400).astype(jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    clipped, state = apply(reverse_pruning(0.9), params)
    assert jax.tree.map(lambda x: x.dtype, clipped) == jax.tree.map(lambda x: x.dtype, params)
    assert np.abs(clipped["kernel"].astype(np.float32)).max() <= float(state.tau["kernel"])


def test_a_kernel_of_zeros_sets_no_threshold():
    params, tx = {"kernel": jnp.zeros(20)}, reverse_pruning(every=1, ema=0.5)
    still, state = apply(tx, params)
    assert np.isinf(state.tau["kernel"]) and not np.asarray(still["kernel"]).any()
    _, state = apply(tx, params, state, {"kernel": jnp.ones(20)})
    assert float(state.tau["kernel"]) == 1.0
    _, state = apply(tx, params, state)
    assert float(state.tau["kernel"]) == 1.0


def test_nan_is_neither_hidden_nor_spread():
    params, tx = {"kernel": normal(0, 100).at[7].set(jnp.nan)}, reverse_pruning(1.0, every=1)
    clipped, state = apply(tx, params)
    assert np.isnan(clipped["kernel"]).nonzero()[0].tolist() == [7]
    assert np.isinf(state.tau["kernel"])
    _, state = apply(tx, {"kernel": normal(0, 100)}, state)
    assert np.isfinite(state.tau["kernel"])


def momentum_step(tx):
    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: sum(jnp.sum((x - 3.0) ** 2) for x in jax.tree.leaves(p)))(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def test_composes_with_momentum_and_clipped_weights_stay_trainable():
    tx = optax.chain(optax.sgd(0.01, momentum=0.9, nesterov=True), reverse_pruning(0.8, every=4))
    plain = optax.sgd(0.01, momentum=0.9, nesterov=True)
    step, free_step = momentum_step(tx), momentum_step(plain)
    params = network()
    state, free, free_state = tx.init(params), params, plain.init(params)
    for count in range(9):
        params, state = step(params, state)
        free, free_state = free_step(free, free_state)
        largest, tau = np.abs(params["dense"]["kernel"]).max(), float(state[1].tau["dense"]["kernel"])
        assert largest <= tau if count % 4 == 0 else largest > tau
    np.testing.assert_array_equal(params["norm"]["scale"], free["norm"]["scale"])
    assert np.abs(params["dense"]["kernel"]).max() < np.abs(free["dense"]["kernel"]).max()


def through_bytes(state, path):
    return flax.serialization.from_bytes(zeros_like(state), flax.serialization.to_bytes(state))


def through_orbax(state, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state", zeros_like(state))


@pytest.mark.parametrize("roundtrip", [through_bytes, through_orbax])
def test_resumes_bit_for_bit(roundtrip, tmp_path):
    tx = optax.chain(optax.sgd(0.01, momentum=0.9), reverse_pruning(0.8, every=2, axis=-1))
    step, params = momentum_step(tx), network()
    state = tx.init(params)
    for count in range(6):
        if count == 3:
            resumed, resumed_state = params, roundtrip(state, tmp_path)
        if count >= 3:
            resumed, resumed_state = step(resumed, resumed_state)
        params, state = step(params, state)
    assert jax.tree.structure(resumed_state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, (resumed, resumed_state), (params, state))


def test_sharded_kernels():
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    params, tx = {"kernel": normal(0, 8, 12)}, reverse_pruning(0.8, sample_size=64)
    expected, expected_state = apply(tx, params)
    for spec in (PartitionSpec("devices"), PartitionSpec(None, "devices")):
        sharded = jax.device_put(params, NamedSharding(mesh, spec))
        clipped, state = apply(tx, sharded)
        np.testing.assert_array_equal(clipped["kernel"], expected["kernel"])
        np.testing.assert_array_equal(state.tau["kernel"], expected_state.tau["kernel"])


def test_a_mask_of_ones_own():
    params, seen = network() | {"list": [normal(5, 6)]}, []

    def mask(path, leaf):
        seen.append((path, leaf.shape))
        return path[0] == "dense" or path == ("list", "0")

    _, state = apply(reverse_pruning(mask=mask), params)
    assert (("conv", "kernel"), (3, 3, 4, 8)) in seen
    assert len(jax.tree.leaves(state.tau)) == 2 and state.tau["conv"]["kernel"] == MASKED
    assert np.isfinite(state.tau["list"][0])


def test_inside_masked_and_inject_hyperparams():
    params = network()
    only_dense = {"conv": False, "norm": False, "dense": True}
    _, state = apply(optax.masked(reverse_pruning(0.8), only_dense), params)
    assert state.inner_state.tau["conv"] == MASKED and np.isfinite(state.inner_state.tau["dense"]["kernel"])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"quantile": 0.0}, "quantile must be a number in (0, 1], got 0.0"),
        ({"quantile": 1.01}, "quantile must be a number in (0, 1]"),
        ({"quantile": float("nan")}, "quantile must be a number in (0, 1], got nan"),
        ({"quantile": "0.95"}, "quantile must be a number in (0, 1], got '0.95'"),
        ({"every": 0}, "every must be an int of at least 1, got 0"),
        ({"every": 2.0}, "every must be an int of at least 1, got 2.0"),
        ({"start": -1}, "start must be an int of at least 0"),
        ({"start": True}, "start must be an int of at least 0, got True"),
        ({"start": 5, "stop": 5}, "stop must be above start=5, got 5"),
        ({"stop": 1.5}, "stop must be None or an int of at least 1, got 1.5"),
        ({"ema": -0.1}, "ema must be a number in [0, 1]"),
        ({"axis": 0.5}, "axis must be None or an int, got 0.5"),
        ({"sample_size": 0}, "sample_size must be an int of at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, complaint):
    with pytest.raises(InvalidInput, match=re.escape(complaint)):
        reverse_pruning(**settings)


def test_wrong_params_are_refused():
    params, tx = network(), reverse_pruning()
    with pytest.raises(InvalidInput, match=r"call tx.update\(updates, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(
        InvalidInput, match="no parameter is selected out of 1, the first being: dense/weight"
    ):
        tx.init({"dense": {"weight": jnp.ones(3)}})
    with pytest.raises(InvalidInput, match=r"axis=2 is out of range for dense/kernel \(float32\[8, 5\]\)"):
        reverse_pruning(axis=2).init({"dense": params["dense"]})
    for broken in (
        jnp.ones(3, jnp.int32),
        jnp.ones((0, 3)),
        jnp.ones(3, jnp.complex64),
        jnp.ones(3, jnp.float16),
    ):
        with pytest.raises(InvalidInput, match=r"cannot clip kernel .* give a `mask` that leaves it out"):
            tx.init({"kernel": broken})
