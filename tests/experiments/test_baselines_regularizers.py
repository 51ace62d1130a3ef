"""Check penalties on kernels against scipy and closed forms, and a step of SAM against two plain steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import qt_jax as qt
from experiments.baselines.regularizers import kure, kurtosis, largest_weights, sharpest
from experiments.configs.training import PRESETS, lambda_schedule
from experiments.models.resnet import ResNet
from experiments.training.state import create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step

PLAIN = dataclasses.replace(
    PRESETS["smoke"],
    **{"batch_size": 32, "momentum": 0.0, "weight_decay": 0.0, "sched": "none", "reverse_pruning": None},
)


def test_kurtosis_is_that_of_scipy():
    drawn = np.random.default_rng(0).standard_t(5, (3, 3, 8, 16)).astype(np.float32)
    expected = stats.kurtosis(drawn.astype(np.float64), axis=None, fisher=False)
    np.testing.assert_allclose(kurtosis(jnp.asarray(drawn)), expected, rtol=1e-5)
    np.testing.assert_allclose(kurtosis(jnp.linspace(-1, 1, 10_001)), 1.8, rtol=1e-3)
    assert kurtosis(jnp.ones(4)) == 0.0


def test_penalties_are_over_kernels_alone():
    kernels = [jnp.float32([-1, -1, 1, 1]), jnp.linspace(-2, 2, 10_001)]
    params = {
        name: {"kernel": kernel, "bias": jnp.full(1, 99.0)}
        for name, kernel in zip("ab", kernels, strict=True)
    }
    np.testing.assert_allclose(kure(params), (1.0 - 1.8) ** 2 / 2, rtol=1e-3)
    assert largest_weights(params) == 3.0
    slope = jax.grad(kure)(params)
    assert not slope["a"]["bias"].any() and np.isfinite(slope["a"]["kernel"]).all()


def test_no_direction_is_no_step():
    assert sharpest({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, 0.1)["w"].tolist() == [1.0, 1.0]


def stepped(config, change=lambda params: params):
    """Return the parameters before and after one step from parameters that `change` has moved."""
    model, tx = ResNet((1,), width=4), optimizer(config, 10)
    state = create_state(config, model, tx, (8, 8, 1))
    state = state.replace(params=change(state.params))
    before = jax.tree.map(jnp.copy, state.params)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), np.uint8)
    split = Split(jnp.asarray(images), jnp.arange(64, dtype=jnp.int32) % 10)
    run = make_train_step(config, model, tx, lambda_schedule(config, 10), (0.5,), (0.5,), 10)
    state, _ = run(state, Totals.zero(), split, epoch_order(config, 64, 0), jnp.int32(1))
    return before, state


def test_a_step_of_sam_is_a_plain_step_from_the_steepest_place():
    before, after = stepped(PLAIN)
    rate = 0.1 * PLAIN.learning_rate
    gradient = jax.tree.map(lambda a, b: (a - b) / rate, before, after.params)
    length = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    steepest, there = stepped(
        PLAIN, lambda params: jax.tree.map(lambda p, g: p + 0.05 / length * g, params, gradient)
    )
    _, sam = stepped(dataclasses.replace(PLAIN, sharpness=0.05))
    for found, start, a, b in zip(
        *map(jax.tree.leaves, (sam.params, before, steepest, there.params)), strict=True
    ):
        np.testing.assert_allclose(found - start, b - a, atol=2e-6)
    for mine, plain in zip(jax.tree.leaves(sam.batch_stats), jax.tree.leaves(after.batch_stats), strict=True):
        np.testing.assert_array_equal(mine, plain)


@pytest.mark.parametrize(("name", "value"), [("kure", kure), ("range", largest_weights)])
def test_the_penalty_is_part_of_the_gradient(name, value):
    before, plain = stepped(PLAIN)
    _, found = stepped(dataclasses.replace(PLAIN, regularizer=name, regularizer_weight=0.5))
    slope, rate = jax.grad(value)(before), 0.1 * PLAIN.learning_rate
    for a, b, g in zip(*map(jax.tree.leaves, (plain.params, found.params, slope)), strict=True):
        np.testing.assert_allclose(a - b, 0.5 * rate * g, atol=2e-6)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"sharpness": 0.1, "accumulate": 2}, "--sharpness takes whole batches"),
        ({"sharpness": 0.1, "quantizer": "lsq", "sched": "constant"}, "ranges that --quantizer lsq learns"),
        ({"regularizer_weight": 2.0}, "the factor of a --regularizer"),
        ({"regularizer": "kure", "regularizer_weight": 0.0}, "is not 0"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, complaint):
    with pytest.raises(qt.InvalidInput, match=complaint):
        dataclasses.replace(PLAIN, **settings)
