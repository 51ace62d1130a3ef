"""Check re-estimated statistics against float64 numpy over all batches, and that the rest is unchanged."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.batch_norm import pool
from qt_jax.errors import InvalidInput

X = np.random.default_rng(0).normal(3.0, 2.0, (40, 6)).astype(np.float32)
BATCHES = [X[:16], X[16:32], X[32:]]
"""Two of 16 and one of 8."""


class Deep(nn.Module):
    """Hold two layers with batch norms whose momenta must not matter."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        for name, momentum in (("first", 0.99), ("second", 0.5)):
            x = nn.Dense(4, dtype=self.dtype, name=name)(x)
            x = nn.BatchNorm(not train, momentum=momentum, dtype=self.dtype, name=f"{name}_norm")(x)
        return nn.Dense(2, name="head")(nn.relu(x))


def training(model):
    return partial(model.apply, train=True, mutable=["batch_stats"])


@pytest.fixture(scope="module")
def variables():
    """Return variables with Quant-Trim's ranges, and statistics that training on other data left."""

    @jax.jit
    def make():
        found = qt.attach_statistics(Deep(), Deep().init(jax.random.key(0), X), qt.QuantConfig(), X)
        with qt.quant_trim(qt.QuantConfig(), 0.0, train=True):
            _, seen = training(Deep())(found, 5.0 * X)
        return {**found, **seen}

    return make()


def reference(variables, batches):
    """Compute in float64 mean and variance of each norm's inputs, normalised by their batch's statistics."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    found, xs = {}, [batch.astype(np.float64) for batch in batches]
    for name in ("first", "second"):
        xs = [x @ params[name]["kernel"] + params[name]["bias"] for x in xs]
        union = np.concatenate(xs)
        found[f"{name}_norm"] = {"mean": union.mean(axis=0), "var": union.var(axis=0)}
        norm = params[f"{name}_norm"]
        xs = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * norm["scale"] + norm["bias"] for x in xs]
    return found


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[::-1], [X]])
def test_statistics_are_those_of_the_union(variables, batches):
    found = qt.reestimate_batch_norm(training(Deep()), variables, batches)["batch_stats"]
    for norm, expected in reference(variables, batches).items():
        for name, value in expected.items():
            np.testing.assert_allclose(found[norm][name], value, rtol=1e-4, atol=1e-5)


def test_old_statistics_have_no_say(variables):
    stale = {**variables, "batch_stats": jax.tree.map(lambda leaf: 7 * leaf, variables["batch_stats"])}
    ours, theirs = (
        qt.reestimate_batch_norm(training(Deep()), given, BATCHES)["batch_stats"]
        for given in (variables, stale)
    )
    for norm in ("first_norm", "second_norm"):
        jax.tree.map(np.testing.assert_array_equal, ours[norm], theirs[norm])


def test_everything_else_is_untouched(variables):
    before = jax.tree.map(np.array, variables)
    found = qt.reestimate_batch_norm(training(Deep()), variables, BATCHES)
    assert found["params"] is variables["params"]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(found) == jax.tree.structure(dict(variables))
    for layer in ("first", "second", "head"):
        jax.tree.map(np.testing.assert_array_equal, found["batch_stats"][layer], before["batch_stats"][layer])
    ours, theirs = (given["batch_stats"]["first_norm"]["mean"] for given in (found, before))
    assert not np.allclose(ours, theirs)


def test_fake_quantized_forward_is_measured_without_moving_its_ranges(variables):
    def quantized(variables, x):
        with qt.quant_trim(qt.QuantConfig(activations=qt.QuantSpec(2)), 1.0, train=True):
            return training(Deep())(variables, x)

    plain = qt.reestimate_batch_norm(training(Deep()), variables, BATCHES)["batch_stats"]
    found = qt.reestimate_batch_norm(quantized, variables, BATCHES)["batch_stats"]
    assert not np.allclose(found["first_norm"]["var"], plain["first_norm"]["var"], rtol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, found["first"], variables["batch_stats"]["first"])


def test_bfloat16_network_keeps_float32_statistics(variables):
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes float32 statistics with bfloat16 inputs
        found = qt.reestimate_batch_norm(training(Deep(jnp.bfloat16)), variables, BATCHES)["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(found["second_norm"])} == {jnp.dtype(jnp.float32)}
    for name, value in reference(variables, BATCHES)["second_norm"].items():
        np.testing.assert_allclose(found["second_norm"][name], value, rtol=0.1, atol=0.1)


class Shared(nn.Module):
    """Apply one batch norm to inputs of two sizes, and keep another on its running averages."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(name="norm")
        halves = norm(x[:, :1], not train), norm(x[:, 1:], use_running_average=not train)
        return nn.BatchNorm(True, name="frozen")(jnp.concatenate(halves, axis=1))


def test_a_norm_called_twice_has_both_inputs_and_a_frozen_one_stays():
    x = X[:, :, None]
    variables = Shared().init(jax.random.key(0), x)
    variables["batch_stats"]["frozen"]["mean"] = jnp.array([0.1], jnp.float32)
    found = qt.reestimate_batch_norm(training(Shared()), variables, [x[:16], x[16:]])["batch_stats"]
    union = x.astype(np.float64)
    np.testing.assert_allclose(found["norm"]["mean"], [union.mean()], rtol=1e-5)
    np.testing.assert_allclose(found["norm"]["var"], [union.var()], rtol=1e-5)
    assert found["frozen"] == variables["batch_stats"]["frozen"]


def test_a_model_without_batch_norm_comes_back_as_it_is():
    model = nn.Dense(2)
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), X), qt.QuantConfig(), X)
    found = qt.reestimate_batch_norm(partial(model.apply, mutable=["batch_stats"]), variables, BATCHES)
    assert found == variables


def test_pooling_is_exact_where_float32_sums_are_not():
    random = np.random.default_rng(1)
    parts = [random.normal(1e4, 0.1, (size, 3)) for size in (3, 50, 500)]
    mean, variance = pool([p.mean(0) for p in parts], [p.var(0) for p in parts], map(len, parts))
    union = np.concatenate(parts)
    np.testing.assert_allclose(mean, union.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, union.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("apply_fn", "batches", "message"),
    [
        (training(Deep()), [], "from no batches"),
        (partial(Deep().apply, mutable=["batch_stats"]), BATCHES, "every batch norm uses its running"),
        (Deep().apply, BATCHES, r"must return \(outputs, updated\)"),
        (training(Deep()), [X, np.full_like(X, np.nan)], "'first_norm' is not finite"),
    ],
)
def test_wrong_input_is_refused(apply_fn, batches, message, variables):
    with pytest.raises(InvalidInput, match=message):
        qt.reestimate_batch_norm(apply_fn, variables, batches)
