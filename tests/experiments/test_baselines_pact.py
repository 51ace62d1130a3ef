"""Compare PACT's clip with the paper's closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments.baselines.learned_ranges import fake_quant_learned
from experiments.baselines.pact import PACT
from qt_jax.interception import INPUT, KERNEL
from qt_jax.ranges import empty_range

CONFIG = qt.QuantConfig(momentum=0.5)
SPEC = qt.QuantSpec(4, symmetric=False, quantile=1.0)
ONE = jnp.float32(1.0)
POSITIVE = np.abs(np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32))
SEEN = {"low": jnp.float32(0.0), "high": jnp.float32(1.0), "count": jnp.int32(1)}


def clipped(x, alpha, seen=SEEN, lam=ONE):
    return fake_quant_learned(PACT[INPUT], jnp.asarray(x), alpha, seen, SPEC, CONFIG, lam)


def test_value_is_the_papers():
    alpha = 1.25
    y, after = clipped(POSITIVE, jnp.float32(alpha))
    expected = np.rint(np.clip(POSITIVE.astype(np.float64), 0, alpha) * 15 / alpha) * alpha / 15
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert int(after["count"]) == 2


@pytest.mark.parametrize("lam", [1.0, 0.25])
def test_gradients_are_the_papers(lam):
    upstream = np.random.default_rng(1).normal(size=POSITIVE.shape).astype(np.float32)

    def loss(x, alpha):
        return jnp.sum(clipped(x, alpha, lam=jnp.float32(lam))[0] * upstream)

    gradient_x, gradient_alpha = jax.grad(loss, (0, 1))(jnp.asarray(POSITIVE), jnp.float32(0.8))
    x, delta = POSITIVE.astype(np.float64), 1e-6
    slope = (np.clip(x, 0, 0.8 + delta) - np.clip(x, 0, 0.8 - delta)) / (2 * delta)
    np.testing.assert_allclose(gradient_alpha, lam * np.sum(slope * upstream), rtol=1e-5)
    passing = np.where((x >= 0) & (x <= 0.8), 1.0, 1.0 - lam)
    np.testing.assert_allclose(gradient_x, passing * upstream, rtol=1e-6)


def test_first_batch_sets_alpha_to_its_maximum():
    y, after = clipped(POSITIVE, jnp.float32(0.0), empty_range())
    assert float(PACT[INPUT].value(after["low"], after["high"], SPEC)) == POSITIVE.max()
    assert float(after["low"]) == 0.0
    np.testing.assert_allclose(np.max(y), POSITIVE.max(), rtol=1e-6)


def test_signed_inputs_keep_an_observed_range():
    x = np.random.default_rng(2).normal(size=(16, 9)).astype(np.float32)
    _, first = clipped(x, jnp.float32(0.0), empty_range())
    assert (float(first["low"]), float(first["high"])) == (x.min(), x.max())
    _, second = clipped(3 * x, jnp.float32(0.01), first)
    np.testing.assert_allclose(second["low"], 2 * x.min(), rtol=1e-6)
    np.testing.assert_allclose(second["high"], 2 * x.max(), rtol=1e-6)
    slope = jax.grad(lambda alpha: jnp.sum(clipped(x, alpha, first)[0]))(jnp.float32(0.01))
    assert float(slope) == 0.0
    positive = jax.lax.fori_loop(0, 50, lambda _, seen: clipped(1 + x**2, ONE, seen)[1], second)
    assert float(positive["low"]) < 0.0  # once signed, for good


@pytest.mark.parametrize("axis", [None, -1])
def test_kernels_are_rounded_by_their_largest_magnitude(axis):
    spec = qt.QuantSpec(4, axis=axis, quantile=1.0)
    kernel = np.random.default_rng(3).normal(size=(6, 3)).astype(np.float32)
    empty = empty_range(None if axis is None else 3)

    def quantized(kernel):
        return fake_quant_learned(PACT[KERNEL], kernel, kernel, empty, spec, CONFIG, ONE)[0]

    y, back = jax.vjp(quantized, jnp.asarray(kernel))
    step = np.abs(kernel.astype(np.float64)).max(axis=None if axis is None else 0) / 7
    np.testing.assert_allclose(y, np.rint(kernel / step) * step, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0], np.ones_like(kernel))
