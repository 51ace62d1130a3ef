"""Checkpoints through orbax: written whole or not at all, restored to the bit."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import qt_jax as qt
from experiments.training.state import TrainState


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """The manager of a folder of checkpoints, which keeps the newest two; a context that closes it."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Writes the state under its own step."""
    manager.save(int(state.step), args=ocp.args.StandardSave(state))


def restore_latest(manager: ocp.CheckpointManager, template: TrainState) -> TrainState | None:
    """The newest state, or None if there is none yet.

    Raises:
      InvalidInput: the checkpoint is damaged, or has other arrays than `template` (another model or config).
    """
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    try:
        state = manager.restore(step, args=ocp.args.StandardRestore(abstract))
    except (ValueError, KeyError, TypeError) as error:
        symptom = " ".join(str(error).splitlines()[:2]).split(". ")[0][:200].rstrip(":. ")
        raise qt.InvalidInput(
            f"the checkpoint {manager.directory}/{step} is damaged, or of another model or config: "
            f"{symptom}. Nothing was changed. Choose another --out, or move that checkpoint away to go on "
            "without it."
        ) from error
    # Orbax commits arrays to their device, which a fresh state is not: the step would be compiled twice.
    return jax.tree.map(lambda leaf: jnp.array(np.asarray(leaf)), state)
