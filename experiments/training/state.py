"""Define the state that a training run carries from step to step, and the optimizer that updates it."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qt_jax as qt
from experiments.configs.training import Config
from experiments.training import quantizers


@flax.struct.dataclass
class TrainState:
    """Hold all that a checkpoint holds. Every random number is drawn from the seed and `step`."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    average: Any
    """Moving average of `params`, or None."""
    rate_scale: Any = np.float32(1.0)
    """Factor of the learning rate, a float32 scalar. It is halved each time a diverged run goes back."""

    @property
    def deployed(self) -> dict[str, Any]:
        """Return the variables that are evaluated and exported."""
        params = self.params if self.average is None else self.average
        return {"params": quantizers.plain(params), "batch_stats": self.batch_stats}


def random_key(config: Config, purpose: str, index: jax.Array | int) -> jax.Array:
    """Return the key for a purpose (parameters, order, augmentation) at the step or epoch `index`."""
    family = ("parameters", "order", "augmentation").index(purpose)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), family), index)


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    if config.lr_schedule == "cosine":
        warmup = max(1, total_steps // 20)
        end = max(total_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, end)
    peak = max(1, total_steps // 5)
    up = optax.linear_schedule(0.1 * config.learning_rate, config.learning_rate, peak)
    down = optax.linear_schedule(config.learning_rate, 0.0, max(1, total_steps - peak))
    return optax.join_schedules([up, down], [peak])


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum and weight decay, followed by reverse pruning if the config has it.

    `quantizers.is_decayed` selects the decayed leaves. `update` takes `rate_scale`, and `batch_stats` for
    reverse pruning of folded kernels.
    """
    chain = [
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(quantizers.is_decayed, params),
        ),
        optax.sgd(learning_rate_schedule(config, total_steps), config.momentum, nesterov=True),
        scaled_by_rate(),
    ]
    if config.reverse_pruning is not None:
        chain.append(
            qt.reverse_pruning(
                config.reverse_pruning,
                every=config.reverse_pruning_every,
                start=round(config.reverse_pruning_start * total_steps),
                folded=config.reverse_pruning_folded,
                spread=config.reverse_pruning_spread,
                seed=config.seed,
            )
        )
    return optax.chain(*chain)


def scaled_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply updates by the `rate_scale` that `update` is given, 1 by default."""

    def update(updates, state, params=None, *, rate_scale=None, **_):
        if rate_scale is None:
            return updates, state
        return jax.tree.map(lambda leaf: leaf * rate_scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def thresholds(opt_state: optax.OptState) -> dict[str, float]:
    """Return reverse pruning's tau of each kernel by path, the mean over channels. Empty without pruning."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "tau")
    leaves = [leaf for _, tau in found for leaf in jax.tree.leaves_with_path(tau)]
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): float(jnp.mean(tau))
        for path, tau in leaves
        if jnp.all(jnp.isfinite(tau))
    }


def create_state(
    config: Config, model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, ...]
) -> TrainState:
    """Create the state before the first step, with all that the quantizer keeps attached."""

    def init(key):
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = quantizers.attach(config, model, model.init(key, images), images)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
            average=params if config.ema else None,
            rate_scale=jnp.ones((), jnp.float32),
        )

    return jax.jit(init)(random_key(config, "parameters", 0))
