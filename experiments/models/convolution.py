"""Run depthwise and pointwise convolutions fast on CPUs, through `nn.Conv`'s field `conv_general_dilated`.

XLA's CPU backend runs a grouped convolution group by group, so a depthwise one is many times slower than its
arithmetic. For the gradient of any kernel, including a pointwise one, it transposes images and output
gradients in plain loops. A matrix product does without these.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

CHANNELS_LAST = jax.lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Layout of `nn.Conv`: images `(batch, height, width, channels)`, kernels `(height, width, in, out)`."""

Pair = tuple[int, int]


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[Pair],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    **options: Any,
) -> jax.Array:
    """Compute `jax.lax.conv_general_dilated`, with fast forms of two kinds of convolution on CPUs.

    A depthwise convolution becomes a sum of shifted products. With padded x, stride s and dilation d,

        y[n, i, j, c] = sum over (p, q) of x[n, s i + d p, s j + d q, c] w[p, q, 0, c]

    is one multiplication and addition over the whole image for each element of the window, and XLA fuses
    them. A pointwise convolution (1x1, stride 1, no padding) becomes a matrix product. Both need float32,
    channels last, and no groups or one output for each channel. Every other convolution, and every other
    device, gets JAX's function of the same name.

    Arguments and result are those of `jax.lax.conv_general_dilated`, up to rounding. `**options` are its
    remaining arguments. Only reverse-mode derivatives are defined.

    >>> import flax.linen as nn
    >>> layer = nn.Conv(8, (3, 3), feature_group_count=8, conv_general_dilated=conv_general_dilated)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 8)))[0].shape
    (1, 4, 4, 8)
    """
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    plain = lhs.dtype == rhs.dtype == jnp.float32 and all(d == 1 for d in lhs_dilation or ())
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and plain and lhs.ndim == 4 and numbers == CHANNELS_LAST and not _asks_for_more(options):
        strides, dilation = tuple(window_strides), tuple(rhs_dilation or (1, 1))
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(lhs.shape[1:3], _reach(rhs, dilation), strides, padding)
        around = ((0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0))
        if feature_group_count == lhs.shape[-1] == rhs.shape[-1]:
            x = jax.lax.pad(lhs, jnp.zeros((), lhs.dtype), around)
            return _shifted_products(x, rhs, strides, dilation)
        unpadded = all(pad == (0, 0, 0) for pad in around)
        if feature_group_count == 1 and rhs.shape[:2] == strides == (1, 1) and unpadded:
            return (lhs.reshape(-1, lhs.shape[-1]) @ rhs[0, 0]).reshape(*lhs.shape[:-1], rhs.shape[-1])
    return jax.lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        **options,
    )


def _asks_for_more(options: dict[str, Any]) -> bool:
    """Tell whether an option is in force, except the precision, which float32 products have anyway."""
    neutral = {"batch_group_count": 1}
    return any(value != neutral.get(name) for name, value in options.items() if name != "precision")


def _reach(kernel: jax.Array, dilation: Pair) -> tuple[int, ...]:
    """Return the height and width that a dilated kernel covers."""
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True))


def _shifts(x: jax.Array, kernel: jax.Array, strides: Pair, dilation: Pair) -> list[jax.Array]:
    """Return, row by row, what each window element sees of a padded `(..., height, width, channels)`."""
    sizes = zip(x.shape[-3:-1], _reach(kernel, dilation), strides, strict=True)
    spans = [s * ((n - r) // s) + 1 for n, r, s in sizes]

    def shift(row: int, column: int) -> jax.Array:
        top, left = row * dilation[0], column * dilation[1]
        return x[..., top : top + spans[0] : strides[0], left : left + spans[1] : strides[1], :]

    return list(itertools.starmap(shift, itertools.product(*map(range, kernel.shape[:2]))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shifted_products(x: jax.Array, kernel: jax.Array, strides: Pair, dilation: Pair) -> jax.Array:
    shifts = _shifts(x, kernel, strides, dilation)
    elements = kernel.reshape(len(shifts), 1, 1, 1, -1)
    return functools.reduce(jnp.add, map(jnp.multiply, shifts, elements))


def _forward(x, kernel, strides, dilation):
    return _shifted_products(x, kernel, strides, dilation), (x, kernel)


def _backward(strides, dilation, residuals, gradient):
    x, kernel = residuals
    multiply = functools.partial(_shifted_products.fun, kernel=kernel, strides=strides, dilation=dilation)
    (x_gradient,) = jax.linear_transpose(multiply, x)(gradient)

    def accumulate(sums, image):
        shifts = _shifts(image[0], kernel, strides, dilation)
        return [total + shift * image[1] for total, shift in zip(sums, shifts, strict=True)], None

    # XLA's CPU backend reduces to channels on one lane. Sums that are kept by pixel are ten times faster.
    zeros = [jnp.zeros(gradient.shape[1:], gradient.dtype)] * (kernel.shape[0] * kernel.shape[1])
    sums, _ = jax.lax.scan(accumulate, zeros, (x, gradient))
    return x_gradient, jnp.stack([total.sum((0, 1)) for total in sums]).reshape(kernel.shape)


_shifted_products.defvjp(_forward, _backward)
