"""Check that reverse pruning finds kernels and gains in any tree, under masks and boxes."""

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
import pytest
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qt_jax.errors import InvalidInput
from qt_jax.interception import GAIN, KERNEL
from qt_jax.pruning import reverse_pruning
from tests.qt_jax.pruning_steps import apply, momentum_step, network, normal, zeros_like

MASKED = optax.MaskedNode()


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
