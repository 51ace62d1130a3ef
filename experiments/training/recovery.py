"""A diverged run goes back to its last checkpoint, or ends with a report of what went wrong."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import qt_jax as qt
from experiments import devices
from experiments.data.augment import normalize
from experiments.training import checkpoints, divergence
from experiments.training.divergence import Diverged
from experiments.training.logs import warn
from experiments.training.program import Program
from experiments.training.state import TrainState
from experiments.training.step import Totals, drawn


def beginning(program: Program, manager: ocp.CheckpointManager) -> tuple[TrainState, Totals]:
    """State and sums of the newest checkpoint that is whole, or those before the first step.

    Raises InvalidInput as `checkpoints.restore_latest` does.
    """
    found = checkpoints.restore_latest(manager, program.template, program.mesh)
    return found or (program.first(), devices.replicate(Totals.zero(), program.mesh))


def gone_back(
    program: Program, manager: ocp.CheckpointManager, error: Diverged, scale: float, directory: Path
) -> tuple[TrainState, Totals]:
    """Where a diverged run begins anew, with half the learning rate that it had; the report is written.

    Args:
      scale: factor of the learning rate with which it went wrong.

    Raises:
      InvalidInput: no retries are left; says what was found out.
    """
    state, totals = beginning(program, manager)
    state = state.replace(rate_scale=devices.replicate(np.float32(scale), program.mesh))
    report = examined(program, state, error) | {"checkpoint": manager.latest_step()}
    message = divergence.told(report, directory)
    if scale <= 0.5**program.config.retries:
        raise qt.InvalidInput(
            f"{message}Lower --learning-rate or use a gentler --sched in another --out, or let --retries 3 "
            "go back to the last checkpoint and on at half the rate."
        )
    warn(f"{message}Going back, and on at {scale / 2:g} of the learning rate.")
    return state.replace(rate_scale=devices.replicate(np.float32(scale / 2), program.mesh)), totals


def examined(program: Program, state: TrainState, error: Diverged) -> dict[str, Any]:
    """The report on the first bad step after `state`; the steps up to it are repeated."""
    config = program.config

    def order(step: int) -> jax.Array:
        return program.order(step // program.steps_per_epoch)

    def advance(state: TrainState) -> tuple[TrainState, Totals]:
        copy, totals = devices.replicate(devices.on_host((state, Totals.zero())), program.mesh)
        return program.run(copy, totals, program.split, order(int(state.step)), np.int32(1))

    bad = divergence.first_bad_step(state, error.step, advance)
    step = int(bad.step)
    draw = jax.jit(
        lambda split, order, step: drawn(config, split, order, step),
        out_shardings=devices.replicated(program.mesh),
    )
    images, labels = devices.on_host(draw(program.split, order(step), np.int32(step)))
    batch = normalize(jnp.asarray(images), program.dataset.mean, program.dataset.std)
    lam = float(program.lam(step))
    return {
        "step": step,
        "epoch": step // program.steps_per_epoch + 1,
        "seen_by_step": error.step,
        "lambda": lam,
        "learning_rate": float(program.rate(step)) * float(bad.rate_scale),
        **divergence.examine(config, program.model, devices.on_host(bad), batch, labels, lam),
    }
