"""Create models by name: `create(name, num_classes, dtype)` returns a Linen module `model(images, train)`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.convnext import ConvNeXt
from experiments.models.mobilenet import MobileNetV2, MobileNetV3, Stage
from experiments.models.recurrent import RowReader
from experiments.models.resnet import FastResNet, ResNet
from experiments.models.segmenters import ASPP, UNet
from experiments.models.speed_net import WHITENING, SpeedNet, whitening_kernel
from experiments.models.transformers import Mixer, ViT

TINY = (Stage(1, 8, 1, 2), Stage(4, 16, 2, 1), Stage(4, 24, 2, 2), Stage(4, 32, 2, 2))
"""Blocks of the MobileNetV2 that trains on one core in minutes."""

MODELS = {
    "fast": FastResNet,
    "fast8": partial(FastResNet, 8),
    "tiny": partial(ResNet, (1,), 4),
    "resnet8": partial(ResNet, (1, 1, 1)),
    "resnet20": partial(ResNet, (3, 3, 3)),
    "resnet56": partial(ResNet, (9, 9, 9)),
    "resnet18": partial(ResNet, (2, 2, 2, 2), 64),
    "mobilenetv2": MobileNetV2,
    "mobilenetv2-tiny": partial(MobileNetV2, 16, TINY, 96),
    "mobilenetv3": MobileNetV3,
    "convnext": ConvNeXt,
    "vit": ViT,
    "vit-small": partial(ViT, 4, 384, 12, 6, 4),
    "vit-tiny": partial(ViT, 4, 48, 3),
    "mixer": Mixer,
    "speed": SpeedNet,
    "speed-half": partial(SpeedNet, (32, 128, 128), norm_momentum=0.9),
    "speed-tiny": partial(SpeedNet, (16, 32)),
    "lstm": partial(RowReader, nn.LSTMCell),
    "gru": partial(RowReader, nn.GRUCell),
}
"""Classifiers: float32 logits `(batch, num_classes)`."""

SEGMENTERS = {
    "unet": partial(UNet, "transposed"),
    "unet-small": partial(UNet, "transposed", 8, 2),
    "unet-nearest": partial(UNet, "nearest"),
    "unet-bilinear": partial(UNet, "bilinear"),
    "aspp": ASPP,
}
"""Per-pixel classifiers: float32 logits `(batch, height, width, num_classes)`."""


def create(name: str, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """Create the Linen module registered as `name`."""
    return (MODELS | SEGMENTERS)[name](num_classes=num_classes, dtype=dtype)


def is_fitted(model: nn.Module) -> bool:
    """Tell whether `fit_to_data` sets parameters of this network before training."""
    return isinstance(model, SpeedNet)


def fit_to_data(model: nn.Module, params: Any, images: jax.Array) -> Any:
    """Return the parameters of a fitted network with those set that it computes from images.

    A `SpeedNet` takes the kernel of its whitening from them.

    Args:
      model: A network for which `is_fitted` is true.
      params: Its parameters, as `init` made them.
      images: float32 `(n, height, width, channels)`, normalised; a few thousand.
    """
    return {**params, WHITENING: {**params[WHITENING], "kernel": whitening_kernel(images)}}
