"""Start command lines as processes, each on one core if asked, and end them with all that they have started.

This module loads nothing but the standard library and psutil, because the jobs of a scheduler run its
functions.
"""

import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PATIENCE = 20.0
"""Seconds that a process gets to end its own children before all of them are killed."""


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], core: int | None = None
) -> subprocess.Popen:
    """Start a command line in a new session and append its output to a log.

    Args:
      command: The program and its arguments.
      log: The file that stdout and stderr are appended to. Its folder is made.
      environment: All environment variables of the process.
      core: The core that the process computes on. None leaves it the cores of this thread.

    Returns:
      The running process.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out, _bound(core):
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(command: Sequence[str], log: Path, changes: Mapping[str, str], core: int | None = None) -> int:
    """Run a command line to its end and return its exit status.

    The process is started as `start` does it. An exception that ends the wait stops the process first.

    Args:
      command: The program and its arguments.
      log: The file that stdout and stderr are appended to.
      changes: Environment variables on top of those of this process.
      core: The core that the process computes on. None leaves it the cores of this thread.

    Returns:
      The exit status, negative for a signal.

    >>> import sys, tempfile
    >>> log = Path(tempfile.mkdtemp()) / "log.txt"
    >>> run([sys.executable, "-c", "import os; exit(os.environ['WORD'])"], log, {"WORD": "no luck"})
    1
    >>> log.read_text()
    'no luck\\n'
    """
    process = start(command, log, {**os.environ, **changes}, core)
    try:
        return process.wait()
    except BaseException:
        stop([process.pid])
        raise


def stop(pids: Iterable[int]) -> None:
    """Ask processes to end, wait for `PATIENCE`, then kill what is left of them and of their descendants."""
    families: dict[psutil.Process, list[psutil.Process]] = {}
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            families[process] = process.children(recursive=True)
    for process in families:
        with suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(families, timeout=PATIENCE)
    for process, family in families.items():
        with suppress(psutil.Error):
            family += process.children(recursive=True)
        for member in (*family, process):
            with suppress(psutil.Error):
                member.kill()
    psutil.wait_procs(families, timeout=PATIENCE)


def kill(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, its descendants, and what is left of the session."""
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


@contextmanager
def _bound(core: int | None) -> Iterator[None]:
    """Bind this thread to one core, so that processes started inside inherit it. None changes nothing."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
