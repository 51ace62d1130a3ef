"""ResNet-50 for 224x224 images, in plain Linen."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.resnet import SAME_3X3


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut (He et al. 2016, arXiv 1512.03385, figure 5 right); the
    3x3 one strides, as in the variant known as v1.5.
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


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016, arXiv 1512.03385, table 1): a 7x7 stem and a max pool down to a quarter of
    the resolution, stages of `Bottleneck`, global mean, linear head. 25.6 M parameters.

    `ResNet50((1, 1), width=4)` is a tiny one for tests.

    Takes images `(batch, height, width, channels)`, returns float32 logits `(batch, num_classes)`.
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
