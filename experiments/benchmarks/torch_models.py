"""Define the networks of `experiments.models` in PyTorch, as a PyTorch user would write them.

Submodules have the names of the Linen ones, so `load_variables` copies by path. Images are NCHW.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from torch import nn

import qt_jax as qt
from experiments.models.mobilenet import MobileNetV2
from experiments.models.resnet import ResNet, ResNet50
from experiments.models.segmenters import UNet
from experiments.models.transformers import ViT

CHANNELS = 3


class BasicBlock(nn.Module):
    """Apply two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.projects = stride != 1 or inputs != features
        if self.projects:
            self.shortcut = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(features)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(x + y)


class Bottleneck(nn.Module):
    """Apply a 1x1, a 3x3 and a 1x1 convolution and a shortcut. The 3x3 convolution has the stride."""

    def __init__(self, inputs: int, features: int, stride: int, expansion: int = 4):
        super().__init__()
        outputs = features * expansion
        self.conv1 = nn.Conv2d(inputs, features, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)
        self.conv3 = nn.Conv2d(features, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.projects = stride != 1 or inputs != outputs
        if self.projects:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.projects:
            x = self.shortcut_norm(self.shortcut(x))
        return F.relu(x + y)


class InvertedResidual(nn.Module):
    """Apply a 1x1 expansion, a 3x3 depthwise convolution, a linear 1x1 projection and a shortcut."""

    def __init__(self, inputs: int, features: int, expansion: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
            self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, features, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(features)
        self.adds = stride == 1 and inputs == features

    def forward(self, x):
        y = F.relu6(self.expand_norm(self.expand(x))) if self.expands else x
        y = F.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


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


class DoubleConv(nn.Module):
    """Apply two 3x3 convolutions, each followed by batch norm and ReLU."""

    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(features)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class TransposedUNet(nn.Module):
    """Classify pixels with a U-Net of transposed convolutions."""

    def __init__(self, linen: UNet):
        super().__init__()
        self.levels = range(1, linen.depth + 1)
        inputs = CHANNELS
        for level in self.levels:
            features = linen.width * 2 ** (level - 1)
            self.add_module(f"down{level}", DoubleConv(inputs, features))
            self.add_module(f"up{level}_resize", nn.ConvTranspose2d(2 * features, features, 2, 2))
            self.add_module(f"up{level}", DoubleConv(2 * features, features))
            inputs = features
        self.bottom = DoubleConv(inputs, 2 * inputs)
        self.head = nn.Conv2d(linen.width, linen.num_classes, 1)

    def forward(self, x):
        skips = []
        for level in self.levels:
            x = self.get_submodule(f"down{level}")(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for level in reversed(self.levels):
            x = torch.cat([skips.pop(), self.get_submodule(f"up{level}_resize")(x)], dim=1)
            x = self.get_submodule(f"up{level}")(x)
        return self.head(x)


def residual_network(linen: ResNet | ResNet50) -> nn.Module:
    """Return a network like ResNet-20, or ResNet-50."""
    deep = isinstance(linen, ResNet50)
    block, expansion = (Bottleneck, 4) if deep else (BasicBlock, 1)
    window = {"kernel_size": 7, "stride": 2, "padding": 3} if deep else {"kernel_size": 3, "padding": 1}
    layers = [
        ("stem", nn.Conv2d(CHANNELS, linen.width, **window, bias=False)),
        ("stem_norm", nn.BatchNorm2d(linen.width)),
        ("stem_relu", nn.ReLU()),
        *([("stem_pool", nn.MaxPool2d(3, 2, 1))] if deep else []),
    ]
    inputs = linen.width
    for stage, blocks in enumerate(linen.stage_sizes):
        features = linen.width * 2**stage
        for number in range(blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append((f"stage{stage + 1}_block{number + 1}", block(inputs, features, stride)))
            inputs = features * expansion
    return _with_head(layers, inputs, linen.num_classes)


def mobilenet_v2(linen: MobileNetV2) -> nn.Module:
    """Return MobileNetV2."""
    layers = [
        ("stem", nn.Conv2d(CHANNELS, linen.stem, 3, padding=1, bias=False)),
        ("stem_norm", nn.BatchNorm2d(linen.stem)),
        ("stem_relu", nn.ReLU6()),
    ]
    inputs = linen.stem
    for number, stage in enumerate(linen.stages, start=1):
        for block in range(1, stage.blocks + 1):
            stride = stage.stride if block == 1 else 1
            layer = InvertedResidual(inputs, stage.features, stage.expansion, stride)
            layers.append((f"stage{number}_block{block}", layer))
            inputs = stage.features
    layers += [
        ("last", nn.Conv2d(inputs, linen.last, 1, bias=False)),
        ("last_norm", nn.BatchNorm2d(linen.last)),
        ("last_relu", nn.ReLU6()),
    ]
    return _with_head(layers, linen.last, linen.num_classes)


def _with_head(layers: Iterable[tuple[str, nn.Module]], features: int, classes: int) -> nn.Module:
    head = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(features, classes)),
    ]
    return nn.Sequential(OrderedDict([*layers, *head]))


def twin(linen: Any, image_size: int) -> nn.Module:
    """Return the PyTorch network of a Linen module's architecture, in evaluation mode, with fresh weights.

    Args:
      linen: A ResNet, ResNet50, MobileNetV2, ViT, or UNet with up="transposed".
      image_size: Height and width in pixels. Only ViT's positions depend on it.

    Raises:
      InvalidInput: The module is of another class.
    """
    makers = {
        ResNet: residual_network,
        ResNet50: residual_network,
        MobileNetV2: mobilenet_v2,
        ViT: lambda linen: VisionTransformer(linen, image_size),
        UNet: TransposedUNet,
    }
    if type(linen) not in makers:
        raise qt.InvalidInput(f"there is no PyTorch network for {type(linen).__name__}")
    return makers[type(linen)](linen).eval()


def load_variables(model: nn.Module, variables: Mapping[str, Any]) -> None:
    """Copy Flax variables into the twin, in place, so that both compute the same function.

    Args:
      model: From `twin`.
      variables: {"params": ..., "batch_stats": ...} of the Linen module.

    Raises:
      KeyError: The twin has no tensor for a leaf, or has one that no leaf fills.
    """
    state = {}
    for collection in ("params", "batch_stats"):
        for path, leaf in flatten_dict(variables.get(collection, {})).items():
            layer = model.get_submodule(".".join(path[:-1]))
            name, value = _in_torch(layer, path[-1], np.asarray(leaf))
            state[".".join((*path[:-1], name))] = torch.from_numpy(np.array(value))
    missing = [key for key in model.state_dict() if key not in state and not key.endswith("batches_tracked")]
    if missing:
        raise KeyError(f"no Flax leaf for {', '.join(missing)}")
    model.load_state_dict(state, strict=False)


def _in_torch(layer: nn.Module, leaf: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """Return one Flax leaf of a layer under PyTorch's name and in its layout."""
    if leaf == "kernel" and isinstance(layer, nn.Linear):  # attention's kernels have heads apart
        return "weight", value.reshape(layer.in_features, layer.out_features).T
    if leaf == "kernel" and isinstance(layer, nn.ConvTranspose2d):  # PyTorch's is a gradient: it flips
        return "weight", value[::-1, ::-1].transpose(2, 3, 0, 1)
    if leaf == "kernel":
        return "weight", value.transpose(3, 2, 0, 1)
    if leaf == "bias":
        return "bias", value.reshape(-1)
    return {"scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf), value
