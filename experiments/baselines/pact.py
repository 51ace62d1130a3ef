"""Learn the clips of activations by PACT (Choi et al. 2018, arXiv 1805.06085).

    y = clip(x, 0, alpha)      y_hat = round(y (2^b - 1) / alpha) * alpha / (2^b - 1)

    d y_hat / d alpha = 1 where x >= alpha, else 0      d y_hat / d x = 1 where 0 <= x <= alpha, else 0

An L2 penalty applies to alpha, with the coefficient of the kernels (`weight_decay`). The first batch sets
alpha to its maximum, in place of a constant. There is one alpha for the input of every layer, where the paper
has one for every ReLU. These are the same tensors, except that two layers that read one tensor have an alpha
each.

Inputs that the first batch shows to be signed (an image, a linear bottleneck, a layer norm) have no ReLU to
parameterize. They keep Quant-Trim's observed range, and their alpha is not used.

Kernels have max-abs symmetric fake quantization in every step, with the straight-through estimator. The
paper uses DoReFa's, which first squashes them by tanh and divides by the largest. The network then computes
with tanh(w) / max|tanh(w)|, so its plain float graph is another network. Ours must be the same one.
"""

import jax
import jax.numpy as jnp
import numpy as np

import qt_jax as qt
from experiments.baselines.learned_ranges import Ends, LearnedQuantizer, LearnedRange, other_axes
from qt_jax.grid import SCALE_FLOOR
from qt_jax.interception import INPUT, KERNEL
from qt_jax.ranges import Range, observe, update_range

ALPHA = "pact_input"
"""Name of alpha beside the kernel."""


def max_abs(kernel: jax.Array, spec: qt.QuantSpec) -> Ends:
    """Return [-a, a], where a is the largest magnitude, of each channel if the spec has an axis.

    >>> float(max_abs(jnp.array([-3.0, 2.0]), qt.QuantSpec(8))[1])
    3.0
    """
    high = jnp.max(jnp.abs(kernel), other_axes(kernel, spec)).astype(jnp.float32)
    return -high, high


def alpha_gradient(x: jax.Array, low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    """Return d y_hat / d alpha, float32 of the shape of x. It is zero where the range is signed."""
    return ((x >= high) & (low >= 0.0)).astype(jnp.float32)


def _observe(x: jax.Array, seen: Range, spec: qt.QuantSpec, config: qt.QuantConfig) -> Range:
    def first() -> Range:
        low, high = jnp.minimum(jnp.min(x), 0.0), jnp.max(x)
        return {"low": low, "high": high, "count": jnp.ones_like(seen["count"])}

    def signed() -> Range:
        ends = observe(x, quantile=spec.quantile, symmetric=False, sample_size=config.sample_size)
        after = update_range(seen, *ends, config.momentum)
        return after | {"low": jnp.minimum(after["low"], np.float32(-SCALE_FLOOR))}  # below 0: stays signed

    def unsigned() -> Range:
        return {**seen, "count": seen["count"] + 1}

    later = jnp.where(seen["low"] < 0.0, 1, 2)
    return jax.lax.switch(jnp.where(seen["count"] == 0, 0, later), (first, signed, unsigned))


def _ends(alpha: jax.Array, seen: Range, spec: qt.QuantSpec) -> Ends:
    signed = seen["low"] < 0.0
    return jnp.minimum(seen["low"], 0.0), jnp.where(
        signed, seen["high"], jnp.maximum(alpha, np.float32(SCALE_FLOOR))
    )


def _alpha(low: jax.Array, high: jax.Array, spec: qt.QuantSpec) -> jax.Array:
    return high


def _observe_kernel(x: jax.Array, seen: Range, spec: qt.QuantSpec, config: qt.QuantConfig) -> Range:
    low, high = max_abs(x, spec)
    return {"low": low, "high": high, "count": seen["count"] + 1}


def _kernel_ends(kernel: jax.Array, seen: Range, spec: qt.QuantSpec) -> Ends:
    return max_abs(kernel, spec)


PACT: LearnedQuantizer = {
    KERNEL: LearnedRange(None, _observe_kernel, _kernel_ends),
    INPUT: LearnedRange(ALPHA, _observe, _ends, _alpha, alpha_gradient),
}
"""A learned clip for every layer's input, max-abs for its kernel."""
