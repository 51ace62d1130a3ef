"""Checkpoints through orbax: written whole or not at all, restored to the bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from experiments.training.quantizers import LEARNED_NAMES
from experiments.training.state import TrainState
from qt_jax.export.checkpoint import restore
from qt_jax.interceptor import is_range


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


def fine_tuned(state: TrainState, folder: Path | None) -> TrainState:
    """A first state with the deployed parameters and the batch norm of another run's newest checkpoint.

    Step, optimizer and ranges of quantizers stay those of `state`: the first batch sets ranges anew.

    Args:
      folder: `checkpoints/METHOD` of the other run, or one step of it; None leaves `state` as it is.

    Raises:
      InvalidInput: there is no checkpoint, it is damaged, or its network is another one.
    """
    if folder is None:
        return state
    held = restore(folder)
    params = _taken(state.params, held.get("average") or held.get("params"), folder)
    batch_stats = _taken(state.batch_stats, held.get("batch_stats"), folder)
    average = None if state.average is None else params
    return state.replace(params=params, batch_stats=batch_stats, average=average)


def _taken(template: Any, held: Any, folder: Path) -> Any:
    """`template` with the model's own leaves from `held`."""
    wanted, found = flatten_dict(template), flatten_dict(held or {})

    def own(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
        return {
            path: leaf.shape
            for path, leaf in leaves.items()
            if not is_range(path) and path[-1] not in LEARNED_NAMES
        }

    mine, theirs = own(wanted), own(found)
    if differ := sorted(path for path in mine | theirs if mine.get(path) != theirs.get(path)):
        path = differ[0]
        raise qt.InvalidInput(
            f"--fine-tune {folder}: {'/'.join(path)} has shape {theirs.get(path, 'absent')} there and "
            f"{mine.get(path, 'absent')} here ({len(differ)} leaves differ): it is another network, or of "
            "another data set. Name checkpoints of the same --model."
        )
    return unflatten_dict(wanted | {path: jnp.array(np.asarray(found[path])) for path in mine})
