"""Residual networks for 32x32 images, in plain Linen: nothing here knows of quantization."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SAME_3X3 = ((1, 1), (1, 1))
"""Explicit padding: "SAME" with stride 2 is asymmetric in JAX and exports as auto_pad."""


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385, figure 5 left)."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        strides = (self.stride, self.stride)

        y = conv(kernel_size=(3, 3), strides=strides, padding=SAME_3X3, name="conv1")(x)
        y = nn.relu(norm(name="norm1")(y))
        y = conv(kernel_size=(3, 3), padding=SAME_3X3, name="conv2")(y)
        y = norm(name="norm2")(y)
        if x.shape != y.shape:
            x = conv(kernel_size=(1, 1), strides=strides, padding="VALID", name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network for small images: stem, stages of `BasicBlock`, global mean, linear head.

    Stage `i` has `stage_sizes[i]` blocks of `width * 2**i` features; every stage but the first halves
    the resolution. `(3, 3, 3)` at width 16 is ResNet-20, `(2, 2, 2, 2)` at width 64 the 18-style network.

    Takes images `(batch, height, width, channels)`, returns float32 logits `(batch, num_classes)`.
    """

    stage_sizes: Sequence[int]
    width: int = 16
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (3, 3), padding=SAME_3X3, use_bias=False, dtype=self.dtype, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="stem_norm")(x)
        x = nn.relu(x)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = BasicBlock(self.width * 2**stage, stride, self.dtype, name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
