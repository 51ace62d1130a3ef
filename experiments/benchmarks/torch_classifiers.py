"""Define the convolutional classifiers of `experiments.models` in PyTorch, as its users would write them.

Submodules have the names of the Linen ones. Images are NCHW.
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import Block, MobileNetV2, MobileNetV3
from experiments.models.resnet import FastResNet, ResNet, ResNet50
from experiments.models.speed_net import SpeedNet

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


class ConvNorm(nn.Module):
    """Apply a 3x3 convolution, batch norm and ReLU."""

    def __init__(self, inputs: int, features: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, features, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(features)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class ShortResNet(nn.Module):
    """Classify images with a short, wide residual network."""

    def __init__(self, linen: FastResNet):
        super().__init__()
        width = linen.width
        self.stem = ConvNorm(CHANNELS, width)
        self.stage1_down = ConvNorm(width, 2 * width, 2)
        for stage, features in ((2, 4 * width), (3, 8 * width)):
            self.add_module(f"stage{stage}_down", ConvNorm(features // 2, features, 2))
            self.add_module(f"stage{stage}_conv1", ConvNorm(features, features))
            self.add_module(f"stage{stage}_conv2", ConvNorm(features, features))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8 * width, linen.num_classes)

    def forward(self, x):
        x = self.stage2_down(self.stage1_down(self.stem(x)))
        x = x + self.stage2_conv2(self.stage2_conv1(x))
        x = self.stage3_down(x)
        x = x + self.stage3_conv2(self.stage3_conv1(x))
        return self.head(torch.flatten(self.pool(x), 1))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate of the image's mean."""

    def __init__(self, features: int, reduction: int = 4):
        super().__init__()
        hidden = max(1, features // reduction)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(features, hidden, 1)
        self.excite = nn.Conv2d(hidden, features, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x):
        return x * self.gate(self.excite(F.relu(self.squeeze(self.pool(x)))))


class RecalibratedResidual(nn.Module):
    """Apply an expansion, a depthwise convolution, squeeze and excitation, a projection and a shortcut."""

    def __init__(self, inputs: int, block: Block):
        super().__init__()
        window, hidden, features, squeezes, activation, stride = block
        self.activation = nn.ReLU() if activation.__name__ == "relu" else nn.Hardswish()
        self.expands = hidden != inputs
        if self.expands:
            self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
            self.expand_norm = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, window, stride, window // 2, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden)
        self.squeezes = squeezes
        if squeezes:
            self.squeeze_excite = SqueezeExcitation(hidden)
        self.project = nn.Conv2d(hidden, features, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(features)
        self.adds = stride == 1 and inputs == features

    def forward(self, x):
        y = self.activation(self.expand_norm(self.expand(x))) if self.expands else x
        y = self.activation(self.depthwise_norm(self.depthwise(y)))
        if self.squeezes:
            y = self.squeeze_excite(y)
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


class LayerNorm2d(nn.LayerNorm):
    """Normalize the channels of each pixel of `(batch, channels, height, width)`, as torchvision does."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ScaledBlock(nn.Module):
    """Apply a 7x7 depthwise convolution, a layer norm, an MLP over channels, layer scale and a shortcut."""

    def __init__(self, features: int, expansion: int = 4):
        super().__init__()
        self.depthwise = nn.Conv2d(features, features, 7, padding=3, groups=features)
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.mlp_in = nn.Linear(features, features * expansion)
        self.gelu = nn.GELU()
        self.mlp_out = nn.Linear(features * expansion, features)
        self.layer_scale = nn.Parameter(torch.ones(features, 1, 1))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.mlp_out(self.gelu(self.mlp_in(y))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


class SpeedBlocks(nn.Module):
    """Classify images by a whitening convolution, blocks of two 3x3 convolutions, and a linear head."""

    def __init__(self, linen: SpeedNet):
        super().__init__()
        features = 8 * CHANNELS
        self.whitening = nn.Conv2d(CHANNELS, features, 2)
        self.blocks = range(1, len(linen.widths) + 1)
        for block, width in zip(self.blocks, linen.widths, strict=True):
            for number, inputs in ((1, features), (2, width)):
                norm = nn.BatchNorm2d(width)
                norm.weight.requires_grad = False
                self.add_module(
                    f"block{block}_conv{number}", nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                )
                self.add_module(f"block{block}_norm{number}", norm)
            features = width
        self.head = nn.Linear(features, linen.num_classes, bias=False)
        self.logit_scale = linen.logit_scale

    def forward(self, x):
        x = F.relu(self.whitening(x))
        for block in self.blocks:
            conv1, norm1, conv2, norm2 = (
                self.get_submodule(f"block{block}_{layer}") for layer in ("conv1", "norm1", "conv2", "norm2")
            )
            x = F.relu(norm1(F.max_pool2d(conv1(x), 2)))
            x = F.relu(norm2(conv2(x)))
        return self.head(x.amax(dim=(2, 3))) * self.logit_scale


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


def mobilenet_v3(linen: MobileNetV3) -> nn.Module:
    """Return MobileNetV3."""
    layers = [
        ("stem", nn.Conv2d(CHANNELS, linen.stem, 3, padding=1, bias=False)),
        ("stem_norm", nn.BatchNorm2d(linen.stem)),
        ("stem_activation", nn.Hardswish()),
    ]
    inputs = linen.stem
    for number, block in enumerate(linen.blocks, start=1):
        layers.append((f"block{number}", RecalibratedResidual(inputs, block)))
        inputs = block.features
    layers += [
        ("last", nn.Conv2d(inputs, linen.last, 1, bias=False)),
        ("last_norm", nn.BatchNorm2d(linen.last)),
        ("last_activation", nn.Hardswish()),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(linen.last, linen.hidden)),
        ("hidden_activation", nn.Hardswish()),
        ("head", nn.Linear(linen.hidden, linen.num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def convnext(linen: ConvNeXt) -> nn.Module:
    """Return ConvNeXt, with layer norms and permutations as torchvision has them."""
    stem = nn.Conv2d(CHANNELS, linen.features[0], linen.patch, linen.patch)
    layers: list[tuple[str, nn.Module]] = [
        ("stem", stem),
        ("stem_norm", LayerNorm2d(linen.features[0], 1e-6)),
    ]
    inputs = linen.features[0]
    for stage, (features, blocks) in enumerate(zip(linen.features, linen.blocks, strict=True), start=1):
        if stage > 1:
            layers.append((f"stage{stage}_down_norm", LayerNorm2d(inputs, 1e-6)))
            layers.append((f"stage{stage}_down", nn.Conv2d(inputs, features, 2, 2)))
        for block in range(1, blocks + 1):
            layers.append((f"stage{stage}_block{block}", ScaledBlock(features)))
        inputs = features
    layers += [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("norm", LayerNorm2d(inputs, 1e-6)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(inputs, linen.num_classes)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _with_head(layers: Iterable[tuple[str, nn.Module]], features: int, classes: int) -> nn.Module:
    head = [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(features, classes)),
    ]
    return nn.Sequential(OrderedDict([*layers, *head]))
