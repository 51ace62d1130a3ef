"""PyTorch's training step of the same network, for `experiments.benchmarks.step`."""

from collections.abc import Callable
from typing import Any

import flax.linen as linen
import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmarks.torch_models import twin
from experiments.configs.cifar import Config


def torch_step(
    model: linen.Module, images: np.ndarray, labels: np.ndarray, config: Config
) -> tuple[Callable[[Any], Any], Any]:
    """`advance` and its first state: forward, backward and SGD with Nesterov momentum on one batch, eager.

    Images are normalised and channels last beforehand; augmentation, less than one percent of JAX's step, is
    left out, and so are running sums of the loss.

    Args:
      images: uint8 `(n, height, width, channels)`, of which the first batch is taken every time.
      labels: int32 `(n,)`, or for segmentation uint8 `(n, height, width)`.

    Raises:
      KeyError: there is no PyTorch network for `model`.
    """
    network = twin(model, images.shape[1]).train().to(memory_format=torch.channels_last)
    batch = torch.from_numpy(images[: config.batch_size].astype(np.float32) / 255).permute(0, 3, 1, 2)
    batch = batch.contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels[: config.batch_size].astype(np.int64))
    optimizer = torch.optim.SGD(
        network.parameters(),
        config.learning_rate,
        momentum=config.momentum,
        nesterov=True,
        weight_decay=config.weight_decay,
    )

    def advance(state: Any) -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(batch), targets, label_smoothing=config.label_smoothing)
        loss.backward()
        optimizer.step()
        return state

    return advance, None
