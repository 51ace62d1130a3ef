"""Run the whole study, from training to tables and figures: `python -m experiments.paper`.

Every row (task, method, seed) is a separate process. Its records go to experiments/results/paper-<preset>. A
relaunch goes on where the last one stopped. With --launcher, rows are jobs of a scheduler, see
`experiments.paper.launch`.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from experiments.configs.study import Preset, preset
from experiments.paper import rows as study
from experiments.paper.collect import united, write_lines
from experiments.paper.launch import command, detached_command, run_rows, submit_rows
from experiments.paper.progress import Display, listing
from experiments.paper.render import STUDY_PAGE, render
from experiments.paper.rows import DEFAULT_RESULTS, StudyRow
from qt_jax import command_line, records
from qt_jax.command_line import terminate_like_interrupt
from qt_jax.errors import InvalidInput
from qt_jax.scheduler import HERE, Scheduler, open_queue


@dataclasses.dataclass(frozen=True)
class Options:
    """Train and deploy all methods of a study, and write its tables and figures.

    Relaunching the same command goes on where it stopped.

    Example:
        python -m experiments.paper --preset smoke --list
    """

    preset: str = "cpu"
    """cpu: small networks, two cores, hours; accelerator: full budgets, for a GPU or TPU; quarter-hour: what
    experiments.accelerator has trained; smoke: minutes; accelerator-reduced and quarter-hour-reduced: the
    rows of these two on a scrap of data."""
    only: tuple[str, ...] = ()
    """Only methods of these tables, such as main or schedule."""
    tasks: tuple[str, ...] = ()
    """Only these tasks."""
    methods: tuple[str, ...] = ()
    """Only these methods, with those whose networks they start from."""
    resume: bool = True
    """Go on with rows that were begun; --no-resume starts those that are not complete from scratch."""
    search: bool = False
    """Search the learning rate of every method, on the validation split, instead of running the rows."""
    list: bool = False
    """Show what is done, and stop."""
    render: bool = False
    """Write tables and figures from the records that are there, and stop."""
    jobs: int | None = None
    """Rows at a time; default: one per core where the preset binds rows to cores, else one; in Slurm all."""
    runs: Path = Path("runs")
    """Folder of checkpoints, graphs and logs."""
    results: Annotated[Path, DEFAULT_RESULTS] = study.RESULTS
    """Folder of records, tables and figures."""
    scheduler: Annotated[Scheduler, tyro.conf.OmitArgPrefixes] = HERE
    """Who runs the rows."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status, as `command` does; it is 1 if rows have failed."""
    return command_line.command(
        "experiments.paper",
        Options,
        run_or_fail,
        arguments,
        failure="rows have failed",
        interrupted="interrupted; the same command goes on from here",
        soft_wrap=True,
    )


def run_or_fail(options: Options, console: Console) -> None:
    """Do what the options ask for.

    Raises:
      Failed: Rows have failed.
    """
    jax.config.update("jax_platforms", "cpu")  # of this process, which leaves accelerators to the rows
    terminate_like_interrupt()
    failed = run(options, console)
    if failed:
        raise command_line.Failed(f"{len(failed)} rows have failed: their logs lie in {options.runs}")


def run(options: Options, console: Console) -> list[StudyRow]:
    """Do what the options ask for, and return the rows that failed."""
    chosen = preset(options.preset)
    folder = study.results_of(chosen, options.results)
    if options.render:
        rendered(folder, options, console)
        return []
    if chosen.accelerated and options.search:
        raise InvalidInput(f"--search trains networks, which experiments.accelerator does for {chosen.name}")
    found = records.read(folder / study.SEARCH)
    every = study.trials(chosen) if options.search else study.study(chosen, found)
    rows = study.select(every, options.only, options.tasks, options.methods)
    if options.list:
        console.print(listing(rows, options.runs, folder))
        return []
    if chosen.accelerated:
        adopt_records(chosen, options)
        rows = with_networks(rows, options, console)
    failed = perform(rows, options, console) if rows else []
    if not options.search:
        rendered(folder, options, console)
    return failed


def adopt_records(chosen: Preset, options: Options) -> None:
    """Bring the records of trained networks into the folder of results. Those of other configs are dropped.

    Raises:
      InvalidInput: `experiments.accelerator` has trained nothing with the present configs.
    """
    home, folder = study.home_of(chosen, options.runs), study.results_of(chosen, options.results)
    present = {row.digest for row in study.study(chosen)}
    both = (records.read(place / study.TRAINED) for place in (folder, home))
    kept = united(*([record for record in found if record["digest"] in present] for found in both))
    if not kept:
        raise InvalidInput(
            f"{home} holds no trained networks: run `python -m experiments.accelerator --preset "
            f"{chosen.name}` on a GPU, and bring that folder here"
        )
    write_lines(folder / study.TRAINED, kept)


def with_networks(rows: list[StudyRow], options: Options, console: Console) -> list[StudyRow]:
    """Return the rows that have a network, and say how many have none."""
    ready = [row for row in rows if study.has_network(row, options.runs)]
    if absent := len(rows) - len(ready):
        console.print(
            f"{absent} of {len(rows)} rows have no network in {options.runs}: they are not deployed"
        )
    return ready


def rendered(folder: Path, options: Options, console: Console) -> None:
    """Write tables and figures, also into the documentation if the results are those of this repository."""
    own = options.results == study.RESULTS
    files = render(folder, STUDY_PAGE if own else None)
    console.print(f"{folder}: {', '.join(sorted(file.name for file in files))}")


def perform(rows: list[StudyRow], options: Options, console: Console) -> list[StudyRow]:
    """Run the rows that are not done, and return those that failed."""
    chosen = rows[0].preset
    folder = study.results_of(chosen, options.results)
    done = study.done(rows, folder)
    waiting = unfinished(rows, done, options.runs)
    slots, jobs = shares(options, chosen.pinned, len(waiting))
    scheduler = options.scheduler
    if scheduler.launcher == "slurm" and chosen.pinned and scheduler.job_cpus is None:
        scheduler = dataclasses.replace(scheduler, job_cpus=1)
    display = Display(rows, done - {*waiting}, len(slots), options.runs, folder, console)
    home = study.home_of(chosen, options.runs)
    shared = {
        "log": lambda row: study.log_of(row, options.runs),
        "slots": slots,
        "environment": environment(home / "jax-cache"),
        "watch": display.update,
    }
    with open_queue(scheduler, home / "jobs") as queue:
        if not options.resume:
            for row in waiting:
                study.forget(row, options.runs)
        console.print(display.opening())
        with display:
            if queue is None:
                progress = run_rows(
                    waiting, lambda row: command(row, options.runs, options.results, jobs), **shared
                )
            else:
                progress = submit_rows(
                    queue,
                    waiting,
                    lambda row: detached_command(row, options.runs, options.results, jobs),
                    done=lambda row: row in study.done([row], folder),
                    say=console.print,
                    **shared,
                )
    return list(progress.failed)


def unfinished(rows: list[StudyRow], done: set[StudyRow], runs: Path) -> list[StudyRow]:
    """Return the rows to run: those not done, and those whose networks these need and this disk lacks."""
    wanted = {row for row in rows if row not in done}
    waiting = [*wanted]
    while waiting:
        source = waiting.pop().waits_for
        if source is None or source in wanted:
            continue
        if not (study.folder_of(source, runs) / study.DESCRIPTION).exists():
            wanted.add(source)
            waiting.append(source)
    return [row for row in rows if row in wanted]


def shares(options: Options, pinned: bool, waiting: int) -> tuple[list[int | None], int]:
    """Return a slot per row that runs or is queued at a time, and how many deployments each does at once.

    Raises:
      InvalidInput: As `slots_of` raises it.
    """
    if options.scheduler.launcher == "slurm":
        jobs = max(1, waiting) if options.jobs is None else options.jobs
        return slots_of(jobs, pinned=False), options.scheduler.job_cpus or 1
    slots = slots_of(options.jobs, pinned)
    return slots, 1 if pinned else max(1, (os.cpu_count() or 1) // len(slots))


def slots_of(jobs: int | None, pinned: bool) -> list[int | None]:
    """Return a core for each row that runs at a time, or None where rows are not bound to cores.

    Raises:
      InvalidInput: `jobs` is less than 1, or more than there are cores to bind rows to.
    """
    cores = sorted(os.sched_getaffinity(0))
    jobs = (len(cores) if pinned else 1) if jobs is None else jobs
    if jobs < 1 or (pinned and jobs > len(cores)):
        raise InvalidInput(f"--jobs must be from 1 to {len(cores)} here, got {jobs}")
    return list(cores[:jobs]) if pinned else [None] * jobs


def environment(cache: Path) -> dict[str, str]:
    """Return the environment variables of the rows' processes.

    All rows share one cache of compiled programs, and JAX does not take all memory of an accelerator.
    """
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
    }


if __name__ == "__main__":
    sys.exit(main())
