"""Build a training run: its compiled functions, its data on the devices, its first state, its validation.

The first state is drawn, or taken from another run that is to be fine-tuned.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import qt_jax as qt
from experiments import devices, models
from experiments.configs.training import Config, lambda_schedule
from experiments.data import Dataset
from experiments.data.augment import normalize
from experiments.training.finishing import refolder
from experiments.training.quantizers import LEARNED_NAMES
from experiments.training.state import TrainState, create_state, learning_rate_schedule, optimizer
from experiments.training.step import Split, Totals, epoch_order, make_predict, make_train_step
from qt_jax.export.network import restore
from qt_jax.interception import is_quant_trim_statistic

FIRST_IMAGES = 5000
"""Training images from which a network may take parameters before the first step."""


class Program(NamedTuple):
    """Hold a run's functions and data. Arrays are on all devices of `mesh`; the split is divided by rows."""

    config: Config
    model: nn.Module
    dataset: Dataset
    mesh: Mesh
    steps_per_epoch: int
    template: TrainState
    """Shapes and dtypes of the state."""
    first: Callable[[], TrainState]
    """Makes the state before the first step."""
    run: Callable[..., tuple[TrainState, Totals]]
    """Takes steps, as built by `make_train_step`."""
    order: Callable[[int], jax.Array]
    """Returns the order of an epoch, counted from 0."""
    split: Split
    lam: Callable[[int], Any]
    rate: Callable[[int], Any]

    @property
    def total(self) -> int:
        """Return the number of steps of the whole run."""
        return self.steps_per_epoch * self.config.epochs


def build(config: Config, model: nn.Module, dataset: Dataset, mesh: Mesh) -> Program:
    """Build the program of a run. Nothing is compiled yet.

    Raises:
      InvalidInput: There is not one whole batch, or it cannot be divided among the devices.
    """
    images, labels = (x[: config.train_limit] for x in (dataset.train_images, dataset.train_labels))
    per_epoch = _steps_per_epoch(config, len(images), mesh.size)
    total = per_epoch * config.epochs
    tx, lam = optimizer(config, total), lambda_schedule(config, total)
    everywhere = devices.replicated(mesh)
    order = jax.jit(lambda epoch: epoch_order(config, len(images), epoch), out_shardings=everywhere)

    def create() -> TrainState:
        return create_state(config, model, tx, images.shape[1:], first_images(model, images, dataset))

    return Program(
        config,
        model,
        dataset,
        mesh,
        per_epoch,
        template=jax.eval_shape(create),
        first=lambda: devices.replicate(fine_tune(create(), config.fine_tune), mesh),
        run=make_train_step(
            config, model, tx, lam, dataset.mean, dataset.std, dataset.num_classes, mesh, total
        ),
        order=lambda epoch: order(np.int32(epoch)),
        split=Split(devices.split_rows(images, mesh), devices.split_rows(labels, mesh)),
        lam=lam,
        rate=learning_rate_schedule(config, total),
    )


def first_images(model: nn.Module, images: np.ndarray, dataset: Dataset) -> jax.Array | None:
    """Return the normalised images from which the network takes parameters; None if it takes none."""
    if not models.is_fitted(model):
        return None
    return normalize(images[:FIRST_IMAGES], dataset.mean, dataset.std)


def _steps_per_epoch(config: Config, images: int, count: int) -> int:
    if config.batch_size > images:
        raise qt.InvalidInput(
            f"--batch-size {config.batch_size} is larger than the training split ({images})"
        )
    if config.batch_size // config.accumulate % count:
        parts = "" if config.accumulate == 1 else f" in {config.accumulate} parts (--accumulate)"
        raise qt.InvalidInput(
            f"--batch-size {config.batch_size}{parts} cannot be divided among {count} devices: choose a "
            f"multiple of {count * config.accumulate}"
        )
    return images // config.batch_size


def fine_tune(state: TrainState, folder: Path | None) -> TrainState:
    """Return a first state with the deployed parameters and the batch norm of another run.

    They come from its newest checkpoint. Step, optimizer and ranges of quantizers stay those of `state`;
    the first batch resets the ranges.

    Args:
      state: First state of this run.
      folder: `checkpoints/METHOD` of the other run, or one step of it. None leaves `state` as it is.

    Raises:
      InvalidInput: There is no checkpoint, it is damaged, or its network is another one.
    """
    if folder is None:
        return state
    held = restore(folder)
    return start_from(state, held.get("average") or held.get("params"), held.get("batch_stats"), folder)


def start_from(state: TrainState, params: Any, batch_stats: Any, folder: Path) -> TrainState:
    """Return a first state with these parameters and this batch norm, which come from `folder`.

    Raises:
      InvalidInput: They are of another network.
    """
    params = _with_own_leaves(state.params, params, folder)
    batch_stats = _with_own_leaves(state.batch_stats, batch_stats, folder)
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, batch_stats=batch_stats, average=average)


def _with_own_leaves(template: Any, held: Any, folder: Path) -> Any:
    """Return `template` with the model's own leaves from `held`."""
    wanted, found = flatten_dict(template), flatten_dict(held or {})

    def own(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {
            path: leaf.shape
            for path, leaf in leaves.items()
            if not is_quant_trim_statistic(path) and path[-1] not in LEARNED_NAMES
        }

    mine, theirs = own(wanted), own(found)
    if differ := sorted(path for path in mine | theirs if mine.get(path) != theirs.get(path)):
        path = differ[0]
        raise qt.InvalidInput(
            f"--fine-tune {folder}: {'/'.join(path)} has shape {theirs.get(path, 'absent')} there and "
            f"{mine.get(path, 'absent')} here ({len(differ)} leaves differ): it is another network, or of "
            "another data set. Name checkpoints of the same --model."
        )
    return unflatten_dict(wanted | {path: jnp.array(np.asarray(found[path])) for path in mine})


def validation(program: Program) -> Callable[[TrainState], dict[str, float]]:
    """Build `validate(state) -> metrics` on the validation split, for the plain and the quantized network."""
    config, model, dataset = program.config, program.model, program.dataset
    kinds = {"fp32": False} | ({"fake_quant": True} if config.sched != "none" else {})
    predictors = {
        name: make_predict(config, model, dataset.mean, dataset.std, quantized=quantized, mesh=program.mesh)
        for name, quantized in kinds.items()
    }

    shape = dataset.train_images.shape[1:]
    refold = refolder(config, model, shape) if config.folded and config.averages else None

    def validate(state: TrainState) -> dict[str, float]:
        found = {}
        variables = state.deployed if refold is None else refold(state.deployed)
        for name, predict in predictors.items():
            logits = predict(variables, dataset.validation_images)
            found[f"validation_{name}"] = accuracy(logits, dataset.validation_labels)
            if logits.ndim == 4:
                decisions = logits.argmax(-1)
                overlap = qt.metrics.miou(decisions, dataset.validation_labels, dataset.num_classes)
                found[f"validation_miou_{name}"] = overlap
        return found

    return validate


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of the decisions, one per image or per pixel, whose largest logit is the label's."""
    return float(np.mean(np.argmax(logits, -1) == labels))
