"""Perform one step of a vendor's toolchain (compile, run or time) in a process with limits, log and cache.

A step has a folder, named by the hash of everything that decides its outcome. The worker writes into a
scratch folder beside it, which is renamed only when its `answer.json` is complete. A kill at any moment
therefore leaves no half step that could be taken for a whole one. A lock file beside the folder makes
everybody else who wants the same step, in this process or in another, wait for the first.

`perform` starts the worker on this machine. `submit` sends the step to a scheduler, whose hosts must all
share the folder of the steps; the lock works across them. The harness submits every compile and the runs of
simulators. Runs and timings that depend on the machine stay with the process that asks, so that the records
are those of one machine. Whether a toolchain is installed is also asked on that machine.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from qt_jax.backends import environments
from qt_jax.backends.protocol import Environment
from qt_jax.files import write_whole
from qt_jax.processes import kill
from qt_jax.scheduler import JobFailed, Queue, wait

WORKER = Path(__file__).with_name("worker.py")
ANSWER, REPLY, LOG = "answer.json", "reply.json", "log.txt"
"""Files of a step's folder: how it ended, what the worker replied, and what the worker printed."""
MAX_GIBIBYTES = round(min(12.0, 0.8 * psutil.virtual_memory().total / 2**30), 1)
"""The default memory limit in GiB: 12, or 80 % of this machine's memory where that is less."""
STOPPING = threading.Event()
"""Set by `stop_all`. Whoever starts steps clears it first."""

_RUNNING: set[subprocess.Popen] = set()


@dataclass(frozen=True)
class Limits:
    """Limit what one step may take."""

    seconds: float = 1800.0
    """Wall-clock time of the step."""
    gibibytes: float = MAX_GIBIBYTES
    """Private memory of each process of the step, in GiB. An allocation beyond it fails."""

    def exceed(self, others: Mapping[str, float]) -> bool:
        """Tell whether one of these limits is above its counterpart in `others`, a dict of these fields.

        A step that failed under `others` may then do better now.
        """
        return self.seconds > others["seconds"] or self.gibibytes > others["gibibytes"]


@dataclass(frozen=True)
class Answer:
    """Tell how a step ended.

    Attributes:
      status: As in a record, see `qt_jax.records`.
      result: What the worker found, if the status is "ok"; else empty.
      reason: Why the status is not "ok"; else None.
      seconds: How long the step took.
      limits: The fields of the `Limits` that it ran under.
      folder: The folder of the step.
    """

    status: str
    result: Mapping[str, Any]
    reason: str | None
    seconds: float
    limits: Mapping[str, float]
    folder: Path


class Stopped(Exception):
    """Report a step that was given up because `stop_all` was called. Nothing of it is kept."""


def perform(
    folder: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits, retry: bool = False
) -> Answer:
    """Return the answer of a step, from its folder or from a new worker process.

    Args:
      folder: The folder of the step.
      environment: The environment whose interpreter runs the worker; None for this one.
      job: What the worker reads, as JSON. A path that starts with "./" lies in the folder.
      limits: What the step may take.
      retry: Perform a step again whose answer is not "ok".

    Returns:
      The answer. One in the folder that lacked time or memory does not count when more is given now.

    Raises:
      Stopped: `stop_all` was called.
    """
    with lock(folder):
        found = cached(folder, limits, retry)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        work = scratch / "work"
        work.mkdir(parents=True)
        status = _execute(scratch, environment, job, limits)
        shutil.rmtree(work, ignore_errors=True)
        if STOPPING.is_set():
            shutil.rmtree(scratch, ignore_errors=True)
            raise Stopped
        answer = _outcome(scratch, job["step"], status, limits)
        (scratch / ANSWER).write_text(json.dumps(answer), encoding="utf-8")
        os.replace(scratch, folder)
        return _parse(answer, folder)


def submit(
    queue: Queue,
    folder: Path,
    environment: Environment | None,
    job: Mapping[str, Any],
    limits: Limits,
    retry: bool = False,
) -> Answer:
    """Return the answer of a step, from its folder or by performing it in a job of a scheduler.

    Args:
      queue: The scheduler's queue.
      folder: The folder of the step, and the other arguments as `perform` takes them.
      environment: As for `perform`.
      job: As for `perform`.
      limits: As for `perform`.
      retry: As for `perform`.

    Returns:
      The answer. A job that ends without one counts as crashed.

    Raises:
      Stopped: `stop_all` was called; the job has been cancelled.
      InvalidInput: The scheduler refuses the job.
    """
    found = cached(folder, limits, retry)
    if found is not None:
        return found
    submitted = queue.submit(perform, folder.absolute(), environment, dict(job), limits, retry)
    try:
        answer = wait(queue, submitted, STOPPING)
    except JobFailed as error:
        return _record_crash(folder, f"{job['step']}: {' '.join(str(error).split())}", limits)
    if answer is None:
        raise Stopped
    return replace(answer, folder=folder)


def cached(folder: Path, limits: Limits, retry: bool = False) -> Answer | None:
    """Return the answer in a step's folder if it still counts, else None.

    With `retry`, an answer that is not "ok" does not count. A timeout or a crash never counts when `limits`
    give more time or memory than it had.
    """
    try:
        found = _parse(json.loads((folder / ANSWER).read_text(encoding="utf-8")), folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    starved = found.status in ("timeout", "crashed") and limits.exceed(found.limits)
    stale = found.status != "ok" and (retry or starved)
    return None if stale else found


def stop_all() -> None:
    """Kill every worker that runs now. The interrupted steps are performed again next time."""
    STOPPING.set()
    for process in list(_RUNNING):
        kill(process)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock file of a step, or of another path: at most one thread or process does at a time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _execute(
    scratch: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits
) -> int | str | None:
    """Run the worker in a scratch folder.

    Returns:
      The worker's exit status, negative for a signal. None if its time ran out. A message if it did not
      start.
    """
    places = {
        name: str(scratch.absolute() / value[2:])
        for name, value in job.items()
        if isinstance(value, str) and value.startswith("./")
    }
    memory = {"answer": str(scratch.absolute() / REPLY), "memory_bytes": int(limits.gibibytes * 2**30)}
    (scratch / "job.json").write_text(json.dumps({**job, **places, **memory}), encoding="utf-8")
    command = [environments.interpreter(environment), WORKER, (scratch / "job.json").absolute()]
    if STOPPING.is_set():
        return None
    with open(scratch / LOG, "wb") as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=scratch / "work",
                env=environments.variables(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"could not start: {error}"
        _RUNNING.add(process)
        try:
            return process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill(process)
            _RUNNING.discard(process)


def _outcome(scratch: Path, step: str, exit_status: int | str | None, limits: Limits) -> dict[str, Any]:
    """Return the content of `answer.json`, from the worker's reply or, without one, from how it ended."""
    if exit_status is None:
        reason = f"{step} was stopped after {limits.seconds:g} s (--timeout)"
        return _failed("timeout", reason, limits, limits.seconds)
    try:
        reply = json.loads((scratch / REPLY).read_text(encoding="utf-8"))
        seconds = float(reply["seconds"])
        if "result" not in reply:
            status = "refused" if reply["refused"] else "crashed"
            return _failed(status, f"{step}: {reply['error']}", limits, seconds)
        answer = {"status": "ok", "result": dict(reply["result"]), "reason": None, "seconds": seconds}
        return answer | {"limits": asdict(limits)}
    except (OSError, ValueError, KeyError, TypeError):  # not what a worker writes
        end = exit_status if isinstance(exit_status, str) else _describe_exit(exit_status)
        return _failed("crashed", f"{step} {end}{_last_line(scratch)}", limits)


def _failed(status: str, reason: str, limits: Limits, seconds: float = 0.0) -> dict[str, Any]:
    """Return the content of `answer.json` for a step that is not "ok"."""
    return {
        "status": status,
        "result": {},
        "reason": reason,
        "seconds": seconds,
        "limits": asdict(limits),
    }


def _describe_exit(status: int) -> str:
    """Say how a worker ended that gave no reply."""
    if status >= 0:
        return f"ended with exit status {status} and no answer"
    known = {number.value: number.name for number in signal.Signals}
    return f"was killed by {known.get(-status, f'signal {-status}')}"


def _last_line(scratch: Path) -> str:
    """Quote the last line of the log, for a worker that gave no reply."""
    try:
        with open(scratch / LOG, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    printed = [line.strip() for line in lines if line.strip()]
    return f"; its last words: {printed[-1][:300]}" if printed else ""


def _record_crash(folder: Path, reason: str, limits: Limits) -> Answer:
    """Write the answer of a step whose job left none: it counts as crashed."""
    answer = _failed("crashed", reason, limits)
    with lock(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / LOG).write_text(f"{reason}\n", encoding="utf-8")
        write_whole(folder / ANSWER, json.dumps(answer))
        return _parse(answer, folder)


def _parse(found: Mapping[str, Any], folder: Path) -> Answer:
    """Turn the content of `answer.json` into an Answer. Raises KeyError or TypeError if it is not one."""
    keys = ("status", "result", "reason", "seconds", "limits")
    return Answer(**{key: found[key] for key in keys}, folder=folder)
