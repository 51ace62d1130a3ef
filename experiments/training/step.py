"""Build the train step and the evaluation, each one compiled function over data that stays on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.baselines.regularizers import REGULARIZERS, sharpest
from experiments.configs.training import Config
from experiments.data.augment import normalize, random_crop_flip, weighted_views
from experiments.devices import constrained, replicated, split_rows
from experiments.training import quantizers
from experiments.training.state import TrainState, move_average, random_key

FLIPPABLE = {"cifar10", "cifar100", "fashion-mnist", "composed", "oxford-pet", "oxford-pet-128"}
"""Data sets whose classes survive a left-right flip."""

CHUNKS = (2000, 1000)
"""Images in one forward pass of `make_logits`: the first that divides their number."""


class Split(NamedTuple):
    """Hold images and labels on the device.

    Images are uint8 `(n, height, width, channels)`. Labels are int32 `(n,)`, or for segmentation uint8
    `(n, height, width)`.
    """

    images: jax.Array
    labels: jax.Array


class Totals(NamedTuple):
    """Hold sums over the steps since they were last read: float32 scalars that the host reads when it logs.

    In segmentation, the `correct` of an image is the share of its pixels that are correct.
    """

    loss: jax.Array
    correct: jax.Array
    images: jax.Array

    @classmethod
    def zero(cls) -> "Totals":
        """Return sums of nothing."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def make_train_step(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    lam: Callable[[jax.Array], jax.Array],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    mesh: Mesh | None = None,
    total: int = 1,
) -> Callable[..., tuple[TrainState, Totals]]:
    """Build `run(state, totals, split, order, steps, seed) -> (state, totals)`, compiled once.

    `order` is the epoch's permutation of the split, `(steps per epoch * batch,)` int32. `steps` (int32) is
    the number of steps to take. With `steps_per_dispatch` 1 it takes exactly one, without a loop: inside a
    loop XLA's CPU backend runs convolutions on one thread, forty times slower. `seed` (uint32) is that of the
    augmentation; without it the config's is compiled in. The seeds of reverse pruning and of vendors' grids
    are always the config's.

    Args:
      config: Config of the run.
      model: Network to train.
      tx: Its optimizer, as `state.optimizer` builds it.
      lam: Lambda by step.
      mean, std: One number per channel, as `augment.normalize` takes them.
      num_classes: Number of classes.
      mesh: Devices among which every batch is divided. `state`, `totals` and `order` are replicated on them,
        and the rows of `split` may be spread. None stands for the one device on which the arguments are.
      total: Steps of the whole run, for `--average-every`.
    """

    gradient_fn = jax.value_and_grad(_loss_function(config, model, lam, num_classes), has_aux=True)

    def gradients_of(state: TrainState, images: jax.Array, labels: jax.Array):
        """Return the mean loss, the number of right decisions, the statistics and the mean gradients."""
        if config.accumulate == 1:
            batch = (state.batch_stats, images, labels, state.step)
            (loss, (correct, batch_stats)), gradients = gradient_fn(state.params, *batch)
            if config.sharpness:
                steepest = sharpest(state.params, gradients, config.sharpness)
                _, gradients = gradient_fn(steepest, *batch)
            return loss, correct, batch_stats, gradients

        def add(carry, part):
            loss, correct, batch_stats, gradients = carry
            (more, (right, batch_stats)), gradient = gradient_fn(state.params, batch_stats, *part, state.step)
            return (loss + more, correct + right, batch_stats, optax.tree.add(gradients, gradient)), None

        count = config.accumulate
        parts = tuple(constrained(x.reshape(count, -1, *x.shape[1:]), mesh, axis=1) for x in (images, labels))
        zero = jnp.zeros((), jnp.float32)
        start = (zero, zero, state.batch_stats, optax.tree.zeros_like(state.params))
        unroll = count if jax.default_backend() == "cpu" else 1
        (loss, correct, batch_stats, gradients), _ = jax.lax.scan(add, start, parts, unroll=unroll)
        mean_of = 1.0 / count
        return loss * mean_of, correct, batch_stats, optax.tree.scale(mean_of, gradients)

    def step(state: TrainState, totals: Totals, split: Split, order: jax.Array, seed: jax.Array | None):
        images, labels = draw_batch(config, split, order, state.step, mesh, seed)
        images = normalize(images, mean, std)
        loss, correct, batch_stats, gradients = gradients_of(state, images, labels)
        params, average = (
            quantizers.initialize_learned(config, tree, state.batch_stats, batch_stats)
            for tree in (state.params, state.average)
        )
        updates, opt_state = tx.update(
            gradients, state.opt_state, params, batch_stats=batch_stats, rate_scale=state.rate_scale
        )
        params = optax.apply_updates(params, updates)
        params, average = move_average(config, state.step, total, params, average)
        final = average if config.averages else params
        batch_stats = quantizers.publish_learned(config, final, batch_stats)
        batch_stats = quantizers.refresh_gains(config, model, params, batch_stats, images.shape[1:])
        seen = Totals(loss * config.batch_size, correct, jnp.float32(config.batch_size))
        state = TrainState(state.step + 1, params, batch_stats, opt_state, average, state.rate_scale)
        return state, jax.tree.map(jnp.add, totals, seen)

    def run(state, totals, split, order, steps, seed=None):
        if config.steps_per_dispatch == 1:
            return step(state, totals, split, order, seed)
        return jax.lax.fori_loop(0, steps, lambda _, carry: step(*carry, split, order, seed), (state, totals))

    placed = None if mesh is None else replicated(mesh)
    return jax.jit(run, donate_argnums=(0, 1), out_shardings=placed)


def _loss_function(
    config: Config, model: nn.Module, lam: Callable[[jax.Array], jax.Array], num_classes: int
) -> Callable[..., tuple[jax.Array, tuple[jax.Array, Any]]]:
    """Build `loss(params, batch_stats, images, labels, step) -> (mean loss, (correct, batch_stats))`."""

    def loss_fn(params, batch_stats, images, labels, step):
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), config.label_smoothing
        )

        def forward(params, images):
            variables = {"params": params, "batch_stats": batch_stats}
            return quantizers.training_forward(config, model, variables, images, lam(step))

        if config.remat:
            forward = jax.checkpoint(forward, policy=_is_product)
        logits, updated = forward(params, images)
        loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        if config.regularizer != "none":
            loss += config.regularizer_weight * REGULARIZERS[config.regularizer](params)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.float32) / labels[0].size
        return loss, (correct, updated.get("batch_stats", {}))

    return loss_fn


def draw_batch(
    config: Config,
    split: Split,
    order: jax.Array,
    step: jax.Array,
    mesh: Mesh | None = None,
    seed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw the augmented uint8 images and int32 labels of one step, only from the seed and the step."""
    per_epoch = order.size // config.batch_size
    position = (step % per_epoch) * config.batch_size
    chosen = jax.lax.dynamic_slice(order, (position,), (config.batch_size,))
    seed = config.seed if seed is None else seed
    flip: bool | jax.Array = config.dataset in FLIPPABLE
    if flip and config.flips == "alternating":
        keys = jax.vmap(partial(random_key, seed, "mirror"))(chosen)
        flip = jax.vmap(jax.random.bernoulli)(keys) ^ (step // per_epoch % 2 == 1)
    move = partial(random_crop_flip, random_key(seed, "augmentation", step), pad=config.shift, flip=flip)
    images, labels = (constrained(rows[chosen], mesh) for rows in split)
    images = move(images)
    if labels.ndim > 1:  # the same key moves a mask with its image
        labels = move(labels[..., None])[..., 0].astype(jnp.int32)
    return images, labels


def _is_product(primitive: Any, *_: Any, **__: Any) -> bool:
    """Tell whether `--remat` keeps an output for the backward pass: of convolutions and matrix products."""
    return primitive in (jax.lax.conv_general_dilated_p, jax.lax.dot_general_p)


def epoch_order(config: Config, images: int, epoch: int, seed: jax.Array | None = None) -> jax.Array:
    """Return the order of an epoch: an int32 permutation of the split, cut to whole batches."""
    seed = config.seed if seed is None else seed
    shuffled = jax.random.permutation(random_key(seed, "order", epoch), images)
    return shuffled[: images // config.batch_size * config.batch_size]


def make_predict(
    config: Config,
    model: nn.Module,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    quantized: bool,
    mesh: Mesh | None = None,
) -> Callable[[Any, np.ndarray], np.ndarray]:
    """Build `predict(variables, images) -> logits` for evaluation, with statistics frozen.

    Args:
      config: Config of the run.
      model: Network to evaluate.
      mean, std: One number per channel, as `augment.normalize` takes them.
      quantized: Full fake quantization (lambda 1) instead of the plain network.
      mesh: As for `make_train_step`.

    Returns:
      A function of variables and uint8 images `(n, height, width, channels)`. It returns float32 logits
      `(n, num_classes)`, or for segmentation `(n, height, width, num_classes)`. It computes them in batches
      of one shape: 500 images, fewer where they are larger than 32x32, rounded up to a multiple of the
      devices.
    """

    def logits(variables, images):
        images = normalize(images, mean, std)
        if not quantized:
            return model.apply(variables, images, train=False)
        return quantizers.quantized_forward(config, model, variables, images)

    placed = None if mesh is None else replicated(mesh)
    logits = jax.jit(logits, out_shardings=placed)

    def predict(variables, images):
        n, (height, width) = len(images), images.shape[1:3]
        batch = min(500, max(1, 500 * 32 * 32 // (height * width)))
        if mesh is not None:
            batch = -(-batch // mesh.size) * mesh.size
        padded = np.concatenate([images, np.zeros((-n % batch, *images.shape[1:]), images.dtype)])
        parts = (padded[i : i + batch] for i in range(0, n, batch))
        if mesh is not None:
            parts = (split_rows(part, mesh) for part in parts)
        return np.concatenate([np.asarray(logits(variables, part)) for part in parts])[:n]

    return predict


def make_logits(
    forward: Callable[[Any, jax.Array], jax.Array], mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any, jax.Array, int], jax.Array]:
    """Build `logits(variables, images, views) -> float32 (n, num_classes)`, one function to be jitted.

    It averages the logits over the views of `weighted_views`. `images` are uint8 on the device; `views` is
    static under jit. Where n is a multiple of `CHUNKS`, they are computed in a loop over chunks of that many.

    Args:
      forward: `(variables, images) -> logits` of normalised images.
      mean, std: One number per channel, as `augment.normalize` takes them.
    """

    def logits(variables: Any, images: jax.Array, views: int) -> jax.Array:
        def seen(part: jax.Array) -> jax.Array:
            return sum(
                weight * forward(variables, normalize(view, mean, std))
                for weight, view in weighted_views(part, views)
            )

        size = next((size for size in CHUNKS if len(images) % size == 0), len(images))
        found = jax.lax.map(seen, images.reshape(-1, size, *images.shape[1:]))
        return found.reshape(-1, found.shape[-1])

    return logits
