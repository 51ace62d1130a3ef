"""Define residual networks in plain Linen: for 32x32 images, for fast training on CPUs, and ResNet-50.

Nothing here knows of quantization.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SAME_3X3 = ((1, 1), (1, 1))
"""Explicit padding: "SAME" with stride 2 is asymmetric in JAX and exports as auto_pad."""


class ResNet(nn.Module):
    """Classify small images with a residual network: stem, stages of `BasicBlock`, global mean, linear head.

    Stage `i` has `stage_sizes[i]` blocks of `width * 2**i` features. Every stage but the first halves the
    resolution. `(3, 3, 3)` at width 16 is ResNet-20, and `(2, 2, 2, 2)` at width 64 is the 18-style network.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
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


class BasicBlock(nn.Module):
    """Apply two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385, figure 5 left)."""

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


class FastResNet(nn.Module):
    """Classify images with a short, wide ResNet-9 for CPUs.

    Most of its work is at low resolution and many channels. It follows DAWNBench's small CIFAR networks
    (Page, "How to train your ResNet", 2018), with strided convolutions in place of pooling and `width`
    channels at full resolution.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    """

    width: int = 24
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        block = partial(ConvNormRelu, dtype=self.dtype)
        x = block(self.width, name="stem")(x, train)
        for stage, (features, residual) in enumerate(((2, False), (4, True), (8, True)), start=1):
            x = block(self.width * features, stride=2, name=f"stage{stage}_down")(x, train)
            if residual:
                y = block(self.width * features, name=f"stage{stage}_conv1")(x, train)
                x = x + block(self.width * features, name=f"stage{stage}_conv2")(y, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class ConvNormRelu(nn.Module):
    """Apply a 3x3 convolution, batch norm and ReLU."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        strides = (self.stride, self.stride)
        conv = partial(nn.Conv, self.features, (3, 3), strides, SAME_3X3, use_bias=False, dtype=self.dtype)
        x = conv(name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="norm")(x)
        return nn.relu(x)


class ResNet50(nn.Module):
    """Classify 224x224 images with ResNet-50 (He et al. 2016, arXiv 1512.03385, table 1).

    It has a 7x7 stem and a max pool down to a quarter of the resolution, stages of `Bottleneck`, a global
    mean, and a linear head. It has 25.6 M parameters. `ResNet50((1, 1), width=4)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, padding=((3, 3), (3, 3)), use_bias=False, dtype=self.dtype)
        x = conv(self.width, (7, 7), (2, 2), name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="stem_norm")(x)
        x = nn.max_pool(nn.relu(x), window_shape=(3, 3), strides=(2, 2), padding=SAME_3X3)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = Bottleneck(self.width * 2**stage, stride, dtype=self.dtype, name=name)(x, train)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class Bottleneck(nn.Module):
    """Apply a 1x1, a 3x3 and a 1x1 convolution and a shortcut.

    (He et al. 2016, arXiv 1512.03385, figure 5 right.) The 3x3 convolution has the stride, as in the variant
    known as v1.5.
    """

    features: int
    stride: int = 1
    expansion: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        outputs, strides = self.features * self.expansion, (self.stride, self.stride)

        y = nn.relu(norm(name="norm1")(conv(self.features, (1, 1), padding="VALID", name="conv1")(x)))
        y = conv(self.features, (3, 3), strides, SAME_3X3, name="conv2")(y)
        y = nn.relu(norm(name="norm2")(y))
        y = norm(name="norm3")(conv(outputs, (1, 1), padding="VALID", name="conv3")(y))
        if x.shape != y.shape:
            x = conv(outputs, (1, 1), strides, "VALID", name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)
