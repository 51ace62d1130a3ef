"""Finish a network after its last step: clip learned kernels and re-estimate batch norm for deployment."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import models
from experiments.configs.training import Config, quant_config
from experiments.data import Dataset
from experiments.data.augment import normalize
from experiments.training import quantizers
from experiments.training.state import TrainState
from qt_jax import recipes
from qt_jax.batch_norm import reestimator
from qt_jax.interception import COLLECTION, KERNEL

BATCH = 500
"""Images in one forward pass."""

Variables = dict[str, Any]
"""Flax collections."""


def finish(config: Config, dataset: Dataset, state: TrainState) -> TrainState:
    """Return the finished state of one run, see `finisher`."""
    return finisher(config, dataset)(state)


def finisher(config: Config, dataset: Dataset) -> Callable[[TrainState], TrainState]:
    """Build `finish(state) -> state`, compiled once for all states of a config.

    It applies the learned clips of kernels, and measures batch norm again if the config asks for it. Gains
    and ranges of folded kernels then follow; in training they belong to the parameters, not to their average.
    LSQ clips every kernel to the ends of its learned grid in each forward pass. Clipping the kernel itself
    changes nothing there, and gives the exported graph the learned range.
    """
    model = models.create(config.model, dataset.num_classes)  # float32, as it is exported
    images = dataset.train_images[: config.train_limit][: config.reestimate]
    measure = batch_norm_on(model, images, dataset)
    refold = refolder(config, model, images.shape[1:]) if config.folded else None

    def finish(state: TrainState) -> TrainState:
        if config.quantizer == "lsq":
            clipped = clip_to_grid(state.params, state.batch_stats)
            state = state.replace(params=clipped)
            if config.averages:
                state = state.replace(average=clip_to_grid(state.average, state.batch_stats))
        variables = measure(state.deployed) if config.reestimate else state.deployed
        if refold is not None and (config.reestimate or config.averages):
            variables = refold(variables)
        return state.replace(batch_stats=variables[COLLECTION])

    return finish


def clip_to_grid(params: Any, batch_stats: Any) -> Any:
    """Return `params` with every kernel clipped to its range in `batch_stats`."""
    ranges = flatten_dict(batch_stats)
    kernels = {}
    for path, leaf in flatten_dict(params).items():
        low, high = (ranges.get((*path[:-1], KERNEL, end)) for end in ("low", "high"))
        clips = path[-1] == "kernel" and low is not None
        kernels[path] = jax.numpy.clip(leaf, low, high) if clips else leaf
    return unflatten_dict(kernels)


def batch_norm_on(model: nn.Module, images: np.ndarray, dataset: Dataset) -> Callable[[Variables], Variables]:
    """Build a function that returns variables with batch norm pooled over uint8 images, in the float network.

    Images that do not fill a batch are left out.
    """

    @reestimator
    def pooled(variables, batch):
        return model.apply(variables, batch, train=True, mutable=[COLLECTION])

    def measure(variables: Variables) -> Variables:
        size = min(BATCH, len(images))
        starts = range(0, len(images) - size + 1, size)
        batches = (normalize(images[start : start + size], dataset.mean, dataset.std) for start in starts)
        return pooled(variables, batches)

    return measure


def refolder(
    config: Config, model: nn.Module, image_shape: tuple[int, ...]
) -> Callable[[Variables], Variables]:
    """Build a function that returns variables with the gains and kernel ranges that batch norm implies."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    fusion = quantizers.fusion(model, image_shape)
    return recipes.refolder(model, quant_config(config), fusion, images, train=False)
