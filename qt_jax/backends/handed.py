"""Steps of vendor jobs handed to a scheduler: every compile, and the runs of simulators.

What depends on the machine, the runs and timings of what is timed, stays with the process that asks, so that
records are those of a run on one machine. Whether a toolchain is there is asked on that machine, too. The
folder of the steps must be one that all hosts share; a step's lock keeps others from it on all of them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qt_jax.backends import steps
from qt_jax.backends.protocol import Environment
from qt_jax.scheduler import JobFailed, Queue, wait


def perform(
    queue: Queue,
    folder: Path,
    environment: Environment | None,
    job: Mapping[str, Any],
    limits: steps.Limits,
    retry: bool = False,
) -> steps.Answer:
    """As `steps.perform`, in a job of the queue; one that ends without an answer has crashed.

    Raises Stopped, after cancelling the job, once `steps.stop_all` was called; InvalidInput if the scheduler
    refuses it.
    """
    found = steps.kept(folder, limits, retry)
    if found is not None:
        return found
    submitted = queue.submit(steps.perform, folder.absolute(), environment, dict(job), limits, retry)
    try:
        answer = wait(queue, submitted, steps.STOPPING)
    except JobFailed as error:
        return steps.give_up(folder, f"{job['step']}: {' '.join(str(error).split())}", limits)
    if answer is None:
        raise steps.Stopped
    return dataclasses.replace(answer, folder=folder)
