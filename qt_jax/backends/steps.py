"""One step of a vendor job (compile, run, time) in a process of its own, with limits, a log and a cache.

A step lives in a folder named by the hash of everything that decides its outcome. The worker writes into a
folder beside it, which gets the step's name only when its `answer.json` is complete: a kill at any moment
leaves no half step behind that could be taken for a whole one. A lock file beside it makes everybody else
who wants the same step, in this process or in another, wait for the first.

Steps of vendor jobs handed to a scheduler: every compile, and the runs of simulators.

What depends on the machine, the runs and timings of what is timed, stays with the process that asks, so that
records are those of a run on one machine. Whether a toolchain is there is asked on that machine, too. The
folder of the steps must be one that all hosts share; a step's lock keeps others from it on all of them.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from qt_jax.backends import environments
from qt_jax.backends.protocol import Environment
from qt_jax.files import write_whole
from qt_jax.scheduler import JobFailed, Queue, wait

WORKER = Path(__file__).with_name("worker.py")

ANSWER, REPLY, LOG = "answer.json", "reply.json", "log.txt"

MOST_GIBIBYTES = round(min(12.0, 0.8 * psutil.virtual_memory().total / 2**30), 1)


@dataclass(frozen=True)
class Limits:
    """What one step may take."""

    seconds: float = 1800.0
    gibibytes: float = MOST_GIBIBYTES
    """Private memory of each process of the step: an allocation beyond it fails."""

    def exceed(self, others: Mapping[str, float]) -> bool:
        """Whether a step that failed under `others`, as a dict of these fields, may do better now."""
        return self.seconds > others["seconds"] or self.gibibytes > others["gibibytes"]


@dataclass(frozen=True)
class Answer:
    """How a step ended: `status` as in a record, `result` if it is "ok", else `reason`."""

    status: str
    result: Mapping[str, Any]
    reason: str | None
    seconds: float
    limits: Mapping[str, float]
    folder: Path


class Stopped(Exception):
    """The step was given up because `stop_all` was called; nothing of it is kept."""


def perform(
    folder: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits, retry: bool = False
) -> Answer:
    """The answer of the step whose home is `folder`: the one found there, or that of a new worker process.

    `job` is what the worker reads; paths in it that start with "./" lie in the folder. With `retry` an answer
    that is not "ok" does not count; one that lacked time or memory never does when more is given now.
    Raises Stopped after `stop_all`.
    """
    with _lock(folder):
        found = kept(folder, limits, retry)
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
        answer = _answer(scratch, job["step"], status, limits)
        (scratch / ANSWER).write_text(json.dumps(answer | {"limits": asdict(limits)}))
        os.replace(scratch, folder)
        return _parsed(answer | {"limits": asdict(limits)}, folder)


def kept(folder: Path, limits: Limits, retry: bool = False) -> Answer | None:
    """The answer that `perform` finds in the folder and takes for good, or None."""
    found = _read(folder)
    stale = found is not None and found.status != "ok" and (retry or _starved(found, limits))
    return None if stale else found


def give_up(folder: Path, reason: str, limits: Limits) -> Answer:
    """Leaves the answer of a step whose process has left none: it counts as crashed."""
    answer = {"status": "crashed", "result": {}, "reason": reason, "seconds": 0.0, "limits": asdict(limits)}
    with _lock(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / LOG).write_text(f"{reason}\n")
        write_whole(folder / ANSWER, json.dumps(answer))
        return _parsed(answer, folder)


STOPPING = threading.Event()
"""Set by `stop_all`; whoever starts steps clears it first."""

_LIVE: set[subprocess.Popen] = set()


def stop_all() -> None:
    """End every worker that runs now; what they were at is done again next time."""
    STOPPING.set()
    for process in list(_LIVE):
        _kill(process)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def _read(folder: Path) -> Answer | None:
    try:
        return _parsed(json.loads((folder / ANSWER).read_text()), folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _parsed(found: Mapping[str, Any], folder: Path) -> Answer:
    keys = ("status", "result", "reason", "seconds", "limits")
    return Answer(**{key: found[key] for key in keys}, folder=folder)


def _starved(found: Answer, limits: Limits) -> bool:
    return found.status in ("timeout", "crashed") and limits.exceed(found.limits)


def _execute(
    scratch: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits
) -> int | str | None:
    """The worker's exit status, negative for a signal; None if its time ran out; why it did not start."""
    places = {
        name: str(scratch.absolute() / value[2:])
        for name, value in job.items()
        if isinstance(value, str) and value.startswith("./")
    }
    memory = {"answer": str(scratch.absolute() / REPLY), "memory_bytes": int(limits.gibibytes * 2**30)}
    (scratch / "job.json").write_text(json.dumps({**job, **places, **memory}))
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
        _LIVE.add(process)
        try:
            return process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            _LIVE.discard(process)


def _kill(process: subprocess.Popen) -> None:
    """End the worker, its descendants, and what is left of its session."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        family = []
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    process.wait()


def _answer(scratch: Path, step: str, status: int | str | None, limits: Limits) -> dict[str, Any]:
    """What the worker replied, or what its end says where it could not reply."""
    if status is None:
        stopped = f"{step} was stopped after {limits.seconds:g} s (--timeout)"
        return {"status": "timeout", "result": {}, "reason": stopped, "seconds": limits.seconds}
    try:
        return _reply(scratch, step)
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"{step} {status if isinstance(status, str) else _end(status)}{_last_words(scratch)}"
        return {"status": "crashed", "result": {}, "reason": reason, "seconds": 0.0}


def _reply(scratch: Path, step: str) -> dict[str, Any]:
    """The worker's own account. Raises one of several errors if it is not what a worker writes."""
    reply = json.loads((scratch / REPLY).read_text())
    seconds = float(reply["seconds"])
    if "result" in reply:
        return {"status": "ok", "result": dict(reply["result"]), "reason": None, "seconds": seconds}
    status = "refused" if reply["refused"] else "crashed"
    return {"status": status, "result": {}, "reason": f"{step}: {reply['error']}", "seconds": seconds}


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} and no answer"
    known = {number.value: number.name for number in signal.Signals}
    return f"was killed by {known.get(-status, f'signal {-status}')}"


def _last_words(scratch: Path) -> str:
    """The last line of the log, for a process that could not say itself what was wrong."""
    try:
        with open(scratch / LOG, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    spoken = [line.strip() for line in lines if line.strip()]
    return f"; its last words: {spoken[-1][:300]}" if spoken else ""


def submit(
    queue: Queue,
    folder: Path,
    environment: Environment | None,
    job: Mapping[str, Any],
    limits: Limits,
    retry: bool = False,
) -> Answer:
    """As `steps.perform`, in a job of the queue; one that ends without an answer has crashed.

    Raises Stopped, after cancelling the job, once `steps.stop_all` was called; InvalidInput if the scheduler
    refuses it.
    """
    found = kept(folder, limits, retry)
    if found is not None:
        return found
    submitted = queue.submit(perform, folder.absolute(), environment, dict(job), limits, retry)
    try:
        answer = wait(queue, submitted, STOPPING)
    except JobFailed as error:
        return give_up(folder, f"{job['step']}: {' '.join(str(error).split())}", limits)
    if answer is None:
        raise Stopped
    return dataclasses.replace(answer, folder=folder)
