"""Models by name: `create(name, num_classes, dtype)` is a Linen module, called as `model(images, train)`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.models.aspp import ASPP
from experiments.models.convnext import ConvNeXt
from experiments.models.fast_resnet import FastResNet
from experiments.models.mixer import Mixer
from experiments.models.mobilenet_v2 import MobileNetV2
from experiments.models.mobilenet_v3 import MobileNetV3
from experiments.models.recurrent import RowReader
from experiments.models.resnet import ResNet
from experiments.models.unet import UNet
from experiments.models.vit import ViT

MODELS = {
    "fast": FastResNet,
    "resnet8": partial(ResNet, (1, 1, 1)),
    "resnet20": partial(ResNet, (3, 3, 3)),
    "resnet56": partial(ResNet, (9, 9, 9)),
    "resnet18": partial(ResNet, (2, 2, 2, 2), 64),
    "mobilenetv2": MobileNetV2,
    "mobilenetv3": MobileNetV3,
    "convnext": ConvNeXt,
    "vit": ViT,
    "mixer": Mixer,
    "lstm": partial(RowReader, nn.LSTMCell),
    "gru": partial(RowReader, nn.GRUCell),
}
"""Classifiers: float32 logits `(batch, num_classes)`."""

SEGMENTERS = {
    "unet": partial(UNet, "transposed"),
    "unet-nearest": partial(UNet, "nearest"),
    "unet-bilinear": partial(UNet, "bilinear"),
    "aspp": ASPP,
}
"""Per-pixel classifiers: float32 logits `(batch, height, width, num_classes)`."""


def create(name: str, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """The Linen module registered as `name`."""
    return (MODELS | SEGMENTERS)[name](num_classes=num_classes, dtype=dtype)
