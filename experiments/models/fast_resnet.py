"""A short, wide residual network for CPUs: most of its work is at low resolution and many channels."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.resnet import SAME_3X3


class ConvNormRelu(nn.Module):
    """3x3 convolution, batch norm, ReLU."""

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


class FastResNet(nn.Module):
    """ResNet-9 in the manner of DAWNBench's small CIFAR networks (Page, "How to train your ResNet", 2018),
    with strided convolutions in place of pooling and `width` channels at full resolution.

    Takes images `(batch, height, width, channels)`, returns float32 logits `(batch, num_classes)`.
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
