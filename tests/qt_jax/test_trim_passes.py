"""Check the points of one forward pass: the ranges they round with, when these move, what is shared."""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import qt_jax as qt

CONFIG = qt.QuantConfig(momentum=0.5)


class Branches(nn.Module):
    """Apply three layers to one tensor, and a fourth to their sum."""

    lifted: bool = False
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.lifted else nn.Dense
        summed = sum(dense(8, name=name)(x) for name in ("query", "key", "value"))
        return dense(4, name="out")(self.activation(summed))


def data(seed: int = 0, size: int = 32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (size, 6))


@functools.partial(jax.jit, static_argnums=(0, 2))
def attached(model: nn.Module, x: jax.Array, config: qt.QuantConfig = CONFIG):
    return qt.attach_statistics(model, model.init(jax.random.key(9), x), config, x)


@functools.partial(jax.jit, static_argnums=0, static_argnames="config")
def trained(model, variables, x, config=CONFIG):
    with qt.quant_trim(config, 1.0, train=True):
        y, updated = model.apply(variables, x, mutable=["batch_stats"])
    return y, {**variables, **updated}


@functools.partial(jax.jit, static_argnums=0)
def evaluated(model, variables, x):
    with qt.quant_trim(CONFIG, 1.0, train=False):
        return model.apply(variables, x)


@functools.partial(jax.jit, static_argnums=0)
def plain(model, variables, x):
    return model.apply({"params": variables["params"]}, x)


def eqns(jaxpr, name: str) -> int:
    """Count the equations of a primitive in a jaxpr, inner ones included."""
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(eqns(sub, name) for sub in inner)


@pytest.mark.parametrize("lifted", [False, True])
def test_a_pass_rounds_with_the_ranges_it_began_with(lifted):
    """Check that the first pass rounds nothing, and the second as an evaluation before it does."""
    model, x, larger = Branches(lifted), data(), 3.0 * data(1)
    variables = attached(model, x)
    y, variables = trained(model, variables, x)
    np.testing.assert_array_equal(y, plain(model, variables, x))
    frozen = evaluated(model, variables, larger)
    y, after = trained(model, variables, larger)
    np.testing.assert_array_equal(y, frozen)
    for name in ("query", "out"):
        old, new = (found["batch_stats"][name]["quant_input"] for found in (variables, after))
        assert int(new["count"]) == 2 and float(new["high"]) > float(old["high"])


def test_a_lifted_layer_has_the_ranges_of_a_plain_one():
    x = data()
    flat, lifted = (
        trained(model, attached(model, x), x)[1]["batch_stats"] for model in (Branches(), Branches(True))
    )
    assert jax.tree.structure(flat) == jax.tree.structure(lifted)
    for (path, mine), other in zip(jax.tree.leaves_with_path(flat), jax.tree.leaves(lifted), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_ranges_are_those_of_single_observations():
    model, x = Branches(), data(size=5000)
    _, variables = trained(model, attached(model, x), x)
    found = variables["batch_stats"]["key"]
    kernel = variables["params"]["key"]["kernel"]
    for name, tensor, symmetric in (("quant_input", x, False), ("quant_kernel", kernel, True)):
        low, high = qt.observe(tensor, quantile=0.999, symmetric=symmetric)
        np.testing.assert_array_equal([found[name]["low"], found[name]["high"]], [low, high])


def test_a_tensor_that_enters_three_layers_is_sampled_once():
    """Expect six gathers for four kernels and two inputs, and one more if `key` cannot share its input."""
    model, x = Branches(), data(size=5000)
    config = qt.QuantConfig(sample_size=16)
    rules = (qt.Rule("key", inputs=qt.QuantSpec(4, symmetric=False, quantile=0.99)),)
    gathers = []
    for chosen in (config, dataclasses.replace(config, rules=rules)):
        jaxpr = jax.make_jaxpr(lambda v, c=chosen: trained(model, v, x, config=c))(attached(model, x, chosen))
        gathers.append(eqns(jaxpr.jaxpr, "gather"))
    assert gathers == [6, 7]


class Siamese(nn.Module):
    """Apply `both` to two tensors, and `one` to the smaller of them, in this order."""

    order: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        layers = {name: nn.Dense(4, name=name) for name in ("both", "one")}
        tensors = {"both": iter((x, 100.0 * x)), "one": iter((x,))}
        return sum(layers[name](next(tensors[name])) for name in self.order)


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("order", ["both one both", "one both both", "both both one"])
def test_a_layer_that_sees_several_tensors_has_a_range_of_its_own(order, attach):
    """Check the ranges in every order of calls, and that a pass rounds with those that are kept."""
    model, x = Siamese(tuple(order.split())), data()
    variables = model.init(jax.random.key(9), x)
    variables = qt.attach_statistics(model, variables, CONFIG, x) if attach else variables
    before = jax.tree.structure(variables)
    _, variables = trained(model, variables, x)
    statistics = variables["batch_stats"]
    low, high = qt.observe(x, quantile=0.999, symmetric=False)
    np.testing.assert_array_equal(_ends(statistics["one"]), [low, high])
    np.testing.assert_allclose(_ends(statistics["both"]), [100.0 * low, 100.0 * high], rtol=1e-6)
    assert statistics["both"]["quant_input"]["count"] == 1 and "quant_several" in statistics["both"]
    assert "quant_several" not in statistics["one"]
    if attach:
        assert jax.tree.structure(variables) == before
    y, _ = trained(model, variables, x)
    np.testing.assert_allclose(evaluated(model, variables, x), y, rtol=1e-5, atol=1e-4)


def _ends(statistics):
    return [statistics["quant_input"][end] for end in ("low", "high")]


def test_statistics_that_do_not_know_of_several_tensors_are_refused_where_it_matters():
    model, x = Siamese(("both", "one", "both")), data()
    _, variables = trained(model, attached(model, x), x)
    statistics = variables["batch_stats"]
    old = {**statistics, "both": {**statistics["both"]}}
    del old["both"]["quant_several"]
    with pytest.raises(
        qt.InvalidInput, match=r"'both/quant_input' sees several tensors.*attach_statistics again"
    ):
        trained(model, {**variables, "batch_stats": old}, x)
    mended = qt.attach_statistics(model, {**variables, "batch_stats": old}, CONFIG, x)
    jax.tree.map(np.testing.assert_array_equal, mended, variables)


def test_frozen_ranges_are_each_layers_own():
    """Set ranges as they are after attaching one layer's statistics alone, or training under other rules."""
    model, x = Branches(), data()
    config = qt.QuantConfig(weights=None)
    _, variables = trained(model, attached(model, x, config), x, config=config)
    stats = variables["batch_stats"]
    narrow = {**stats["key"]["quant_input"], "low": jnp.float32(-0.1), "high": jnp.float32(0.1)}
    changed = {**variables, "batch_stats": {**stats, "key": {"quant_input": narrow}}}
    with qt.quant_trim(config, 1.0, train=False):
        _, captured = model.apply(changed, x, capture_intermediates=True)
    found = captured["intermediates"]["key"]["__call__"][0]
    params = variables["params"]["key"]
    rounded = qt.fake_quant(x, narrow["low"], narrow["high"], config.activations)
    np.testing.assert_allclose(found, rounded @ params["kernel"] + params["bias"][None], rtol=1e-5, atol=1e-6)
    _, after = trained(model, changed, x, config=config)
    ranges = [after["batch_stats"][name]["quant_input"] for name in ("query", "key", "value")]
    assert all(jax.tree.all(jax.tree.map(np.array_equal, ranges[0], other)) for other in ranges)


def test_layers_of_other_specs_do_not_share():
    model, x = Branches(), data()
    rules = (qt.Rule("key", inputs=qt.QuantSpec(4, symmetric=False)),)
    config = qt.QuantConfig(rules=rules, momentum=0.5)
    _, variables = trained(model, attached(model, x, config), x, config=config)
    with qt.quant_trim(config, 1.0, train=False):
        _, captured = model.apply(variables, x, capture_intermediates=True)
    inner = captured["intermediates"]
    params, low = variables["params"], variables["batch_stats"]["key"]["quant_input"]
    coarse = qt.fake_quant(x, low["low"], low["high"], qt.QuantSpec(4, symmetric=False))
    kernel = variables["batch_stats"]["key"]["quant_kernel"]
    w = qt.fake_quant(params["key"]["kernel"], kernel["low"], kernel["high"], qt.QuantSpec(8))
    np.testing.assert_allclose(
        inner["key"]["__call__"][0], coarse @ w + params["key"]["bias"][None], rtol=1e-5
    )


def test_gradients_of_a_shared_input_add_up():
    model, x = Branches(activation=lambda x: x), data()
    _, variables = trained(model, attached(model, x), x)

    def total(x):
        with qt.quant_trim(CONFIG, 1.0, train=False):
            return jnp.sum(model.apply(variables, x))

    def kernel(name):
        found = variables["batch_stats"][name]["quant_kernel"]
        return qt.fake_quant(variables["params"][name]["kernel"], found["low"], found["high"], CONFIG.weights)

    expected = sum(kernel(name) for name in ("query", "key", "value")) @ kernel("out").sum(1)
    np.testing.assert_allclose(jax.grad(total)(x), np.tile(expected, (len(x), 1)), rtol=1e-4, atol=1e-6)


def test_one_network_takes_its_quantiles_in_one_selection():
    """Count selections: tensors of one size share one, however many layers there are."""

    class Deep(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            for _ in range(self.depth):
                x = nn.Dense(64)(x)
            return x

    x = jnp.ones((64, 64))
    counts = []
    for depth in (2, 6):
        model = Deep(depth)
        jaxpr = jax.make_jaxpr(lambda v, model=model: trained(model, v, x))(attached(model, x))
        counts.append((eqns(jaxpr.jaxpr, "top_k"), eqns(jaxpr.jaxpr, "sort")))
    assert counts == [(1, 0), (1, 0)]


def test_a_pass_that_fails_leaves_nothing_behind():
    model, x = Branches(), data()
    variables = attached(model, x)
    with qt.quant_trim(CONFIG, 1.0, train=True):
        with pytest.raises(Exception, match="shape"):
            model.apply(variables, jnp.ones((3, 7)), mutable=["batch_stats"])
        _, updated = model.apply(variables, x, mutable=["batch_stats"])
    assert int(updated["batch_stats"]["query"]["quant_input"]["count"]) == 1


class Scanned(nn.Module):
    """Scan over one layer three times."""

    @nn.compact
    def __call__(self, x):
        def body(layer, carry, _):
            return layer(carry), None

        axes = {"params": 0, "batch_stats": 0}
        scan = nn.scan(body, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scan(nn.Dense(6, name="layer"), x, None)[0]


class Mapped(nn.Module):
    """Lift a layer, also by transformations in which JAX traces nothing."""

    lift: Callable

    @nn.compact
    def __call__(self, x):
        return self.lift(nn.Dense)(6, name="layer")(x)


def metadata(layer):
    return nn.add_metadata_axis(
        layer, variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "layers"}
    )


LIFTED = {
    "scan": Scanned(),
    "remat": Mapped(nn.remat),
    "jit": Mapped(nn.jit),
    "metadata": Mapped(metadata),
}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "disable_jit"])
@pytest.mark.parametrize("name", LIFTED)
def test_ranges_of_lifted_layers_move(name, jit):
    model, x = LIFTED[name], data()
    variables = attached(model, x)
    with jax.disable_jit(not jit):
        _, variables = trained(model, variables, x)
    counts = [
        leaf for path, leaf in jax.tree.leaves_with_path(variables["batch_stats"]) if path[-1].key == "count"
    ]
    assert len(counts) == 2 and all(np.all(count == 1) for count in counts)


@pytest.mark.parametrize("name", ["scan", "remat", "jit"])
def test_no_tracer_outlives_its_trace(name):
    model, x = LIFTED[name], data()
    variables = attached(model, x)
    with jax.checking_leaks():
        jax.jit(lambda variables: trained(model, variables, x))(variables)


class Student(nn.Module):
    """Apply a layer, and inside the module a teacher, to the same tensor."""

    teacher: nn.Module
    taught: dict
    moves: bool

    @nn.compact
    def __call__(self, x):
        mutable = ["batch_stats"] if self.moves else False
        answer = self.teacher.apply(self.taught, x, mutable=mutable)
        if self.moves:
            answer, updated = answer
            self.sow("intermediates", "count", updated["batch_stats"]["quant_input"]["count"])
        return nn.Dense(4, name="layer")(x) - answer


@pytest.mark.parametrize("moves", [False, True])
def test_an_apply_inside_a_module_is_a_pass_of_its_own(moves):
    x, teacher = data(), nn.Dense(4)
    _, variables = trained(teacher, attached(teacher, x), 100.0 * x)
    student = Student(teacher, variables, moves)
    state = qt.attach_statistics(student, student.init(jax.random.key(9), x), CONFIG, x)
    with qt.quant_trim(CONFIG, 1.0, train=True):
        _, updated = student.apply(state, x, mutable=["batch_stats", "intermediates"])
    ranges = updated["batch_stats"]["layer"]["quant_input"]
    assert int(ranges["count"]) == 1
    np.testing.assert_array_equal(
        [ranges["low"], ranges["high"]], qt.observe(x, quantile=0.999, symmetric=False)
    )
    if moves:
        assert updated["intermediates"]["count"] == (2,)


class Arranged(nn.Module):
    """Make layers in `setup`, and call them from a method that is not `__call__`."""

    def setup(self):
        self.first, self.second = nn.Dense(6), nn.Dense(6)

    def __call__(self, x):
        return self.encode(x)

    def encode(self, x):
        return self.second(self.first(x))


def test_any_method_is_a_pass():
    model, x = Arranged(), data()
    variables = attached(model, x)
    with qt.quant_trim(CONFIG, 1.0, train=True):
        y, updated = model.apply(variables, x, mutable=["batch_stats"], method="encode")
        again, _ = model.apply({**variables, **updated}, x, mutable=["batch_stats"], method="encode")
    assert all(int(updated["batch_stats"][name]["quant_input"]["count"]) == 1 for name in ("first", "second"))
    np.testing.assert_array_equal(y, model.apply({"params": variables["params"]}, x))
    assert not np.array_equal(y, again)


def test_whole_kernels_are_not_copied():
    """Check that kernels at quantile 1 are reduced one by one, without an array that holds them all."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.Dense(128)(x)
            return x

    config = qt.QuantConfig(weights=qt.QuantSpec(quantile=1.0), activations=None)
    model, x = Deep(), jnp.ones((2, 128))
    jaxpr = jax.make_jaxpr(lambda v: trained(model, v, x, config=config))(attached(model, x, config))
    assert eqns(jaxpr.jaxpr, "concatenate") == 0
