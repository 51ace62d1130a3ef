"""Check reverse pruning: thresholds, exact bounds, schedules, dtypes, trees of any kind and bad settings."""

import functools
import re

import chex
import flax.linen as nn
import flax.serialization
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qt_jax.errors import InvalidInput
from qt_jax.interception import GAIN, KERNEL
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


def bits(x):
    return np.asarray(x).view(np.uint8)


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


@pytest.mark.parametrize(
    ("mask", "selected"),
    [
        ({"conv": False, "norm": False, "dense": True}, {"dense/kernel"}),
        (
            {"conv": {"kernel": True, "bias": True}, "norm": True, "dense": False},
            {"conv/kernel"},
        ),
        (True, {"conv/kernel", "dense/kernel"}),
        (FrozenDict({"conv": np.True_, "norm": False, "dense": False}), {"conv/kernel"}),
        (jax.tree.map(lambda p: p.ndim > 1, network()), {"conv/kernel", "dense/kernel"}),
        (jax.tree.map(lambda p: True, network()), {"conv/kernel", "dense/kernel"}),
        (lambda path, leaf: path[-1] == "bias" and leaf.ndim == 1, {"conv/bias", "norm/bias"}),
        (lambda path, *leaf: re.search("en", "/".join(path)), {"dense/kernel"}),
    ],
)
def test_masks_are_functions_or_trees(mask, selected):
    tau = reverse_pruning(mask=mask).init(network()).tau
    paths = [path for path, _ in jax.tree.leaves_with_path(tau)]
    assert {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths} == selected


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        ({"conv": False, "dense": True}, "mask says nothing about norm/bias; give True or False for it"),
        ({"conv": False, "nrom": True}, "mask gives True at nrom, where no parameter is"),
        (
            {"conv": 1, "norm": False, "dense": True},
            "mask must be a function or a tree of bools, got 1 at conv",
        ),
        ("dense", "tree of bools, got 'dense' as the whole tree"),
        (False, "no parameter is selected out of 5"),
        (jax.tree.map(lambda p: p.ndim == 1, network()), "give a function (path, leaf) -> bool as `mask`"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, complaint):
    with pytest.raises(InvalidInput, match=re.escape(complaint)):
        reverse_pruning(mask=mask).init(network())


# Trees. A parameter goes by its path, whatever masks and boxes stand around it.
def layers():
    return {name: {"kernel": normal(i, 4, 6), "bias": normal(i + 9, 6)} for i, name in enumerate("abc")}


GAINS = {name: {GAIN: jnp.exp(normal(i, 6))} for i, name in enumerate("zabc")}
TRAINED = {"a": False, "b": True, "c": True}
FROZEN = {"a": True, "b": False, "c": False}
LABELS = {"a": "frozen", "b": "trained", "c": "trained"}


def folded(**options):
    return reverse_pruning(0.7, every=1, folded=True, **options)


def expected_folded(params, name):
    """The clipped kernel of one layer, and the tau."""
    kernel, gain = np.asarray(params[name]["kernel"], np.float64), np.asarray(GAINS[name][GAIN], np.float64)
    tau = np.quantile(np.abs(kernel * gain), 0.7)
    return np.clip(kernel, -tau / gain, tau / gain), tau


@pytest.mark.parametrize(
    "tx",
    [
        optax.masked(folded(), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.masked(folded(), {name: {"kernel": True, "bias": False} for name in "abc"}),
        optax.masked(folded(), TRAINED),
        optax.multi_transform({"trained": folded(), "frozen": optax.set_to_zero()}, LABELS),
        optax.partition(
            {"trained": optax.chain(optax.sgd(1.0), folded()), "frozen": optax.adam(0.1)}, LABELS
        ),
        optax.chain(optax.sgd(1.0), optax.named_chain(("pruning", folded(mask=TRAINED)))),
        optax.selective_transform(folded(), freeze_mask=FROZEN),
    ],
)
def test_gains_are_found_by_path_under_masks(tx):
    params = layers()
    step = jax.jit(lambda params, state: tx.update(zeros_like(params), state, params, batch_stats=GAINS))
    with jax.numpy_dtype_promotion("standard"):  # optax.adam wants it
        updates, _ = step(params, tx.init(params))
    clipped = optax.apply_updates(params, updates)
    for name in "bc":
        np.testing.assert_allclose(clipped[name]["kernel"], expected_folded(params, name)[0], rtol=1e-5)
        np.testing.assert_array_equal(clipped[name]["bias"], params[name]["bias"])


@flax.struct.dataclass
class Layer:
    """A layer whose parameters are attributes."""

    kernel: jax.Array
    bias: jax.Array


def boxed(params):
    return jax.tree.map(lambda p: nn.Partitioned(p, ("in", "out")[-p.ndim :]), params)


def in_nnx_boxes(params):
    return nnx.State(jax.tree.map(nnx.Param, params))


def in_attributes(params):
    return {name: Layer(**layer) for name, layer in params.items()}


CONTAINERS = {
    "dict": dict,
    "frozen": FrozenDict,
    "boxes": boxed,
    "nnx": in_nnx_boxes,
    "struct": in_attributes,
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_kernels_are_found_in_any_container(container):
    params, seen = layers(), []
    held = CONTAINERS[container](params)
    tx = folded()
    state = tx.init(held)
    updates, state = jax.jit(tx.update)(zeros_like(held), state, held, batch_stats=FrozenDict(GAINS))
    assert jax.tree.structure(updates) == jax.tree.structure(held)
    pairs = zip(jax.tree.leaves(held), jax.tree.leaves(updates), strict=True)
    clipped = [p + u for p, u in pairs]  # bias and kernel of a, b and c, or kernel and bias
    assert len(jax.tree.leaves(state.tau)) == 3
    for i, name in enumerate("abc"):
        pair = {leaf.ndim: leaf for leaf in clipped[2 * i : 2 * i + 2]}
        kernel, tau = expected_folded(params, name)
        np.testing.assert_allclose(pair[2], kernel, rtol=1e-5)
        np.testing.assert_array_equal(pair[1], params[name]["bias"])
        np.testing.assert_allclose(jax.tree.leaves(state.tau)[i], tau, rtol=1e-6)
    reverse_pruning(mask=lambda path, leaf: seen.append(path) or True).init(held)
    assert {*seen} == {(name, leaf) for name in "abc" for leaf in ("kernel", "bias")}
    mask = {"a": False, "b": {"kernel": True, "bias": False}, "c": True}
    assert len(jax.tree.leaves(reverse_pruning(mask=mask).init(held).tau)) == 2


def test_boxed_parameters_of_a_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.Dense(3, kernel_init=init, name="plain")(nn.Dense(8, kernel_init=init, name="first")(x))

    params = Net().init(jax.random.key(0), jnp.ones((1, 5)))["params"]
    tx = reverse_pruning(0.8, every=1)
    clipped, state = apply(tx, params)
    box = clipped["first"]["kernel"]
    assert isinstance(box, nn.Partitioned) and box.names == (None, "model")
    assert (
        np.abs(box.value).max()
        <= state.tau["first"]["kernel"]
        < np.abs(params["first"]["kernel"].value).max()
    )
    # one number has no axes to lay over a mesh
    assert nn.get_partition_spec(state).tau["first"]["kernel"] == PartitionSpec()
    np.testing.assert_array_equal(
        apply(tx, nn.unbox(params))[0]["first"]["kernel"], clipped["first"]["kernel"].value
    )


def test_masks_made_of_boxes():
    params = boxed(layers())
    tx = optax.masked(folded(), jax.tree.map(lambda p: p.ndim > 1, params))
    updates, _ = tx.update(zeros_like(params), tx.init(params), params, batch_stats=GAINS)
    clipped = params["b"]["kernel"].value + updates["b"]["kernel"].value
    np.testing.assert_allclose(clipped, expected_folded(layers(), "b")[0], rtol=1e-5)


# Shapes of a kernel and its gain, stacked axes of its ranges (None: it has none), shape of the gain in full
STACKED = [
    ((5, 4, 6), (6,), None, (1, 1, 6)),
    ((5, 4, 6), (5, 6), None, (5, 1, 6)),  # a scanned Dense
    ((5, 5, 5), (5, 5), None, (5, 1, 5)),
    ((2, 3, 3, 4, 6), (2, 6), None, (2, 1, 1, 1, 6)),  # a scanned Conv
    ((2, 5, 4, 6), (2, 5, 6), None, (2, 5, 1, 6)),  # scanned twice
    ((3, 3, 6, 4), (6, 1), None, (1, 1, 6, 1)),  # a transposed kernel
    ((2, 3, 6, 4), (2, 6, 1), None, (2, 1, 6, 1)),  # scanned
    ((4, 6, 1), (4, 1), None, (4, 1, 1)),  # a scanned Dense of one feature
    ((3, 3, 1), (3, 1), None, (1, 3, 1)),  # may be either: a transposed kernel
    ((3, 3, 1), (3, 1), (), (1, 3, 1)),
    ((3, 3, 1), (3, 1), (3,), (3, 1, 1)),  # a scanned Dense, as its ranges tell
    ((5, 4, 6), (), None, (1, 1, 1)),
]


def test_gains_of_stacked_layers():
    params, statistics, taus, wanted, rng = {}, {}, {}, {}, np.random.default_rng(0)
    for number, (shape, gain_shape, count, full) in enumerate(STACKED):
        kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        gain = jnp.asarray(np.exp(rng.standard_normal(gain_shape)), jnp.float32)
        params[str(number)] = {"kernel": kernel}
        counts = {} if count is None else {KERNEL: {"count": jnp.zeros(count, jnp.int32)}}
        statistics[str(number)] = {GAIN: gain, **counts}
        deployed = np.asarray(kernel, np.float64) * np.asarray(gain).reshape(full)
        tau = np.quantile(np.abs(deployed), 0.7)
        taus[str(number)] = {"kernel": jnp.float32(tau)}
        wanted[str(number)] = np.clip(deployed, -tau, tau) / np.asarray(gain).reshape(full)
    tx = reverse_pruning(1.0, every=1, ema=1.0, folded=True)  # keeps the tau of its state
    state = tx.init(params)._replace(tau=taus)
    updates, _ = jax.jit(tx.update)(zeros_like(params), state, params, batch_stats=statistics)
    for name, layer in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(layer["kernel"], wanted[name], rtol=1e-5, err_msg=f"{STACKED[int(name)]}")


@pytest.mark.parametrize("gain", [(4,), (5,), (4, 6), (6, 5), (1, 6), (5, 6, 1, 1)])
def test_gains_that_do_not_fit_are_refused(gain):
    params, tx = {"body": {"dense": {"kernel": normal(0, 5, 4, 6)}}}, folded()
    statistics = {"body": {"dense": {GAIN: jnp.ones(gain)}}}
    message = f"the gain {list(gain)} of body/dense does not fit its kernel [5, 4, 6]"
    with pytest.raises(InvalidInput, match=re.escape(message)):
        tx.update(params, tx.init(params), params, batch_stats=statistics)


# Frozen weights
def pruning(**options):
    return reverse_pruning(0.7, every=1, **options)


STILL = optax.masked(optax.set_to_zero(), FROZEN)
ORDERS = {
    "before": optax.chain(optax.adam(0.1), pruning(), STILL),
    "hidden": optax.chain(optax.adam(0.1), STILL, pruning(mask=TRAINED)),
    "masked": optax.chain(optax.adam(0.1), STILL, optax.masked(pruning(), TRAINED)),
    "inside": optax.partition(
        {"trained": optax.chain(optax.adam(0.1), pruning()), "frozen": optax.set_to_zero()}, LABELS
    ),
    "selective": optax.selective_transform(optax.chain(optax.adam(0.1), pruning()), freeze_mask=FROZEN),
    "freeze": optax.chain(optax.adam(0.1), pruning(), optax.freeze(FROZEN)),
}


@pytest.mark.parametrize("order", ORDERS)
def test_frozen_weights_stay_to_the_bit(order):
    tx, start = ORDERS[order], layers()
    with jax.numpy_dtype_promotion("standard"):  # optax.adam wants it
        step, params, state = momentum_step(tx), start, tx.init(start)
        for _ in range(3):
            params, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, params["a"], start["a"])
    [(_, tau)] = optax.tree_utils.tree_get_all_with_path(state, "tau")
    for name in "bc":
        assert np.abs(params[name]["kernel"]).max() <= tau[name]["kernel"]
        assert not np.isclose(params[name]["kernel"], start[name]["kernel"]).all()


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


def test_a_kernel_that_all_steps_of_a_scan_share_has_their_gain():
    kernel = jax.random.normal(jax.random.key(0), (2, 3))
    gain = jnp.array([[1.0, 2.0, 4.0]] * 2)  # two steps, as many as inputs
    statistics = {"cell": {GAIN: gain, "quant_kernel": {"count": jnp.ones(2, jnp.int32)}}}
    params = {"cell": {"kernel": kernel}}
    tx = reverse_pruning(0.5, every=1, folded=True)
    updates, _ = tx.update(
        jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch_stats=statistics
    )
    folded = np.abs(np.asarray(kernel) * np.asarray(gain)[:1])
    bound = np.quantile(folded, 0.5) / np.asarray(gain)[:1]
    found = optax.apply_updates(params, updates)["cell"]["kernel"]
    np.testing.assert_allclose(found, np.clip(kernel, -bound, bound), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda tx: tx(mask={"backbone": False, "head": True}),
        lambda tx: tx(mask=lambda path, leaf: path[0] == "head" and path[-1] == "kernel"),
        lambda tx: optax.masked(tx(), {"backbone": False, "head": True}),
        lambda tx: optax.partition(
            {"trained": tx(), "frozen": optax.set_to_zero()}, {"backbone": "frozen", "head": "trained"}
        ),
    ],
)
def test_a_head_without_gains_is_clipped_beside_a_backbone_that_a_mask_hides(make):
    params = {
        "backbone": {"layer": {"kernel": normal(0, 4, 6)}},
        "head": {"kernel": normal(1, 6, 3), "bias": normal(2, 3)},
    }
    statistics = {"backbone": {"layer": {GAIN: jnp.exp(normal(3, 6))}}}
    tx = make(functools.partial(reverse_pruning, 0.7, every=1, folded=True))
    updates, _ = tx.update(zeros_like(params), tx.init(params), params, batch_stats=statistics)
    clipped = optax.apply_updates(params, updates)
    tau = np.quantile(np.abs(np.asarray(params["head"]["kernel"], np.float64)), 0.7)
    np.testing.assert_allclose(
        clipped["head"]["kernel"], np.clip(params["head"]["kernel"], -tau, tau), rtol=1e-6
    )
    chex.assert_trees_all_equal(clipped["backbone"], params["backbone"])


def test_gains_that_no_kernel_finds_are_refused():
    params = {"params": {"layer": {"kernel": jnp.ones((3, 3))}}}
    statistics = {"layer": {GAIN: jnp.ones(3)}}
    tx = reverse_pruning(folded=True)
    with pytest.raises(InvalidInput, match="params/layer/kernel for one; params must be the tree below"):
        tx.update(params, tx.init(params), params, batch_stats=statistics)
