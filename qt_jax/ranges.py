"""Observe robust ranges: quantiles of a fair sub-sample, smoothed by an exponential moving average.

The cost of a quantile depends on the size of the sample, never on that of the tensor. Extremes, which are
the quantile 1, are those of the whole tensor, and cost one reduction. The method is that of Quant-Trim, arXiv
2511.15300, section on robust quantile statistics. Sub-sampling and the sample sizes are this package's
choice.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qt_jax.errors import InvalidInput

PER_CHANNEL_MINIMUM = 256
"""Smallest number of elements that is observed of each channel for a per-channel quantile, if there are as
many."""

TAIL = 16
"""A tail of at most 1 in `TAIL` elements is selected, instead of sorting the sample. Of 4096 elements,
selecting the six largest takes 5 microseconds on CPUs, the 206 largest 50, and sorting 70 or more."""

Range = dict[str, jax.Array]
"""Smoothed range of one tensor: float32 `low` and `high` (scalars, or one value for each channel) and the
int32 `count` of observations. A count of 0 says that nothing real was seen yet."""


def subsample(x: jax.Array, size: int, axis: int | None = None) -> jax.Array:
    """Return a deterministic sub-sample, fair to every channel and position whatever the shape.

    Of an array that is sharded over a mesh, only the sample is sent between devices.

    Args:
      x: Array of any shape.
      size: Number of elements wanted. A tensor (or channel) with no more than that is taken whole.
      axis: Channel axis, for a sample of every channel. The other axes are then sampled at
        `max(size / channels, PER_CHANNEL_MINIMUM)` positions, the same for each channel.

    Returns:
      `(size,)` elements of `x`; with an `axis`, `(channels, elements per channel)`.

    Raises:
      InvalidInput: The size is below 1, or the axis is out of range.

    >>> subsample(jnp.arange(6).reshape(2, 3), 100).shape
    (6,)
    >>> subsample(jnp.ones((64, 32, 32, 16)), 4096).shape
    (4096,)
    >>> subsample(jnp.ones((3, 3, 64, 128)), 4096, axis=-1).shape
    (128, 256)
    """
    x = jnp.asarray(x)
    _check(x, size, axis)
    if axis is None:
        if x.size <= size:
            return _whole(x).reshape(-1)
        return x.at[tuple(_lattice(x.shape, size))].get(mode="promise_in_bounds", out_sharding=_replicated(x))
    channels = jnp.moveaxis(x, axis, 0)
    elements = math.prod(channels.shape[1:])
    wanted = max(size // channels.shape[0], PER_CHANNEL_MINIMUM)
    if elements <= wanted:
        return _whole(channels).reshape(channels.shape[0], elements)
    index = (slice(None), *_lattice(channels.shape[1:], wanted))
    return channels.at[index].get(mode="promise_in_bounds", out_sharding=_replicated(channels))


def _check(x: jax.Array, size: int, axis: int | None) -> None:
    if size < 1:
        raise InvalidInput(f"sample size must be at least 1, got {size}")
    if x.size == 0:
        raise InvalidInput(f"an array of shape {x.shape} has no elements, and no range")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise InvalidInput(f"channel axis {axis} is out of range for an array of shape {x.shape}")


def _lattice(shape: Sequence[int], size: int) -> list[np.ndarray]:
    """Return one int32 index array for each axis: `size` points of a Kronecker lattice over `shape`.

    A single stride over the flattened tensor can divide the channel count, and then sees one channel for
    ever. Here every axis has another stride, and no stride can divide anything: the fractional parts of
    i * phi_d^-j, with phi_d the real root of x^(d+1) = x + 1, are equidistributed on each axis and jointly
    (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    axes = sum(n > 1 for n in shape)
    root = 1.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (axes + 1))
    steps = np.arange(1, size + 1, dtype=np.float64)
    strides = iter(root ** -np.arange(1.0, axes + 1.0))
    return [
        np.floor((0.5 + steps * next(strides)) % 1.0 * n).astype(np.int32)
        if n > 1
        else np.zeros(size, np.int32)
        for n in shape
    ]


def _whole(x: jax.Array) -> jax.Array:
    """Return `x`, on every device."""
    sharding = _replicated(x)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _replicated(x: jax.Array) -> jax.sharding.NamedSharding | None:
    """Return the sharding that puts a sample of `x` on every device of its mesh, if its axes are Explicit."""
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def quantiles(sample: jax.Array, levels: Sequence[float]) -> list[jax.Array]:
    """Return empirical quantiles along the last axis, interpolated linearly (numpy's default definition).

    Extremes are computed as a minimum or a maximum, and levels near the ends by selecting the tails. Other
    levels sort the sample.

    Args:
      sample: Array `(..., n)`.
      levels: Python floats in [0, 1], known when tracing.

    Returns:
      One float32 array of shape `(...)` for each level.

    >>> [float(v) for v in quantiles(jnp.arange(5.0), (0.0, 0.5, 0.875))]
    [0.0, 2.0, 3.5]
    """
    sample = sample.astype(jnp.float32)
    if set(levels) <= {0.0, 1.0}:
        extremes = {0.0: jnp.min, 1.0: jnp.max}
        return [extremes[level](sample, axis=-1) for level in levels]
    last = sample.shape[-1] - 1
    below = [math.floor(level * last) for level in levels]
    above = [min(position + 1, last) for position in below]
    at = _order_statistics(sample, {*below, *above})
    weights = [np.float32(level * last - position) for level, position in zip(levels, below, strict=True)]
    return [at[i] + w * (at[j] - at[i]) for i, j, w in zip(below, above, weights, strict=True)]


def _order_statistics(sample: jax.Array, positions: set[int]) -> dict[int, jax.Array]:
    """Return the values at these positions of the sorted sample, counted from 0.

    Positions near the ends, where robust ranges lie, are found by selecting the tails.
    """
    n = sample.shape[-1]
    low = max((p + 1 for p in positions if 2 * p < n), default=0)
    high = max((n - p for p in positions if 2 * p >= n), default=0)
    if max(low, high) > n // TAIL:
        ordered = _sort(sample)
        return {p: ordered[..., p] for p in positions}
    found: dict[int, jax.Array] = {}
    if low:
        smallest = -_largest(-sample, low)
        found |= {p: smallest[..., p] for p in positions if 2 * p < n}
    if high:
        largest = _largest(sample, high)
        found |= {p: largest[..., n - 1 - p] for p in positions if 2 * p >= n}
    return found


def _sort(x: jax.Array) -> jax.Array:
    """Sort to float32 in ascending order along the last axis, NaN at the end of its sign.

    The bits of a float, read as an integer, are in the float's order once those of negative numbers are
    mirrored. XLA's CPU backend sorts 4096 integers in 0.16 ms and floats in 0.6. With two sites for each of
    ResNet-20's 21 layers that is 3 % of its training step.
    """

    def mirror(bits: jax.Array) -> jax.Array:
        return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

    bits = mirror(jax.lax.bitcast_convert_type(x, jnp.int32))
    return jax.lax.bitcast_convert_type(mirror(jax.lax.sort(bits, is_stable=False)), jnp.float32)


def _largest(x: jax.Array, count: int) -> jax.Array:
    """Return the `count` largest elements along the last axis, in descending order.

    Without the barrier XLA's CPU backend sees that only some of them are used, and sorts instead, which is a
    hundred times slower.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(x, count)[0])


def observe(
    x: jax.Array,
    *,
    quantile: float,
    symmetric: bool,
    axis: int | None = None,
    sample_size: int = 4096,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the robust range of one tensor.

    If `symmetric`, high is the `quantile` of |x| and low = -high. Otherwise low and high are the quantiles
    `1 - quantile` and `quantile` of x.

    Over several devices, a mean of per-device quantiles is not the quantile of the batch. Under `jit` with
    sharded arrays the sample is drawn from the global tensor, and there is nothing to do. Under `shard_map`
    or `pmap` give the mapped `axis_name`: the samples of all devices are gathered and the quantile is taken
    of their union, so that every device holds the same range.

    Args:
      x: Array of any shape and float dtype.
      quantile: Upper level, in (0.5, 1]. At 1 the range holds every element, whatever the sample size.
      symmetric: Whether the range is [-high, high].
      axis: Channel axis for one range per channel, or None.
      sample_size: See `subsample`.
      axis_name: Mapped device axis, or None.

    Returns:
      (low, high): float32, scalars, or `(channels,)` with an `axis`.

    >>> low, high = observe(jnp.arange(-10.0, 11.0), quantile=1.0, symmetric=False)
    >>> float(low), float(high)
    (-10.0, 10.0)
    """
    drawn = draw(x, quantile=quantile, symmetric=symmetric, axis=axis, sample_size=sample_size)
    (found,) = ranges([drawn], axis_name)
    return found


class Sample(NamedTuple):
    """Keep what was drawn of one tensor, and say which robust range is asked of it.

    Attributes:
      values: float32 `(n,)`, or `(channels, n)`. At quantile 1 it holds the smallest and the largest element
        of the tensor, n = 2. Constant for differentiation.
      quantile: Upper level, in (0.5, 1].
      symmetric: Whether the range is symmetric.
    """

    values: jax.Array
    quantile: float
    symmetric: bool


def draw(
    x: jax.Array, *, quantile: float, symmetric: bool, axis: int | None = None, sample_size: int = 4096
) -> Sample:
    """Draw the sub-sample of one tensor, or its extremes. The arguments are as for `observe`."""
    x = jax.lax.stop_gradient(jnp.asarray(x))
    _check(x, sample_size, axis)
    values = _extremes(x, axis) if quantile == 1.0 else subsample(x, sample_size, axis)
    return Sample(values.astype(jnp.float32), quantile, symmetric)


def _extremes(x: jax.Array, axis: int | None) -> jax.Array:
    """Return the smallest and the largest element: `(2,)`, or `(channels, 2)` with an axis."""
    others = None if axis is None else tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    return jnp.stack([_whole(end(x, others)) for end in (jnp.min, jnp.max)], axis=-1)


def ranges(samples: Sequence[Sample], axis_name: str | None = None) -> list[tuple[jax.Array, jax.Array]]:
    """Return the robust range of each sample, as `observe` defines it.

    Samples of one size share one selection. On GPUs a selection costs its start, whatever its height: 42
    samples of 4096 elements take 17 microseconds together and 470 one by one. Extremes are computed for each
    sample separately.

    Args:
      samples: From `draw`.
      axis_name: As for `observe`.

    Returns:
      (low, high) for each sample.

    >>> tensors = (jnp.arange(-1.0, 3.0), jnp.arange(-4.0, 2.0))
    >>> found = ranges([draw(x, quantile=1.0, symmetric=False) for x in tensors])
    >>> [(float(low), float(high)) for low, high in found]
    [(-1.0, 2.0), (-4.0, 1.0)]
    """
    ends: dict[int, list[jax.Array]] = {}
    alike: dict[tuple[int, float], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.quantile == 1.0:
            extremes = [jnp.max(side, axis=-1) for side in _sides(sample)]
            ends[index] = extremes if axis_name is None else jax.lax.pmax(extremes, axis_name)
        else:
            alike.setdefault((sample.values.shape[-1], sample.quantile), []).append(index)
    for (n, quantile), members in alike.items():
        rows = [side.reshape(-1, n) for index in members for side in _sides(samples[index])]
        together = jnp.concatenate(rows)
        if axis_name is not None:
            together = jax.lax.all_gather(together, axis_name, axis=1, tiled=True)
        (highs,) = quantiles(together, (quantile,))
        if axis_name is not None:  # equal on all devices, which shard_map does not know of gathered values
            highs = jax.lax.pmax(highs, axis_name)
        parts = iter(jnp.split(highs, np.cumsum([len(row) for row in rows])[:-1]))
        for index in members:
            shape = samples[index].values.shape[:-1]
            ends[index] = [next(parts).reshape(shape) for _ in _sides(samples[index])]
    return [(-ends[index][-1], ends[index][0]) for index in range(len(samples))]


def _sides(sample: Sample) -> list[jax.Array]:
    """Return the tensors whose upper quantiles are the ends of the range."""
    return [jnp.abs(sample.values)] if sample.symmetric else [sample.values, -sample.values]


def hull(bounds: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Return the smallest range that holds all of these.

    >>> low, high = hull([(jnp.float32(-1), jnp.float32(2)), (jnp.float32(0), jnp.float32(3))])
    >>> float(low), float(high)
    (-1.0, 3.0)
    """
    lows, highs = zip(*bounds, strict=True)
    return functools.reduce(jnp.minimum, lows), functools.reduce(jnp.maximum, highs)


@jax.custom_batching.custom_vmap
def hull_over_vmap(average: Range, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (low, high). Where `vmap` maps them and not the range, return their hull over the mapped axis.

    Layers under `nn.vmap` may share one range, such as those with `variable_axes={"batch_stats": None}`. An
    average to which `lane` was added is mapped wherever the arrays given to `lane` are.
    """
    return low, high


@hull_over_vmap.def_vmap
def _hull_over_vmap(size: int, mapped: tuple, average: Range, low: jax.Array, high: jax.Array) -> tuple:
    if any(jax.tree.leaves(mapped[0])):
        return (low, high), tuple(mapped[1:])
    low, high = jnp.min(low, 0) if mapped[1] else low, jnp.max(high, 0) if mapped[2] else high
    return hull_over_vmap(average, low, high), (False, False)


def lane(*arrays: jax.Array) -> jax.Array:
    """Return a zero, float32, which `vmap` maps over every axis over which it maps one of the arrays."""
    empty = [jax.lax.stop_gradient(x)[..., :0] for x in arrays if x.ndim]
    return sum((jnp.sum(x).astype(jnp.float32) for x in empty), jnp.zeros((), jnp.float32))


def empty_range(channels: int | None = None) -> Range:
    """Return a range that has seen nothing: zeros, with `count` 0; `(channels,)` for one per channel."""
    shape = () if channels is None else (channels,)
    return {
        "low": jnp.zeros(shape, jnp.float32),
        "high": jnp.zeros(shape, jnp.float32),
        "count": jnp.zeros((), jnp.int32),
    }


def update_range(average: Range, low: jax.Array, high: jax.Array, momentum: float) -> Range:
    """Return the moving average after one more observation, in float32.

    r <- momentum * r + (1 - momentum) * r_new. The first observation, which `count` tells, is taken as it is,
    so that neither zeros nor the dummy batch of `init` leak into the range. An observation that is not finite
    is left out: a single bad batch would spoil the average for good.

    >>> seen = update_range(empty_range(), jnp.float32(-1.0), jnp.float32(3.0), momentum=0.5)
    >>> seen = update_range(seen, jnp.float32(-2.0), jnp.float32(5.0), momentum=0.5)
    >>> float(seen["low"]), float(seen["high"]), int(seen["count"])
    (-1.5, 4.0, 2)
    """
    keep = jnp.where(average["count"] == 0, jnp.float32(0.0), jnp.float32(momentum))
    usable = jnp.all(jnp.isfinite(low) & jnp.isfinite(high))
    low, high = jnp.where(usable, low, average["low"]), jnp.where(usable, high, average["high"])
    return {
        "low": keep * average["low"] + (1.0 - keep) * low,
        "high": keep * average["high"] + (1.0 - keep) * high,
        "count": average["count"] + usable.astype(jnp.int32),
    }
