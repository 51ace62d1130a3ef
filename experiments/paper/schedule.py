"""Rows in processes of their own, one a core at a time: started, watched, stopped; what failed is told.

Rows as jobs of a scheduler, submitted in the order that `schedule` gives: a row's source comes first.

A row that a process of an earlier launch still works on is not submitted: its job waits, outside the queue,
until that process has let go of the row's folder. What an earlier launch has left in Slurm's queue without
cancelling it (it was killed) cannot be seen from here; the job that comes second then waits at the row's
folder, and finds the work done.

`python -m experiments.paper.row`: one row in a process of its own, from training to its records.

Relaunching goes on where it stopped: training from its checkpoint, evaluation from its cache.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from experiments.paper.collect import held
from experiments.paper.rows import StudyRow
from qt_jax import processes
from qt_jax.scheduler import Job, JobFailed, Queue

LAST_LINES = 5


class Process(Protocol):
    """What a row runs as, here or through a scheduler."""

    def poll(self) -> int | None:
        """Its exit status; None while it has not ended."""


@dataclass(frozen=True)
class Running:
    """A row's process, since when (`time.monotonic`), and the slot that it takes."""

    row: StudyRow
    process: Process
    started: float
    slot: int


@dataclass
class Progress:
    """What has become of the rows so far.

    Attributes:
      waiting: rows not yet begun, in their order.
      running, finished: rows at work; rows that have ended well, with their seconds.
      failed: rows that have not, with the last lines of their logs.
    """

    waiting: list[StudyRow]
    running: list[Running] = field(default_factory=list)
    finished: dict[StudyRow, float] = field(default_factory=dict)
    failed: dict[StudyRow, str] = field(default_factory=dict)


def run_rows(
    rows: Sequence[StudyRow],
    command: Callable[[StudyRow], list[str]],
    log: Callable[[StudyRow], Path],
    *,
    slots: Sequence[int | None],
    environment: Mapping[str, str],
    watch: Callable[[Progress], None],
    interval: float = 0.5,
) -> Progress:
    """Runs all rows, in their order as far as what they need is there; a row that fails stops no other.

    Args:
      rows: to be run. One whose `source` is among them waits for it, and fails with it.
      command: the command line of a row.
      log: the file that takes what a row prints; it is added to.
      slots: a row at a time for each: the core it is bound to, or None for no core of its own.
      environment: variables of the rows' processes.
      watch: called with what has become of the rows, every `interval` seconds and at the end.

    Raises KeyboardInterrupt, after all processes have ended, when interrupted.
    """
    started: list[subprocess.Popen] = []

    def start(row: StudyRow, core: int | None) -> subprocess.Popen:
        started.append(processes.start(command(row), log(row), environment, core))
        return started[-1]

    try:
        return carry_out(rows, start, log, slots=slots, watch=watch, interval=interval)
    finally:
        live = [process for process in started if process.poll() is None]
        processes.stop(process.pid for process in live)
        for process in live:
            process.wait()


def carry_out(
    rows: Sequence[StudyRow],
    start: Callable[[StudyRow, int | None], Process],
    log: Callable[[StudyRow], Path],
    *,
    slots: Sequence[int | None],
    watch: Callable[[Progress], None],
    interval: float,
) -> Progress:
    """As `run_rows`, for rows that `start` starts in a slot; the caller ends those that an error leaves."""
    progress = Progress(list(rows))
    while progress.waiting or progress.running:
        _start(progress, start, slots)
        watch(progress)
        if progress.running:
            time.sleep(interval)
        _reap(progress, log)
    watch(progress)
    return progress


def time_left(progress: Progress, known: Mapping[StudyRow, float], slots: int, now: float) -> float | None:
    """Seconds until all rows have ended, from how long like rows took; None while none has ended.

    Like rows are those of the same task and the same deployments; else of the same task; else all.

    Args:
      known: seconds of rows that were finished before, beside those in `progress`.
      slots: rows at a time.
      now: `time.monotonic()`.
    """
    measured = {**known, **progress.finished}
    if not measured:
        return None
    alike: dict[tuple, list[float]] = {}
    for row, seconds in measured.items():
        for kind in _kinds(row):
            alike.setdefault(kind, []).append(seconds)

    def expected(row: StudyRow) -> float:
        found = next(alike[kind] for kind in _kinds(row) if kind in alike)
        return sum(found) / len(found)

    rest = [max(0.0, expected(r.row) - (now - r.started)) for r in progress.running]
    work = sum(rest) + sum(map(expected, progress.waiting))
    return max([work / slots, *rest])


def _kinds(row: StudyRow) -> list[tuple]:
    """What rows this one is like, the narrowest kind first."""
    return [(row.task.name, row.targets), (row.task.name,), ()]


def last_words(path: Path) -> str:
    """The last lines of a log."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "no log was written"
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])


def _start(progress: Progress, start, slots: Sequence[int | None]) -> None:
    """Starts rows until all slots are taken or none is ready."""
    for slot in range(len(slots)):
        if slot in {running.slot for running in progress.running}:
            continue
        blocked = {*progress.waiting, *(running.row for running in progress.running)}
        row = next((row for row in progress.waiting if row.source not in blocked), None)
        if row is None:
            return
        progress.waiting.remove(row)
        if row.source in progress.failed:
            progress.failed[row] = f"needs {row.source}, which has failed"
            continue
        progress.running.append(Running(row, start(row, slots[slot]), time.monotonic(), slot))


def _reap(progress: Progress, log: Callable[[StudyRow], Path]) -> None:
    for running in list(progress.running):
        status = running.process.poll()
        if status is None:
            continue
        progress.running.remove(running)
        if status == 0:
            progress.finished[running.row] = time.monotonic() - running.started
        else:
            progress.failed[running.row] = f"exit status {status}\n{last_words(log(running.row))}"


@dataclass
class Handed:
    """A row's job, which is submitted once nobody works in the folder of the row's log."""

    log: Path
    submit: Callable[[], Job]
    done: Callable[[], bool]
    """Whether the row needs no job any more, after another process has let go of it."""
    say: Callable[[], None]
    """Called if the row is held, once."""
    waits: bool = False
    job: Job | None = None

    def poll(self) -> int | None:
        """The exit status of the row; 1, after adding its last words to the log, of a job that left none."""
        if self.job is None:
            if held(self.log.parent):
                if not self.waits:
                    self.say()
                self.waits = True
            elif self.waits and self.done():
                return 0
            else:
                self.job = self.submit()
        if self.job is None or not self.job.done():
            return None
        try:
            return self.job.result()
        except JobFailed as error:
            with open(self.log, "a") as log:
                log.write(f"{error}\n")
            return 1


def hand_over(
    queue: Queue,
    rows: Sequence[StudyRow],
    command: Callable[[StudyRow], list[str]],
    log: Callable[[StudyRow], Path],
    *,
    slots: Sequence[int | None],
    environment: Mapping[str, str],
    done: Callable[[StudyRow], bool],
    watch: Callable[[Progress], None],
    say: Callable[[str], None],
) -> Progress:
    """As `schedule.run_rows`, through a scheduler; who has opened the queue cancels its jobs.

    Args:
      environment: variables of the rows' processes; of those, a job gets what differs from this process's.
      done: whether the records of a row are complete.
      say: gets a line about each row that another process works on.

    Raises InvalidInput if the scheduler refuses a job.
    """
    changes = {name: value for name, value in environment.items() if os.environ.get(name) != value}

    def start(row: StudyRow, core: int | None) -> Handed:
        path = log(row).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        handed = Handed(
            path,
            lambda: queue.submit(processes.run, command(row), path, changes, core),
            lambda: done(row),
            lambda: say(f"{row}: another process works on it; submitted only if it is not done after that"),
        )
        if not held(path.parent):
            handed.job = handed.submit()
        return handed

    return carry_out(rows, start, log, slots=slots, watch=watch, interval=queue.interval)


def command(row: StudyRow, runs: Path, results: Path, jobs: int) -> list[str]:
    """The command line that performs a row as a child of this process, without which it ends itself."""
    return [*detached_command(row, runs, results, jobs), "--parent", str(os.getpid())]


def detached_command(row: StudyRow, runs: Path, results: Path, jobs: int) -> list[str]:
    """The command line that performs a row wherever a scheduler puts it."""
    flags = {"preset": row.preset.name, "task": row.task.name, "method": row.name, "seed": row.seed}
    flags |= {"runs": runs, "results": results, "jobs": jobs}
    if row.searching:
        flags["factor"] = row.factor
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "experiments.paper.row", *pairs]
