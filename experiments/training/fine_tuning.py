"""A run that begins with the network of another one."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from experiments.training.quantizers import LEARNED_NAMES
from experiments.training.state import TrainState
from qt_jax.export.checkpoint import restore
from qt_jax.interceptor import is_range


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
