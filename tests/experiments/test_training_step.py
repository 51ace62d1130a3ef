"""Check the parts of a training run: types, order, learning rate, detection of divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments import models
from experiments.configs.training import PRESETS, Config, lambda_schedule
from experiments.data.augment import crop_flip
from experiments.models.resnet import ResNet
from experiments.models.speed_net import whitening_kernel
from experiments.training.state import (
    create_state,
    learning_rate_schedule,
    move_average,
    optimizer,
    random_key,
    taus,
)
from experiments.training.step import Split, Totals, draw_batch, epoch_order, make_train_step

CONFIG = dataclasses.replace(PRESETS["smoke"], dataset="digits", reverse_pruning_every=2)
TINY = ResNet((1,), width=4)
SPLIT = Split(jax.ShapeDtypeStruct((256, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((256,), jnp.int32))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_bfloat16_computes_and_float32_remembers(ema):
    config = dataclasses.replace(CONFIG, dtype="bfloat16", ema=ema)
    model, tx = TINY.clone(dtype=jnp.bfloat16), optimizer(config, 12)
    with jax.numpy_dtype_promotion("standard"):  # Linen's own BatchNorm mixes the two types
        state = jax.eval_shape(lambda: create_state(config, model, tx, (8, 8, 1)))
        step = make_train_step(config, model, tx, lambda_schedule(config, 12), (0.5,), (0.5,), 10)
        totals, order = jax.eval_shape(Totals.zero), jax.eval_shape(lambda: epoch_order(config, 256, 0))
        arguments = (state, totals, SPLIT, order, jax.ShapeDtypeStruct((), jnp.int32))
        jaxpr = str(jax.make_jaxpr(step)(*arguments))
        after, _ = jax.eval_shape(step, *arguments)
    assert after == state  # in shapes and types
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    convolutions = [line for line in jaxpr.splitlines() if "= conv_general_dilated" in line]
    assert convolutions and all("bf16[" in line.split("=")[0] for line in convolutions)


def test_every_epoch_has_an_order_of_its_own():
    orders = [np.asarray(epoch_order(CONFIG, 256 + 17, epoch)) for epoch in (0, 1, 0)]
    assert [len(set(order.tolist())) for order in orders] == [256] * 3
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[0], orders[2])


@pytest.mark.parametrize("name", ["one-cycle", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 1000])
def test_learning_rate_peaks_and_ends_at_zero(name, total):
    rate = learning_rate_schedule(Config(lr_schedule=name, learning_rate=0.5), total)
    rates = [float(rate(step)) for step in range(total + 2)]
    assert max(rates) == pytest.approx(0.5 if total > 1 else max(rates))
    assert rates[-1] == pytest.approx(0.0, abs=1e-7)
    assert min(rates) >= 0.0


def test_learning_rate_ends_at_the_final_share():
    rate = learning_rate_schedule(Config(learning_rate=0.5, final_rate=0.1), 100)
    assert float(rate(100)) == pytest.approx(0.05) and float(rate(20)) == pytest.approx(0.5)


PARAMS = {
    "a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "b": {"kernel": jnp.full((2, 2), 3.0)},
    "norm": {"bias": jnp.ones(2)},
}


def updates_of(**changes):
    """Return the first update of parameters with gradients of one, and the rate of plain SGD."""
    config = Config(**{"momentum": 0.0, "weight_decay": 0.0, "reverse_pruning": None, **changes})
    tx = optimizer(config, 10)
    gradients = jax.tree.map(jnp.ones_like, PARAMS)
    return tx.update(gradients, tx.init(PARAMS), PARAMS)[0], float(learning_rate_schedule(config, 10)(0))


def test_biases_without_a_kernel_have_a_rate_of_their_own():
    updates, rate = updates_of(bias_rate=8.0)
    np.testing.assert_allclose(updates["norm"]["bias"], -8.0 * rate, rtol=1e-6)
    for leaf in updates["a"].values():
        np.testing.assert_allclose(leaf, -rate, rtol=1e-6)


def test_frozen_parameters_get_no_update_from_anything():
    updates, rate = updates_of(
        frozen=("b/.*",),
        weight_decay=0.1,
        reverse_pruning=0.5,
        reverse_pruning_every=1,
        reverse_pruning_start=0.0,
    )
    np.testing.assert_array_equal(updates["b"]["kernel"], 0.0)
    np.testing.assert_allclose(updates["a"]["kernel"], -1.1 * rate, rtol=1e-6)


def test_reverse_pruning_leaves_biases_and_frozen_kernels_alone():
    config = Config(frozen=("b/.*",), reverse_pruning_every=1, reverse_pruning_start=0.0)
    tx = optimizer(config, 10)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    (found,) = taus(state)
    (tau,) = jax.tree.leaves_with_path(found["tau"])
    assert jax.tree_util.keystr(tau[0], simple=True, separator="/") == "a/kernel"


def test_a_pattern_that_freezes_nothing_is_refused():
    config = dataclasses.replace(CONFIG, frozen=("nothing",))
    with pytest.raises(qt.InvalidInput, match=r"--frozen 'nothing' matches no parameter; .*head/kernel"):
        create_state(config, TINY, optimizer(config, 10), (8, 8, 1))


def test_the_average_replaces_the_parameters_when_it_is_due():
    config, params, average = Config(average_every=2), {"w": jnp.float32(4.0)}, {"w": jnp.float32(2.0)}
    kept, same = move_average(config, jnp.int32(4), 10, params, average)
    assert (float(kept["w"]), float(same["w"])) == (4.0, 2.0)
    replaced, moved = move_average(config, jnp.int32(5), 10, params, average)
    keep = 0.95**2 * 0.5**3
    np.testing.assert_allclose([replaced["w"], moved["w"]], [4 - 2 * keep] * 2, rtol=1e-6)
    with pytest.raises(qt.InvalidInput, match="the average would never move"):
        optimizer(config, 1)
    with pytest.raises(qt.InvalidInput, match="give one"):
        Config(average_every=2, ema=0.9)


def test_alternating_flips_mirror_each_image_in_every_other_epoch():
    config = Config(batch_size=8, shift=0, flips="alternating")
    images = jax.random.randint(jax.random.key(0), (8, 32, 32, 3), 0, 255, jnp.uint8)
    split, order = Split(images, jnp.arange(8)), jnp.arange(8)[::-1]
    seen = [draw_batch(config, split, order, jnp.int32(step))[0] for step in range(3)]
    mirrored = [np.any(np.asarray(batch != images[::-1]), axis=(1, 2, 3)) for batch in seen]
    np.testing.assert_array_equal(mirrored[0], ~mirrored[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    assert 0 < mirrored[0].sum() < 8
    where = jnp.zeros((8, 2), jnp.int32)
    np.testing.assert_array_equal(seen[0], crop_flip(images[::-1], where, jnp.asarray(mirrored[0]), 0))


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_a_seed_given_as_an_argument_draws_as_that_of_the_config(seed):
    config = Config(batch_size=4, seed=seed)
    split = Split(jnp.arange(4 * 32 * 32 * 3).astype(jnp.uint8).reshape(4, 32, 32, 3), jnp.arange(4))
    given = jnp.uint32(seed)
    draw = jax.jit(
        lambda order, seed: draw_batch(Config(batch_size=4), split, order, jnp.int32(3), seed=seed)
    )
    order = jax.jit(lambda seed: epoch_order(Config(batch_size=4), 4, 2, seed))(given)
    np.testing.assert_array_equal(order, epoch_order(config, 4, 2))
    for one, other in zip(draw(order, given), draw_batch(config, split, order, jnp.int32(3)), strict=True):
        np.testing.assert_array_equal(one, other)
    keys = [jax.random.key_data(random_key(value, "parameters", 0)) for value in (seed, given)]
    np.testing.assert_array_equal(*keys)


def test_the_speed_network_takes_its_whitening_from_the_first_images():
    config = Config(model="speed-tiny", dataset="digits", frozen=("whitening/kernel",))
    model = models.create(config.model, 10)
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    state = create_state(config, model, optimizer(config, 10), (8, 8, 1), images)
    expected = whitening_kernel(images)
    np.testing.assert_allclose(
        np.abs(state.params["whitening"]["kernel"]), np.abs(expected), rtol=1e-3, atol=1e-4
    )
    assert models.is_fitted(model) and not models.is_fitted(TINY)
