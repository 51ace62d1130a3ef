"""Define the transformers, the mixer and the recurrent networks of `experiments.models` in PyTorch.

Submodules have the names of the Linen ones. Images are NCHW.
"""

import torch
import torch.nn.functional as F
from flax import linen
from torch import nn

from experiments.models.recurrent import RowReader
from experiments.models.transformers import Mixer, ViT

CHANNELS = 3


class Attention(nn.Module):
    """Apply self-attention with separate projections for queries, keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        batch, tokens, dim = x.shape
        q, k, v = (
            project(x).view(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, dim))


class EncoderBlock(nn.Module):
    """Apply self-attention and an MLP, each after a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_in = nn.Linear(dim, dim * mlp_ratio)
        self.gelu = nn.GELU()
        self.mlp_out = nn.Linear(dim * mlp_ratio, dim)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(self.gelu(self.mlp_in(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """Classify images by patches, a class token, positions, encoder blocks and a head on the token."""

    def __init__(self, linen: ViT, image_size: int):
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, linen.dim, linen.patch, linen.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, linen.dim))
        self.positions = nn.Parameter(torch.zeros(1, (image_size // linen.patch) ** 2 + 1, linen.dim))
        self.blocks = [f"block{number}" for number in range(1, linen.depth + 1)]
        for name in self.blocks:
            self.add_module(name, EncoderBlock(linen.dim, linen.heads, linen.mlp_ratio))
        self.norm = nn.LayerNorm(linen.dim, eps=1e-6)
        self.head = nn.Linear(linen.dim, linen.num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.head(self.norm(x[:, 0]))


class TwoLinear(nn.Module):
    """Apply two linear layers over the last axis with an exact GELU between them."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.in_ = nn.Linear(features, hidden)
        self.gelu = nn.GELU()
        self.out = nn.Linear(hidden, features)

    def forward(self, x):
        return self.out(self.gelu(self.in_(x)))


class MixingBlock(nn.Module):
    """Apply an MLP over the patches, then one over the channels, each after a layer norm."""

    def __init__(self, tokens: int, linen: Mixer):
        super().__init__()
        self.token_norm = nn.LayerNorm(linen.dim, eps=1e-6)
        self.token_mlp = TwoLinear(tokens, linen.token_hidden)
        self.channel_norm = nn.LayerNorm(linen.dim, eps=1e-6)
        self.channel_mlp = TwoLinear(linen.dim, linen.channel_hidden)

    def forward(self, x):
        x = x + self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mlp(self.channel_norm(x))


class MLPMixer(nn.Module):
    """Classify images by patches, mixer blocks, a layer norm, the mean over the patches, and a head."""

    def __init__(self, linen: Mixer, image_size: int):
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, linen.dim, linen.patch, linen.patch)
        self.blocks = [f"block{number}" for number in range(1, linen.depth + 1)]
        for name in self.blocks:
            self.add_module(name, MixingBlock((image_size // linen.patch) ** 2, linen))
        self.norm = nn.LayerNorm(linen.dim, eps=1e-6)
        self.head = nn.Linear(linen.dim, linen.num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.head(self.norm(x).mean(dim=1))


class RowClassifier(nn.Module):
    """Classify images with an LSTM or a GRU that takes one row of the image per step."""

    def __init__(self, module: RowReader, image_size: int):
        super().__init__()
        layer = nn.LSTM if module.cell is linen.LSTMCell else nn.GRU
        self.cell = layer(CHANNELS * image_size, module.features, batch_first=True)
        self.head = nn.Linear(module.features, module.num_classes)

    def forward(self, x):
        states, _ = self.cell(x.permute(0, 2, 3, 1).flatten(2))
        return self.head(states[:, -1])
