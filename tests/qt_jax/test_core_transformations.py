"""Check `quant_trim` under the transformations of JAX and Flax: jit, scan, vmap, loops and meshes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import qt_jax as qt
from tests.qt_jax.core_training import CONFIG, X, learned

JittedDense = nn.jit(nn.Dense)


class Nested(nn.Module):
    """Put a layer under nn.jit, or not."""

    jit: bool

    @nn.compact
    def __call__(self, x):
        first = JittedDense if self.jit else nn.Dense
        return nn.Dense(3, name="second")(nn.relu(first(8, name="first")(x)))


def test_a_submodule_under_jit_is_traced_anew_in_every_context():
    variables = Nested(True).init(jax.random.key(0), X)
    found = {}
    for jit in (True, False):
        _, state, _ = learned(Nested(jit), variables, X, 0.0)
        found[jit], _, visit = learned(Nested(jit), state, X, 1.0, passes=1)
        assert set(visit.layers) == {"first", "second"}
    np.testing.assert_allclose(found[True], found[False], rtol=1e-6, atol=1e-6)

    state = qt.attach_statistics(Nested(True), variables, CONFIG, X)
    for lam in (0.0, 1.0):  # two jitted steps in one process

        @jax.jit
        def step(state, lam=lam):
            with qt.quant_trim(CONFIG, lam, train=True):
                return Nested(True).apply(state, X, mutable=["batch_stats"])[1]

        state = {**state, **step(state)}
    assert int(state["batch_stats"]["first"]["quant_input"]["count"]) == 2


@pytest.mark.parametrize("inside_first", [True, False])
def test_a_jitted_function_is_quantized_inside_a_context_and_nowhere_else(inside_first):
    model = nn.Dense(4)
    _, variables, _ = learned(model, model.init(jax.random.key(0), X), X)
    plain = model.apply(variables, X)
    with qt.quant_trim(CONFIG, 1.0, train=False):
        quantized = model.apply(variables, X)
    forward = jax.jit(lambda variables: model.apply(variables, X))

    def inside():
        with qt.quant_trim(CONFIG, 1.0, train=False):
            return forward(variables)

    order = (inside, lambda: forward(variables)) if inside_first else (lambda: forward(variables), inside)
    found = {True: order[0](), False: order[1]()}
    np.testing.assert_allclose(found[inside_first], quantized, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[not inside_first], plain, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(inside(), inside())
    assert not np.allclose(quantized, plain, rtol=1e-4)


class Recurrent(nn.Module):
    """Run a cell over time."""

    options: dict

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.RNN(nn.LSTMCell(4, name="cell"), **self.options)(x)[:, -1])


def test_a_recurrent_cell_needs_its_collection_carried():
    x = X.reshape(16, 2, 5)
    variables = Recurrent({}).init(jax.random.key(0), x)
    with pytest.raises(
        qt.InvalidInput, match=r'cannot be kept.*nn\.RNN\(cell, variable_axes=\{"batch_stats": 0'
    ):
        qt.attach_statistics(Recurrent({}), variables, CONFIG, x)
    _, state, visit = learned(Recurrent({"variable_axes": {"batch_stats": 0}}), variables, x)
    assert {path.split("/")[-1] for path in visit.layers} >= {"hi", "ii", "head"}
    assert state["batch_stats"]["cell"]["hi"]["quant_input"]["high"].shape == (2,)


class Stacked(nn.Module):
    """Scan over layers, with the axis of `batch_stats` that is given."""

    axis: int | None

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0} if self.axis is None else {"params": 0, "batch_stats": self.axis}
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes=axes, split_rngs={"params": True}, length=3
        )
        return nn.Dense(2, name="head")(scan(nn.Dense(10, name="layer"), x, None)[0])


@pytest.mark.parametrize(
    ("axis", "message"),
    [(None, r"'layer/quant_kernel' cannot be kept.*skip=True"), (1, r'variable_axes=\{"batch_stats": 0\}')],
)
def test_a_scan_that_cannot_carry_the_ranges_is_named(axis, message):
    variables = Stacked(axis).init(jax.random.key(0), X)
    with pytest.raises(qt.InvalidInput, match=message):
        qt.attach_statistics(Stacked(axis), variables, CONFIG, X)
    config = qt.QuantConfig(rules=(qt.Rule("layer", skip=True),))
    assert set(qt.attach_statistics(Stacked(axis), variables, config, X)["batch_stats"]) == {"head"}


class Shared(nn.Module):
    """Map one layer over an axis, with one range for all."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        layer = nn.vmap(
            nn.Dense,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            axis_name=self.axis_name,
        )
        return layer(3, name="layer")(x)


@pytest.mark.parametrize("axis_name", [None, "tokens"])
def test_a_layer_that_is_mapped_with_one_range_holds_the_ranges_of_all(axis_name):
    x, model = X.reshape(16, 2, 5) * jnp.array([1.0, 9.0])[None, :, None], Shared(axis_name)
    _, state, _ = learned(model, model.init(jax.random.key(0), x), x)
    seen = state["batch_stats"]["layer"]["quant_input"]
    ends = [qt.observe(x[:, i], quantile=0.999, symmetric=False) for i in range(2)]
    np.testing.assert_allclose(seen["low"], min(float(low) for low, _ in ends), rtol=1e-6)
    np.testing.assert_allclose(seen["high"], max(float(high) for _, high in ends), rtol=1e-6)


def test_an_axis_name_that_is_not_mapped_is_named():
    config, model = qt.QuantConfig(axis_name="batch"), nn.Dense(2)
    with pytest.raises(qt.InvalidInput, match="axis_name='batch' is not a mapped axis"):
        learned(model, model.init(jax.random.key(0), X), X, config=config)


class Switched(nn.Module):
    """Choose one of two layers by Flax's own switch."""

    def setup(self):
        self.first, self.second = nn.Dense(4), nn.Dense(4)

    def __call__(self, x, index):
        if self.is_initializing():
            self.first(x), self.second(x)
        return nn.switch(index, [lambda model, x: model.first(x), lambda model, x: model.second(x)], self, x)


class Closed(nn.Module):
    """Choose one of two layers that the branches close over."""

    @nn.compact
    def __call__(self, x, index):
        first, second = nn.Dense(4, name="first"), nn.Dense(4, name="second")
        if self.is_initializing():
            first(x), second(x)
        return nn.cond(index > 0, lambda _, x: first(x), lambda _, x: second(x), self, x)


def test_the_branch_that_is_taken_moves_its_ranges():
    variables = Switched().init(jax.random.key(0), X, 0)
    variables = qt.attach_statistics(Switched(), variables, CONFIG, X, 0)
    for index in (0, 1, 1):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            _, new = Switched().apply(variables, X, jnp.int32(index), mutable=["batch_stats"])
        variables = {**variables, **new}
    counts = [int(variables["batch_stats"][name]["quant_input"]["count"]) for name in ("first", "second")]
    assert counts == [1, 2]


def test_layers_inside_jax_s_own_transformations_cannot_move():
    variables = Closed().init(jax.random.key(0), X, 0)
    variables = qt.attach_statistics(Closed(), variables, CONFIG, X, 0)
    with pytest.raises(qt.InvalidInput, match=r"cannot move: its layer is called inside one of JAX's own"):
        learned(Closed(), variables, X, index=jnp.int32(1))


@pytest.mark.parametrize("quantile", [0.999, 1.0])
def test_shard_map_infers_that_ranges_are_replicated(quantile):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = qt.QuantSpec(8, symmetric=False, quantile=quantile)
    config, model = qt.QuantConfig(axis_name="batch", activations=spec), nn.Dense(2)
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), config, X)

    def forward(variables, x):
        with qt.quant_trim(config, 1.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["quant_input"]

    split = jax.sharding.PartitionSpec("batch")
    whole = jax.sharding.PartitionSpec()
    found = jax.shard_map(forward, mesh=mesh, in_specs=(whole, split), out_specs=whole)(variables, X)
    low, high = qt.observe(X, quantile=quantile, symmetric=False)
    np.testing.assert_allclose([found["low"], found["high"]], [low, high], rtol=1e-6)


@pytest.mark.parametrize("attach", [True, False])
def test_a_context_inside_a_context_is_refused(attach):
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), X)
    refused = pytest.raises(qt.InvalidInput, match="inside quant_trim")
    with refused, qt.quant_trim(CONFIG, 1.0, train=False):
        if attach:
            qt.attach_statistics(model, variables, CONFIG, X)
        with qt.quant_trim(CONFIG, 1.0, train=False):
            model.apply(variables, X)
    _, variables, _ = learned(model, variables, X)  # the context that failed is left


@pytest.mark.parametrize("axis", [None, -1])
def test_ranges_of_kernels_do_not_depend_on_the_number_of_devices(axis):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    config = qt.QuantConfig(weights=qt.QuantSpec(8, axis=axis), axis_name="batch", sample_size=10**6)
    model, whole = nn.Dense(5), jax.sharding.PartitionSpec()
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), config, X)

    def forward(variables, x):
        with qt.quant_trim(config, 1.0, train=True):
            return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["quant_kernel"]

    split = jax.sharding.PartitionSpec("batch")
    found = jax.shard_map(forward, mesh=mesh, in_specs=(whole, split), out_specs=whole)(variables, X)
    kernel = np.abs(np.asarray(variables["params"]["kernel"]))
    expected = np.quantile(kernel, 0.999, axis=None if axis is None else 0)
    np.testing.assert_allclose(found["high"], expected, rtol=1e-6)


class Twice(nn.Module):
    """Apply a layer to two tensors, through a lifted class."""

    layer: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        layer = self.layer(10, name="layer")
        return layer(x) + layer(10.0 * x)


class InAndOut(nn.Module):
    """Apply a layer inside a lifted body and outside."""

    inside_first: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(10, name="layer")
        body = nn.remat(lambda layer, x: layer(x))
        if self.inside_first:
            return body(layer, 10.0 * x) + layer(x)
        return layer(x) + body(layer, 10.0 * x)


BODIES = [
    Twice(nn.Dense),
    Twice(nn.remat(nn.Dense)),
    Twice(nn.jit(nn.Dense)),
    InAndOut(True),
    InAndOut(False),
]


@pytest.mark.parametrize("model", BODIES, ids=["plain", "remat", "jit", "inside first", "outside first"])
def test_a_range_moves_once_however_many_bodies_see_its_layer(model):
    """Check the ranges after three passes, and that each rounds with those that it began with."""
    state = qt.attach_statistics(model, model.init(jax.random.key(1), X), CONFIG, X)

    @jax.jit
    def step(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            y, new = model.apply(state, x, mutable=["batch_stats"])
        return y, {**state, **new}

    @jax.jit
    def evaluated(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=False):
            return model.apply(state, x)

    structure, average = jax.tree.structure(state), None
    for factor in (1.0, 2.0, 0.5):
        x = factor * X
        before = evaluated(state, x)
        y, state = step(state, x)
        np.testing.assert_allclose(y, before, rtol=1e-5, atol=1e-5)
        low, high = (10.0 * np.asarray(end) for end in qt.observe(x, quantile=0.999, symmetric=False))
        seen = np.array([low, high])
        average = seen if average is None else 0.99 * average + 0.01 * seen
    assert jax.tree.structure(state) == structure
    found = state["batch_stats"]["layer"]["quant_input"]
    np.testing.assert_allclose([found["low"], found["high"]], average, rtol=1e-5)
    assert int(found["count"]) == int(state["batch_stats"]["layer"]["quant_kernel"]["count"]) == 3


@pytest.mark.parametrize("layer", [nn.Dense, nn.remat(nn.Dense)])
def test_lanes_of_an_outer_vmap_are_not_mixed(layer):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer(3, name="layer")(x)

    state = qt.attach_statistics(Model(), Model().init(jax.random.key(1), X), CONFIG, X)

    def seen(state, x):
        with qt.quant_trim(CONFIG, 1.0, train=True):
            return Model().apply(state, x, mutable=["batch_stats"])[1]["batch_stats"]["layer"]["quant_input"]

    lanes = jnp.stack([X, 10.0 * X, 100.0 * X])
    found = jax.vmap(seen, (None, 0))(state, lanes)
    high = qt.observe(X, quantile=0.999, symmetric=False)[1]
    np.testing.assert_allclose(found["high"], [high, 10 * high, 100 * high], rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"variable_carry": "batch_stats"}, {"variable_broadcast": ["params", "batch_stats"]}]
)
def test_a_loop_that_takes_the_collection_in_another_way_is_refused(options):
    model, x = Recurrent(options), X.reshape(16, 2, 5)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(qt.InvalidInput, match="cannot carry the ranges"):
        learned(model, variables, x)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("quantile", [0.9, 1.0])
def test_kernels_on_explicit_meshes_are_observed_and_pruned(quantile, axis):
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    kernel = jax.random.normal(jax.random.key(0), (16, 8))
    spec = jax.sharding.PartitionSpec(None, "model")
    tx = qt.reverse_pruning(quantile, every=1, axis=axis)
    plain = {"kernel": kernel}
    expected, _ = tx.update(jax.tree.map(jnp.zeros_like, plain), tx.init(plain), plain)
    bounds = qt.observe(kernel, quantile=quantile, symmetric=True, axis=axis)
    with jax.set_mesh(mesh):
        split = {"kernel": jax.device_put(kernel, jax.sharding.NamedSharding(mesh, spec))}
        found, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, split), tx.init(split), split)
        seen = qt.observe(split["kernel"], quantile=quantile, symmetric=True, axis=axis)
    np.testing.assert_array_equal(found["kernel"], expected["kernel"])
    np.testing.assert_allclose(seen, bounds, rtol=1e-6)


class Iterated(nn.Module):
    """Apply a layer in a loop whose number of steps is not known when tracing."""

    carry: str | bool

    def setup(self):
        self.layer = nn.Dense(10)

    def __call__(self, x):
        if self.is_initializing():
            return self.layer(x)

        def go_on(module, carry):
            return carry[0] < 3

        def step(module, carry):
            return carry[0] + 1, 3 * module.layer(carry[1])

        return nn.while_loop(go_on, step, self, (0, x), carry_variables=self.carry)[1]


def test_a_layer_in_a_while_loop_has_one_range_of_all_it_sees():
    config = qt.QuantConfig(
        weights=qt.QuantSpec(8, quantile=1.0), activations=qt.QuantSpec(8, symmetric=False, quantile=1.0)
    )
    variables = Iterated("batch_stats").init(jax.random.key(1), X)
    _, state, _ = learned(Iterated("batch_stats"), variables, X, 0.0, config, passes=1)
    kernel, seen = np.asarray(variables["params"]["layer"]["kernel"]), [np.asarray(X)]
    for _ in range(2):
        seen.append(3 * (seen[-1] @ kernel))
    found = state["batch_stats"]["layer"]["quant_input"]
    assert int(found["count"]) == 1
    np.testing.assert_allclose(found["high"], max(x.max() for x in seen), rtol=1e-5)
    np.testing.assert_allclose(found["low"], min(x.min() for x in seen), rtol=1e-5)
    with pytest.raises(qt.InvalidInput, match=r"carry_variables of its nn\.while_loop"):
        qt.attach_statistics(Iterated(False), variables, config, X)
    rows = qt.coverage(Iterated(False), variables, X, config=config, console=Console(quiet=True))
    assert "carry_variables of its nn.while_loop" in rows[0].reason
