"""Learn the step sizes of a network's grids by LSQ (Esser et al. 2020, arXiv 1902.08153).

    v_hat = s * round(clip(v / s, -Q_N, Q_P))

    d v_hat / d s = -v / s + round(v / s)   inside,   -Q_N below,   Q_P above
    d v_hat / d v = 1                       inside,   0 elsewhere

The gradient of s is scaled by 1 / sqrt(n Q_P), where n is the number of weights that share s, or of the
features of one example of an activation. The first batch sets s = 2 <|v|> / sqrt(Q_P). With b bits,
Q_N = 2^(b-1) and Q_P = 2^(b-1) - 1 for weights and for activations that the first batch shows to be signed.
For the others Q_N = 0 and Q_P = 2^b - 1. There is no learned offset (LSQ+, arXiv 2004.09576): every backend
has these grids, and zero is on them.

There are differences from the paper. A step may be per channel. s is kept above `SCALE_FLOOR`. All layers
have the bits of the config, while the paper leaves the first and last at 8 (rules can do so). The config sets
the weight decay, and whether training starts from scratch or from a float network.
"""

import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments.baselines.learned_ranges import Ends, LearnedQuantizer, LearnedRange, other_axes
from qt_jax.grid import SCALE_FLOOR, along_axis, quantization_parameters
from qt_jax.interception import INPUT, KERNEL
from qt_jax.ranges import Range


def step_range(step: jax.Array, signed: jax.Array | bool, spec: qt.QuantSpec) -> Ends:
    """Return the range whose grid has this step.

    An asymmetric spec gives [-Q_N s, Q_P s], with Q_N = 0 or, where `signed`, 2^(b-1). A symmetric spec gives
    [-a, a], where Quant-Trim's grid of that spec turns a into s.

    >>> ends = step_range(jnp.float32(0.5), True, qt.QuantSpec(4, symmetric=False))
    >>> [float(end) for end in ends]
    [-4.0, 3.5]
    """
    step = jnp.maximum(step, np.float32(SCALE_FLOOR))
    q_min, q_max = spec.integer_range
    if spec.symmetric:
        high = step * np.float32((q_max - q_min) / 2)
        return -high, high
    below = jnp.where(signed, np.float32(2 ** (spec.bits - 1)), np.float32(0.0))
    return jnp.where(signed, -below * step, 0.0), (q_max - below) * step


def initial_range(x: jax.Array, spec: qt.QuantSpec) -> Ends:
    """Return the range of s = 2 <|x|> / sqrt(Q_P), one for each channel if the spec has an axis.

    >>> ends = initial_range(jnp.array([0.0, 1.0]), qt.QuantSpec(2, symmetric=False))
    >>> [round(float(end), 4) for end in ends]
    [0.0, 1.7321]
    """
    signed = jnp.any(x < 0.0) & (not spec.symmetric)
    q_max = np.float32(spec.integer_range[1])
    largest = jnp.where(signed, q_max - 2 ** (spec.bits - 1), q_max)
    return step_range(2.0 * jnp.mean(jnp.abs(x), other_axes(x, spec)) / jnp.sqrt(largest), signed, spec)


def step_gradient(x: jax.Array, low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    """Return d x_hat / d s by the formula above, not yet scaled: float32 of the shape of x."""
    q_min, q_max = spec.integer_range
    scale, zero_point = (along_axis(p, x, spec) for p in quantization_parameters(low, high, spec))
    ratio, least, largest = x / scale, q_min - zero_point, q_max - zero_point
    inside = jnp.round(ratio) - ratio
    return jnp.where(ratio <= least, least, jnp.where(ratio >= largest, largest, inside))


def _observe(x: jax.Array, seen: Range, spec: qt.QuantSpec, config: qt.QuantConfig) -> Range:
    def first() -> Range:
        low, high = initial_range(x, spec)
        return {"low": low, "high": high, "count": jnp.ones_like(seen["count"])}

    return jax.lax.cond(seen["count"] == 0, first, lambda: {**seen, "count": seen["count"] + 1})


def _ends(step: jax.Array, seen: Range, spec: qt.QuantSpec) -> Ends:
    return step_range(step, seen["low"] < 0.0, spec)


def _step(low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    return quantization_parameters(low, high, spec)[0]


def _scaled(x: jax.Array, low: jax.Array, high: jax.Array, spec: qt.QuantSpec, elements: int) -> jax.Array:
    zero_point = along_axis(quantization_parameters(low, high, spec)[1], x, spec)
    largest = spec.integer_range[1] - zero_point
    return step_gradient(x, low, high, spec) / jnp.sqrt(np.float32(elements) * largest)


def _kernel_slope(x: jax.Array, low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    return _scaled(x, low, high, spec, x.size // low.size)


def _input_slope(x: jax.Array, low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    return _scaled(x, low, high, spec, x.size // len(x))


LSQ: LearnedQuantizer = {
    KERNEL: LearnedRange("lsq_kernel", _observe, _ends, _step, _kernel_slope),
    INPUT: LearnedRange("lsq_input", _observe, _ends, _step, _input_slope),
}
"""Learned steps for every kernel and every layer's input."""
