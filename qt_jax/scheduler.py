"""Jobs for a scheduler that is there already, through submitit: processes of this machine, or Slurm's queue.

Slurm's jobs run on other hosts: the folders they work in must lie on a file system that all hosts share.
Records and steps are written under `flock`. Lustre grants it if mounted so; NFS does unless mounted with
`local_lock`, but a host may for a while see a file as it was before another host replaced it, over version 3
above all, so that a record can get lost: the same command then makes it again. This was tried on one host.

A job whose time is up is told shortly before (local: 30 s, Slurm: 90 s), ends what it has started, and has
failed. One that is preempted has failed, too, unless Slurm queues it again.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from qt_jax import processes
from qt_jax.errors import InvalidInput

LAST_LINES = 5
SLURM_TOOLS = ("sbatch", "srun", "sacct", "scancel")


@dataclass(frozen=True)
class Scheduler:
    """Who runs the jobs, and what each of them may take."""

    launcher: Literal["here", "local", "slurm", "debug"] = "here"
    """here: processes of this one. Through submitit: local: jobs on this machine; slurm: jobs in Slurm's
    queue; debug: one after the other inside this process."""
    partition: str | None = None
    """Of Slurm."""
    job_minutes: int = 1440
    """Time limit of each job, local or Slurm's, which it is told shortly before."""
    job_cpus: int | None = None
    """CPUs of each of Slurm's jobs."""
    job_gpus: int | None = None
    """GPUs of each of Slurm's jobs; local ones see those that this process sees."""
    job_memory: float | None = None
    """GiB of each of Slurm's jobs."""


HERE = Scheduler()


class JobFailed(Exception):
    """A job that ended without a result; the message names it and says its last words."""


@dataclass
class Job:
    """A call that a scheduler performs."""

    name: str
    handle: Any
    """As submitit knows it."""
    well: bool = False
    """Whether its result has been fetched."""

    def done(self) -> bool:
        """Whether it has ended, well or not. In debug mode this is what performs it."""
        with warnings.catch_warnings():
            # submitit leaves the log files of its debug mode to the garbage collector
            warnings.simplefilter("ignore", ResourceWarning)
            return self.handle.done()

    def result(self) -> Any:
        """What the function has returned, once `done`. Raises JobFailed if it has not."""
        if self.handle.exception() is None:
            self.well = True
            return self.handle.result()
        log = self.handle.paths.stdout
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        words = [line for line in lines if line.strip()][-LAST_LINES:] or ["it has left no log"]
        told = "\n".join(words)
        raise JobFailed(f"{self.name} ended without a result ({self.handle.state}):\n{told}")


@dataclass
class Queue:
    """An open connection to a scheduler, see `open_queue`.

    Attributes:
      launcher: as in `Scheduler`.
      executor: submitit's.
      interval: seconds between two looks at a job.
      jobs: all that were submitted.
    """

    launcher: str
    executor: Any
    interval: float
    jobs: list[Job] = field(default_factory=list)
    turn: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Hands `function(*arguments)` over; both are pickled. Several threads may do so.

        Raises InvalidInput if Slurm refuses the job.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import clean_env

        call = (function, *arguments)
        if self.launcher != "debug":
            # submitit's local jobs see no GPU but those it counts out
            kept = {"CUDA_VISIBLE_DEVICES"} if self.launcher == "local" else ()
            call = (_perform, {name: os.environ.get(name) for name in kept}, *call)
        with self.turn, _uninterrupted(), clean_env():
            try:
                handle = self.executor.submit(*call)
            except (FailedJobError, FailedSubmissionError) as error:
                raise InvalidInput(f"sbatch refused a job: {' '.join(str(error).split())}") from error
            job = Job(f"{self.launcher} job {handle.job_id}", handle)
            self.jobs.append(job)
        return job

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Ends those jobs that have not ended; local ones are gone afterwards, Slurm's have been told."""
        if self.launcher == "debug":
            return
        live = [job for job in jobs if not job.done()]
        if self.launcher == "local":
            processes.stop(int(job.handle.job_id) for job in live)
            for job in live:
                job.done()  # reaps the process
        else:
            for job in live:
                job.handle.cancel(check=False)


@contextmanager
def open_queue(scheduler: Scheduler, folder: Path) -> Iterator[Queue | None]:
    """The scheduler of these settings; None for `here`. Jobs that have not ended are cancelled at the end.

    Args:
      folder: gets a folder with submitit's files and logs, which goes again if all jobs have ended well.

    Raises InvalidInput for settings that do not go together, without submitit, and without Slurm's tools.

    >>> with open_queue(Scheduler("local"), Path(tempfile.mkdtemp())) as queue:
    ...     job = queue.submit(divmod, 7, 2)
    ...     wait(queue, job)
    (3, 1)
    """
    _check(scheduler)
    if scheduler.launcher == "here":
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    # a folder of its own: local jobs are named by process ids, which come back
    own = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder))
    slurm = scheduler.launcher == "slurm"
    queue = Queue(scheduler.launcher, _executor(scheduler, own), interval=5.0 if slurm else 0.2)
    try:
        yield queue
    finally:
        queue.cancel(queue.jobs)
    if all(job.well for job in queue.jobs):
        shutil.rmtree(own, ignore_errors=True)


def wait(queue: Queue, job: Job, stopping: threading.Event | None = None) -> Any:
    """The result of a job; None, after cancelling it, once `stopping` is set. Raises JobFailed as it does."""
    stopping = threading.Event() if stopping is None else stopping
    while not job.done():
        if stopping.wait(queue.interval):
            queue.cancel([job])
            return None
    return job.result()


def _check(scheduler: Scheduler) -> None:
    given = {f.name for f in fields(scheduler) if getattr(scheduler, f.name) != f.default} - {"launcher"}
    understood = {"slurm": given, "local": {"job_minutes"}}.get(scheduler.launcher, set())
    if foreign := sorted(given - understood):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise InvalidInput(
            f"--launcher {scheduler.launcher} knows no {flags}: leave out, or --launcher slurm"
        )
    for name in sorted(given - {"partition"}):
        if getattr(scheduler, name) <= 0 and name != "job_gpus":
            flag = f"--{name.replace('_', '-')}"
            raise InvalidInput(f"{flag} must be above 0, got {getattr(scheduler, name)}")
    if scheduler.launcher != "slurm":
        return
    for tool in SLURM_TOOLS:
        if shutil.which(tool) is None:
            raise InvalidInput(
                f"no {tool} on PATH: --launcher slurm works on a host from which Slurm takes jobs; "
                "--launcher local needs none"
            )


def _executor(scheduler: Scheduler, folder: Path) -> Any:
    """submitit's executor. Raises InvalidInput where it is not installed."""
    # its own logging would close the handlers of everybody else
    quiet = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        import cloudpickle
        import submitit
    except ImportError as error:
        raise InvalidInput(f"--launcher {scheduler.launcher} needs submitit: pip install submitit") from error
    finally:
        os.environ.pop("SUBMITIT_LOG_LEVEL")
        os.environ.update({} if quiet is None else {"SUBMITIT_LOG_LEVEL": quiet})
    logging.getLogger("submitit").setLevel(logging.ERROR)
    for module in (sys.modules[__name__], processes):
        cloudpickle.register_pickle_by_value(module)  # so that a job need not load JAX to start a command
    if scheduler.launcher == "debug":
        return submitit.DebugExecutor(folder)
    if scheduler.launcher == "local":
        local = submitit.LocalExecutor(folder)
        local.update_parameters(timeout_min=scheduler.job_minutes, stderr_to_stdout=True)
        return local
    memory = None if scheduler.job_memory is None else f"{round(1024 * scheduler.job_memory)}MB"
    asked = {
        "partition": scheduler.partition,
        "cpus_per_task": scheduler.job_cpus,
        "gpus_per_node": scheduler.job_gpus,
        "mem": memory,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    executor = submitit.SlurmExecutor(folder)
    executor.update_parameters(job_name="qt_jax", time=scheduler.job_minutes, stderr_to_stdout=True, **asked)
    return executor


def _perform(variables: Mapping[str, str | None], function: Callable[..., Any], *arguments: Any) -> Any:
    """In a job: the call, under these variables; SIGTERM, which submitit ignores, ends it as Ctrl-C does."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    for name, value in variables.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})
    signal.signal(signal.SIGTERM, end)
    return function(*arguments)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started inside are deaf to the terminal's Ctrl-C: they end when they are told."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
