"""Run one row in a separate process, from training to its records: `python -m experiments.paper.row`.

A relaunch goes on where the row stopped: training from its checkpoint, evaluation from its cache.
"""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

from rich.console import Console

import qt_jax as qt
from experiments.configs.study import preset
from experiments.paper.networks import perform
from experiments.paper.rows import DEFAULT_RESULTS, RESULTS, SEARCH, StudyRow, results_of, row_of
from qt_jax import command_line, records
from qt_jax.command_line import terminate_like_interrupt


@dataclasses.dataclass(frozen=True)
class Options:
    """Run one row of a study, from training to its records; `experiments.paper` launches it.

    Example:
        python -m experiments.paper.row --preset smoke --task digits --method float --seed 0
    """

    preset: str
    """Preset of the study."""
    task: str
    """Name of the task, as in the preset."""
    method: str
    """Name of the method, as in experiments/configs/methods.py."""
    seed: int
    """Seed of training."""
    factor: float | None = None
    """Makes the row a trial of the search, at this factor of the task's learning rate."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    results: Annotated[Path, DEFAULT_RESULTS] = RESULTS
    """Folder of all results."""
    jobs: int = 1
    """Deployments at a time."""
    parent: int | None = None
    """Process id; this process ends when its parent is no longer that one."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as `command` does."""
    return command_line.command("experiments.paper.row", Options, run, arguments, soft_wrap=True)


def run(options: Options, console: Console) -> None:
    """Run the row of the options. SIGTERM acts as Ctrl-C: the processes that it has started end first."""
    terminate_like_interrupt()
    if options.parent is not None:
        threading.Thread(target=_end_without, args=(options.parent,), daemon=True).start()
    perform(find(options), options.runs, options.results, console, options.jobs)


def _end_without(parent: int) -> None:
    """Terminate this process once `parent` is no longer its parent."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def find(options: Options) -> StudyRow:
    """Return the row of a command line.

    Raises:
      InvalidInput: The preset, the task or the method is unknown.
    """
    chosen = preset(options.preset)
    task = chosen.task(options.task)
    if options.method not in task.methods:
        known = ", ".join(task.methods)
        raise qt.InvalidInput(f"--method {options.method!r} is unknown here; choose one of {known}")
    found = records.read(results_of(chosen, options.results) / SEARCH)
    return row_of(chosen, task, options.method, options.seed, found, options.factor)


if __name__ == "__main__":
    sys.exit(main())
