"""Rows as jobs of a scheduler, submitted in the order that `schedule` gives: a row's source comes first.

A row that a process of an earlier launch still works on is not submitted: its job waits, outside the queue,
until that process has let go of the row's folder. What an earlier launch has left in Slurm's queue without
cancelling it (it was killed) cannot be seen from here; the job that comes second then waits at the row's
folder, and finds the work done.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.paper.progress import held
from experiments.paper.rows import Row
from experiments.paper.schedule import Progress, carry_out
from qt_jax import processes
from qt_jax.scheduler import Job, JobFailed, Queue


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
    rows: Sequence[Row],
    command: Callable[[Row], list[str]],
    log: Callable[[Row], Path],
    *,
    slots: Sequence[int | None],
    environment: Mapping[str, str],
    done: Callable[[Row], bool],
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

    def start(row: Row, core: int | None) -> Handed:
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
