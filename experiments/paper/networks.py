"""Train, export and deploy the network of one row, and collect its records.

The network is trained, or it is that of another row, perhaps with batch norm estimated again. Every stage
leaves its product in the row's folder. A relaunch goes on where the row stopped: training from its
checkpoint, evaluation from its cache.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console

import qt_jax as qt
from experiments import models
from experiments.data import Dataset, load
from experiments.paper.collect import collect
from experiments.paper.rows import (
    ATTEMPTS,
    DESCRIPTION,
    GRAPH,
    NETWORK,
    StudyRow,
    folder_of,
    locked,
    results_of,
)
from experiments.pipeline import deploy_float, describe
from experiments.runs import model_input, vendor_arrays
from experiments.training.checkpoints import read_variables
from experiments.training.finishing import batch_norm_on
from experiments.training.loop import train
from qt_jax import records
from qt_jax.backends import cost
from qt_jax.backends.steps import Limits
from qt_jax.export import network
from qt_jax.interception import COLLECTION

CHECKPOINTS, REESTIMATED, ADOPTED = "checkpoints", "reestimated", "adopted"

REESTIMATION = 10_000
"""Training images with which batch norm is estimated again."""

LAYER_IMAGES = 512
"""Validation images on which the outputs of layers are compared."""


def perform(row: StudyRow, runs: Path, results: Path, console: Console, jobs: int = 1) -> None:
    """Run all stages of one row. At the end its records are in the folder of results.

    Args:
      row: The row.
      runs: Folder of all runs.
      results: Folder of all results.
      console: Prints what happens.
      jobs: Deployments at a time.

    Raises:
      InvalidInput: Training diverged, the network cannot be exported, or it does not run.
    """
    folder = folder_of(row, runs)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), _timed(folder / ATTEMPTS):
        dataset = load(row.config.dataset, row.config.data_dir, seed=0)
        console.print(f"{row}: {folder}; {row.chosen or 'learning rate of the preset, none was searched'}")
        prepare(row, runs, dataset, console)
        found = evaluate(row, folder, dataset, console, jobs)
    held_out = model_input(dataset, dataset.validation_images[:LAYER_IMAGES])
    collect(row, folder, trained_in(row, runs), found, held_out, results_of(row.preset, results))
    for bulky in ("data", "work"):
        shutil.rmtree(folder / "evaluation" / bulky, ignore_errors=True)
    console.print("done")


@contextlib.contextmanager
def _timed(path: Path) -> Iterator[None]:
    """Append a record of the seconds that the block takes, and of the error that ends it."""
    started, failure = time.perf_counter(), None
    try:
        yield
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        seconds = round(time.perf_counter() - started, 1)
        records.append(path, {"seconds": seconds, "error": failure})


def trained_in(row: StudyRow, runs: Path) -> Path:
    """Return the folder in which the network of a row was trained: its own, or that of the row it deploys."""
    return folder_of(row.source if row.method.network else row, runs)


def prepare(row: StudyRow, runs: Path, dataset: Dataset, console: Console) -> None:
    """Train and export the network, and leave its description and its verified graph in the row's folder.

    What is there already is not done again.

    Raises:
      InvalidInput: Training diverged, or the network cannot be exported.
    """
    folder, name = folder_of(row, runs), row.method.network or row.name
    checkpoint = trained_in(row, runs) / CHECKPOINTS / name
    if row.preset.accelerated:
        checkpoint = _adopted(row, trained_in(row, runs))
    elif row.method.network is None:
        config = row.config
        if row.source is not None:
            start = folder_of(row.source, runs) / CHECKPOINTS / row.source.name
            config = dataclasses.replace(config, fine_tune=start)
        model = models.create(config.model, dataset.num_classes, jnp.dtype(config.dtype))
        train(config, model, dataset, folder, name)
    if row.method.export == "batch-norm":
        checkpoint = _reestimated(row, checkpoint, folder / CHECKPOINTS / REESTIMATED, dataset)
    describe(row.config, dataset, os.path.relpath(checkpoint, folder), folder / DESCRIPTION)
    if not (folder / GRAPH).exists():
        clips = row.method.export == "clips"
        summary = deploy_float(row.config, network.load(folder), folder / GRAPH, dataset, clips=clips)
        console.print(
            f"{GRAPH}: {summary['bytes']:,} bytes, {summary['macs'] / 1e6:.1f} M multiply-accumulates; "
            f"largest difference to JAX {max(summary['max_difference'].values()):.1e}; "
            f"{len(summary['clips'])} clips; {summary['ranges_reason'] or 'learned ranges'}"
        )


def _adopted(row: StudyRow, folder: Path) -> Path:
    """Return the path of the checkpoint of a network that `experiments.accelerator` has left in a folder.

    Raises:
      InvalidInput: It has left none.
    """
    path = folder / CHECKPOINTS / ADOPTED
    if not path.exists():
        if not (folder / NETWORK).exists():
            raise qt.InvalidInput(
                f"{row}: {folder / NETWORK} is not there: train it on a GPU with "
                f"`python -m experiments.accelerator --preset {row.preset.name}`, and bring its folder here"
            )
        held = read_variables(folder / NETWORK)
        _save(row, held["params"], held[COLLECTION], path)
    return path


def _save(row: StudyRow, params: Any, batch_stats: Any, path: Path) -> None:
    """Write a checkpoint that holds nothing but the deployed network."""
    key = "average" if row.config.averages else "params"
    with ocp.StandardCheckpointer() as writer:
        writer.save(path.absolute(), {key: params, COLLECTION: batch_stats})


def _reestimated(row: StudyRow, checkpoint: Path, path: Path, dataset: Dataset) -> Path:
    """Return the path of a copy of a checkpoint whose batch norm is measured on the float graph."""
    if path.exists():
        return path
    model = models.create(row.config.model, dataset.num_classes, jnp.float32)
    trained = network.restore(checkpoint)
    params = "average" if row.config.averages else "params"
    variables = {"params": trained[params], COLLECTION: trained[COLLECTION]}
    found = batch_norm_on(model, dataset.train_images[:REESTIMATION], dataset)(variables)
    _save(row, trained[params], found[COLLECTION], path)
    return path


def evaluate(
    row: StudyRow, folder: Path, dataset: Dataset, console: Console, jobs: int
) -> list[records.Record]:
    """Deploy the network of a row and return its records, FP32 in onnxruntime first. Each is made once."""
    config = row.config
    if row.searching:
        held_out = {"test_images": dataset.validation_images, "test_labels": dataset.validation_labels}
        dataset = dataclasses.replace(dataset, **held_out)
    calibration, test_set = vendor_arrays(config, dataset, config.test_limit)
    identity = {
        "run": f"paper-{row.preset.name}",
        "task": row.task.name,
        "model": config.model,
        "method": row.name,
        "seed": row.seed,
        "checkpoint": hashlib.sha256((folder / GRAPH).read_bytes()).hexdigest(),
    }

    def report(record: records.Record) -> None:
        shown = record["status"] if record["top1"] is None else f"{100 * record['top1']:.2f} %"
        console.print(f"{record['backend']} {record['scheme']}: {shown} ({record['seconds']:.0f} s)")

    found: dict[str, records.Record] = {}
    for target in row.targets:
        rows = qt.evaluate(
            folder / GRAPH,
            calibration,
            test_set,
            backends=[target.backend],
            schemes=list(target.schemes),
            runtimes=[target.runtime],
            jobs=jobs,
            limits=Limits(seconds=60 * row.preset.minutes),
            price_per_hour=cost.PRICE_PER_CPU_HOUR * len(os.sched_getaffinity(0)),
            folder=folder / "evaluation",
            identity=identity,
            on_record=report,
        )
        found |= {record["key"]: record for record in rows}
    return list(found.values())
