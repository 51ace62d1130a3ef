"""Define a whole training run as one compiled function of the data and a seed.

A `Speedrun` holds its settings: how long, at which rates, and when Quant-Trim sets in.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import qt_jax as qt
from experiments.data.augment import crop_flip, normalize
from experiments.models.speed_net import SpeedNet, whitening_kernel
from experiments.training.state import average_parameters
from experiments.training.step import make_logits
from qt_jax.interception import is_quant_trim_statistic

WHITENED = 5000
"""Images from which the whitening is computed."""


@dataclasses.dataclass(frozen=True)
class Speedrun:
    """Hold the settings of a run. The defaults were chosen on a validation split."""

    epochs: float = 13.0
    """Passes over the training images."""
    batch_size: int = 1024
    """Images per step. The rest of an epoch is dropped."""
    learning_rate: float = 1.5
    """Peak rate of SGD with Nesterov momentum on the mean loss."""
    momentum: float = 0.85
    """Nesterov momentum."""
    weight_decay: float = 1.3e-3
    """L2 penalty on kernels and, divided by the square of their rate, biases."""
    bias_rate: float = 64.0
    """Learning rate of biases, in units of that of kernels."""
    label_smoothing: float = 0.2
    """Share of the label spread over all classes."""
    shift: int = 2
    """Largest shift of images, in pixels."""
    average_every: int = 5
    """Steps between two replacements of the parameters by their moving average; 0 turns averaging off."""
    activation: Literal["relu", "gelu"] = "gelu"
    """Nonlinearity."""
    width: float = 1.0
    """Factor of the channels."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type; parameters and statistics stay in float32."""
    quant_trim: bool = True
    """Use fake quantization and reverse pruning; without them it is the float twin."""
    warmup: float = 0.3
    """Fraction of training with lambda zero: plain steps, in which the whitening's bias trains."""
    ramp_end: float = 0.85
    """Fraction of training at which lambda reaches one."""
    weight_quantile: float = 1.0
    """Upper quantile of |w| that sets a weight scale."""
    activation_quantile: float = 1.0
    """Upper quantile of an activation's range. The lower one is its complement."""
    reestimate: int = 8
    """Batches on which batch norm is re-estimated at the end, in the float network; 0 turns it off."""
    reverse_pruning: float | None = 0.99
    """Quantile of |w| to which kernels are pulled back in the ramp, every 25 steps; None turns it off."""

    def model(self, num_classes: int) -> nn.Module:
        """Return the network."""
        widths = tuple(max(8, round(self.width * features / 8) * 8) for features in (64, 256, 256))
        activation = {"relu": nn.relu, "gelu": nn.gelu}[self.activation]
        return SpeedNet(widths, num_classes, activation=activation, dtype=jnp.dtype(self.dtype))

    def quant_config(self) -> qt.QuantConfig | None:
        """Return W8A8, or None for the float twin."""
        if not self.quant_trim:
            return None
        return qt.QuantConfig(
            weights=qt.QuantSpec(8, quantile=self.weight_quantile),
            activations=qt.QuantSpec(8, symmetric=False, quantile=self.activation_quantile),
            momentum=0.9,
        )

    def lam(self, total: int) -> optax.Schedule:
        """Return lambda as a function of the step: the paper's three phases."""
        joint = self.warmup + (self.ramp_end - self.warmup) * 8 / 13
        return qt.schedules.warmup_quartic_quadratic(
            total, warmup=self.warmup, joint=joint, end=self.ramp_end
        )

    def rate(self, total: int) -> optax.Schedule:
        """Return the learning rate as a function of the step: up from a fifth of the peak, down to 7 %."""
        peak = max(1, round(0.23 * total))
        up = optax.linear_schedule(0.2 * self.learning_rate, self.learning_rate, peak)
        down = optax.linear_schedule(self.learning_rate, 0.07 * self.learning_rate, max(1, total - peak))
        return optax.join_schedules([up, down], [peak])

    def optimizer(self, total: int) -> optax.GradientTransformation:
        """Return SGD with biases at their own rate and a fixed whitening, followed by reverse pruning."""
        rate = self.rate(total)

        def group(factor: float) -> optax.GradientTransformation:
            return optax.chain(
                optax.add_decayed_weights(self.weight_decay / factor**2),
                optax.sgd(lambda step: factor * rate(step), self.momentum, nesterov=True),
            )

        groups = {"kernel": group(1.0), "bias": group(self.bias_rate), "fixed": optax.set_to_zero()}
        chain = [optax.partition(groups, lambda params: jax.tree_util.tree_map_with_path(_group, params))]
        if self.quant_trim and self.reverse_pruning is not None:
            start = round(self.warmup * total)
            pruned = {"every": 25, "start": start, "mask": lambda path, _: path[-1] == "kernel" != path[0]}
            chain.append(qt.reverse_pruning(self.reverse_pruning, **pruned))
        return optax.chain(*chain)


def _group(path: tuple[Any, ...], _: jax.Array) -> str:
    module, name = (key.key for key in path)
    if module == "whitening":
        return "fixed" if name == "kernel" else "kernel"
    return name


class State(NamedTuple):
    """Hold what one step passes to the next."""

    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any


def make_training(
    recipe: Speedrun, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int
) -> Callable[[jax.Array, jax.Array, jax.Array], dict[str, Any]]:
    """Build `train(images, labels, key) -> variables`, to be jitted: draw, train and average parameters.

    `images` are uint8 `(n, 32, 32, channels)` and `labels` int32 `(n,)`, on the device. Steps before the
    ramp of lambda are plain. From then on every step is fake-quantized.
    """
    model, config = recipe.model(num_classes), recipe.quant_config()

    def train(images: jax.Array, labels: jax.Array, key: jax.Array) -> dict[str, Any]:
        per_epoch = images.shape[0] // recipe.batch_size
        total = round(recipe.epochs * per_epoch)
        ramp = round(recipe.warmup * total)
        tx, lam = recipe.optimizer(total), recipe.lam(total)
        init_key, order_key, flip_key, shift_key = jax.random.split(key, 4)
        first = normalize(images[:WHITENED], mean, std)
        variables = model.init(init_key, first[:1])
        variables["params"]["whitening"]["kernel"] = whitening_kernel(first)
        if config is not None:
            variables = qt.attach_statistics(model, variables, config, first[:1])
        params = variables["params"]
        epochs = jax.random.split(order_key, -(-total // per_epoch))
        orders = jax.vmap(lambda key: jax.random.permutation(key, images.shape[0]))(epochs)
        orders = orders[:, : per_epoch * recipe.batch_size].reshape(-1, recipe.batch_size)
        mirrored = jax.random.bernoulli(flip_key, 0.5, images.shape[:1])

        def batch(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Return a batch of randomly shifted images, each mirrored in every other epoch."""
            chosen = orders[step]
            span = 2 * recipe.shift + 1
            offsets = jax.random.randint(jax.random.fold_in(shift_key, step), (recipe.batch_size, 2), 0, span)
            flips = mirrored[chosen] ^ (step // per_epoch % 2 == 1)
            moved = crop_flip(images[chosen], offsets, flips, recipe.shift)
            return normalize(moved, mean, std), labels[chosen]

        def advance(step: jax.Array, state: State, quantized: bool) -> State:
            inputs, targets = batch(step)
            targets = jax.nn.one_hot(targets, num_classes, dtype=jnp.float32)
            targets = optax.smooth_labels(targets, recipe.label_smoothing)

            def loss_fn(params: Any) -> tuple[jax.Array, Any]:
                if quantized:
                    fixed = jax.lax.stop_gradient(params["whitening"])
                    params = {**params, "whitening": fixed}
                forward = partial(model.apply, train=True, mutable=["batch_stats"])
                variables = {"params": params, "batch_stats": state.batch_stats}
                if quantized:
                    with qt.quant_trim(config, lam(step), train=True):
                        logits, updated = forward(variables, inputs)
                else:
                    logits, updated = forward(variables, inputs)
                return jnp.mean(optax.softmax_cross_entropy(logits, targets)), updated["batch_stats"]

            gradients, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
            updates, opt_state = tx.update(gradients, state.opt_state, state.params)
            params, average = optax.apply_updates(state.params, updates), state.average
            if recipe.average_every:
                params, average = average_parameters(step, total, recipe.average_every, params, average)
            return State(params, batch_stats, opt_state, average)

        state = State(params, variables["batch_stats"], tx.init(params), params)
        state = jax.lax.fori_loop(0, ramp, partial(advance, quantized=False), state)
        later = partial(advance, quantized=config is not None)
        state = jax.lax.fori_loop(ramp, total, later, state)
        final = state.average if recipe.average_every else state.params
        batch_stats = state.batch_stats
        if recipe.reestimate:
            size = min(recipe.reestimate, per_epoch) * recipe.batch_size
            batches = images[:size].reshape(-1, recipe.batch_size, *images.shape[1:])
            batch_stats = _remeasured(recipe.model(num_classes), final, batch_stats, batches, mean, std)
        return {"params": final, "batch_stats": batch_stats}

    return train


def _remeasured(model: Any, params: Any, batch_stats: Any, batches: jax.Array, mean: Any, std: Any) -> Any:
    """Return the statistics with those of batch norm averaged over batches. Ranges stay as they are."""
    model = model.clone(norm_momentum=0.0)

    def measure(images: jax.Array) -> Any:
        inputs = normalize(images, mean, std)
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, inputs, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    measured = jax.lax.map(measure, batches)
    return jax.tree.map_with_path(
        lambda path, old, new: (
            old
            if is_quant_trim_statistic(tuple(key.key for key in path))
            else jnp.mean(new, axis=0, dtype=old.dtype)
        ),
        batch_stats,
        measured,
    )


def make_evaluation(
    recipe: Speedrun, mean: tuple[float, ...], std: tuple[float, ...], num_classes: int
) -> Callable[..., jax.Array]:
    """Build `logits(variables, images, views) -> float32 (n, num_classes)`, see `make_logits`."""
    model = recipe.model(num_classes)
    return make_logits(partial(model.apply, train=False), mean, std)
