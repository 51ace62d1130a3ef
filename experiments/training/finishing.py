"""Finish a network after its last step: clip learned kernels and re-estimate batch norm for deployment."""

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
"""Images in one forward pass."""


def finish(config: Config, dataset: Dataset, state: TrainState) -> TrainState:
    """Return the state with learned clips of kernels applied, and with batch norm re-estimated if asked for.

    LSQ clips every kernel to the ends of its learned grid in each forward pass. Clipping the kernel itself
    changes nothing there, and gives the exported graph the learned range.
    """
    if config.quantizer == "lsq":
        state = state.replace(params=clip_to_grid(state.params, state.batch_stats))
    if not config.reestimate:
        return state
    model = models.create(config.model, dataset.num_classes)  # float32, as it is exported
    images = dataset.train_images[: config.train_limit][: config.reestimate]
    variables = reestimate(model, state.deployed, images, dataset)
    if config.folded:
        variables = refold(config, model, variables, images)
    return state.replace(batch_stats=variables[COLLECTION])


def clip_to_grid(params: Any, batch_stats: Any) -> Any:
    """Return `params` with every kernel clipped to its range in `batch_stats`."""
    ranges = flatten_dict(batch_stats)
    kernels = {}
    for path, leaf in flatten_dict(params).items():
        low, high = (ranges.get((*path[:-1], KERNEL, end)) for end in ("low", "high"))
        clips = path[-1] == "kernel" and low is not None
        kernels[path] = jax.numpy.clip(leaf, low, high) if clips else leaf
    return unflatten_dict(kernels)


def reestimate(model: nn.Module, variables: Any, images: np.ndarray, dataset: Dataset) -> dict[str, Any]:
    """Return the variables with batch norm pooled over uint8 images, in the float network.

    Images that do not fill a batch are left out.
    """
    size = min(BATCH, len(images))
    batches = (
        normalize(images[start : start + size], dataset.mean, dataset.std)
        for start in range(0, len(images) - size + 1, size)
    )

    def forward(variables, batch):
        return model.apply(variables, batch, train=True, mutable=[COLLECTION])

    return qt.reestimate_batch_norm(forward, variables, batches)


def refold(config: Config, model: nn.Module, variables: Any, images: np.ndarray) -> dict[str, Any]:
    """Return the variables with the gains and the ranges of kernels that their present batch norm implies."""
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
