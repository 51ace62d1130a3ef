"""Check that the sub-sample is fair whatever the shape, and that the quantiles are numpy's."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qt_jax as qt
from qt_jax.ranges import empty_range, update_range

SHAPES = [
    (128, 32, 32, 16), (128, 32, 32, 32), (128, 16, 16, 64), (128, 8, 8, 256), (32, 64, 64, 24),
    (127, 31, 33, 17), (128, 7, 7, 512), (64, 197, 96), (128, 1, 1, 2048), (4096, 512), (3, 3, 256, 256),
    (1_000_003,), (2**20,), (1, 224, 224, 48),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_axis_is_sampled_evenly(shape):
    """Compare the share of each index (or of each of 16 bins of it) on every axis with its expectation."""
    size = 4096
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        index = np.broadcast_to(
            np.arange(length).reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape
        )
        sample = np.asarray(qt.subsample(jnp.asarray(index, jnp.int32), size))
        assert sample.shape == (size,)
        bins = min(length, 16)
        counts = np.bincount(sample * bins // length, minlength=bins)
        widths = np.bincount(np.arange(length) * bins // length, minlength=bins)
        np.testing.assert_allclose(counts / size, widths / length, atol=0.01, rtol=0.05)
        if length <= 512:
            assert len(np.unique(sample)) == length


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1], ids=str)
def test_ranges_of_channel_structured_tensors_against_exact_quantiles(shape):
    """Give channels different gains and offsets, and rows different gains, which ruined a prototype's run."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    x *= np.exp(rng.normal(0, 0.7, shape[-1])).astype(np.float32)
    x += rng.normal(0, 0.5, shape[-1]).astype(np.float32)
    if len(shape) == 4:
        x *= np.linspace(0.5, 1.5, shape[2], dtype=np.float32).reshape(1, 1, -1, 1)
    spread = np.quantile(x, 0.95) - np.quantile(x, 0.05)
    for level in (0.01, 0.05, 0.5, 0.95, 0.99):
        sample = np.asarray(qt.subsample(jnp.asarray(x), 4096))
        found, exact = np.quantile(sample, level), np.quantile(x, level)
        rank = np.mean(x <= found)
        tolerance = 5 * np.sqrt(level * (1 - level) / 4096)
        assert abs(rank - level) < tolerance, (level, found, exact, spread)


@hypothesis.given(st.integers(1, 300), st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 99))
def test_quantiles_are_numpys(size, levels, seed):
    x = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    found = qt.quantiles(jnp.asarray(x), levels)
    np.testing.assert_allclose(
        np.stack(found), np.quantile(x.astype(np.float64), levels), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("levels", [(0.001, 0.999), (0.999,), (0.95,), (0.03, 0.97), (0.2, 0.999)], ids=str)
@pytest.mark.parametrize("shape", [(4096,), (3, 256)], ids=str)
def test_tails_hold_what_sorting_puts_there(shape, levels):
    """Compare bit for bit, with ties, infinities and NaN. Robust levels must not sort."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32).round(2)
    x[..., [0, 7, 9]], x[..., 1] = np.inf, -np.inf
    for bad in (False, True):
        x[..., 5] = np.nan if bad else 0.0
        ordered = np.sort(x, axis=-1)
        last = shape[-1] - 1
        for level, found in zip(levels, qt.quantiles(jnp.asarray(x), levels), strict=True):
            below = int(np.floor(level * last))
            low, high = ordered[..., below], ordered[..., below + 1]
            weight = np.float32(level * last - below)
            with np.errstate(invalid="ignore"):
                np.testing.assert_allclose(found, low + weight * (high - low), rtol=1e-6)
    sorts = "sort" in str(jax.make_jaxpr(lambda x: qt.quantiles(x, levels))(x))
    assert sorts == (0.2 in levels)


def test_small_tensors_are_taken_whole():
    x = jnp.arange(60).reshape(3, 4, 5)
    np.testing.assert_array_equal(qt.subsample(x, 60), np.arange(60))
    np.testing.assert_array_equal(
        qt.subsample(x, 240, axis=1), np.moveaxis(np.arange(60).reshape(3, 4, 5), 1, 0).reshape(4, 15)
    )


def test_per_channel_sample_holds_its_own_channel():
    x = jnp.broadcast_to(jnp.arange(64, dtype=jnp.float32), (3, 3, 512, 64))
    sample = qt.subsample(x, 4096, axis=-1)
    np.testing.assert_array_equal(sample, np.broadcast_to(np.arange(64.0)[:, None], (64, 256)))


def test_observation_cost_does_not_grow_with_the_tensor():
    """Check that the compiled observation reads the sample, not the tensor."""

    def flops(shape):
        observed = jax.jit(lambda x: qt.observe(x, quantile=0.999, symmetric=False))
        return observed.lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().cost_analysis()["flops"]

    assert flops((3, 3, 512, 512)) == pytest.approx(flops((3, 3, 64, 64)), rel=0.1)


def test_observe_symmetric_and_asymmetric():
    x = jnp.linspace(-4.0, 2.0, 1001)
    low, high = qt.observe(x, quantile=0.9, symmetric=True)
    assert low == -high
    np.testing.assert_allclose(high, np.quantile(np.abs(x), 0.9), rtol=1e-6)
    low, high = qt.observe(x, quantile=0.9, symmetric=False)
    np.testing.assert_allclose([low, high], np.quantile(np.asarray(x), [0.1, 0.9]), rtol=1e-5)


def test_moving_average_in_closed_form():
    seen = empty_range(2)
    values = [np.array([1.0, -2.0]), np.array([3.0, 5.0]), np.array([0.5, 0.25])]
    expected = values[0]
    for value in values:
        seen = update_range(seen, jnp.asarray(-value, jnp.float32), jnp.asarray(value, jnp.float32), 0.75)
    for value in values[1:]:
        expected = 0.75 * expected + 0.25 * value
    np.testing.assert_allclose(seen["high"], expected, rtol=1e-6)
    np.testing.assert_allclose(seen["low"], -expected, rtol=1e-6)
    assert int(seen["count"]) == 3


def test_wrong_sizes_are_refused():
    with pytest.raises(qt.InvalidInput, match="at least 1"):
        qt.subsample(jnp.ones(3), 0)
    with pytest.raises(qt.InvalidInput, match="out of range"):
        qt.subsample(jnp.ones((3, 4)), 10, axis=2)


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("shape", [(64, 16, 16, 16), (4, 4, 4, 16)])
def test_explicit_sharding_changes_nothing(shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        sample = jax.jit(lambda v: qt.subsample(v, 4096, axis))(sharded)
    np.testing.assert_array_equal(sample, qt.subsample(jnp.asarray(x), 4096, axis))
