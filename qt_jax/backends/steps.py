"""One step of a vendor job (compile, run, time) in a process of its own, with limits, a log and a cache.

A step lives in a folder named by the hash of everything that decides its outcome. The worker writes into a
folder beside it, which gets the step's name only when its `answer.json` is complete: a kill at any moment
leaves no half step behind that could be taken for a whole one.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qt_jax.backends import environments
from qt_jax.backends.protocol import Environment

WORKER = Path(__file__).with_name("worker.py")
ANSWER, LOG = "answer.json", "log.txt"


@dataclass(frozen=True)
class Limits:
    """What one step may take."""

    seconds: float = 1800.0
    gibibytes: float = 12.0
    """Private memory of each process: an allocation beyond it fails."""


@dataclass(frozen=True)
class Answer:
    """How a step ended: `status` as in a record, `result` if it is "ok", else `reason`."""

    status: str
    result: Mapping[str, Any]
    reason: str | None
    seconds: float
    folder: Path


def perform(
    folder: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits, retry: bool = False
) -> Answer:
    """The answer of the step whose home is `folder`: the one found there, or that of a new worker process.

    `job` is what the worker reads; paths in it that start with "./" lie in the folder. With `retry` an answer
    that is not "ok" does not count. Threads that ask for the same step wait for the first.
    """
    with _lock(folder):
        found = _read(folder)
        if found is not None and (found.status == "ok" or not retry):
            return found
        shutil.rmtree(folder, ignore_errors=True)
        scratch = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        work = scratch / "work"
        work.mkdir(parents=True)
        status = _execute(scratch, environment, job, limits)
        shutil.rmtree(work, ignore_errors=True)
        answer = _answer(scratch, job["step"], status, limits)
        (scratch / ANSWER).write_text(json.dumps(answer))
        os.replace(scratch, folder)
        return _read(folder)


_LIVE: set[subprocess.Popen] = set()
_LOCKS: dict[Path, threading.Lock] = {}
_LOCKS_GUARD = threading.Lock()


def _lock(folder: Path) -> threading.Lock:
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(folder.absolute(), threading.Lock())


def _read(folder: Path) -> Answer | None:
    try:
        found = json.loads((folder / ANSWER).read_text())
        return Answer(found["status"], found["result"], found["reason"], found["seconds"], folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _execute(
    scratch: Path, environment: Environment | None, job: Mapping[str, Any], limits: Limits
) -> int | None:
    """The worker's exit status, negative for a signal; None if its time ran out."""
    places = {
        name: str(scratch.absolute() / value[2:])
        for name, value in job.items()
        if isinstance(value, str) and value.startswith("./")
    }
    memory = {"answer": str(scratch.absolute() / "reply.json"), "memory_bytes": int(limits.gibibytes * 2**30)}
    (scratch / "job.json").write_text(json.dumps({**job, **places, **memory}))
    command = [environments.interpreter(environment), WORKER, (scratch / "job.json").absolute()]
    with open(scratch / LOG, "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=scratch / "work",
            env=environments.variables(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _LIVE.add(process)
        try:
            return process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_session(process)
            _LIVE.discard(process)


def stop_all() -> None:
    """End every worker that runs now; what they were at is done again next time."""
    for process in list(_LIVE):
        _kill_session(process)


def _kill_session(process: subprocess.Popen) -> None:
    """End the worker and every child it left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _answer(scratch: Path, step: str, status: int | None, limits: Limits) -> dict[str, Any]:
    """What the worker replied, or what its end says where it could not reply."""
    nothing = {"result": {}, "seconds": limits.seconds if status is None else 0.0}
    if status is None:
        return nothing | {"status": "timeout", "reason": f"{step} was stopped after {limits.seconds:g} s"}
    try:
        reply = json.loads((scratch / "reply.json").read_text())
        seconds = reply["seconds"]
        if "result" in reply:
            return {"status": "ok", "result": reply["result"], "reason": None, "seconds": seconds}
    except (OSError, ValueError, KeyError, TypeError):
        return nothing | {"status": "crashed", "reason": f"{step} {_end(status)}{_last_words(scratch)}"}
    status = "refused" if reply["refused"] else "crashed"
    return nothing | {"status": status, "reason": f"{step}: {reply['error']}", "seconds": seconds}


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} and no answer"
    return f"was killed by {signal.Signals(-status).name}"


def _last_words(scratch: Path) -> str:
    """The last line of the log, for a process that could not say itself what was wrong."""
    lines = (scratch / LOG).read_bytes()[-4000:].decode(errors="replace").split("\n")
    spoken = [line.strip() for line in lines if line.strip()]
    return f"; its last words: {spoken[-1][:300]}" if spoken else ""
