"""A run that is told to end saves what it has first: SIGTERM of a scheduler, Ctrl-C of its user."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """Training has ended before its last step, with a checkpoint; `status` is the exit status to end with."""

    def __init__(self, step: int, signum: int):
        super().__init__(f"interrupted at step {step}, which is saved; the same command goes on from there")
        self.status = 128 + signum


@contextmanager
def watched() -> Iterator[Callable[[int], int | None]]:
    """Inside, the first of `SIGNALS` is noted, and a second one ends the process at once.

    Yields:
      `step -> signal`, to be asked after every step: the signal that has come, or None. Of several processes
      one that is told to end is enough: all hear of it at the same step (JAX's own notice of preemption).
    """
    come: list[int] = []
    if jax.process_count() > 1:
        asked: set[int] = set()

        def reached(step: int) -> int | None:
            if step not in asked and multihost_utils.reached_preemption_sync_point(step):
                come.append(signal.SIGTERM)
            asked.add(step)
            return come[0] if come else None

        yield reached
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None
        return
    before = {name: signal.getsignal(name) for name in SIGNALS}

    def note(signum, _frame):
        come.append(signum)
        restore()

    def restore():
        for name, handler in before.items():
            signal.signal(name, handler)

    for name in SIGNALS:
        signal.signal(name, note)
    try:
        yield lambda step: come[0] if come else None
    finally:
        restore()
