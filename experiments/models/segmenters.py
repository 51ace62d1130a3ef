"""Define segmenters for small images in plain Linen: U-Net, and atrous spatial pyramid pooling (ASPP)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.resnet import SAME_3X3, BasicBlock


class UNet(nn.Module):
    """Classify pixels with a U-Net of padded convolutions and batch norm.

    (Ronneberger et al. 2015, arXiv 1505.04597.) Going down, two convolutions and a 2x2 max pool follow each
    other `depth` times, and the features double. Going up, the resolution is doubled by a 2x2 transposed
    convolution, or by `jax.image.resize` and a 3x3 convolution (Odena et al. 2016, "Deconvolution and
    checkerboard artifacts"). Then the features of that resolution are concatenated and two convolutions
    follow. `UNet(width=4, depth=1)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)`, whose height and width are multiples of 2**depth. It
    returns float32 logits `(batch, height, width, num_classes)`.
    """

    up: Literal["transposed", "nearest", "bilinear"] = "transposed"
    width: int = 16
    depth: int = 3
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        block = partial(DoubleConv, dtype=self.dtype)
        skips = []
        for level in range(1, self.depth + 1):
            x = block(self.width * 2 ** (level - 1), name=f"down{level}")(x, train)
            skips.append(x)
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = block(self.width * 2**self.depth, name="bottom")(x, train)
        for level in range(self.depth, 0, -1):
            features = self.width * 2 ** (level - 1)
            x = jnp.concatenate([skips.pop(), self._doubled(x, features, f"up{level}_resize")], axis=-1)
            x = block(features, name=f"up{level}")(x, train)
        x = nn.Conv(self.num_classes, (1, 1), padding="VALID", dtype=self.dtype, name="head")(x)
        return x.astype(jnp.float32)

    def _doubled(self, x: jax.Array, features: int, name: str) -> jax.Array:
        """Return `x` at twice its resolution, with `features` channels."""
        if self.up == "transposed":
            return nn.ConvTranspose(features, (2, 2), (2, 2), "VALID", dtype=self.dtype, name=name)(x)
        batch, height, width, channels = x.shape
        x = jax.image.resize(x, (batch, 2 * height, 2 * width, channels), self.up, antialias=False)
        return nn.Conv(features, (3, 3), padding=SAME_3X3, dtype=self.dtype, name=name)(x)


class DoubleConv(nn.Module):
    """Apply two 3x3 convolutions, each followed by batch norm and ReLU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, self.features, (3, 3), padding=SAME_3X3, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        x = nn.relu(norm(name="norm1")(conv(name="conv1")(x)))
        return nn.relu(norm(name="norm2")(conv(name="conv2")(x)))


class ASPP(nn.Module):
    """Classify pixels in the manner of DeepLabv3 (Chen et al. 2017, arXiv 1706.05587).

    Residual blocks go down to a quarter of the resolution. The pyramid, a 1x1 convolution, and bilinear
    upsampling to the image's size follow. `ASPP(width=4, features=4)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits
    `(batch, height, width, num_classes)`.
    """

    width: int = 16
    features: int = 64
    dilations: Sequence[int] = (2, 4, 6)
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        batch, height, width, _ = x.shape
        x = nn.Conv(self.width, (3, 3), padding=SAME_3X3, use_bias=False, dtype=self.dtype, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype, name="stem_norm")(x)
        x = nn.relu(x)
        for stage, stride in enumerate((1, 2, 2)):
            block = BasicBlock(self.width * 2**stage, stride, self.dtype, name=f"block{stage + 1}")
            x = block(x, train)
        x = AtrousPyramid(self.features, self.dilations, self.dtype, name="pyramid")(x, train)
        x = nn.Conv(self.num_classes, (1, 1), padding="VALID", dtype=self.dtype, name="head")(x)
        x = jax.image.resize(x, (batch, height, width, self.num_classes), "bilinear", antialias=False)
        return x.astype(jnp.float32)


class AtrousPyramid(nn.Module):
    """Apply a 1x1 convolution, dilated 3x3 convolutions and the image's mean side by side, then project.

    Each branch has batch norm and ReLU (Chen et al. 2017, arXiv 1706.05587, figure 5).
    """

    features: int
    dilations: Sequence[int] = (2, 4, 6)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def convolve(x: jax.Array, name: str, **window: Any) -> jax.Array:
            conv = partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype)
            norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
            return nn.relu(norm(name=f"{name}_norm")(conv(**window, name=name)(x)))

        point = {"kernel_size": (1, 1), "padding": "VALID"}
        branches = [convolve(x, "point", **point)]
        for rate in self.dilations:
            window = {"kernel_size": (3, 3), "kernel_dilation": (rate, rate), "padding": ((rate, rate),) * 2}
            branches.append(convolve(x, f"dilated{rate}", **window))
        pooled = convolve(jnp.mean(x, axis=(1, 2), keepdims=True), "pooled", **point)
        branches.append(jnp.broadcast_to(pooled, branches[0].shape))
        return convolve(jnp.concatenate(branches, axis=-1), "project", **point)
