"""Train networks of one config for any seed: everything is compiled once, and the data stay on the device.

A seed is an argument of the compiled functions, not a constant in them. Several seeds may also be trained at
once, by `jax.vmap`. No checkpoint is written on the way, and the host reads nothing before the last step.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from experiments.configs.training import Config, lambda_schedule
from experiments.data import Dataset
from experiments.data.augment import VIEWS
from experiments.training import quantizers
from experiments.training.divergence import are_finite, is_sound
from experiments.training.finishing import finisher
from experiments.training.program import first_images, start_from
from experiments.training.state import (
    TrainState,
    create_state,
    learning_rate_schedule,
    optimizer,
    taus,
    thresholds,
)
from experiments.training.step import FLIPPABLE, Split, Totals, epoch_order, make_logits, make_train_step

Network = dict[str, Any]
"""The variables that are deployed: `params` and `batch_stats`."""

Curve = list[dict[str, Any]]
"""A dict per epoch: epoch, step, loss, accuracy, lambda, learning_rate and tau."""


class Placed(NamedTuple):
    """Hold the splits of a data set on the device."""

    training: Split
    validation: Split
    test: Split


class SeedProgram(NamedTuple):
    """Hold the functions that train and measure networks of one config.

    With several seeds at once, states, orders and sums have the seeds as their first axis.
    """

    config: Config
    steps_per_epoch: int
    at_once: int
    """Seeds in one call."""
    split: Split
    create: Callable[[Any], TrainState]
    """`create(seed) -> state`."""
    order: Callable[[Any, Any], jax.Array]
    """`order(epoch, seed)` gives the order of an epoch, counted from 0."""
    run: Callable[..., tuple[TrainState, Totals]]
    """`run(state, totals, split, order, steps, seed)`, as `make_train_step` builds it."""
    finish: Callable[[TrainState], TrainState]
    """Finishes the state of one seed, as `finisher` builds it."""
    measure: Callable[[Network], dict[str, float | None]]
    """Measures the accuracies of one network, as `make_measurement` builds it."""
    lam: Callable[[int], Any]
    rate: Callable[[int], Any]


class Trained(NamedTuple):
    """Hold what came of one seed.

    Attributes:
      network: The deployed variables, on the host.
      curve: The course of training.
      accuracies: As `SeedProgram.measure` returns them.
      seconds: From the draw of the parameters to the last measurement of batch norm, divided by the seeds
        that were trained at once.
    """

    network: Network
    curve: Curve
    accuracies: dict[str, float | None]
    seconds: float

    @property
    def is_finite(self) -> bool:
        """Tell whether every number of the network is finite, and every loss sound."""
        return are_finite(self.network) and all(is_sound(row["loss"]) for row in self.curve)


def place(dataset: Dataset, limit: int | None) -> Placed:
    """Place the splits of a data set on the device, with at most `limit` training images."""
    return Placed(
        Split(jnp.asarray(dataset.train_images[:limit]), jnp.asarray(dataset.train_labels[:limit])),
        Split(jnp.asarray(dataset.validation_images), jnp.asarray(dataset.validation_labels)),
        Split(jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)),
    )


def build(config: Config, dataset: Dataset, data: Placed, at_once: int = 1) -> SeedProgram:
    """Build the program of a config. Nothing is compiled yet.

    Args:
      config: Config of training. Its own seed is that of reverse pruning and of vendors' grids, for all
        networks.
      dataset: The data set.
      data: Its splits on the device.
      at_once: Seeds in one call.
    """
    images, seen = len(data.training.images), dataset.train_images[: config.train_limit]
    model = models.create(config.model, dataset.num_classes, jnp.dtype(config.dtype))
    per_epoch = images // config.batch_size
    total = per_epoch * config.epochs
    tx, lam = optimizer(config, total), lambda_schedule(config, total)
    shape, first = seen.shape[1:], first_images(model, seen, dataset)
    constants = (dataset.mean, dataset.std, dataset.num_classes)
    run = make_train_step(config, model, tx, lam, *constants, total=total)

    def create(first: jax.Array | None, seed: jax.Array) -> TrainState:
        return create_state(config, model, tx, shape, first, seed)

    def order(epoch: jax.Array, seed: jax.Array) -> jax.Array:
        return epoch_order(config, images, epoch, seed)

    if at_once > 1:
        create, order = (jax.vmap(function, in_axes=(None, 0)) for function in (create, order))
        run = jax.jit(jax.vmap(run, in_axes=(0, 0, None, 0, None, 0)), donate_argnums=(0, 1))
    create = jax.jit(create)
    return SeedProgram(
        config,
        per_epoch,
        at_once,
        data.training,
        create=lambda seed: create(first, seed),
        order=jax.jit(order),
        run=run,
        finish=finisher(config, dataset),
        measure=make_measurement(config, dataset, data),
        lam=lam,
        rate=learning_rate_schedule(config, total),
    )


def make_measurement(
    config: Config, dataset: Dataset, data: Placed
) -> Callable[[Network], dict[str, float | None]]:
    """Build `measure(network) -> accuracies`, in float32, as networks are exported.

    The accuracies are `validation_fp32`, `top1` and `top1_six_views` of the plain network, and
    `validation_fake_quant` and `top1_fake_quant` of the fake-quantized one. The last two are None for methods
    without fake quantization, and those of six views for images that are not mirrored.
    """
    model = models.create(config.model, dataset.num_classes)
    views = VIEWS if config.dataset in FLIPPABLE else 1

    def plain(variables: Network, images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)

    def quantized(variables: Network, images: jax.Array) -> jax.Array:
        return quantizers.quantized_forward(config, model, variables, images)

    forwards = {"fp32": plain} | ({"fake_quant": quantized} if config.sched != "none" else {})

    @jax.jit
    def measured(variables: Network, data: Placed) -> dict[str, jax.Array]:
        found = {}
        for name, forward in forwards.items():
            logits = make_logits(forward, dataset.mean, dataset.std)
            found[f"validation_{name}"] = _accuracy(
                logits(variables, data.validation.images, 1), data.validation
            )
            found[f"test_{name}"] = _accuracy(logits(variables, data.test.images, 1), data.test)
        six = make_logits(plain, dataset.mean, dataset.std)(variables, data.test.images, views)
        return found | {"six_views": _accuracy(six, data.test)}

    def measure(variables: Network) -> dict[str, float | None]:
        found = {name: float(value) for name, value in measured(variables, data).items()}
        return {
            "validation_fp32": found["validation_fp32"],
            "validation_fake_quant": found.get("validation_fake_quant"),
            "top1": found["test_fp32"],
            "top1_fake_quant": found.get("test_fake_quant"),
            "top1_six_views": found["six_views"] if views == VIEWS else None,
        }

    return measure


def _accuracy(logits: jax.Array, split: Split) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, -1) == split.labels, dtype=jnp.float32)


def rehearsed(program: SeedProgram) -> SeedProgram:
    """Compile all functions of a program, run each of them once, and return the program as compiled.

    No training pays for compilation, for loading kernels or for filling caches then.
    """
    seed = _seeds(range(program.at_once))
    arguments = (program.create(seed), _zero(program), program.split, program.order(np.int32(0), seed))
    run = program.run.lower(*arguments, np.int32(1), seed).compile()
    state, _ = run(*arguments, np.int32(1), seed)
    program.measure(program.finish(_one(program, jax.device_get(state), 0)).deployed)
    return program._replace(run=run)


def train(
    program: SeedProgram, seeds: Sequence[int], start: Sequence[tuple[Network, Path]] = ()
) -> list[Trained]:
    """Train the networks of some seeds, from drawn parameters or from other networks.

    Args:
      program: A program, rehearsed or not.
      seeds: As many seeds as the program trains at once.
      start: For each seed the network that it starts from, and the file that held it.

    Returns:
      What came of each seed. Training that diverges ends like any other, see `Trained.is_finite`.

    Raises:
      InvalidInput: A network to start from is another one.
    """
    seed = _seeds(seeds)
    started = time.perf_counter()
    state = program.create(seed)
    if start:
        single = [_one(program, state, index) for index in range(len(seeds))]
        begun = [
            start_from(one, network["params"], network["batch_stats"], file)
            for one, (network, file) in zip(single, start, strict=True)
        ]
        state = begun[0] if program.at_once == 1 else jax.tree.map(lambda *rows: jnp.stack(rows), *begun)
    state, sums, pulled = _all_epochs(program, state, seed)
    state = jax.device_get(state)
    finished = [_finished(program, _one(program, state, index)) for index in range(len(seeds))]
    networks = jax.device_get([one.deployed for one in finished])
    seconds = (time.perf_counter() - started) / len(seeds)
    sums, pulled = jax.device_get((sums, pulled))
    return [
        Trained(
            network, _curve(program, _one(program, (sums, pulled), index)), program.measure(network), seconds
        )
        for index, network in enumerate(networks)
    ]


def _all_epochs(
    program: SeedProgram, state: TrainState, seed: jax.Array
) -> tuple[TrainState, list[Totals], list[Any]]:
    """Take all steps, and return the last state with the sums and the thresholds of each epoch."""
    sums, pulled, per_dispatch = [], [], program.config.steps_per_dispatch
    for epoch in range(program.config.epochs):
        totals, order = _zero(program), program.order(np.int32(epoch), seed)
        for done in range(0, program.steps_per_epoch, per_dispatch):
            steps = min(per_dispatch, program.steps_per_epoch - done)
            state, totals = program.run(state, totals, program.split, order, np.int32(steps), seed)
        sums.append(totals)
        pulled.append(jax.tree.map(jnp.copy, taus(state.opt_state)))  # the next step overwrites the state
    return state, sums, pulled


def _finished(program: SeedProgram, state: TrainState) -> TrainState:
    """Return the finished state of one seed. A diverged one stays as it is: nothing can be measured on it."""
    return program.finish(state) if are_finite(state.params) else state


def _curve(program: SeedProgram, measured: tuple[list[Totals], list[Any]]) -> Curve:
    """Return the course of training from the sums and the thresholds of each epoch."""
    rows = []
    for epoch, (totals, pulled) in enumerate(zip(*measured, strict=True), start=1):
        step, images = epoch * program.steps_per_epoch, float(totals.images)
        rows.append(
            {
                "epoch": epoch,
                "step": step,
                "loss": float(totals.loss) / images,
                "accuracy": float(totals.correct) / images,
                "lambda": float(program.lam(step)),
                "learning_rate": float(program.rate(step)),
                "tau": thresholds(pulled),
            }
        )
    return rows


def _seeds(seeds: Sequence[int]) -> jax.Array:
    """Return the seeds as the functions of a program take them: one, or an array."""
    return jnp.asarray(seeds[0] if len(seeds) == 1 else list(seeds), jnp.uint32)


def _zero(program: SeedProgram) -> Totals:
    """Return sums of nothing, for each seed that is trained at once."""
    if program.at_once == 1:
        return Totals.zero()
    return jax.tree.map(lambda x: jnp.zeros((program.at_once,), x.dtype), Totals.zero())


def _one(program: SeedProgram, tree: Any, index: int) -> Any:
    """Return what belongs to one of the seeds that are trained at once."""
    return tree if program.at_once == 1 else jax.tree.map(lambda leaf: leaf[index], tree)
