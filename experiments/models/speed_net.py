"""Define a network that trains on CIFAR-10 in seconds on one GPU.

It is short, wide at low resolution, and whitens its input. Its ingredients are published with such records:
Page, "How to train your ResNet" (2018), and Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU",
arXiv 2404.00498.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.resnet import SAME_3X3

WINDOW = (2, 2)
"""Window of the whitening convolution and of the poolings."""

WHITENING = "whitening"
"""Name of the whitening convolution."""


class SpeedNet(nn.Module):
    """Classify images by a fixed whitening convolution, blocks of two 3x3 convolutions, and a linear head.

    Each block halves the resolution. Set the kernel `whitening` by `whitening_kernel`. The other convolutions
    begin as the identity on their first outputs.

    It takes images `(batch, 32, 32, 3)` and returns float32 logits `(batch, num_classes)`.
    """

    widths: Sequence[int] = (64, 256, 256)
    num_classes: int = 10
    norm_momentum: float = 0.6
    logit_scale: float = 1 / 9
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding=SAME_3X3,
            use_bias=False,
            kernel_init=identity_first,
            dtype=self.dtype,
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.norm_momentum,
            use_scale=False,
            dtype=self.dtype,
        )
        features = 2 * math.prod(WINDOW) * x.shape[-1]
        x = nn.Conv(features, WINDOW, padding="VALID", dtype=self.dtype, name=WHITENING)(x)
        x = self.activation(x)
        for block, width in enumerate(self.widths, start=1):
            x = max_pool(conv(width, name=f"block{block}_conv1")(x), WINDOW)
            x = self.activation(norm(name=f"block{block}_norm1")(x))
            x = conv(width, name=f"block{block}_conv2")(x)
            x = self.activation(norm(name=f"block{block}_norm2")(x))
        x = jnp.max(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32) * self.logit_scale


def identity_first(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Draw a kernel `(height, width, in, out)` whose first outputs pass the inputs on.

    The other outputs are uniform in +-1 / sqrt(height width in).
    """
    height, width, inputs, outputs = shape
    bound = 1 / math.sqrt(height * width * inputs)
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    passed = min(inputs, outputs)
    return kernel.at[..., :passed].set(0).at[height // 2, width // 2, :, :passed].set(jnp.eye(inputs, passed))


def whitening_kernel(images: jax.Array, epsilon: float = 5e-4) -> jax.Array:
    """Return the kernel that maps the windows of these images to nearly uncorrelated entries of variance 1.

    With the covariance C = V diag(l) V^T of all windows, the outputs are V^T x / sqrt(l + epsilon) and their
    negatives.

    Args:
      images: float32 `(n, height, width, channels)`, normalised.
      epsilon: Added to the variances l.

    Returns:
      A float32 kernel `(2, 2, channels, 8 channels)`.
    """
    rows, columns = WINDOW
    height, width, channels = images.shape[1:]
    shifts = [images[:, r : height - 1 + r, c : width - 1 + c] for r in range(rows) for c in range(columns)]
    windows = jnp.concatenate(shifts, axis=-1).reshape(-1, rows * columns * channels)
    covariance = windows.T @ windows / windows.shape[0]
    variances, vectors = jnp.linalg.eigh(covariance)
    kernel = (vectors / jnp.sqrt(variances + epsilon)[None, :]).reshape(rows, columns, channels, -1)
    return jnp.concatenate([kernel, -kernel], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Apply `nn.max_pool` with windows side by side, and drop what does not fill a window at the end.

    The gradient is shared equally by every entry that equals the maximum. That takes a few elementwise
    operations, where XLA's own gradient scatters.
    """
    return nn.max_pool(x, window, window)


def _forward(x: jax.Array, window: tuple[int, int]):
    pooled = max_pool(x, window)
    return pooled, (x, pooled)


def _backward(window: tuple[int, int], residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, pooled = residuals
    n, height, width, channels = pooled.shape
    rows, columns = window
    inside = x[:, : height * rows, : width * columns]
    tiles = inside.reshape(n, height, rows, width, columns, channels)
    chosen = (tiles == pooled[:, :, None, :, None]).astype(x.dtype)
    share = gradient / jnp.sum(chosen, axis=(2, 4))
    spread = (chosen * share[:, :, None, :, None]).reshape(inside.shape)
    left = [(0, whole - part) for whole, part in zip(x.shape, inside.shape, strict=True)]
    return (jnp.pad(spread, left),)


max_pool.defvjp(_forward, _backward)
