"""One training run, from the latest checkpoint to the last step, through interruption and divergence.

A run that is told to end saves what it has first: SIGTERM of a scheduler, Ctrl-C of its user.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from experiments import devices
from experiments.configs.training import Config
from experiments.data import Dataset
from experiments.training import checkpoints, divergence
from experiments.training.divergence import Diverged
from experiments.training.finishing import finished
from experiments.training.logs import TrainingLog, drift, progress_bar, warn
from experiments.training.program import Program, build, validation
from experiments.training.state import TrainState, thresholds
from experiments.training.step import Totals
from qt_jax import provenance

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


LOG_EVERY = 20
"""Steps between two looks at the loss."""


def train(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    directory: Path,
    method: str,
    on: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Trains to the last step, resuming from the newest checkpoint, and returns the deployed variables.

    Every epoch ends with a validation of the plain and the fake-quantized network, a row in metrics.jsonl
    and a checkpoint. The same command gives the same parameters to the bit, interrupted or not; on another
    number of devices, up to the order of floating-point sums.

    Args:
      on: devices among which every batch is divided; by default all, of all processes.

    Raises:
      InvalidInput: the loss has diverged and no retries are left; the batch cannot be divided; checkpoints
        are of another model, are all damaged, or cannot be written.
      Interrupted: SIGTERM or Ctrl-C has come; the step it came in is saved.
    """
    program = build(config, model, dataset, devices.data_mesh(on))
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.open_checkpoints(directory / "checkpoints" / method))
        state, totals = divergence.beginning(program, manager)
        done = int(state.step)
        if done >= program.total:
            return devices.on_host(state.deployed)
        log = None
        if devices.is_leader():
            log = stack.enter_context(contextlib.closing(TrainingLog(directory, method, done)))
        bar = progress_bar(method, program.total, done, config.batch_size, shown=log is not None)
        stack.enter_context(bar)
        stopping = stack.enter_context(watched())
        validate = validation(program)
        while (first := int(state.step)) < program.total:
            started, scale = time.perf_counter(), float(state.rate_scale)
            try:
                state, totals = _run_epoch(program, state, totals, bar, stopping)
            except Diverged as error:
                state, totals = divergence.gone_back(program, manager, error, scale, directory)
                bar.update(int(state.step) * config.batch_size - bar.n)
                continue
            step = int(state.step)
            if step > first and step % program.steps_per_epoch == 0:
                if step == program.total:
                    state = devices.replicate(finished(config, dataset, devices.on_host(state)), program.mesh)
                seconds = time.perf_counter() - started
                row = _row(program, state, totals, validate(state), seconds, step - first)
                if log is not None:
                    # The row first: a kill between the two has it dropped and written again, never missing.
                    log.write(step, **row)
                    bar.write(_epoch_line(method, config.epochs, row))
                    if message := drift(row):
                        warn(message)
            checkpoints.save(manager, state, totals)
            if step < program.total and (signal := stopping(step)):
                raise Interrupted(step, signal)
    return devices.on_host(state.deployed)


def _run_epoch(
    program: Program,
    state: TrainState,
    totals: Totals,
    bar: tqdm,
    stopping: Callable[[int], int | None],
) -> tuple[TrainState, Totals]:
    """The steps of the present epoch that are left, or as many as there are until `stopping` says so.

    Raises Diverged.
    """
    config, per_epoch = program.config, program.steps_per_epoch
    step = int(state.step)
    epoch = step // per_epoch
    first, end, order = epoch * per_epoch, (epoch + 1) * per_epoch, program.order(epoch)
    if step == first:
        totals = devices.replicate(Totals.zero(), program.mesh)
    while step < end and not stopping(step):
        steps = min(config.steps_per_dispatch, end - step)
        state, totals = program.run(state, totals, program.split, order, np.int32(steps))
        step += steps
        bar.update(steps * config.batch_size)
        if step == end or (step - first) % max(LOG_EVERY, config.steps_per_dispatch) < steps:
            loss, correct = _means(totals)
            bar.set_postfix(
                {
                    "epoch": f"{epoch + 1}/{config.epochs}",
                    "loss": f"{loss:.3f}",
                    "accuracy": f"{correct:.3f}",
                    "lambda": f"{float(program.lam(step)):.3f}",
                }
            )
            if not divergence.is_sound(loss):
                raise Diverged(step, loss)
    if step == end and not divergence.are_finite(devices.on_host(state.params)):
        raise Diverged(step, float("nan"))
    return state, totals


def _means(totals: Totals) -> tuple[float, float]:
    """Mean loss and accuracy of the sums."""
    images = max(float(totals.images), 1.0)
    return float(totals.loss) / images, float(totals.correct) / images


def _row(
    program: Program,
    state: TrainState,
    totals: Totals,
    validated: dict[str, float],
    seconds: float,
    steps: int,
) -> dict[str, Any]:
    """What metrics.jsonl says of the epoch that has ended, of which this process took so many steps."""
    step = int(state.step)
    loss, correct = _means(totals)
    return {
        "epoch": step // program.steps_per_epoch,
        "loss": loss,
        "accuracy": correct,
        **validated,
        "lambda": float(program.lam(step)),
        "learning_rate": float(program.rate(step)) * float(state.rate_scale),
        "tau": thresholds(devices.on_host(state.opt_state)),
        "seconds": seconds,
        "images_per_second": steps * program.config.batch_size / seconds,
        "compilations": program.run._cache_size(),
        "devices": program.mesh.size,
        "commit": provenance.commit(),
        "versions": provenance.versions(["jax", "jaxlib", "flax", "optax"]),
        "device": jax.devices()[0].device_kind,
    }


def _epoch_line(method: str, epochs: int, row: dict[str, float]) -> str:
    parts = [f"{method} epoch {row['epoch']}/{epochs}", f"loss {row['loss']:.3f}"]
    parts += [f"lambda {row['lambda']:.3f}", f"validation FP32 {100 * row['validation_fp32']:.2f} %"]
    if "validation_fake_quant" in row:
        parts.append(f"fake-quant {100 * row['validation_fake_quant']:.2f} %")
    return "  ".join([*parts, f"{row['images_per_second']:,.0f} images/s"])
