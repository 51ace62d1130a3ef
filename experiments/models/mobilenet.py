"""Define MobileNetV2 and MobileNetV3 for 32x32 images, in plain Linen."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.convolution import conv_general_dilated
from experiments.models.resnet import SAME_3X3


class Stage(NamedTuple):
    """Describe the blocks of one resolution: expansion and output features of each, number, first stride."""

    expansion: int
    features: int
    blocks: int
    stride: int


class MobileNetV2(nn.Module):
    """Classify images with MobileNetV2 cut to small images (Sandler et al. 2018, arXiv 1801.04381, table 2).

    It has a stem of stride 1, the first five widths, and a last 1x1 convolution of `last` features. It has
    0.34 M parameters. `MobileNetV2(stem=4, stages=(Stage(1, 4, 1, 1), Stage(2, 8, 2, 2)), last=16)` is a
    tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    """

    stem: int = 32
    stages: Sequence[Stage] = (
        Stage(1, 16, 1, 1),
        Stage(6, 24, 2, 1),
        Stage(6, 32, 3, 2),
        Stage(6, 64, 2, 2),
        Stage(6, 96, 2, 1),
    )
    last: int = 256
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=conv_general_dilated)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)

        x = conv(self.stem, (3, 3), padding=SAME_3X3, name="stem")(x)
        x = nn.relu6(norm(name="stem_norm")(x))
        for number, stage in enumerate(self.stages, start=1):
            for block in range(1, stage.blocks + 1):
                stride = stage.stride if block == 1 else 1
                block_of = partial(InvertedResidual, stage.features, stage.expansion, stride, self.dtype)
                x = block_of(name=f"stage{number}_block{block}")(x, train)
        x = conv(self.last, (1, 1), padding="VALID", name="last")(x)
        x = nn.relu6(norm(name="last_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class InvertedResidual(nn.Module):
    """Apply a 1x1 expansion, a 3x3 depthwise convolution, a linear 1x1 projection and a shortcut.

    The shortcut is there where shapes allow it (Sandler et al. 2018, arXiv 1801.04381, figure 4).
    """

    features: int
    expansion: int = 6
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=conv_general_dilated)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        hidden = x.shape[-1] * self.expansion

        y = x
        if self.expansion > 1:
            y = conv(hidden, (1, 1), padding="VALID", name="expand")(y)
            y = nn.relu6(norm(name="expand_norm")(y))
        y = conv(
            hidden,
            (3, 3),
            strides=(self.stride, self.stride),
            padding=SAME_3X3,
            feature_group_count=hidden,
            name="depthwise",
        )(y)
        y = nn.relu6(norm(name="depthwise_norm")(y))
        y = conv(self.features, (1, 1), padding="VALID", name="project")(y)
        y = norm(name="project_norm")(y)
        return x + y if x.shape == y.shape else y


class Block(NamedTuple):
    """Describe one row of the paper's table.

    Its fields are the window of the depthwise convolution, the features of the expansion and of the output,
    whether channels are recalibrated, the activation, and the stride.
    """

    window: int
    hidden: int
    features: int
    squeeze: bool
    activation: Callable[[jax.Array], jax.Array]
    stride: int


SMALL = (
    Block(3, 16, 16, True, nn.relu, 1),
    Block(3, 72, 24, False, nn.relu, 2),
    Block(3, 88, 24, False, nn.relu, 1),
    Block(5, 96, 40, True, nn.hard_swish, 2),
    Block(5, 240, 40, True, nn.hard_swish, 1),
    Block(5, 120, 48, True, nn.hard_swish, 1),
    Block(5, 144, 48, True, nn.hard_swish, 1),
)
"""MobileNetV3-Small (arXiv 1905.02244, table 2) up to the last halving but one, its first two at stride 1."""


class MobileNetV3(nn.Module):
    """Classify images with MobileNetV3 (Howard et al. 2019, arXiv 1905.02244).

    It has a stem of stride 1, `blocks`, a last 1x1 convolution of `last` features, a global mean, a hidden
    layer of `hidden` features, and a linear head. `MobileNetV3(stem=4, blocks=(Block(3, 4, 4, True, nn.relu,
    2), Block(5, 8, 4, True, nn.hard_swish, 1)), last=8, hidden=8)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    """

    stem: int = 16
    blocks: Sequence[Block] = SMALL
    last: int = 288
    hidden: int = 512
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=conv_general_dilated)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)

        x = conv(self.stem, (3, 3), padding=SAME_3X3, name="stem")(x)
        x = nn.hard_swish(norm(name="stem_norm")(x))
        for number, block in enumerate(self.blocks, start=1):
            x = InvertedResidualV3(block, self.dtype, name=f"block{number}")(x, train)
        x = conv(self.last, (1, 1), padding="VALID", name="last")(x)
        x = nn.hard_swish(norm(name="last_norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.hard_swish(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class InvertedResidualV3(nn.Module):
    """Apply a 1x1 expansion, a depthwise convolution, squeeze and excitation, a projection and a shortcut.

    The 1x1 projection is linear. The shortcut is there where shapes allow it (Howard et al. 2019,
    arXiv 1905.02244, figure 4).
    """

    block: Block
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        window, hidden, features, squeeze, activation, stride = self.block
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, conv_general_dilated=conv_general_dilated)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)

        y = x
        if hidden != x.shape[-1]:
            y = conv(hidden, (1, 1), padding="VALID", name="expand")(y)
            y = activation(norm(name="expand_norm")(y))
        y = conv(
            hidden,
            (window, window),
            strides=(stride, stride),
            padding=((window // 2, window // 2),) * 2,
            feature_group_count=hidden,
            name="depthwise",
        )(y)
        y = activation(norm(name="depthwise_norm")(y))
        if squeeze:
            y = SqueezeExcite(dtype=self.dtype, name="squeeze_excite")(y)
        y = conv(features, (1, 1), padding="VALID", name="project")(y)
        y = norm(name="project_norm")(y)
        return x + y if x.shape == y.shape else y


class SqueezeExcite(nn.Module):
    """Scale each channel by hard_sigmoid(W2 relu(W1 mean(x))), where the mean is over the image.

    (Hu et al. 2018, arXiv 1709.01507, with the gate of Howard et al. 2019, section 5.3.)
    """

    reduction: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        conv = partial(
            nn.Conv,
            kernel_size=(1, 1),
            padding="VALID",
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
        )
        gate = jnp.mean(x, axis=(1, 2), keepdims=True)
        gate = nn.relu(conv(max(1, features // self.reduction), name="squeeze")(gate))
        return x * nn.hard_sigmoid(conv(features, name="excite")(gate))
