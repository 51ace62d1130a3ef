"""Define the segmenters of `experiments.models` in PyTorch, as its users would write them.

Submodules have the names of the Linen ones. Images are NCHW.
"""

import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmarks.torch_classifiers import BasicBlock
from experiments.models.segmenters import ASPP, UNet

CHANNELS = 3


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


class SkipUNet(nn.Module):
    """Classify pixels with a U-Net of transposed convolutions, or of interpolations and convolutions."""

    def __init__(self, linen: UNet):
        super().__init__()
        self.levels = range(1, linen.depth + 1)
        self.mode = linen.up
        inputs = CHANNELS
        for level in self.levels:
            features = linen.width * 2 ** (level - 1)
            self.add_module(f"down{level}", DoubleConv(inputs, features))
            resize = (
                nn.ConvTranspose2d(2 * features, features, 2, 2)
                if linen.up == "transposed"
                else nn.Conv2d(2 * features, features, 3, padding=1)
            )
            self.add_module(f"up{level}_resize", resize)
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
            if self.mode == "nearest":
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            elif self.mode == "bilinear":
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = torch.cat([skips.pop(), self.get_submodule(f"up{level}_resize")(x)], dim=1)
            x = self.get_submodule(f"up{level}")(x)
        return self.head(x)


class DeepLab(nn.Module):
    """Classify pixels by residual blocks, an atrous pyramid, and bilinear upsampling, as torchvision does."""

    def __init__(self, linen: ASPP):
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, linen.width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(linen.width)
        self.block1 = BasicBlock(linen.width, linen.width, 1)
        self.block2 = BasicBlock(linen.width, 2 * linen.width, 2)
        self.block3 = BasicBlock(2 * linen.width, 4 * linen.width, 2)
        self.pyramid = DilatedPyramid(4 * linen.width, linen.features, linen.dilations)
        self.head = nn.Conv2d(linen.features, linen.num_classes, 1)

    def forward(self, x):
        y = F.relu(self.stem_norm(self.stem(x)))
        y = self.pyramid(self.block3(self.block2(self.block1(y))))
        return F.interpolate(self.head(y), size=x.shape[-2:], mode="bilinear", align_corners=False)


class DilatedPyramid(nn.Module):
    """Apply a 1x1 convolution, dilated 3x3 ones and the image's mean side by side, then project."""

    def __init__(self, inputs: int, features: int, dilations: tuple[int, ...]):
        super().__init__()
        self.branches = ["point", *(f"dilated{rate}" for rate in dilations)]
        self.point = nn.Conv2d(inputs, features, 1, bias=False)
        for rate in dilations:
            conv = nn.Conv2d(inputs, features, 3, padding=rate, dilation=rate, bias=False)
            self.add_module(f"dilated{rate}", conv)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pooled = nn.Conv2d(inputs, features, 1, bias=False)
        self.project = nn.Conv2d((len(dilations) + 2) * features, features, 1, bias=False)
        for name in (*self.branches, "pooled", "project"):
            self.add_module(f"{name}_norm", nn.BatchNorm2d(features))

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.get_submodule(f"{name}_norm")(self.get_submodule(name)(x)))

    def forward(self, x):
        branches = [self._branch(name, x) for name in self.branches]
        pooled = self._branch("pooled", self.pool(x))
        pooled = F.interpolate(pooled, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self._branch("project", torch.cat([*branches, pooled], dim=1))
