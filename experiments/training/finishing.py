"""What happens to a network once, after its last step: it becomes the one that is deployed."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from experiments import models
from experiments.configs.training import Config, quant_config
from experiments.data import Dataset
from experiments.data.augment import normalize
from experiments.training import quantizers
from experiments.training.state import TrainState
from qt_jax.interception import COLLECTION, KERNEL

BATCH = 500
"""Images at once."""


def finished(config: Config, dataset: Dataset, state: TrainState) -> TrainState:
    """The state with learned clips of kernels applied, and batch norm measured anew if the config says so.

    LSQ clips every kernel to the ends of its learned grid in each forward pass, so that clipping the kernel
    itself changes nothing there, and hands the exported graph the range that was learned.
    """
    if config.quantizer == "lsq":
        state = state.replace(params=clipped_to_grid(state.params, state.batch_stats))
    if not config.reestimate:
        return state
    model = models.create(config.model, dataset.num_classes)  # float32, as it is exported
    images = dataset.train_images[: config.train_limit][: config.reestimate]
    variables = reestimated(model, state.deployed, images, dataset)
    if config.folded:
        variables = refolded(config, model, variables, images)
    return state.replace(batch_stats=variables[COLLECTION])


def reestimated(model: nn.Module, variables: Any, images: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    """The variables with batch norm pooled over uint8 images, less those that fill no batch, in float."""
    size = min(BATCH, len(images))
    batches = (
        normalize(images[start : start + size], dataset.mean, dataset.std)
        for start in range(0, len(images) - size + 1, size)
    )

    def forward(variables, batch):
        return model.apply(variables, batch, train=True, mutable=[COLLECTION])

    return qt.reestimate_batch_norm(forward, variables, batches)


def refolded(config: Config, model: nn.Module, variables: Any, images: np.ndarray) -> dict[str, Any]:
    """The variables with gains and ranges of kernels that belong to their present batch norm."""
    image_shape = images.shape[1:]
    variables = quantizers.fusion(model, image_shape).refresh(variables)
    unseen = {
        path: np.zeros_like(leaf) if KERNEL in path and path[-1] == "count" else leaf
        for path, leaf in flatten_dict(variables[COLLECTION]).items()
    }
    specs = dataclasses.replace(quant_config(config), activations=None)

    @jax.jit
    def observe(variables):
        with qt.quant_trim(specs, 0.0, train=True):
            images = np.zeros((1, *image_shape), np.float32)
            return model.apply(variables, images, train=False, mutable=[COLLECTION])[1][COLLECTION]

    observed = flatten_dict(observe({**variables, COLLECTION: unflatten_dict(unseen)}))
    kept = {
        path: observed[path] if KERNEL in path else leaf
        for path, leaf in flatten_dict(variables[COLLECTION]).items()
    }
    return {**variables, COLLECTION: unflatten_dict(kept)}


def clipped_to_grid(params: Any, batch_stats: Any) -> Any:
    """`params` with every kernel clipped to the range that `batch_stats` has of it."""
    ranges = flatten_dict(batch_stats)
    kernels = {}
    for path, leaf in flatten_dict(params).items():
        low, high = (ranges.get((*path[:-1], KERNEL, end)) for end in ("low", "high"))
        clips = path[-1] == "kernel" and low is not None
        kernels[path] = jax.numpy.clip(leaf, low, high) if clips else leaf
    return unflatten_dict(kernels)
