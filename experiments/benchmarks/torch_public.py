"""Define the networks of `experiments.benchmarks.public_models` in PyTorch.

Each follows the PyTorch code that most people run: torchvision's ViT with `nn.MultiheadAttention`, timm's
with one layer for queries, keys and values, the authors' PoolFormer, and the blocks of diffusers. Submodules
have the names of the Linen ones. Images are NCHW.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmarks.public_models import DiffusionUNet, PoolFormer, PublicViT, plane_waves

CHANNELS = 3


class FusedAttention(nn.Module):
    """Apply self-attention with one projection for queries, keys and values, as timm does."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


class PreNormBlock(nn.Module):
    """Apply self-attention and an MLP with the tanh form of GELU, each after a layer norm."""

    def __init__(self, linen: PublicViT):
        super().__init__()
        dim = linen.dim
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6)
        self.fused = linen.pool == "mean"
        self.attention = (
            FusedAttention(dim, linen.heads)
            if self.fused
            else nn.MultiheadAttention(dim, linen.heads, batch_first=True)
        )
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp_in = nn.Linear(dim, linen.hidden)
        self.gelu = nn.GELU(approximate="tanh")
        self.mlp_out = nn.Linear(linen.hidden, dim)

    def forward(self, x):
        y = self.attention_norm(x)
        y = self.attention(y) if self.fused else self.attention(y, y, y, need_weights=False)[0]
        x = x + y
        return x + self.mlp_out(self.gelu(self.mlp_in(self.mlp_norm(x))))


class PublicVisionTransformer(nn.Module):
    """Classify images by patches, encoder blocks, and a head on the class token or on the mean."""

    def __init__(self, linen: PublicViT, image_size: int):
        super().__init__()
        self.embedding = nn.Conv2d(CHANNELS, linen.dim, linen.patch, linen.patch)
        side = image_size // linen.patch
        self.mean = linen.pool == "mean"
        if self.mean:
            waves = torch.from_numpy(plane_waves(side, side, linen.dim))
            self.register_buffer("positions", waves, persistent=False)
        else:
            self.class_token = nn.Parameter(torch.zeros(1, 1, linen.dim))
            self.positions = nn.Parameter(torch.zeros(1, side**2 + 1, linen.dim))
        self.blocks = [f"encoder{number}" for number in range(linen.depth)]
        for name in self.blocks:
            self.add_module(name, PreNormBlock(linen))
        self.norm = nn.LayerNorm(linen.dim, eps=1e-6)
        self.head = nn.Linear(linen.dim, linen.num_classes)

    def forward(self, x):
        x = self.embedding(x).flatten(2).transpose(1, 2)
        if not self.mean:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.positions
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        x = self.norm(x)
        return self.head(x.mean(dim=1) if self.mean else x[:, 0])


class PoolMixingBlock(nn.Module):
    """Mix pixels by a mean over 3x3 minus the pixel, then channels by an MLP, each with a scale."""

    def __init__(self, features: int, expansion: int = 4):
        super().__init__()
        self.pool_norm = nn.GroupNorm(1, features)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp_norm = nn.GroupNorm(1, features)
        self.mlp_in = nn.Conv2d(features, expansion * features, 1)
        self.gelu = nn.GELU()
        self.mlp_out = nn.Conv2d(expansion * features, features, 1)
        self.pool_scale = nn.Parameter(torch.ones(features))
        self.mlp_scale = nn.Parameter(torch.ones(features))

    def forward(self, x):
        y = self.pool_norm(x)
        x = x + self.pool_scale.unsqueeze(-1).unsqueeze(-1) * (self.pool(y) - y)
        y = self.mlp_out(self.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + self.mlp_scale.unsqueeze(-1).unsqueeze(-1) * y


class PoolFormerNet(nn.Module):
    """Classify images with PoolFormer."""

    def __init__(self, linen: PoolFormer):
        super().__init__()
        inputs, layers = CHANNELS, []
        for stage, (features, blocks) in enumerate(zip(linen.features, linen.blocks, strict=True), start=1):
            embedding = (
                nn.Conv2d(inputs, features, 7, 4, 2) if stage == 1 else nn.Conv2d(inputs, features, 3, 2, 1)
            )
            layers.append(("embedding" if stage == 1 else f"embedding{stage}", embedding))
            layers += [
                (f"stage{stage}_block{block}", PoolMixingBlock(features)) for block in range(1, blocks + 1)
            ]
            inputs = features
        self.layers = [name for name, _ in layers]
        for name, layer in layers:
            self.add_module(name, layer)
        self.norm = nn.GroupNorm(1, inputs)
        self.head = nn.Linear(inputs, linen.num_classes)

    def forward(self, x):
        for name in self.layers:
            x = self.get_submodule(name)(x)
        return self.head(self.norm(x).mean([-2, -1]))


class TimedResBlock(nn.Module):
    """Apply two convolutions after group norm and SiLU, between them the time, and a shortcut."""

    def __init__(self, inputs: int, features: int, time_features: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, features, 3, padding=1)
        self.time = nn.Linear(time_features, features)
        self.norm2 = nn.GroupNorm(groups, features, eps=1e-6)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, features, 1) if inputs != features else nn.Identity()

    def forward(self, x, time):
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time(time)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return self.shortcut(x) + y


class ImageAttention(nn.Module):
    """Apply self-attention among the pixels, after group norm and beside a shortcut, as diffusers does."""

    def __init__(self, features: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, features, eps=1e-6)
        self.attention = nn.ModuleDict(
            {name: nn.Linear(features, features) for name in ("query", "key", "value", "out")}
        )

    def forward(self, x):
        batch, features, height, width = x.shape
        y = self.norm(x).view(batch, features, height * width).transpose(1, 2)
        q, k, v = (
            self.attention[name](y).view(batch, -1, 1, features).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.attention["out"](y.transpose(1, 2).reshape(batch, -1, features))
        return x + y.transpose(-1, -2).reshape(batch, features, height, width)


class DenoisingUNet(nn.Module):
    """Predict the noise in images `(batch, channels, height, width)` at times `(batch,)`."""

    def __init__(self, linen: DiffusionUNet):
        super().__init__()
        width, self.count = linen.width, linen.blocks
        self.width, self.lowest = width, len(linen.multiples) - 1
        self.time_in, self.time_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.conv_in = nn.Conv2d(CHANNELS, width, 3, padding=1)
        features, skips = width, [width]

        def block(name: str, inputs: int, outputs: int) -> None:
            self.add_module(name, TimedResBlock(inputs, outputs, 4 * width, linen.groups))

        def attention(name: str) -> None:
            self.add_module(name, ImageAttention(features, linen.groups))

        for level, multiple in enumerate(linen.multiples):
            for number in range(self.count):
                block(f"down{level}_block{number}", features, multiple * width)
                features = multiple * width
                if level == self.lowest:
                    attention(f"down{level}_attention{number}")
                skips.append(features)
            if level < self.lowest:
                self.add_module(f"down{level}_halve", nn.Conv2d(features, features, 3, 2, 1))
                skips.append(features)
        block("middle_block0", features, features)
        attention("middle_attention")
        block("middle_block1", features, features)
        for level, multiple in reversed(list(enumerate(linen.multiples))):
            for number in range(self.count + 1):
                block(f"up{level}_block{number}", features + skips.pop(), multiple * width)
                features = multiple * width
                if level == self.lowest:
                    attention(f"up{level}_attention{number}")
            if level > 0:
                self.add_module(f"up{level}_double", nn.Conv2d(features, features, 3, padding=1))
        self.norm_out = nn.GroupNorm(linen.groups, features, eps=1e-6)
        self.conv_out = nn.Conv2d(features, CHANNELS, 3, padding=1)

    def forward(self, x, times):
        time = self.time_in(time_embedding(times, self.width))
        time = F.silu(self.time_out(F.silu(time)))
        x = self.conv_in(x)
        skips = [x]
        for level in range(self.lowest + 1):
            for number in range(self.count):
                x = self._block("down", level, number, x, time)
                skips.append(x)
            if level < self.lowest:
                x = self.get_submodule(f"down{level}_halve")(x)
                skips.append(x)
        x = self.middle_block1(self.middle_attention(self.middle_block0(x, time)), time)
        for level in reversed(range(self.lowest + 1)):
            for number in range(self.count + 1):
                x = self._block("up", level, number, torch.cat([x, skips.pop()], dim=1), time)
            if level > 0:
                x = self.get_submodule(f"up{level}_double")(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))

    def _block(self, way: str, level: int, number: int, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = self.get_submodule(f"{way}{level}_block{number}")(x, time)
        return self.get_submodule(f"{way}{level}_attention{number}")(x) if level == self.lowest else x


def time_embedding(times: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the embedding `(batch, dim)` of times `(batch,)`, as diffusers computes it."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=times.device) / half
    angles = times[:, None].float() * torch.exp(exponent)[None, :]
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
