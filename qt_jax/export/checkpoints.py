"""Read a checkpoint as a tree of numpy arrays: orbax in all its layouts, and msgpack files of Flax.

`restore` takes the checkpoint itself, one with several items, a folder of steps, or a file.
"""

import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from orbax.checkpoint.metadata import StringMetadata

from qt_jax.errors import InvalidInput

MARKER = "_METADATA"
"""File by which a folder is recognized as a checkpoint of orbax."""

STEP = re.compile(r"(?:(?:checkpoint|ckpt|epoch|step)[_-])?(\d+)")
"""Name of a step: a number, alone or behind one of the usual words, as in `checkpoint_7`."""

UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name of a folder that orbax did not finish writing."""


def restore(path: str | os.PathLike) -> dict[str, Any]:
    """Restore a checkpoint as a tree of numpy arrays, whatever devices it was saved from.

    Args:
      path: A checkpoint of orbax, a step of a `CheckpointManager`, or a folder of steps, of which the newest
        counts. A checkpoint of several items is a tree of them by name. Or a file that
        `flax.serialization.to_bytes` wrote.

    Raises:
      InvalidInput: There is no checkpoint, or it is damaged.
    """
    found = find(Path(path))
    if found.is_file():
        tree = _from_msgpack(found)
    elif (found / MARKER).exists():
        tree = _from_orbax(found)
    else:
        items = {item.name: _from_orbax(item) for item in _items(found)}
        tree = items if len(items) > 1 else next(iter(items.values()))
    if isinstance(tree, list | tuple):
        tree = {str(index): child for index, child in enumerate(tree)}
    if not isinstance(tree, dict):
        raise InvalidInput(f"the checkpoint {found} holds a {type(tree).__name__}, not collections by name")
    return tree


def find(path: Path) -> Path:
    """Find the checkpoint that `path` is, or the newest one that it holds.

    Returns:
      The folder of the checkpoint or of its items, or a file.

    Raises:
      InvalidInput: There is none. The message says what `path` is instead.
    """
    if path.is_file() or (path / MARKER).exists() or _items(path):
        return path
    steps = {child: STEP.fullmatch(child.name) for child in path.iterdir()} if path.is_dir() else {}
    numbers = {child: int(match[1]) for child, match in steps.items() if match}
    if numbers:
        return find(max(numbers, key=numbers.__getitem__))
    raise InvalidInput(
        f"{path} is not a checkpoint of orbax and holds none"
        + ("" if path.is_dir() else " (there is no such folder)")
        + ": name a folder saved by orbax, one of its steps, or the folder of all steps"
    )


def _items(path: Path) -> list[Path]:
    """List the folders of a checkpoint's items, in order: no steps, and nothing unfinished."""
    children = sorted(path.iterdir()) if path.is_dir() else []
    whole = [child for child in children if (child / MARKER).exists() and UNFINISHED not in child.name]
    return [child for child in whole if STEP.fullmatch(child.name) is None]


def _from_orbax(path: Path) -> Any:
    """Read one tree that orbax wrote."""
    folder = epath.Path(path.absolute())
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(folder).tree
        kinds = jax.tree.map(lambda leaf: str if isinstance(leaf, StringMetadata) else np.ndarray, saved)
        arrays = jax.tree.map(lambda kind: ocp.RestoreArgs(restore_type=kind), kinds)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arrays))
    except (ValueError, KeyError, TypeError, OSError) as error:
        symptom = str(error).partition("\n")[0][:200]
        raise InvalidInput(f"the checkpoint {folder} is damaged: {symptom}") from error
    finally:
        handler.close()


def _from_msgpack(path: Path) -> Any:
    """Read the tree in a file of `flax.serialization.to_bytes`."""
    try:
        return serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack's exceptions share no base class
        raise InvalidInput(
            f"{path} is a file, and not one of flax.serialization.to_bytes; orbax writes folders: read it in "
            "Python, with the library that wrote it, and export with qt_jax.to_onnx(model.apply, variables, "
            "input_shape)"
        ) from error
