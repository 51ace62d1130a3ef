"""The points of one forward pass: whose ranges they round with, when these move, what is shared."""

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
    """Three layers on one tensor, whose sum goes into a fourth."""

    lifted: bool = False
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x):
        dense = nn.remat(nn.Dense) if self.lifted else nn.Dense
        summed = sum(dense(8, name=name)(x) for name in ("query", "key", "value"))
        return dense(4, name="out")(self.activation(summed))


def data(seed: int = 0, size: int = 32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (size, 6))


def attached(model: nn.Module, x: jax.Array, config: qt.QuantConfig = CONFIG):
    return qt.attach_statistics(model, model.init(jax.random.key(9), x), config, x)


def trained(model, variables, x, lam=1.0, config=CONFIG):
    with qt.quant_trim(config, lam, train=True):
        y, updated = model.apply(variables, x, mutable=["batch_stats"])
    return y, {**variables, **updated}


def eqns(jaxpr, name: str) -> int:
    """How many equations of a primitive a jaxpr has, inner ones included."""
    inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(eqns(sub, name) for sub in inner)


@pytest.mark.parametrize("lifted", [False, True])
def test_a_pass_rounds_with_the_ranges_it_began_with(lifted):
    """The first passes its tensors through, the second rounds as an evaluation before it would have."""
    model, x, larger = Branches(lifted), data(), 3.0 * data(1)
    variables = attached(model, x)
    y, variables = trained(model, variables, x)
    np.testing.assert_array_equal(y, model.apply({"params": variables["params"]}, x))
    with qt.quant_trim(CONFIG, 1.0, train=False):
        frozen = model.apply(variables, larger)
    y, after = trained(model, variables, larger)
    np.testing.assert_array_equal(y, frozen)
    for name in ("query", "out"):
        old, new = (found["batch_stats"][name]["quant_input"] for found in (variables, after))
        assert int(new["count"]) == 2 and float(new["high"]) > float(old["high"])


def test_a_lifted_layer_has_the_ranges_of_a_plain_one():
    x = data()
    plain, lifted = (
        trained(model, attached(model, x), x)[1]["batch_stats"] for model in (Branches(), Branches(True))
    )
    assert jax.tree.structure(plain) == jax.tree.structure(lifted)
    for (path, mine), other in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(lifted), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_ranges_are_those_of_single_observations():
    model, x = Branches(), data(size=5000)
    _, variables = trained(model, attached(model, x), x)
    found = variables["batch_stats"]["key"]
    kernel = variables["params"]["key"]["kernel"]
    for name, tensor, symmetric in (("quant_input", x, False), ("quant_kernel", kernel, True)):
        low, high = qt.observe(tensor, quantile=0.999, symmetric=symmetric)
        np.testing.assert_array_equal([found[name]["low"], found[name]["high"]], [low, high])


def test_a_tensor_that_enters_three_layers_is_rounded_once():
    """Three inputs share a grid: 4 kernels and 2 inputs are rounded; nothing is sorted but for one size."""
    model, x = Branches(), data()
    variables = attached(model, x)
    for seed in range(3):
        _, variables = trained(model, variables, data(seed))
    stats = variables["batch_stats"]
    for name in ("key", "value"):
        assert jax.tree.all(
            jax.tree.map(np.array_equal, stats[name]["quant_input"], stats["query"]["quant_input"])
        )
    jaxpr = jax.make_jaxpr(lambda variables, x: trained(model, variables, x))(variables, x)
    zero_points = 2
    assert eqns(jaxpr.jaxpr, "round") == 4 + 2 + zero_points


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
    """Of all tensors of one size; the number of layers does not matter."""

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
