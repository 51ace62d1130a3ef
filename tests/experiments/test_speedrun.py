"""Check the speedrun: the parts of the recipe in closed form, the command on a few images."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qt_jax as qt
from experiments.data import load
from experiments.data.augment import VIEWS, weighted_views
from experiments.models.speed_net import identity_first, max_pool, whitening_kernel
from experiments.speedrun.program import Speedrun, make_training
from experiments.training.state import average_parameters
from qt_jax import records

command = importlib.import_module("experiments.speedrun.__main__")

TINY = Speedrun(epochs=2, batch_size=32, width=0.1, dtype="float32", reestimate=1, reverse_pruning=0.9)
FLAGS = [
    *("--recipe.epochs", "1", "--recipe.batch-size", "32", "--recipe.width", "0.1"),
    *("--recipe.dtype", "float32", "--train-limit", "64", "--seeds", "1"),
]


@pytest.fixture
def scrap(monkeypatch):
    """Replace CIFAR-10 by digits as 32x32 colour images, noisy so that no direction is empty."""
    digits, random = load("digits"), np.random.default_rng(0)

    def colour(images: np.ndarray) -> np.ndarray:
        large = np.repeat(np.repeat(np.repeat(images[:128], 4, 1), 4, 2), 3, 3)
        return large // 2 + random.integers(0, 128, large.shape, np.uint8)

    dataset = dataclasses.replace(
        digits,
        **{
            f"{part}_images": colour(getattr(digits, f"{part}_images"))
            for part in ("train", "validation", "test")
        },
        **{f"{part}_labels": getattr(digits, f"{part}_labels")[:128] for part in ("validation", "test")},
        train_labels=digits.train_labels[:128],
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    monkeypatch.setattr(command, "load", lambda *_, **__: dataset)
    return dataset


def test_whitened_windows_are_uncorrelated():
    random = np.random.default_rng(0)
    images = random.normal(size=(64, 8, 8, 3)).astype(np.float32)
    images = images + np.roll(images, 1, axis=2)
    kernel = whitening_kernel(jnp.asarray(images), epsilon=0.0)
    assert kernel.shape == (2, 2, 3, 24)
    windows = np.stack(
        [images[:, r : 7 + r, c : 7 + c] for r in range(2) for c in range(2)], axis=-2
    ).reshape(-1, 12)
    outputs = windows.astype(np.float64) @ np.asarray(kernel, np.float64).reshape(12, 24)
    np.testing.assert_allclose(outputs[:, :12].T @ outputs[:, :12] / len(outputs), np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(outputs[:, 12:], -outputs[:, :12])


@pytest.mark.parametrize("size", [4, 5])
def test_max_pool_and_its_gradient(size):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def pooled(pool):
        return lambda x: jnp.sum(jnp.sin(pool(x, (2, 2))))

    reference = pooled(lambda x, window: nn.max_pool(x, window, window))
    np.testing.assert_array_equal(max_pool(x, (2, 2)), nn.max_pool(x, (2, 2), (2, 2)))
    np.testing.assert_allclose(jax.grad(pooled(max_pool))(x), jax.grad(reference)(x), rtol=1e-6)


def test_tied_maxima_share_the_gradient():
    gradient = jax.grad(lambda x: jnp.sum(max_pool(x, (2, 2))))(jnp.ones((1, 2, 2, 1)))
    np.testing.assert_array_equal(gradient, np.full((1, 2, 2, 1), 0.25))


def test_convolutions_begin_as_the_identity():
    kernel = identity_first(jax.random.key(0), (3, 3, 4, 6))
    x = jax.random.normal(jax.random.key(1), (1, 5, 5, 4))
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(y[..., :4], x, atol=1e-6)
    assert np.abs(kernel[..., 4:]).max() <= 1 / 6 and np.std(kernel[..., 4:]) > 0.05


def test_parameters_are_replaced_by_their_average():
    params, average = {"w": jnp.float32(4.0)}, {"w": jnp.float32(2.0)}
    new, moved = average_parameters(jnp.int32(3), 10, 5, params, average)
    assert float(new["w"]) == 4.0 and float(moved["w"]) == 2.0
    new, moved = average_parameters(jnp.int32(4), 10, 5, params, average)
    keep = 0.95**5 * 0.4**3
    np.testing.assert_allclose([new["w"], moved["w"]], [4 - 2 * keep] * 2, rtol=1e-6)


def test_views():
    images = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.uint8).reshape(2, 4, 4, 3)
    views = weighted_views(images, VIEWS)
    assert len(views) == VIEWS and sum(weight for weight, _ in views) == 1.0
    np.testing.assert_array_equal(views[0][1], images)
    np.testing.assert_array_equal(views[1][1], images[:, :, ::-1])
    np.testing.assert_array_equal(views[2][1][:, 1:, 1:], images[:, :-1, :-1])
    ((weight, same),) = weighted_views(images, 1)
    assert weight == 1.0 and same is images


def test_training_fixes_the_whitening_and_prunes_the_rest(scrap):
    images, labels = jnp.asarray(scrap.train_images), jnp.asarray(scrap.train_labels)
    train = jax.jit(make_training(TINY, scrap.mean, scrap.std, 10))
    first, again, other = (train(images, labels, jax.random.key(seed)) for seed in (0, 0, 1))
    same = jax.tree.map(np.array_equal, first, again)
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(first["params"]["head"]["kernel"], other["params"]["head"]["kernel"])
    whitening = first["params"]["whitening"]
    positive, negative = np.split(np.asarray(whitening["kernel"]), 2, axis=-1)
    np.testing.assert_array_equal(positive, -negative)  # as it was made: gradients are not so
    assert np.any(whitening["bias"] != 0)
    statistics = first["batch_stats"]["block1_conv1"]
    steps = TINY.epochs * len(images) // TINY.batch_size
    assert int(statistics["quant_input"]["count"]) == steps - round(TINY.warmup * steps)


def test_command_trains_deploys_and_does_nothing_twice(scrap, tmp_path, capsys):
    out = [*FLAGS, "--out", str(tmp_path)]
    assert command.main([*out, "--no-deploy"]) == 0
    trained = records.read(tmp_path / "records.jsonl")
    assert [(row["method"], row["scheme"]) for row in trained] == [
        ("quant-trim", "trained"),
        ("float", "trained"),
    ]
    assert command.main(out) == 0
    rows = records.read(tmp_path / "records.jsonl")
    assert rows[:2] == trained and [row["scheme"] for row in rows[2:5]] == [
        "fp32",
        "int8-pt-minmax",
        "int8-pc-minmax",
    ]
    assert rows[2]["top1"] == pytest.approx(trained[0]["top1"], abs=0.02)
    assert rows[2]["top1_six_views"] == pytest.approx(trained[0]["top1_six_views"], abs=0.02)
    assert command.main(out) == 0 and records.read(tmp_path / "records.jsonl") == rows
    assert "int8-pc-minmax" in capsys.readouterr().out
    assert command.main([*out, "--recipe.shift", "1"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_wrong_input_is_refused(scrap, tmp_path, capsys):
    assert command.main(["--recipe.batch-size", "1000", "--out", str(tmp_path)]) == 2
    assert "larger than the training split (" in capsys.readouterr().err
    with pytest.raises(qt.InvalidInput, match="at least 1"):
        command.Options(seeds=0)
