"""Run one training from the latest checkpoint to the last step, through interruption and divergence.

A run that is told to stop, by a scheduler's SIGTERM or a user's Ctrl-C, saves its state first.
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
from experiments.training.finishing import finish
from experiments.training.logs import TrainingLog, drift, progress_bar, warn
from experiments.training.program import Program, build, validation
from experiments.training.state import TrainState, thresholds
from experiments.training.step import Totals
from qt_jax import provenance

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop a run."""

LOG_EVERY = 20
"""Steps between two checks of the loss."""


class Interrupted(KeyboardInterrupt):
    """Signal that training stopped before its last step, with a checkpoint. `status` is the exit status."""

    def __init__(self, step: int, signum: int):
        super().__init__(f"interrupted at step {step}, which is saved; the same command goes on from there")
        self.status = 128 + signum


def train(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    directory: Path,
    method: str,
    on: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
    """Train to the last step, resuming from the newest checkpoint, and return the deployed variables.

    Every epoch ends with a validation of the plain and the fake-quantized network, a row in metrics.jsonl
    and a checkpoint. The same command gives the same parameters to the bit, interrupted or not. On another
    number of devices they are the same up to the order of floating-point sums.

    Args:
      config: Config of the run.
      model: Network to train.
      dataset: Set to train and validate on.
      directory: Folder of the run, for metrics, TensorBoard and checkpoints.
      method: Name under which the folder keeps them.
      on: Devices among which every batch is divided. By default all devices of all processes.

    Raises:
      InvalidInput: The loss has diverged and no retries are left, the batch cannot be divided, or the
        checkpoints are of another model, are all damaged, or cannot be written.
      Interrupted: SIGTERM or Ctrl-C has come. The step in which it came is saved.
    """
    program = build(config, model, dataset, devices.data_mesh(on))
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoints.open_checkpoints(directory / "checkpoints" / method))
        state, totals = divergence.resume(program, manager)
        done = int(state.step)
        if done >= program.total:
            return devices.on_host(state.deployed)
        log = None
        if devices.is_leader():
            log = stack.enter_context(contextlib.closing(TrainingLog(directory, method, done)))
        bar = progress_bar(method, program.total, done, config.batch_size, shown=log is not None)
        stack.enter_context(bar)
        stopping = stack.enter_context(watch_signals())
        validate = validation(program)
        while (first := int(state.step)) < program.total:
            started, scale = time.perf_counter(), float(state.rate_scale)
            try:
                state, totals = _run_epoch(program, state, totals, bar, stopping)
            except Diverged as error:
                state, totals = divergence.go_back(program, manager, error, scale, directory)
                bar.update(int(state.step) * config.batch_size - bar.n)
                continue
            step = int(state.step)
            if step > first and step % program.steps_per_epoch == 0:
                if step == program.total:
                    state = devices.replicate(finish(config, dataset, devices.on_host(state)), program.mesh)
                seconds = time.perf_counter() - started
                row = _row(program, state, totals, validate(state), seconds, step - first)
                if log is not None:
                    # The row comes before the checkpoint. A kill between the two makes the resumed run drop
                    # the row and write it again, so that it is never missing.
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
    """Take the remaining steps of the current epoch, or those until `stopping` returns a signal.

    Raises:
      Diverged: The loss is not sound, or parameters are not finite at the end of the epoch.
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
    """Return the mean loss and the accuracy that the sums amount to."""
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
    """Return the row of metrics.jsonl for the epoch that has ended.

    Args:
      program: The run.
      state: State at the end of the epoch.
      totals: Sums over the epoch.
      validated: Result of `validation`.
      seconds: Time that this process spent on the epoch.
      steps: Steps of the epoch that this process took.
    """
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


@contextmanager
def watch_signals() -> Iterator[Callable[[int], int | None]]:
    """Note the first of `SIGNALS` that comes inside the context. A second one ends the process at once.

    Yields:
      `step -> signal`, to be called after every step: the signal that has come, or None. With several
      processes it is enough that one is told to stop: all of them learn it at the same step, through JAX's
      own notice of preemption.
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
