"""Models by name: `create(name, num_classes, dtype)` is a Linen module, called as `model(images, train)`."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from experiments.models.fast_resnet import FastResNet
from experiments.models.resnet import ResNet

MODELS = {
    "fast": FastResNet,
    "resnet8": partial(ResNet, (1, 1, 1)),
    "resnet20": partial(ResNet, (3, 3, 3)),
    "resnet56": partial(ResNet, (9, 9, 9)),
    "resnet18": partial(ResNet, (2, 2, 2, 2), 64),
}


def create(name: str, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """The Linen module registered as `name`."""
    return MODELS[name](num_classes=num_classes, dtype=dtype)
