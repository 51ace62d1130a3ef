"""A row's network: trained, or another row's; perhaps with batch norm estimated again; exported, verified."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console

from experiments import models
from experiments.data import Dataset
from experiments.paper.rows import StudyRow, folder_of
from experiments.pipeline import describe
from experiments.training.finishing import reestimated
from experiments.training.loop import train
from qt_jax.export.deploy import deploy
from qt_jax.export.network import load, restore
from qt_jax.interception import COLLECTION

GRAPH, DESCRIPTION = "model.onnx", "model.json"
CHECKPOINTS, REESTIMATED = "checkpoints", "reestimated"
REESTIMATION = 10_000
"""Training images with which batch norm is estimated again."""


def trained_in(row: StudyRow, runs: Path) -> Path:
    """The folder in which the network of a row was trained: its own, or that of the row it deploys anew."""
    return folder_of(row.source if row.method.network else row, runs)


def prepare(row: StudyRow, runs: Path, dataset: Dataset, console: Console) -> None:
    """Leaves the row's description and its verified graph in its folder; what is there is not done again.

    Raises:
      InvalidInput: training diverged, or the network cannot be exported.
    """
    folder, name = folder_of(row, runs), row.method.network or row.name
    checkpoint = trained_in(row, runs) / CHECKPOINTS / name
    if row.method.network is None:
        config = row.config
        if row.method.start is not None:
            start = folder_of(row.source, runs) / CHECKPOINTS / row.method.start
            config = dataclasses.replace(config, fine_tune=start)
        model = models.create(config.model, dataset.num_classes, jnp.dtype(config.dtype))
        train(config, model, dataset, folder, name)
    if row.method.export == "batch-norm":
        checkpoint = _reestimated(row, checkpoint, folder / CHECKPOINTS / REESTIMATED, dataset)
    describe(row.config, dataset, os.path.relpath(checkpoint, folder), folder / DESCRIPTION)
    if not (folder / GRAPH).exists():
        clips = row.method.export == "clips"
        summary = deploy(load(folder), folder / GRAPH, clips=clips)
        console.print(
            f"{GRAPH}: {summary['bytes']:,} bytes, {summary['macs'] / 1e6:.1f} M multiply-accumulates; "
            f"largest difference to JAX {max(summary['max_difference'].values()):.1e}; "
            f"{len(summary['clips'])} clips; {summary['ranges_reason'] or 'learned ranges'}"
        )


def _reestimated(row: StudyRow, checkpoint: Path, place: Path, dataset: Dataset) -> Path:
    """A checkpoint like another, with its batch norm measured on the float graph."""
    if place.exists():
        return place
    model = models.create(row.config.model, dataset.num_classes, jnp.float32)
    held = restore(checkpoint)
    params = "average" if row.config.ema else "params"
    variables = {"params": held[params], COLLECTION: held[COLLECTION]}
    found = reestimated(model, variables, dataset.train_images[:REESTIMATION], dataset)
    with ocp.StandardCheckpointer() as writer:
        writer.save(place.absolute(), {params: held[params], COLLECTION: found[COLLECTION]})
    return place
