"""Save and restore checkpoints through orbax: written whole or not at all, and restored to the bit.

Beside the arrays each checkpoint holds `integrity`: shape, dtype and SHA-256 of every leaf, and the versions
that wrote it. They tell a damaged checkpoint from one of another network.
"""

import errno
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import qt_jax as qt
from experiments import devices
from experiments.data.store import write_npz
from experiments.training.logs import warn
from experiments.training.state import TrainState
from experiments.training.step import Totals
from qt_jax import provenance

ARRAYS, INTEGRITY = "default", "integrity"
"""Items of a checkpoint."""

DAMAGED = "damaged"
"""Suffix of the name of the folder that damaged checkpoints are moved to."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""Packages whose versions a checkpoint records."""


class Damaged(Exception):
    """Signal that a checkpoint cannot be read, or is not what was written."""


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Open a folder of checkpoints, of which the newest two are kept. Use the manager as a context."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, create=True, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    handlers = {ARRAYS: ocp.StandardCheckpointHandler(), INTEGRITY: ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(
        directory.absolute(), options=options, item_names=tuple(handlers), item_handlers=handlers
    )


def save(manager: ocp.CheckpointManager, state: TrainState, totals: Totals) -> None:
    """Write state and sums under the state's step, unless they are there already.

    Raises:
      InvalidInput: There is no space, or no permission. Earlier checkpoints stay as they were.
    """
    step, tree = int(state.step), _tree(state, totals)
    if manager.latest_step() == step:
        return
    integrity = {"leaves": _digests(tree), "versions": provenance.versions(PACKAGES)}
    items = {ARRAYS: ocp.args.StandardSave(tree), INTEGRITY: ocp.args.JsonSave(integrity)}
    try:
        manager.save(step, args=ocp.args.Composite(**items))
    except (OSError, ValueError) as error:
        reasons = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)]
        reason = next((text for text in reasons if text.lower() in str(error).lower()), None)
        if reason is None:
            raise
        kept = max((held for held in manager.all_steps() if held < step), default=None)
        left = "There is none before it" if kept is None else f"The one of step {kept} is whole"
        raise qt.InvalidInput(
            f"the checkpoint of step {step} cannot be written to {manager.directory} ({reason}). {left}; the "
            "same command goes on from it once that is fixed."
        ) from error


def restore_latest(
    manager: ocp.CheckpointManager, template: TrainState, mesh: Mesh
) -> tuple[TrainState, Totals] | None:
    """Return the newest intact state with its sums, or None if there is no checkpoint yet.

    Damaged newer checkpoints are moved to another folder, with a warning. A warning also says if other
    versions wrote the restored one.

    Args:
      manager: Checkpoints of the run.
      template: Shapes and dtypes.
      mesh: Devices on all of which the arrays are placed, whichever they were saved from.

    Raises:
      InvalidInput: No checkpoint is intact, or the newest is of another network. Nothing was changed then.
    """
    damaged: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _restore(manager, step, template, mesh)
        except Damaged as error:
            damaged[step] = str(error)
            continue
        _set_aside(manager, damaged, step)
        return found
    if damaged:
        told = "; ".join(f"{manager.directory}/{step}: {why}" for step, why in damaged.items())
        raise qt.InvalidInput(
            f"every checkpoint is damaged ({told}). Nothing was changed. Restore them from a copy, or move "
            f"{manager.directory} away to start over."
        )
    return None


def _tree(state: TrainState, totals: Totals) -> dict[str, Any]:
    """Return the content of a checkpoint by name."""
    return {**vars(state), "totals": totals._asdict()}


def _restore(manager, step: int, template: TrainState, mesh: Mesh) -> tuple[TrainState, Totals]:
    wanted = _tree(template, Totals.zero())
    integrity = _read(manager, step, **{INTEGRITY: ocp.args.JsonRestore()})[INTEGRITY]
    try:
        leaves, versions = integrity["leaves"], integrity["versions"]
    except (TypeError, KeyError) as error:
        raise Damaged("its integrity record cannot be read") from error
    _refuse_other_network(leaves, wanted, f"{manager.directory}/{step}")
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=devices.replicated(mesh)), wanted
    )
    tree = _read(manager, step, **{ARRAYS: ocp.args.StandardRestore(abstract)})[ARRAYS]
    if changed := [path for path, found in _digests(tree).items() if found != leaves[path]]:
        raise Damaged(f"{changed[0]} is not what was written ({len(changed)} of {len(leaves)} arrays)")
    _tell_versions(versions, step)
    totals = Totals(**tree.pop("totals"))
    return TrainState(**tree), totals


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> ocp.args.Composite:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax and tensorstore raise whatever the damage leads to
        symptom = " ".join(str(error).splitlines()[:2]).split(". ")[0][:200].rstrip(":. ")
        raise Damaged(symptom or type(error).__name__) from error


def _refuse_other_network(leaves: dict[str, Any], wanted: Any, where: str) -> None:
    there = {path: tuple(found[:2]) for path, found in leaves.items()}
    here = {path: (str(leaf.dtype), list(leaf.shape)) for path, leaf in _named(wanted).items()}
    there = {path: (dtype, list(shape)) for path, (dtype, shape) in there.items()}
    if differ := sorted(path for path in there | here if there.get(path) != here.get(path)):
        path = differ[0]
        raise qt.InvalidInput(
            f"the checkpoint {where} is of another model or config: {path} is "
            f"{_shown(there.get(path))} there and {_shown(here.get(path))} here ({len(differ)} arrays "
            "differ). Nothing was changed. Choose another --out."
        )


def _shown(kind: tuple[str, list[int]] | None) -> str:
    return "absent" if kind is None else f"{kind[0]}{kind[1]}"


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _digests(tree: Any) -> dict[str, list[Any]]:
    """Return a mapping of path to [dtype, shape, SHA-256 of the bytes]."""
    found = {}
    for path, leaf in _named(tree).items():
        array = np.ascontiguousarray(leaf)
        found[path] = [str(array.dtype), list(np.shape(leaf)), hashlib.sha256(array).hexdigest()]
    return found


def _set_aside(manager: ocp.CheckpointManager, damaged: dict[int, str], good: int) -> None:
    """Move damaged checkpoints to a folder beside that of the intact ones."""
    if not damaged:
        return
    directory = Path(manager.directory)
    aside = directory.with_name(f"{directory.name}-{DAMAGED}")
    for step, why in damaged.items():
        warn(
            f"the checkpoint of step {step} is damaged ({why}). It was moved to {aside}; step {good} is taken"
        )
        if devices.is_leader():
            aside.mkdir(exist_ok=True)
            names = {entry.name for entry in aside.iterdir()}
            free = next(name for n in range(len(names) + 1) if (name := f"{step}-{n}") not in names)
            os.replace(directory / str(step), aside / free)
    devices.barrier("damaged checkpoints are aside")
    manager.reload()


def _tell_versions(there: dict[str, str | None], step: int) -> None:
    here = provenance.versions(PACKAGES)
    differ = [f"{name} {there.get(name)} -> {here[name]}" for name in here if there.get(name) != here[name]]
    if differ:
        warn(
            f"the checkpoint of step {step} was written with other versions ({', '.join(differ)}). The "
            "result may differ from that of an uninterrupted run."
        )


def write_variables(path: Path, variables: Any) -> None:
    """Write the variables of a network as an .npz of their leaves by path, whole or not at all.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "network.npz"
    >>> write_variables(path, {"params": {"head": {"bias": np.ones(2)}}})
    >>> read_variables(path)["params"]["head"]["bias"].tolist()
    [1.0, 1.0]
    """
    write_npz(path, {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()})


def read_variables(path: Path) -> dict[str, Any]:
    """Read what `write_variables` wrote.

    Raises:
      InvalidInput: The file is missing or damaged.
    """
    try:
        with np.load(path) as archive:
            return unflatten_dict({name: archive[name] for name in archive.files}, sep="/")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise qt.InvalidInput(
            f"{path} holds no network ({error}): train it again, or bring a whole copy"
        ) from error
