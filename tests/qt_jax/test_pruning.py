"""Check reverse pruning: its thresholds and schedules, how it composes and resumes, and bad settings."""

import re

import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from qt_jax.errors import InvalidInput
from qt_jax.interception import GAIN
from qt_jax.pruning import ReversePruningState, reverse_pruning
from tests.qt_jax.pruning_steps import apply, momentum_step, network, normal, zeros_like

MASKED = optax.MaskedNode()


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


# Wrappers
def test_inside_masked():
    only_dense = {"conv": False, "norm": False, "dense": True}
    _, state = apply(optax.masked(reverse_pruning(0.8), only_dense), network())
    assert state.inner_state.tau["conv"] == MASKED and np.isfinite(state.inner_state.tau["dense"]["kernel"])


def test_inside_inject_hyperparams():
    def optimizer(learning_rate):
        return optax.chain(optax.sgd(learning_rate), reverse_pruning(0.8))

    expected, _ = apply(reverse_pruning(0.8), network())
    settings = ("quantile", "every", "start", "ema", "spread", "seed", "sample_size")
    for tx in (
        optax.inject_hyperparams(optimizer)(learning_rate=0.1),
        optax.inject_hyperparams(reverse_pruning, static_args=settings)(quantile=0.8),
    ):
        clipped, _ = apply(tx, network())
        jax.tree.map(np.testing.assert_array_equal, clipped, expected)
    with pytest.raises(InvalidInput, match=r"quantile must be .* known when tracing.* static_args"):
        optax.inject_hyperparams(reverse_pruning)(quantile=0.8).init(network())


def test_only_emitted_updates_count():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.1), reverse_pruning(0.7, every=2)), 3)
    params, gradients = {"kernel": normal(0, 50)}, {"kernel": normal(1, 50)}
    state, due, update = tx.init(params), [], jax.jit(tx.update)
    for _ in range(12):
        before = params
        with jax.numpy_dtype_promotion("standard"):  # optax.MultiSteps wants it
            updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        free = before["kernel"] - np.float32(0.1) * gradients["kernel"]
        moved = not np.array_equal(params["kernel"], before["kernel"])
        due.append(moved and not np.allclose(params["kernel"], free))
    assert np.flatnonzero(due).tolist() == [2, 8] and int(state.inner_opt_state[1].count) == 4


def test_only_finite_updates_count():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), reverse_pruning(0.7, every=1)), 5)
    params = {"kernel": normal(0, 50)}
    kept, state = apply(tx, params, updates={"kernel": jnp.full(50, jnp.nan)})
    np.testing.assert_array_equal(kept["kernel"], params["kernel"])
    tau = state.inner_state[1].tau["kernel"]
    assert int(state.inner_state[1].count) == 0 and tau == 0.0
    clipped, state = apply(tx, params, state)
    assert np.abs(clipped["kernel"]).max() <= state.inner_state[1].tau["kernel"] < 2.0


def test_tree_map_params_and_empty_groups():
    params, tx = network(), optax.chain(optax.trace(0.9), reverse_pruning(0.7))
    axes = jax.tree.map(lambda p: p.ndim, params)
    mapped = optax.tree_map_params(
        tx, lambda _, n: n, tx.init(params), axes, transform_non_params=lambda _: 0
    )
    assert mapped[0].trace == axes and mapped[1] == ReversePruningState(0, 0)
    labels = jax.tree.map(lambda _: "all", params)
    groups = {"all": reverse_pruning(0.7), "nobody": reverse_pruning(0.9)}
    clipped, _ = apply(optax.partition(groups, labels), params)
    jax.tree.map(np.testing.assert_array_equal, clipped, apply(reverse_pruning(0.7), params)[0])


def test_update_of_another_tree_is_refused():
    params = {"a": {"kernel": normal(0, 3, 4)}}
    tx = reverse_pruning()
    for other in ({"a": {"kernel": None}}, {"a": {"kernel": {"x": params["a"]["kernel"], "y": jnp.ones(3)}}}):
        with pytest.raises(InvalidInput, match=r"a/kernel was one array in init and is .* now"):
            tx.update(other, tx.init(params), params)


# Values that JAX can look for
@pytest.fixture
def debugging():
    with jax.debug_infs(True), jax.debug_nans(True):
        yield


@pytest.mark.parametrize(
    ("settings", "gains", "jitted"),
    [
        ({}, None, True),
        ({}, None, False),
        ({"axis": -1, "spread": 0.1}, None, True),
        ({}, 0.0, False),
        *(({"spread": 0.1}, gain, True) for gain in (0.0, 1e-38, 1e-45, -3e38)),
        *(({"axis": -1}, gain, True) for gain in (0.0, 1e-38, 1e-45, -3e38)),
    ],
)
def test_a_run_makes_no_infinite_or_undefined_values(debugging, settings, gains, jitted):
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        reverse_pruning(0.7, every=2, start=4, stop=9, folded=gains is not None, **settings),
    )
    params = {"a": {"kernel": normal(0, 6, 4)}, "zero": {"kernel": jnp.zeros((3, 2))}}
    statistics = {}
    if gains is not None:
        statistics = {"a": {GAIN: jnp.ones(4).at[1].set(gains)}, "zero": {GAIN: jnp.full(2, gains)}}
    update = jax.jit(tx.update) if jitted else tx.update
    state = tx.init(params)
    for count in range(12):
        gradients = {"a": {"kernel": normal(count, 6, 4)}, "zero": {"kernel": jnp.zeros((3, 2))}}
        updates, state = update(gradients, state, params, batch_stats=statistics)
        params = optax.apply_updates(params, updates)
        assert (np.asarray(state[1].tau["a"]["kernel"]) > 0.0).any() == (count >= 4)
        assert (np.asarray(state[1].tau["zero"]["kernel"]) == 0.0).all()


def test_infinite_thresholds_of_older_states_are_read():
    params, tx = {"kernel": normal(0, 300)}, reverse_pruning(0.9, every=2, axis=0, sample_size=10)
    old, state = (tx.init(params)._replace(tau={"kernel": jnp.full(300, value)}) for value in (jnp.inf, 0.0))
    for _ in range(3):
        mine, old = apply(tx, params, old)
        wanted, state = apply(tx, params, state)
        jax.tree.map(np.testing.assert_array_equal, (mine, old), (wanted, state))
    off = tx.init(params)._replace(tau={"kernel": jnp.full(300, jnp.inf)}, count=jnp.int32(1))
    kept, off = apply(tx, params, off)
    assert (np.asarray(off.tau["kernel"]) == 0.0).all()
    np.testing.assert_array_equal(kept["kernel"], params["kernel"])


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
        ({"quantile": np.ones(())}, "quantile must be a number in (0, 1], got array(1.)"),
        ({"mask": lambda params: params}, "mask must be a function (path, leaf) -> bool or a tree of bools"),
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
