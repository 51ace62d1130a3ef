"""Check the one step between the end of training and deployment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import qt_jax as qt
from experiments import models
from experiments.configs.training import Config, lambda_schedule, quant_config
from experiments.data.augment import normalize
from experiments.data.dataset import Dataset
from experiments.training import finishing, quantizers
from experiments.training.state import create_state, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_train_step
from qt_jax.interception import GAIN

SHAPE = (8, 8, 3)
CONFIG = Config(
    model="tiny", bits=4, folded=True, grids="vendors", reverse_pruning_folded=True, reestimate=500
)


@pytest.fixture(scope="module")
def dataset():
    """Return noise in the form of a data set."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (600, *SHAPE), np.uint8)
    labels = random.integers(0, 10, 600, np.int32)
    names = tuple("0123456789")
    return Dataset("noise", *(images, labels) * 3, mean=(0.5,) * 3, std=(0.25,) * 3, class_names=names)


def begun(config):
    model = models.create(config.model, 10)
    state = create_state(config, model, optimizer(config, 10), SHAPE)
    images = jax.random.normal(jax.random.key(0), (4, *SHAPE))
    with qt.quant_trim(quant_config(config), 0.0, train=True):
        updated = model.apply(state.deployed, images, train=True, mutable=["batch_stats"])[1]
    return model, state.replace(batch_stats=updated["batch_stats"])


def test_gains_and_kernel_ranges_follow_batch_norm_and_nothing_else_does(dataset):
    _, before = begun(CONFIG)
    after = finishing.finish(CONFIG, dataset, before)
    old, new = flatten_dict(before.batch_stats), flatten_dict(after.batch_stats)
    gain = np.asarray(after.params["stem_norm"]["scale"]) / np.sqrt(new["stem_norm", "var"] + 1e-5)
    np.testing.assert_allclose(new["stem", GAIN], gain, rtol=1e-5)
    folded = np.abs(np.asarray(after.params["stem"]["kernel"]) * gain)
    np.testing.assert_allclose(new["stem", "quant_kernel", "high"], folded.max((0, 1, 2)), rtol=1e-5)
    assert not np.allclose(old["stem_norm", "var"], new["stem_norm", "var"])
    for path in old:
        if "quant_input" in path:
            np.testing.assert_array_equal(old[path], new[path])
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_batch_norm_is_pooled_over_the_training_images_that_the_run_may_see(dataset):
    config = dataclasses.replace(CONFIG, train_limit=100)
    model, state = begun(config)
    after = finishing.finish(config, dataset, state)
    images = (dataset.train_images[:100].astype(np.float64) / 255 - 0.5) / 0.25
    stem = model.apply(
        state.deployed,
        jnp.asarray(images, jnp.float32),
        capture_intermediates=True,
        mutable=["intermediates"],
    )[1]["intermediates"]["stem"]["__call__"][0]
    mean = np.asarray(stem, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(after.batch_stats["stem_norm"]["mean"], mean, rtol=1e-3, atol=1e-5)


def test_kernels_of_lsq_are_clipped_to_their_grid_which_changes_nothing_on_it(dataset):
    config = Config(model="tiny", quantizer="lsq", sched="constant", reverse_pruning=None, bits=4)
    model, state = begun(config)
    stats = flatten_dict(state.batch_stats)
    peak = float(jnp.abs(state.params["stem"]["kernel"]).max())
    for end, value in (("low", -0.5 * peak), ("high", 0.5 * peak)):
        state.batch_stats["stem"]["quant_kernel"][end] = jnp.full_like(
            stats["stem", "quant_kernel", end], value
        )
    images = jax.random.normal(jax.random.key(1), (4, *SHAPE))
    after = finishing.finish(config, dataset, state)
    assert float(jnp.abs(after.params["stem"]["kernel"]).max()) == pytest.approx(0.5 * peak)
    outputs = [quantizers.quantized_forward(config, model, s.deployed, images) for s in (state, after)]
    np.testing.assert_array_equal(*outputs)


def test_one_measurement_serves_many_networks_and_equals_that_of_the_package(dataset):
    model, state = begun(CONFIG)
    measure = finishing.batch_norm_on(model, dataset.train_images, dataset)
    other = {**state.deployed, "params": jax.tree.map(lambda leaf: 2 * leaf, state.deployed["params"])}
    for variables in (state.deployed, other):
        expected = qt.reestimate_batch_norm(
            lambda variables, batch: model.apply(variables, batch, train=True, mutable=["batch_stats"]),
            variables,
            [normalize(dataset.train_images[:500], dataset.mean, dataset.std)],
        )
        jax.tree.map(np.testing.assert_array_equal, measure(variables), expected)


def test_gains_in_training_are_those_of_the_parameters_and_at_the_end_those_of_their_average(dataset):
    config = dataclasses.replace(CONFIG, ema=0.5, reestimate=0, batch_size=50, reverse_pruning_start=1.0)
    model = models.create(config.model, 10)
    tx = optimizer(config, 10)
    state = create_state(config, model, tx, SHAPE)
    split = Split(jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels))
    step = make_train_step(config, model, tx, lambda_schedule(config, 10), (0.5,) * 3, (0.25,) * 3, 10)
    for _ in range(3):
        state, _ = step(state, Totals.zero(), split, epoch_order(config, 600, 0), jnp.int32(1))

    def gains(params):
        norm = np.asarray(state.batch_stats["stem_norm"]["var"])
        return np.asarray(params["stem_norm"]["scale"]) / np.sqrt(norm + 1e-5)

    np.testing.assert_allclose(state.batch_stats["stem"][GAIN], gains(state.params), rtol=1e-5)
    assert not np.allclose(gains(state.params), gains(state.average), rtol=1e-4)
    after = finishing.finish(config, dataset, state)
    np.testing.assert_allclose(after.batch_stats["stem"][GAIN], gains(state.average), rtol=1e-5)
    peak = np.abs(np.asarray(state.average["stem"]["kernel"]) * gains(state.average)).max((0, 1, 2))
    np.testing.assert_allclose(after.batch_stats["stem"]["quant_kernel"]["high"], peak, rtol=1e-5)
