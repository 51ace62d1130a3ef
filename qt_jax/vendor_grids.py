"""At every step a random one of the grids that vendors lay over a kernel, so that it gets used to none.

Compilers differ in two ways: one scale for the kernel or one for each output channel, and, with h = 2^(b-1)
and a the largest magnitude, the full symmetric range [-h, h - 1] with s = a / (h - 1/2) (onnxruntime) or the
narrow one [1 - h, h - 1] with s = a / (h - 1) (NNCF, tpu-mlir, TFLite). A kernel trained on one of the four
fits that one; weights that meet all four have to be where the rounding of each does little harm. Not in the
paper: this package's choice, off by default.
"""

import zlib

import jax
import jax.numpy as jnp

from qt_jax.fake_quant import SCALE_FLOOR, QuantSpec, along_axis, blend


def grid_key(seed: int, path: str, count: jax.Array) -> jax.Array:
    """The key of the draw for the kernel at `path` after `count` observations (int32 scalar): all calls of a
    layer in one pass share it."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode())), count)


def fake_quant_on_drawn_grid(
    x: jax.Array, low: jax.Array, high: jax.Array, spec: QuantSpec, lam: jax.Array, key: jax.Array
) -> jax.Array:
    """`x` blended with its image on one of the four grids, each with probability 1/4.

    Args:
      x: a kernel, float32 or lower.
      low, high: float32 `(channels,)`, along `spec.axis`; symmetric, so that a = max(-low, high).
      spec: gives bits and axis; its gradient is the identity.
      lam: blend coefficient in [0, 1].
      key: of the draw.

    Returns:
      x_tilde, shape and dtype of `x`.

    >>> w, a = jnp.array([[0.9, 0.1]]), jnp.array([0.9, 0.1])
    >>> spec, one = QuantSpec(4, axis=-1), jnp.float32(1)
    >>> draws = [fake_quant_on_drawn_grid(w, -a, a, spec, one, jax.random.key(i)) for i in range(20)]
    >>> sorted({round(float(draw[0, 0]), 2) for draw in draws})
    [0.84, 0.9]
    """
    per_tensor, full = jax.random.bernoulli(key, 0.5, (2,))
    half = 2 ** (spec.bits - 1)
    magnitude = jnp.maximum(-low, high)
    magnitude = jnp.where(per_tensor, jnp.max(magnitude), magnitude)
    scale = jnp.maximum(magnitude * jnp.where(full, 1 / (half - 0.5), 1 / (half - 1)), SCALE_FLOOR)
    value = x.astype(jnp.float32)
    scale = along_axis(scale, value, spec)
    x_hat = jnp.clip(jnp.round(value / scale), jnp.where(full, -half, 1 - half), half - 1) * scale
    return blend(value, x_hat, lam).astype(x.dtype)
