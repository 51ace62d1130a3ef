"""`python -m experiments.paper.row`: one row in a process of its own, from training to its records.

Relaunching goes on where it stopped: training from its checkpoint, evaluation from its cache.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from rich.console import Console

import qt_jax as qt
from experiments.configs.study import preset
from experiments.data import Dataset, load
from experiments.paper import collect
from experiments.paper.networks import GRAPH, prepare, trained_in
from experiments.paper.rows import (
    ATTEMPTS,
    DEFAULT_RESULTS,
    RESULTS,
    SEARCH,
    StudyRow,
    folder_of,
    results_of,
    row_of,
)
from experiments.runs import model_input, vendor_arrays
from qt_jax import command_line, records
from qt_jax.backends import cost
from qt_jax.backends.steps import Limits
from qt_jax.command_line import terminate_like_interrupt

LAYER_IMAGES = 512
"""Validation images on which the outputs of layers are compared."""


@dataclasses.dataclass(frozen=True)
class Options:
    """One row of a study, from training to its records; `experiments.paper` launches it.

    Example:
        python -m experiments.paper.row --preset smoke --task digits --method float --seed 0
    """

    preset: str
    """Of the study."""
    task: str
    """Name of the task, as in the preset."""
    method: str
    """Name of the method, as its file."""
    seed: int
    """Of training."""
    factor: float | None = None
    """Makes this a trial of the search, at so many times the task's learning rate."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    results: Annotated[Path, DEFAULT_RESULTS] = RESULTS
    """Folder of all results."""
    jobs: int = 1
    """Deployments at a time."""
    parent: int | None = None
    """Process without which this one ends itself."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `command` does."""
    return command_line.command("experiments.paper.row", Options, run, arguments, soft_wrap=True)


def run(options: Options, console: Console) -> None:
    """The row of the options. SIGTERM ends it as Ctrl-C does: the processes it has started end first."""
    terminate_like_interrupt()
    if options.parent is not None:
        threading.Thread(target=_end_without, args=(options.parent,), daemon=True).start()
    perform(find(options), options.runs, options.results, console, options.jobs)


def _end_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def find(options: Options) -> StudyRow:
    """The row of a command line. Raises InvalidInput for an unknown preset, task or method."""
    chosen = preset(options.preset)
    tasks = {task.name: task for task in chosen.tasks}
    for flag, name, known in (
        ("--task", options.task, list(tasks)),
        ("--method", options.method, list(tasks[options.task].methods if options.task in tasks else ())),
    ):
        if name not in known:
            raise qt.InvalidInput(f"{flag} {name!r} is unknown here; choose one of {', '.join(known)}")
    found = records.read(results_of(chosen, options.results) / SEARCH)
    return row_of(chosen, tasks[options.task], options.method, options.seed, found, options.factor)


def perform(row: StudyRow, runs: Path, results: Path, console: Console, jobs: int = 1) -> None:
    """All stages of one row; its records are in the results at the end.

    Raises:
      InvalidInput: training diverged, the network cannot be exported, or it does not run.
    """
    folder = folder_of(row, runs)
    folder.mkdir(parents=True, exist_ok=True)
    with collect.locked(folder), _timed(folder / ATTEMPTS):
        dataset = load(row.config.dataset, row.config.data_dir, seed=0)
        console.print(f"{row}: {folder}; {row.chosen or 'learning rate of the preset, none was searched'}")
        prepare(row, runs, dataset, console)
        found = _evaluate(row, folder, dataset, console, jobs)
    held_out = model_input(dataset, dataset.validation_images[:LAYER_IMAGES])
    collect.collect(row, folder, trained_in(row, runs), found, held_out, results_of(row.preset, results))
    for bulky in ("data", "work"):
        shutil.rmtree(folder / "evaluation" / bulky, ignore_errors=True)
    console.print("done")


@contextlib.contextmanager
def _timed(path: Path) -> Iterator[None]:
    """Notes how long what is inside takes, and the error that ends it."""
    started, failure = time.perf_counter(), None
    try:
        yield
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        seconds = round(time.perf_counter() - started, 1)
        records.append(path, {"seconds": seconds, "error": failure})


def _evaluate(
    row: StudyRow, folder: Path, dataset: Dataset, console: Console, jobs: int
) -> list[records.Record]:
    """The records of the row's network, FP32 in onnxruntime first; each is made once."""
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

    def say(record: records.Record) -> None:
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
            on_record=say,
        )
        found |= {record["key"]: record for record in rows}
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
