"""Check that pruned weights keep their bound to the last bit, whatever their type and size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qt_jax.interception import GAIN
from qt_jax.pruning import ReversePruningState, reverse_pruning
from tests.qt_jax.pruning_steps import apply, normal, zeros_like


def bits(x):
    return np.asarray(x).view(np.uint8)


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
    assert state.tau["kernel"] == 0.0 and not np.asarray(still["kernel"]).any()
    _, state = apply(tx, params, state, {"kernel": jnp.ones(20)})
    assert float(state.tau["kernel"]) == 1.0
    _, state = apply(tx, params, state)
    assert float(state.tau["kernel"]) == 1.0


def test_nan_is_neither_hidden_nor_spread():
    params, tx = {"kernel": normal(0, 100).at[7].set(jnp.nan)}, reverse_pruning(1.0, every=1)
    clipped, state = apply(tx, params)
    assert np.isnan(clipped["kernel"]).nonzero()[0].tolist() == [7]
    assert state.tau["kernel"] == 0.0
    _, state = apply(tx, {"kernel": normal(0, 100)}, state)
    assert 0.0 < state.tau["kernel"] < 10.0


def test_infinite_weights_are_not_hidden_before_the_first_threshold():
    params, tx = {"kernel": normal(0, 100).at[7].set(jnp.inf)}, reverse_pruning(1.0, every=1)
    clipped, state = apply(tx, params)
    assert np.isinf(clipped["kernel"]).nonzero()[0].tolist() == [7] and state.tau["kernel"] == 0.0


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [None, -1])
def test_quantile_1_clips_nothing(dtype, axis, steps):
    params = {"kernel": normal(0, 3, 41, 600).at[1, 17, 300].set(50.0).astype(dtype)}  # more than the sample
    updates = jax.tree.map(lambda p: (0.1 * jnp.roll(p, 1).astype(jnp.float32)).astype(dtype), params)
    tx = reverse_pruning(1.0, every=1, axis=axis)
    state, step = tx.init(params), jax.jit(tx.update)
    changed, state = step(updates, state, params)
    np.testing.assert_array_equal(bits(changed["kernel"]), bits(updates["kernel"]))
    params = optax.apply_updates(params, changed)
    largest = np.abs(np.asarray(params["kernel"], np.float32)).max(None if axis is None else (0, 1))
    np.testing.assert_array_equal(state.tau["kernel"], largest)
    for _ in range(steps - 1):  # rounding in the moving average clips no kernel that stands still
        changed, state = step(zeros_like(params), state, params)
        assert not np.asarray(changed["kernel"]).any()
    np.testing.assert_array_equal(state.tau["kernel"], largest)


def test_quantile_1_clips_nothing_of_float64_and_folded_kernels():
    params = {"dense": {"kernel": normal(0, 300, 301)}}
    gains = {"dense": {GAIN: jnp.exp(normal(1, 301)).at[3].set(0.0)}}
    tx = reverse_pruning(1.0, every=1, folded=True)
    changed, _ = jax.jit(tx.update)(zeros_like(params), tx.init(params), params, batch_stats=gains)
    assert not np.asarray(changed["dense"]["kernel"]).any()
    with jax.enable_x64(True):
        wide = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=70_000))}
        tx = reverse_pruning(1.0, every=1)
        changed, _ = jax.jit(tx.update)(zeros_like(wide), tx.init(wide), wide)
        assert not np.asarray(changed["kernel"]).any()
