"""Define the state that a training run carries from step to step, and the optimizer that updates it."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

import qt_jax as qt
from experiments import models
from experiments.configs.training import Config
from experiments.training import quantizers

LeafPath = tuple[Any, ...]
"""Path of a leaf of the parameters, as `jax.tree_util` gives it."""


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


def random_key(seed: jax.Array | int, purpose: str, index: jax.Array | int) -> jax.Array:
    """Return the key for a purpose (parameters, order, augmentation, mirror) at the step or epoch `index`."""
    family = ("parameters", "order", "augmentation", "mirror").index(purpose)
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), family), index)


def learning_rate_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step."""
    if config.lr_schedule == "cosine":
        warmup = max(1, total_steps // 20)
        end = max(total_steps, warmup + 1)
        return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, end)
    peak = max(1, total_steps // 5)
    up = optax.linear_schedule(0.1 * config.learning_rate, config.learning_rate, peak)
    end = config.final_rate * config.learning_rate
    down = optax.linear_schedule(config.learning_rate, end, max(1, total_steps - peak))
    return optax.join_schedules([up, down], [peak])


def optimizer(config: Config, total_steps: int) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum and weight decay, followed by reverse pruning if the config has it.

    `quantizers.is_decayed` selects the decayed leaves. `update` takes `rate_scale`, and `batch_stats` for
    reverse pruning of folded kernels. Frozen leaves get no update.

    Raises:
      InvalidInput: The run ends before `--average-every` has replaced the parameters once.
    """
    if config.average_every > total_steps:
        raise qt.InvalidInput(
            f"--average-every {config.average_every} is more than the {total_steps} steps of the run: the "
            "average would never move"
        )
    frozen = is_frozen(config)
    chain = [
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(quantizers.is_decayed, params),
        ),
        optax.sgd(learning_rate_schedule(config, total_steps), config.momentum, nesterov=True),
        scaled_by_rate(),
    ]
    if config.bias_rate != 1.0:
        chain.append(optax.masked(optax.scale(config.bias_rate), lone_biases))
    if config.frozen:
        still = partial(jax.tree_util.tree_map_with_path, lambda path, _: frozen(path))
        chain.append(optax.masked(optax.set_to_zero(), still))
    if config.reverse_pruning is not None:
        chain.append(
            qt.reverse_pruning(
                config.reverse_pruning,
                every=config.reverse_pruning_every,
                start=round(config.reverse_pruning_start * total_steps),
                folded=config.reverse_pruning_folded,
                spread=config.reverse_pruning_spread,
                seed=config.seed,
                mask=lambda path, _: path[-1] == "kernel" and not frozen(path),
            )
        )
    return optax.chain(*chain)


def lone_biases(params: Any) -> Any:
    """Return a mask that is True for biases without a kernel beside them, as batch norm has.

    >>> lone_biases({"norm": {"bias": 0.0}, "conv": {"bias": 0.0, "kernel": 0.0}})
    {'conv': {'bias': False, 'kernel': False}, 'norm': {'bias': True}}
    """
    owners = {path[:-1] for path, _ in jax.tree.leaves_with_path(params) if path[-1].key == "kernel"}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "bias" and path[:-1] not in owners, params
    )


def is_frozen(config: Config) -> Callable[[LeafPath], bool]:
    """Return a function that tells whether a parameter stays as it is, by its path."""
    patterns = [re.compile(pattern) for pattern in config.frozen]

    def frozen(path: LeafPath) -> bool:
        name = "/".join(str(getattr(key, "key", key)) for key in path)
        return any(pattern.fullmatch(name) for pattern in patterns)

    return frozen


def move_average(config: Config, step: jax.Array, total: int, params: Any, average: Any) -> tuple[Any, Any]:
    """Return the parameters and their moving average after a step; the average is None without one."""
    if config.ema:
        return params, optax.incremental_update(params, average, 1.0 - config.ema)
    if config.average_every:
        return average_parameters(step, total, config.average_every, params, average)
    return params, average


def average_parameters(step: jax.Array, total: int, every: int, params: Any, average: Any) -> tuple[Any, Any]:
    """Move the average towards the parameters at every `every`-th step, and replace the parameters by it.

    The weight of the old average is 0.95^every (step / total)^3, so the average moves less and less.

    >>> params, average = average_parameters(jnp.int32(5), 10, 1, jnp.ones(1), jnp.zeros(1))
    >>> params.tolist() == average.tolist(), round(average.item(), 4)  # 1 - 0.95 / 8
    (True, 0.8813)
    """
    keep = jnp.float32(0.95**every) * (step.astype(jnp.float32) / total) ** 3
    moved = optax.incremental_update(params, average, 1.0 - keep)
    due = (step + 1) % every == 0

    def chosen(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, old)

    return chosen(moved, params), chosen(moved, average)


def scaled_by_rate() -> optax.GradientTransformationExtraArgs:
    """Multiply updates by the `rate_scale` that `update` is given, 1 by default."""

    def update(updates, state, params=None, *, rate_scale=None, **_):
        if rate_scale is None:
            return updates, state
        return jax.tree.map(lambda leaf: leaf * rate_scale.astype(leaf.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def taus(opt_state: optax.OptState) -> list[Any]:
    """Return the trees of reverse pruning's tau in the state of an optimizer. Empty without pruning."""
    return [{"tau": tau} for _, tau in optax.tree_utils.tree_get_all_with_path(opt_state, "tau")]


def thresholds(opt_state: optax.OptState) -> dict[str, float]:
    """Return reverse pruning's tau of each kernel by path, the mean over channels. Empty without pruning."""
    leaves = [leaf for found in taus(opt_state) for leaf in jax.tree.leaves_with_path(found["tau"])]
    return {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/"): float(jnp.mean(tau))
        for path, tau in leaves
        if jnp.all(jnp.isfinite(tau) & (tau > 0))
    }


def create_state(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    first: jax.Array | None = None,
    seed: jax.Array | None = None,
) -> TrainState:
    """Create the state before the first step, with all that the quantizer keeps attached.

    Args:
      config: Config of the run.
      model: Network to train.
      tx: Its optimizer.
      image_shape: Height, width and channels.
      first: Normalised images for a network that takes parameters from them, else None; see
        `models.fit_to_data`.
      seed: Seed of the parameters; None for the config's.

    Raises:
      InvalidInput: A pattern of `--frozen` matches no parameter.
    """

    def init(key, first):
        images = jnp.zeros((1, *image_shape), jnp.float32)
        variables = model.init(key, images)
        if first is not None:
            variables = {**variables, "params": models.fit_to_data(model, variables["params"], first)}
        _check_frozen(config, variables["params"])
        variables = quantizers.attach(config, model, variables, images)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=tx.init(params),
            average=params if config.averages else None,
            rate_scale=jnp.ones((), jnp.float32),
        )

    return jax.jit(init)(random_key(config.seed if seed is None else seed, "parameters", 0), first)


def _check_frozen(config: Config, params: Any) -> None:
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    for pattern in config.frozen:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise qt.InvalidInput(
                f"--frozen {pattern!r} matches no parameter; their paths are {', '.join(names)}"
            )
