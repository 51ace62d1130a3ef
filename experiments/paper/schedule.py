"""Rows in processes of their own, one a core at a time: started, watched, stopped; what failed is told."""

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from experiments.paper.rows import Row

PATIENCE = 20.0
"""Seconds that a row has to end the processes it has started, before all are killed."""
LAST_LINES = 5


@dataclass(frozen=True)
class Running:
    """A row's process, since when (`time.monotonic`), and the slot that it takes."""

    row: Row
    process: subprocess.Popen
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

    waiting: list[Row]
    running: list[Running] = field(default_factory=list)
    finished: dict[Row, float] = field(default_factory=dict)
    failed: dict[Row, str] = field(default_factory=dict)


def run_rows(
    rows: Sequence[Row],
    command: Callable[[Row], list[str]],
    log: Callable[[Row], Path],
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
    progress = Progress(list(rows))
    try:
        while progress.waiting or progress.running:
            _start(progress, command, log, slots, environment)
            watch(progress)
            if progress.running:
                time.sleep(interval)
            _reap(progress, log)
        watch(progress)
    finally:
        stop(process.process for process in progress.running)
    return progress


def time_left(progress: Progress, known: Mapping[Row, float], slots: int, now: float) -> float | None:
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

    def expected(row: Row) -> float:
        found = next(alike[kind] for kind in _kinds(row) if kind in alike)
        return sum(found) / len(found)

    rest = [max(0.0, expected(r.row) - (now - r.started)) for r in progress.running]
    work = sum(rest) + sum(map(expected, progress.waiting))
    return max([work / slots, *rest])


def _kinds(row: Row) -> list[tuple]:
    """What rows this one is like, the narrowest kind first."""
    return [(row.task.name, row.targets), (row.task.name,), ()]


def stop(processes: Iterable[subprocess.Popen]) -> None:
    """Asks processes to end, waits, and kills what is left of them and of what they have started."""
    processes = list(processes)
    families = [_family(process) for process in processes]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process, family in zip(processes, families, strict=True):
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        for member in (*family, *_family(process)):
            with suppress(psutil.Error):
                member.kill()
        process.wait()


def last_words(path: Path) -> str:
    """The last lines of a log."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "no log was written"
    return "\n".join([line for line in lines if line.strip()][-LAST_LINES:])


def _start(progress: Progress, command, log, slots: Sequence[int | None], environment) -> None:
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
        path = log(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as out, _bound(slots[slot]):
            process = subprocess.Popen(
                command(row),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        progress.running.append(Running(row, process, time.monotonic(), slot))


def _reap(progress: Progress, log: Callable[[Row], Path]) -> None:
    for running in list(progress.running):
        status = running.process.poll()
        if status is None:
            continue
        progress.running.remove(running)
        if status == 0:
            progress.finished[running.row] = time.monotonic() - running.started
        else:
            progress.failed[running.row] = f"exit status {status}\n{last_words(log(running.row))}"


@contextmanager
def _bound(core: int | None) -> Iterator[None]:
    """What is started inside computes on this core alone; None: wherever this thread may."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []
