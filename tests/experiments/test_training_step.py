"""Check the parts of a training run: types, order, learning rate, detection of divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.training import PRESETS, Config, lambda_schedule
from experiments.models.resnet import ResNet
from experiments.training.state import create_state, learning_rate_schedule, optimizer
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
