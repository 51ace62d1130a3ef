"""Define networks as they are published elsewhere, in plain Linen: ViT, PoolFormer and a diffusion U-Net.

The benchmark of exports takes them beside the networks of `experiments.models`. Their PyTorch twins are in
`experiments.benchmarks.torch_public`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SAME_3X3 = ((1, 1), (1, 1))


class PublicViT(nn.Module):
    """Classify images with a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

    With `pool="token"` it is Google's: a class token, learned positions, and a head on the token. With
    `pool="mean"` it is that of Beyer et al. 2022 (arXiv 2205.01580): fixed sines as positions, and a head on
    the mean of the tokens. The defaults are ViT-B/16 with 86.6 M parameters.

    It takes images `(batch, height, width, channels)` of whole patches and returns float32 logits
    `(batch, num_classes)`.
    """

    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    pool: Literal["token", "mean"] = "token"
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.dim, window, window, padding="VALID", name="embedding")(x)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, self.dim)
        if self.pool == "token":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim))
            x = jnp.concatenate([jnp.tile(token, (batch, 1, 1)), x], axis=1)
            x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        else:
            x = x + plane_waves(height, width, self.dim)
        for number in range(self.depth):
            x = PublicEncoder(self.heads, self.hidden, name=f"encoder{number}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(x[:, 0] if self.pool == "token" else x.mean(axis=1))


class PublicEncoder(nn.Module):
    """Apply self-attention and an MLP with the tanh form of GELU, each after a layer norm."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6)
        y = norm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, deterministic=True, name="attention")(y, y)
        y = nn.Dense(self.hidden, name="mlp_in")(norm(name="mlp_norm")(x))
        return x + nn.Dense(x.shape[-1], name="mlp_out")(nn.gelu(y))


def plane_waves(height: int, width: int, dim: int) -> np.ndarray:
    """Return positions `(1, height width, dim)`, float32: sines and cosines of columns and of rows."""
    rates = 10000.0 ** -np.linspace(0.0, 1.0, dim // 4)
    rows, columns = (np.outer(grid.ravel(), rates) for grid in np.mgrid[:height, :width])
    waves = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(waves, axis=1, dtype=np.float32)[None]


class PoolFormer(nn.Module):
    """Classify images with PoolFormer (Yu et al. 2022, arXiv 2111.11418). The defaults are PoolFormer-S12.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    """

    blocks: Sequence[int] = (2, 2, 6, 2)
    features: Sequence[int] = (64, 128, 320, 512)
    num_classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.features[0], (7, 7), (4, 4), padding=((2, 2), (2, 2)), name="embedding")(x)
        for stage, (features, blocks) in enumerate(zip(self.features, self.blocks, strict=True), start=1):
            if stage > 1:
                x = nn.Conv(features, (3, 3), (2, 2), padding=SAME_3X3, name=f"embedding{stage}")(x)
            for block in range(1, blocks + 1):
                x = PoolFormerBlock(name=f"stage{stage}_block{block}")(x)
        x = nn.GroupNorm(num_groups=1, epsilon=1e-5, name="norm")(x)
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2)))


class PoolFormerBlock(nn.Module):
    """Mix pixels by a mean over 3x3 minus the pixel, then channels by an MLP, each with a scale."""

    expansion: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        norm = partial(nn.GroupNorm, num_groups=1, epsilon=1e-5)
        small = nn.initializers.constant(1e-5)
        pool_scale, mlp_scale = (
            self.param(name, small, (features,)).reshape(1, 1, 1, features)
            for name in ("pool_scale", "mlp_scale")
        )
        y = norm(name="pool_norm")(x)
        mean = nn.avg_pool(y, (3, 3), (1, 1), SAME_3X3, count_include_pad=False)
        x = x + pool_scale * (mean - y)
        y = norm(name="mlp_norm")(x)
        y = nn.gelu(nn.Conv(self.expansion * features, (1, 1), name="mlp_in")(y), approximate=False)
        return x + mlp_scale * nn.Conv(features, (1, 1), name="mlp_out")(y)


class DiffusionUNet(nn.Module):
    """Predict the noise in images with the U-Net of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B).

    Level `i` has `width * multiples[i]` features and `blocks` residual blocks, one more going up. The lowest
    level has self-attention. Every block reads the time.

    It takes images `(batch, height, width, channels)` and times `(batch,)`, and returns noise of the images'
    shape.
    """

    width: int = 32
    multiples: Sequence[int] = (1, 2, 2)
    blocks: int = 2
    groups: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, times: jax.Array, train: bool = False) -> jax.Array:
        channels, levels = x.shape[-1], list(enumerate(self.multiples))
        time = nn.Dense(4 * self.width, name="time_in")(sinusoids(times, self.width))
        time = nn.silu(nn.Dense(4 * self.width, name="time_out")(nn.silu(time)))
        block = partial(TimedBlock, groups=self.groups)

        x = nn.Conv(self.width, (3, 3), padding=SAME_3X3, name="conv_in")(x)
        skips = [x]
        for level, multiple in levels:
            for number in range(self.blocks):
                x = block(multiple * self.width, name=f"down{level}_block{number}")(x, time)
                if level == levels[-1][0]:
                    x = PixelAttention(self.groups, name=f"down{level}_attention{number}")(x)
                skips.append(x)
            if level < levels[-1][0]:
                x = nn.Conv(x.shape[-1], (3, 3), (2, 2), SAME_3X3, name=f"down{level}_halve")(x)
                skips.append(x)
        x = block(x.shape[-1], name="middle_block0")(x, time)
        x = PixelAttention(self.groups, name="middle_attention")(x)
        x = block(x.shape[-1], name="middle_block1")(x, time)
        for level, multiple in reversed(levels):
            for number in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(multiple * self.width, name=f"up{level}_block{number}")(x, time)
                if level == levels[-1][0]:
                    x = PixelAttention(self.groups, name=f"up{level}_attention{number}")(x)
            if level > 0:
                batch, height, width, features = x.shape
                x = jax.image.resize(x, (batch, 2 * height, 2 * width, features), "nearest")
                x = nn.Conv(features, (3, 3), padding=SAME_3X3, name=f"up{level}_double")(x)
        x = nn.silu(nn.GroupNorm(self.groups, name="norm_out")(x))
        return nn.Conv(channels, (3, 3), padding=SAME_3X3, name="conv_out")(x)


class TimedBlock(nn.Module):
    """Apply two convolutions after group norm and SiLU, between them the time, and a shortcut."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        norm = partial(nn.GroupNorm, self.groups)
        conv = partial(nn.Conv, self.features, (3, 3), padding=SAME_3X3)
        y = conv(name="conv1")(nn.silu(norm(name="norm1")(x)))
        y = y + nn.Dense(self.features, name="time")(time)[:, None, None, :]
        y = conv(name="conv2")(nn.silu(norm(name="norm2")(y)))
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), name="shortcut")(x)
        return x + y


class PixelAttention(nn.Module):
    """Apply self-attention of one head among the pixels, after group norm and beside a shortcut."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, features = x.shape
        y = nn.GroupNorm(self.groups, name="norm")(x).reshape(batch, height * width, features)
        y = nn.MultiHeadDotProductAttention(1, deterministic=True, name="attention")(y, y)
        return x + y.reshape(x.shape)


def sinusoids(times: jax.Array, dim: int) -> jax.Array:
    """Return the embedding `(batch, dim)` of times `(batch,)`: sines, then cosines, of falling rates."""
    rates = jnp.exp(-np.log(10000.0) / (dim // 2) * jnp.arange(dim // 2, dtype=jnp.float32))
    angles = times[:, None] * rates[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
