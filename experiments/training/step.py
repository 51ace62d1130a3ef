"""The train step and the evaluation, each one compiled function over data that stays on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs.cifar import Config
from experiments.data.augment import normalize, random_crop_flip
from experiments.training import quantizers
from experiments.training.state import TrainState, random_key

FLIPPABLE = {"cifar10", "cifar100", "fashion-mnist", "composed", "oxford-pet", "oxford-pet-128"}
"""Data sets whose classes survive a left-right flip."""


class Split(NamedTuple):
    """Images `(n, height, width, channels)` uint8 and their labels, on the device: `(n,)` int32, or for
    segmentation `(n, height, width)` uint8.
    """

    images: jax.Array
    labels: jax.Array


class Totals(NamedTuple):
    """Sums over the steps since they were last read; float32 scalars, read by the host when it logs.

    In segmentation the `correct` of an image is the share of its pixels that are.
    """

    loss: jax.Array
    correct: jax.Array
    images: jax.Array

    @classmethod
    def zero(cls) -> "Totals":
        """Nothing summed yet."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def make_train_step(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    lam: Callable[[jax.Array], jax.Array],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
) -> Callable[..., tuple[TrainState, Totals]]:
    """Builds `run(state, totals, split, order, steps) -> (state, totals)`, compiled once.

    `order` is the epoch's permutation of the split, `(steps per epoch * batch,)` int32; `steps` (int32) is
    the number of steps to take. With `steps_per_dispatch` 1 it takes exactly one, without a loop: inside a
    loop XLA's CPU backend runs convolutions on one thread, forty times slower.
    """

    def step(state: TrainState, totals: Totals, split: Split, order: jax.Array):
        position = (state.step % (order.size // config.batch_size)) * config.batch_size
        chosen = jax.lax.dynamic_slice(order, (position,), (config.batch_size,))
        key = random_key(config, "augmentation", state.step)
        move = partial(random_crop_flip, key, flip=config.dataset in FLIPPABLE)
        images, labels = normalize(move(split.images[chosen]), mean, std), split.labels[chosen]
        if labels.ndim > 1:  # a mask moves with its image, for it is the same key
            labels = move(labels[..., None])[..., 0].astype(jnp.int32)
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), config.label_smoothing
        )

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = quantizers.training_forward(config, model, variables, images, lam(state.step))
            return jnp.mean(optax.softmax_cross_entropy(logits, targets)), (
                logits,
                updated.get("batch_stats", {}),
            )

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        params, average = (
            quantizers.started(config, tree, state.batch_stats, batch_stats)
            for tree in (state.params, state.average)
        )
        updates, opt_state = tx.update(gradients, state.opt_state, params, batch_stats=batch_stats)
        params = optax.apply_updates(params, updates)
        if config.ema:
            average = optax.incremental_update(params, average, 1.0 - config.ema)
        final = average if config.ema else params
        batch_stats = quantizers.published(config, final, batch_stats)
        batch_stats = quantizers.with_gains(config, model, final, batch_stats, images.shape[1:])
        correct = jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.float32) / labels[0].size
        seen = Totals(loss * config.batch_size, correct, jnp.float32(config.batch_size))
        state = TrainState(state.step + 1, params, batch_stats, opt_state, average)
        return state, jax.tree.map(jnp.add, totals, seen)

    def run(state, totals, split, order, steps):
        if config.steps_per_dispatch == 1:
            return step(state, totals, split, order)
        return jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry, split, order), (state, totals))

    return jax.jit(run, donate_argnums=(0, 1))


def epoch_order(config: Config, images: int, epoch: int) -> jax.Array:
    """The order of epoch `epoch`: a permutation of the split, cut to whole batches; int32."""
    shuffled = jax.random.permutation(random_key(config, "order", epoch), images)
    return shuffled[: images // config.batch_size * config.batch_size]


def make_predict(
    config: Config, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], *, quantized: bool
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Builds `predict(variables, images) -> logits` for evaluation, with statistics frozen.

    Args:
      quantized: full fake quantization (lambda 1) instead of the plain network.

    Returns:
      A function of variables and uint8 images `(n, height, width, channels)`; float32 logits
      `(n, num_classes)`, or for segmentation `(n, height, width, num_classes)`, computed in batches of one
      shape: 500 images, fewer where they are larger than 32x32.
    """

    @jax.jit
    def logits(variables, images):
        images = normalize(images, mean, std)
        if not quantized:
            return model.apply(variables, images, train=False)
        return quantizers.quantized_forward(config, model, variables, images)

    def predict(variables, images):
        n, (height, width) = len(images), images.shape[1:3]
        batch = min(500, max(1, 500 * 32 * 32 // (height * width)))
        padded = np.concatenate([images, np.zeros((-n % batch, *images.shape[1:]), images.dtype)])
        parts = [logits(variables, padded[i : i + batch]) for i in range(0, n, batch)]
        return np.concatenate([np.asarray(part) for part in parts])[:n]

    return predict
