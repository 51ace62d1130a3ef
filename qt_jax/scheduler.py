"""Submit jobs to an existing scheduler through submitit: processes of this machine, or Slurm's queue.

Slurm's jobs run on other hosts. The folders they work in must lie on a file system that all hosts share.
Records and steps are written under `flock`. Lustre grants it where it is mounted with locks. NFS grants it
unless it is mounted with `local_lock`. Over NFS, version 3 above all, a host may for a while see a file as it
was before another host replaced it, and a record can get lost. The same command then makes that record again.
All of this was tried on one host only.

A job is warned shortly before its time limit (local: 30 s, Slurm: 90 s). It then ends the processes it has
started and counts as failed. A preempted job counts as failed too, unless Slurm queues it again.
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
"""Lines of a failed job's log that its error repeats."""
SLURM_TOOLS = ("sbatch", "srun", "sacct", "scancel")


@dataclass(frozen=True)
class Scheduler:
    """Choose who runs the jobs, and what each job may use."""

    launcher: Literal["here", "local", "slurm", "debug"] = "here"
    """here: child processes of this one. The others go through submitit. local: jobs on this machine; slurm:
    jobs in Slurm's queue; debug: one after the other inside this process."""
    partition: str | None = None
    """Slurm's partition."""
    job_minutes: int = 1440
    """Time limit of each local or Slurm job. A job is warned shortly before."""
    job_cpus: int | None = None
    """CPUs of each Slurm job."""
    job_gpus: int | None = None
    """GPUs of each Slurm job. Local jobs see the GPUs that this process sees."""
    job_memory: float | None = None
    """GiB of memory of each Slurm job."""


HERE = Scheduler()


class JobFailed(Exception):
    """Report a job that ended without a result. The message names it and repeats its last lines."""


@dataclass
class Job:
    """Follow one call that a scheduler performs.

    Attributes:
      name: The launcher and submitit's number of the job, for messages.
      handle: submitit's own job.
      succeeded: Whether the result has been fetched.
    """

    name: str
    handle: Any
    succeeded: bool = False

    def done(self) -> bool:
        """Tell whether the job has ended, well or not. In debug mode, asking performs the call."""
        with warnings.catch_warnings():
            # submitit leaves the log files of its debug mode to the garbage collector
            warnings.simplefilter("ignore", ResourceWarning)
            return self.handle.done()

    def result(self) -> Any:
        """Return what the function of a job that is `done` has returned.

        Raises:
          JobFailed: The function raised, or its process ended before it returned.
        """
        if self.handle.exception() is None:
            self.succeeded = True
            return self.handle.result()
        log = self.handle.paths.stdout
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        last = [line for line in lines if line.strip()][-LAST_LINES:] or ["it has left no log"]
        text = "\n".join(last)
        raise JobFailed(f"{self.name} ended without a result ({self.handle.state}):\n{text}")


@dataclass
class Queue:
    """Submit jobs to a scheduler and cancel them. `open_queue` makes one.

    Attributes:
      launcher: As in `Scheduler`.
      executor: submitit's executor.
      interval: Seconds between two looks at a job.
      jobs: All jobs that were submitted.
      lock: Held by the thread that is submitting.
    """

    launcher: str
    executor: Any
    interval: float
    jobs: list[Job] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Submit the call `function(*arguments)`; both are pickled. Several threads may submit.

        Raises:
          InvalidInput: Slurm refuses the job.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import clean_env

        call = (function, *arguments)
        if self.launcher != "debug":
            # submitit would hide from a local job all GPUs that it has not assigned itself
            kept = {"CUDA_VISIBLE_DEVICES"} if self.launcher == "local" else ()
            call = (_perform, {name: os.environ.get(name) for name in kept}, *call)
        with self.lock, _uninterrupted(), clean_env():
            try:
                handle = self.executor.submit(*call)
            except (FailedJobError, FailedSubmissionError) as error:
                raise InvalidInput(f"sbatch refused a job: {' '.join(str(error).split())}") from error
            job = Job(f"{self.launcher} job {handle.job_id}", handle)
            self.jobs.append(job)
        return job

    def cancel(self, jobs: Iterable[Job]) -> None:
        """End jobs that are still running. On return, local ones are gone and Slurm's have been signalled."""
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
    """Open a queue of the scheduler, and cancel at the end the jobs that are still running.

    Args:
      scheduler: Who runs the jobs.
      folder: The folder in which a new folder gets submitit's files and logs. The new folder is deleted at
        the end if all jobs have succeeded.

    Yields:
      The queue. None for the launcher `here`, which needs none.

    Raises:
      InvalidInput: The settings do not go together, submitit is not installed, or Slurm's tools are missing.

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
    # local jobs are named by process ids, which repeat, so every queue gets a new folder
    own = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=folder))
    slurm = scheduler.launcher == "slurm"
    queue = Queue(scheduler.launcher, _executor(scheduler, own), interval=5.0 if slurm else 0.2)
    try:
        yield queue
    finally:
        queue.cancel(queue.jobs)
    if all(job.succeeded for job in queue.jobs):
        shutil.rmtree(own, ignore_errors=True)


def wait(queue: Queue, job: Job, stopping: threading.Event | None = None) -> Any:
    """Wait for a job and return its result.

    Args:
      queue: The queue that the job was submitted to.
      job: The job.
      stopping: Setting this event ends the wait.

    Returns:
      The result. None if `stopping` was set: the job is then cancelled.

    Raises:
      JobFailed: The job ended without a result.
    """
    stopping = threading.Event() if stopping is None else stopping
    while not job.done():
        if stopping.wait(queue.interval):
            queue.cancel([job])
            return None
    return job.result()


def _check(scheduler: Scheduler) -> None:
    """Raise InvalidInput for settings that do not go together, or that this machine cannot meet."""
    given = {f.name for f in fields(scheduler) if getattr(scheduler, f.name) != f.default} - {"launcher"}
    understood = {"slurm": given, "local": {"job_minutes"}}.get(scheduler.launcher, set())
    if foreign := sorted(given - understood):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in foreign)
        raise InvalidInput(
            f"--launcher {scheduler.launcher} does not take {flags}: leave out, or use --launcher slurm"
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
    """Make submitit's executor. Raises InvalidInput where submitit is not installed."""
    # submitit's own logging configuration would close the handlers of other loggers
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
        cloudpickle.register_pickle_by_value(module)  # a job then starts a command without loading JAX
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
    """Perform a call inside a job, under these environment variables.

    submitit ignores SIGTERM. Here it raises KeyboardInterrupt, as Ctrl-C does. A variable that is None is
    unset.
    """

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
    """Block the terminal's Ctrl-C in the processes started inside, so that only `cancel` ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
