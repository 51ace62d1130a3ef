"""Command lines as processes: started on a core of their own, and stopped with all that they have started.

The standard library and psutil are all that this module loads: a scheduler's jobs run its functions.
"""

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PATIENCE = 20.0
"""Seconds that a process has to end those it has started, before all are killed."""


def start(
    command: Sequence[str], log: Path, environment: Mapping[str, str], core: int | None = None
) -> subprocess.Popen:
    """Starts a command line in a session of its own; what it prints is added to `log`.

    Args:
      environment: all of its variables.
      core: the one it computes on; None: wherever this thread may.
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
    """The exit status of a command line, started as `start` does and stopped if an exception ends the wait.

    Args:
      changes: variables that it has beside those of this process.

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
    """Asks processes to end, waits, and kills what is left of them and of what they have started."""
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
