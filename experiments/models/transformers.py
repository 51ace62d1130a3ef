"""Define networks of patches for 32x32 images, in plain Linen: a small vision transformer and MLP-Mixer."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ViT(nn.Module):
    """Classify images with a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929).

    A strided convolution embeds the patches. A class token, learned positions, `depth` encoder blocks, and a
    linear head on the token follow. The positions fix the image's size. `ViT(dim=8, depth=1, heads=2)` is a
    tiny one for tests.

    It takes images `(batch, height, width, channels)` of whole patches and returns float32 logits
    `(batch, num_classes)`. Training and inference are the same.
    """

    patch: int = 4
    dim: int = 96
    depth: int = 4
    heads: int = 3
    mlp_ratio: int = 2
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.dim, window, window, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.dim)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.dim)), x], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = x + positions.astype(self.dtype)
        for block in range(1, self.depth + 1):
            x = EncoderBlock(self.heads, self.mlp_ratio, self.dtype, name=f"block{block}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x[:, 0])
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class EncoderBlock(nn.Module):
    """Apply self-attention and an MLP, each after a layer norm and beside a shortcut.

    (Dosovitskiy et al. 2021, arXiv 2010.11929, equations 2 and 3.)
    """

    heads: int
    mlp_ratio: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        dense = partial(nn.Dense, dtype=self.dtype)

        y = norm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")(y)
        y = norm(name="mlp_norm")(x)
        y = nn.gelu(dense(features * self.mlp_ratio, name="mlp_in")(y), approximate=False)
        return x + dense(features, name="mlp_out")(y)


class Mixer(nn.Module):
    """Classify images with MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601).

    A strided convolution embeds the patches. `depth` mixer blocks, a layer norm, the mean over the patches,
    and a linear head follow. The MLPs over patches fix the image's size.
    `Mixer(dim=8, depth=1, token_hidden=8, channel_hidden=8)` is a tiny one for tests.

    It takes images `(batch, height, width, channels)` of whole patches and returns float32 logits
    `(batch, num_classes)`. Training and inference are the same.
    """

    patch: int = 4
    dim: int = 96
    depth: int = 4
    token_hidden: int = 48
    channel_hidden: int = 384
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        window = (self.patch, self.patch)
        x = nn.Conv(self.dim, window, window, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        for block in range(1, self.depth + 1):
            block_of = partial(MixerBlock, self.token_hidden, self.channel_hidden, self.dtype)
            x = block_of(name=f"block{block}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)


class MixerBlock(nn.Module):
    """Apply an MLP over the patches, then one over the channels, each after a layer norm, with a shortcut.

    (Tolstikhin et al. 2021, arXiv 2105.01601, equation 1.)
    """

    token_hidden: int
    channel_hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        y = jnp.swapaxes(norm(name="token_norm")(x), 1, 2)
        x = x + jnp.swapaxes(MLP(self.token_hidden, self.dtype, name="token_mlp")(y), 1, 2)
        y = norm(name="channel_norm")(x)
        return x + MLP(self.channel_hidden, self.dtype, name="channel_mlp")(y)


class MLP(nn.Module):
    """Apply two linear layers over the last axis with an exact GELU between them."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="in")(x), approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(y)
