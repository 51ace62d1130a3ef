"""The pieces of a training run: types, order, learning rate, the watch for divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments.configs.cifar import PRESETS, Config, lambda_schedule
from experiments.models.resnet import ResNet
from experiments.training import loop
from experiments.training.logs import progress_bar
from experiments.training.state import TrainState, create_state, learning_rate_schedule, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step

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


@pytest.mark.parametrize("symptom", ["the loss is nan", "a parameter is not finite"])
def test_divergence_is_seen_in_the_loss_and_in_the_parameters(symptom):
    loss, parameter = (np.nan, 1.0) if symptom == "the loss is nan" else (1.0, np.inf)
    state = TrainState(np.int32(0), {"kernel": np.float32([parameter, 1.0])}, {}, None, None)

    def step(state, totals, split, order, steps):
        return state, Totals(loss, 0.0, 1.0)

    with (
        pytest.raises(qt.InvalidInput, match=f"{symptom} by step 4, in epoch 1.* --learning-rate"),
        progress_bar("quant-trim", 4, 0, 64) as bar,
    ):
        loop._run_epoch(
            CONFIG, step, state, Split(np.zeros(256), None), 0, 4, lambda_schedule(CONFIG, 4), bar
        )


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
