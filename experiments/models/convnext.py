"""Define ConvNeXt for 32x32 images, in plain Linen."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.convolution import conv_general_dilated


class ConvNeXtBlock(nn.Module):
    """Apply a 7x7 depthwise convolution, a layer norm, an MLP over channels, layer scale and a shortcut.

    (Liu et al. 2022, arXiv 2201.03545, figure 4.)
    """

    expansion: int = 4
    layer_scale: float = 1e-2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        y = nn.Conv(
            features,
            (7, 7),
            padding=((3, 3), (3, 3)),
            feature_group_count=features,
            conv_general_dilated=conv_general_dilated,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(y)
        y = nn.Dense(features * self.expansion, dtype=self.dtype, name="mlp_in")(y)
        y = nn.Dense(features, dtype=self.dtype, name="mlp_out")(nn.gelu(y, approximate=False))
        scale = self.param("layer_scale", nn.initializers.constant(self.layer_scale), (1, 1, 1, features))
        return x + y * scale.astype(self.dtype)


class ConvNeXt(nn.Module):
    """Classify images with ConvNeXt (Liu et al. 2022, arXiv 2201.03545).

    It has a stem of patches, stages of blocks with a layer norm and a 2x2 convolution of stride 2 between
    them, a global mean, a layer norm, and a linear head. The stem's patches are 2x2 in place of 4x4, and
    layer scale starts at 0.01 because there are few layers. `ConvNeXt(features=(4, 8), blocks=(1, 1))` is a
    tiny one for tests.

    It takes images `(batch, height, width, channels)` and returns float32 logits `(batch, num_classes)`.
    Training and inference are the same.
    """

    features: Sequence[int] = (48, 96, 192)
    blocks: Sequence[int] = (2, 2, 2)
    patch: int = 2
    num_classes: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        conv = partial(nn.Conv, padding="VALID", dtype=self.dtype)

        patch = (self.patch, self.patch)
        x = conv(self.features[0], patch, patch, name="stem")(x)
        x = norm(name="stem_norm")(x)
        for stage, (features, blocks) in enumerate(zip(self.features, self.blocks, strict=True), start=1):
            if stage > 1:
                x = norm(name=f"stage{stage}_down_norm")(x)
                x = conv(features, (2, 2), (2, 2), name=f"stage{stage}_down")(x)
            for block in range(1, blocks + 1):
                x = ConvNeXtBlock(dtype=self.dtype, name=f"stage{stage}_block{block}")(x)
        x = norm(name="norm")(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x).astype(jnp.float32)
