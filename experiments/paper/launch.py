"""Run rows in separate processes, one per slot, or submit them as jobs to a scheduler.

Rows start in their order, except that a row whose source is among them waits for it. A row that fails does
not stop the others; the last lines of its log are reported.

A row that a process of an earlier launch still works on is not submitted at once. It waits, outside of the
queue, until that process has released the row's folder. Jobs that a killed launch has left in Slurm's queue
cannot be seen from here. The second job of such a row waits at the row's folder and then finds the work done.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from experiments.paper.rows import StudyRow, held
from qt_jax import processes
from qt_jax.scheduler import Job, JobFailed, Queue

LAST_LINES = 5
"""Lines of the log of a failed row that are reported."""


class Process(Protocol):
    """Specify what a row runs as, here or through a scheduler."""

    def poll(self) -> int | None:
        """Return the exit status, or None while the process has not ended."""


@dataclass(frozen=True)
class Running:
    """Hold the process of a row, when it started (`time.monotonic`), and the slot that it takes."""

    row: StudyRow
    process: Process
    started: float
    slot: int


@dataclass
class Progress:
    """Record what has become of the rows so far.

    Attributes:
      waiting: Rows that have not started, in their order.
      running: Rows at work.
      finished: Rows that have ended well, with the seconds that they took.
      failed: Rows that have failed, with the last lines of their logs.
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
    """Run all rows in processes of this machine.

    Args:
      rows: Rows to run. One whose `source` is among them waits for it, and fails with it.
      command: Returns the command line of a row.
      log: Returns the file to which the output of a row is appended.
      slots: One entry per row that runs at a time: the core it is bound to, or None to bind it to none.
      environment: All environment variables of the rows' processes.
      watch: Called with the progress every `interval` seconds and at the end.
      interval: Seconds.

    Returns:
      The progress at the end.

    Raises:
      KeyboardInterrupt: Interrupted. All processes have ended before it is raised.
    """
    started: list[subprocess.Popen] = []

    def start(row: StudyRow, core: int | None) -> subprocess.Popen:
        started.append(processes.start(command(row), log(row), environment, core))
        return started[-1]

    try:
        return _supervise(rows, start, log, slots=slots, watch=watch, interval=interval)
    finally:
        live = [process for process in started if process.poll() is None]
        processes.stop(process.pid for process in live)
        for process in live:
            process.wait()


def submit_rows(
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
    """Run all rows as jobs of a scheduler. Whoever opened the queue cancels its jobs.

    Args:
      queue: Open queue of the scheduler.
      rows: As in `run_rows`.
      command: As in `run_rows`.
      log: As in `run_rows`.
      slots: As in `run_rows`.
      environment: Environment variables of the rows' processes. A job gets those that differ from the ones of
        this process.
      done: Tells whether the records of a row are complete.
      watch: As in `run_rows`.
      say: Called with a line about each row that another process works on.

    Returns:
      The progress at the end.

    Raises:
      InvalidInput: The scheduler refuses a job.
    """
    changes = {name: value for name, value in environment.items() if os.environ.get(name) != value}

    def start(row: StudyRow, core: int | None) -> RowJob:
        path = log(row).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        job = RowJob(
            path,
            lambda: queue.submit(processes.run, command(row), path, changes, core),
            lambda: done(row),
            lambda: say(f"{row}: another process works on it; submitted only if it is not done after that"),
        )
        if not held(path.parent):
            job.job = job.submit()
        return job

    return _supervise(rows, start, log, slots=slots, watch=watch, interval=queue.interval)


@dataclass
class RowJob:
    """Submit the job of a row once no process works in the folder of the row's log.

    Attributes:
      log: Log of the row.
      submit: Submits the job.
      done: Tells whether the row needs no job any more, after another process has released its folder.
      say: Called once if another process holds the folder.
      waits: Whether another process has held the folder.
      job: The job once it is submitted.
    """

    log: Path
    submit: Callable[[], Job]
    done: Callable[[], bool]
    say: Callable[[], None]
    waits: bool = False
    job: Job | None = None

    def poll(self) -> int | None:
        """Return the exit status of the row, or None while it has not ended.

        The status is 1 for a job that ended without one. The last lines of that job are appended to the log.
        """
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


def _supervise(
    rows: Sequence[StudyRow],
    start: Callable[[StudyRow, int | None], Process],
    log: Callable[[StudyRow], Path],
    *,
    slots: Sequence[int | None],
    watch: Callable[[Progress], None],
    interval: float,
) -> Progress:
    """Start rows with `start` as slots become free, until all have ended.

    The caller ends the processes that an error leaves behind.
    """
    progress = Progress(list(rows))
    while progress.waiting or progress.running:
        _start_ready(progress, start, slots)
        watch(progress)
        if progress.running:
            time.sleep(interval)
        _reap(progress, log)
    watch(progress)
    return progress


def _start_ready(
    progress: Progress, start: Callable[[StudyRow, int | None], Process], slots: Sequence[int | None]
) -> None:
    """Start rows until all slots are taken or no row is ready."""
    for slot in range(len(slots)):
        if slot in {running.slot for running in progress.running}:
            continue
        blocked = {*progress.waiting, *(running.row for running in progress.running)}
        row = next((row for row in progress.waiting if row.waits_for not in blocked), None)
        if row is None:
            return
        progress.waiting.remove(row)
        if row.waits_for in progress.failed:
            progress.failed[row] = f"needs {row.waits_for}, which has failed"
            continue
        progress.running.append(Running(row, start(row, slots[slot]), time.monotonic(), slot))


def _reap(progress: Progress, log: Callable[[StudyRow], Path]) -> None:
    """Move rows that have ended to `finished` or `failed`."""
    for running in list(progress.running):
        status = running.process.poll()
        if status is None:
            continue
        progress.running.remove(running)
        if status == 0:
            progress.finished[running.row] = time.monotonic() - running.started
        else:
            progress.failed[running.row] = f"exit status {status}\n{last_lines(log(running.row))}"


def last_lines(path: Path) -> str:
    """Return the last lines of a log."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "no log was written"
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])


def command(row: StudyRow, runs: Path, results: Path, jobs: int) -> list[str]:
    """Return the command line that performs a row as a child of this process and ends with it."""
    return [*detached_command(row, runs, results, jobs), "--parent", str(os.getpid())]


def detached_command(row: StudyRow, runs: Path, results: Path, jobs: int) -> list[str]:
    """Return the command line that performs a row wherever a scheduler starts it."""
    flags = {"preset": row.preset.name, "task": row.task.name, "method": row.name, "seed": row.seed}
    flags |= {"runs": runs, "results": results, "jobs": jobs}
    if row.searching:
        flags["factor"] = row.factor
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "experiments.paper.row", *pairs]
