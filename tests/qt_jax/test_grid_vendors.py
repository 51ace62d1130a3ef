"""Check that the drawn grids are onnxruntime's and the narrow one, each per tensor and per channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from qt_jax.backends.grids import CONVENTIONS, rounded_kernel
from qt_jax.grid import fake_quant_on_drawn_grid, grid_key

SPEC = qt.QuantSpec(4, axis=-1, quantile=1.0, grids="vendors")


def images(w):
    """Return the four images of a kernel in float64."""
    found = {}
    for scope, peak in (("tensor", np.abs(w).max()), ("channel", np.abs(w).max(axis=0))):
        found[scope, "full"] = np.clip(np.round(w / (peak / 7.5)), -8, 7) * peak / 7.5
        found[scope, "narrow"] = np.clip(np.round(w / (peak / 7)), -7, 7) * peak / 7
    return found


def test_each_of_the_four_grids_is_drawn_a_quarter_of_the_time():
    w = jax.random.normal(jax.random.key(0), (40, 5)) * jnp.array([[1.0, 0.5, 0.1, 2.0, 3.0]])
    high = jnp.max(jnp.abs(w), axis=0)
    draw = jax.jit(jax.vmap(lambda key: fake_quant_on_drawn_grid(w, -high, high, SPEC, jnp.float32(1), key)))
    draws = np.asarray(draw(jax.vmap(lambda n: grid_key(0, "stem", n))(jnp.arange(800))))
    counts = {}
    tie = np.abs(w) == np.asarray(high)  # on the full grid it lies halfway between two integers
    for name, image in images(np.asarray(w, np.float64)).items():
        equal = (np.abs(draws - image) < 1e-5) | tie
        counts[name] = int(np.sum(np.all(equal, axis=(1, 2))))
    assert sum(counts.values()) == 800
    assert all(150 < count < 250 for count in counts.values()), counts


def test_each_of_the_ten_conventions_is_drawn_a_tenth_of_the_time():
    """Compare with the float64 rounding of the backend that emulates conventions."""
    w = jax.random.normal(jax.random.key(0), (40, 5)) * jnp.array([[1.0, 0.5, 0.1, 2.0, 3.0]])
    high = jnp.max(jnp.abs(w), axis=0)
    spec = qt.QuantSpec(4, axis=-1, quantile=1.0, grids="conventions")
    draw = jax.jit(jax.vmap(lambda key: fake_quant_on_drawn_grid(w, -high, high, spec, jnp.float32(1), key)))
    draws = np.asarray(draw(jax.vmap(lambda n: grid_key(0, "stem", n))(jnp.arange(1000))))
    kernel, counts = np.asarray(w), {}
    tie = np.abs(kernel) == np.asarray(high)
    names = [name for name in CONVENTIONS if name.startswith("int4w")]
    assert len(names) == 5
    for name in names:
        for axis in (None, 0):
            largest = np.abs(kernel).max(axis=axis, keepdims=True).astype(np.float64)
            image = rounded_kernel(kernel, largest, CONVENTIONS[name])
            equal = (np.abs(draws - image) < 1e-5) | (tie & (name == "int4w-full"))
            counts[name, axis] = int(np.sum(np.all(equal, axis=(1, 2))))
    assert sum(counts.values()) == 1000, counts
    assert all(60 < count < 140 for count in counts.values()), counts


def test_training_draws_anew_at_every_step_and_evaluation_does_not():
    model, x = nn.Dense(6, use_bias=False), jnp.eye(16)
    config = qt.QuantConfig(weights=SPEC, activations=None)
    variables = qt.attach_statistics(model, model.init(jax.random.key(0), x), config, x)
    seen = set()
    for _ in range(24):
        with qt.quant_trim(config, 1.0, train=True):
            y, updated = model.apply(variables, x, mutable=["batch_stats"])
        if int(variables["batch_stats"]["quant_kernel"]["count"]):  # the first step has no grid yet
            seen.add(np.asarray(y).tobytes())
        variables = {**variables, **updated}
    assert len(seen) == 4
    with qt.quant_trim(config, 1.0, train=False):
        evaluated = model.apply(variables, x)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    np.testing.assert_allclose(evaluated, images(kernel)["channel", "narrow"], atol=1e-5)


def test_the_gradient_is_the_identity_and_lambda_zero_the_kernel():
    w = jax.random.normal(jax.random.key(1), (7, 3))
    high = jnp.max(jnp.abs(w), axis=0)

    def total(w, lam):
        return jnp.sum(fake_quant_on_drawn_grid(w, -high, high, SPEC, lam, jax.random.key(2)))

    np.testing.assert_array_equal(jax.grad(total)(w, jnp.float32(1)), np.ones((7, 3)))
    same = fake_quant_on_drawn_grid(w, -high, high, SPEC, jnp.float32(0), jax.random.key(2))
    np.testing.assert_array_equal(same, w)


@pytest.mark.parametrize("settings", [{"axis": None}, {"symmetric": False}, {"ste": "clipped"}])
def test_what_it_does_not_go_with_is_refused(settings):
    with pytest.raises(qt.InvalidInput, match=r'grids="vendors" goes with'):
        qt.QuantSpec(**{"bits": 4, "axis": -1, "grids": "vendors", **settings})
    with pytest.raises(qt.InvalidInput, match='"own", "vendors" or "conventions"'):
        qt.QuantSpec(grids="all")
