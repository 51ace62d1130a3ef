"""Read and write what belongs to the folder of a run.

A run's folder belongs to one config. config.json says which one, and a relaunch with another config is
refused. The folder holds one ONNX graph per network: that of the quantizer, and that of the float twin.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

import qt_jax as qt
from experiments.configs.training import Config
from experiments.data import Dataset
from experiments.data.augment import normalize
from qt_jax import records
from qt_jax.files import write_whole

QUANT_TRIM, FLOAT = "quant-trim", "float"
"""Methods: the networks of a run are named after them in records, and their checkpoints in folders."""

ONNX_NAMES = {QUANT_TRIM: "model.onnx", FLOAT: "twin.onnx"}

CONFIG = "config.json"
REQUIRED = ("dataset", "model", "seed")
"""Fields without which a config.json is not that of a run."""

CHUNK = 1000
"""Images that are normalized at a time."""


def graphs_of(quantizer: str) -> dict[str, str]:
    """Map each method to the name of its graph in the folder of a run with this `--quantizer`.

    >>> graphs_of("lsq")
    {'lsq': 'model.onnx', 'float': 'twin.onnx'}
    """
    return {quantizer: ONNX_NAMES[QUANT_TRIM], FLOAT: ONNX_NAMES[FLOAT]}


def claim(directory: Path, config: Any, free_to_change: set[str]) -> None:
    """Write config.json into the run's folder, or check that the folder belongs to this config.

    A folder that holds nothing but a config.json of this program holds no run yet and may be claimed again.

    Args:
      directory: Folder of the run, created if it does not exist.
      config: Dataclass of plain values and paths.
      free_to_change: Fields in which a relaunch may differ.

    Raises:
      InvalidInput: The folder holds a run of another config (the message names the fields that differ) or
        something that is not a run, or it cannot be written to. Nothing in it has changed then.
    """
    path = directory / CONFIG
    if set("[\\") & set(str(directory.absolute())):
        raise qt.InvalidInput(
            f"{directory.absolute()} contains [ or \\, which orbax takes for a pattern: checkpoints there "
            "could not be read back. Choose another --out."
        )
    mine = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
    try:
        present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
        unfinished = {name for name in present if name.startswith(CONFIG) and name.endswith(".partial")}
        begun = present - unfinished - {CONFIG}
        if CONFIG in present:
            theirs = _claimed_config(path)
            differ = _differences(theirs, mine, free_to_change)
            if not differ:
                return
            if begun or mine.keys() != theirs.keys():
                raise qt.InvalidInput(
                    f"{directory} belongs to a run of another config ({', '.join(differ)}). Nothing was "
                    "changed. Choose another --out, or relaunch with the values that are there."
                )
        elif begun:
            raise qt.InvalidInput(
                f"{directory} is not empty and holds no config.json: it is not a run of this program. "
                "Nothing was changed. Choose another --out."
            )
        for name in unfinished:  # left behind by a claim that was killed
            (directory / name).unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine, indent=2) + "\n")
    except OSError as error:
        raise qt.InvalidInput(
            f"{directory} cannot be the folder of a run ({error.strerror}: {error.filename}). "
            "Choose another --out."
        ) from error


def _plain(value: Any) -> Any:
    """Return the value as JSON gives it back."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _claimed_config(path: Path) -> dict[str, Any]:
    """Read the config of the run to which a folder belongs; raise InvalidInput if the file is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise qt.InvalidInput(
            f"{path} cannot be read ({error}). Nothing was changed. Restore it, or choose another --out."
        ) from error
    return values


def _differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> list[str]:
    """Name the fields that differ but may not, each with both values."""
    names = [name for name in new | old if name not in free]
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
    return [f"{name} {there!r} -> {here!r}" for name, (there, here) in pairs.items() if there != here]


def read_config_json(folder: Path) -> dict[str, Any]:
    """Read the config of the run in `folder`. Older runs lack some of the fields of `Config`.

    Raises:
      InvalidInput: There is no config.json, or it is damaged or belongs to something else.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if missing := [key for key in REQUIRED if key not in config]:
            raise ValueError(f"it does not say {' and '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise qt.InvalidInput(
            f"{folder} is not the folder of a run of experiments.cifar: {CONFIG} cannot be read ({error}). "
            "Name the folder that a run has written."
        ) from error
    return config


def networks(folder: Path, config: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """List the ONNX files of a run, each with the fields that identify it in records.

    Raises:
      InvalidInput: The run has no ONNX file yet.
    """
    graphs = graphs_of(config.get("quantizer", QUANT_TRIM))  # older runs do not say which
    found = [(method, folder / name) for method, name in graphs.items() if (folder / name).exists()]
    if not found:
        raise qt.InvalidInput(
            f"{folder} holds neither {' nor '.join(graphs.values())}: finish the run first."
        )
    return [(path, identity(folder, config, method, path)) for method, path in found]


def identity(folder: Path, config: dict[str, Any], method: str, graph: Path) -> dict[str, Any]:
    """Return the fields of a record that say which network of which run it is about.

    Args:
      folder: Folder of the run.
      config: Its config.json, or the same fields.
      method: Key of `graphs_of`.
      graph: ONNX file of the network.
    """
    return {
        "run": folder.name,
        "task": config["dataset"],
        "model": config["model"],
        "seed": config["seed"],
        "method": method,
        "checkpoint": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "training": training_provenance(folder, method),
    }


def training_provenance(directory: Path, method: str) -> dict[str, Any]:
    """Return the commit, versions and device of the last epoch that was trained."""
    last = [row for row in records.read(directory / "metrics.jsonl") if row.get("method") == method][-1:]
    return {key: row.get(key) for row in last for key in ("commit", "versions", "device")}


def vendor_arrays(
    config: Config, dataset: Dataset, limit: int | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return what `qt.evaluate` takes: calibration images, and the first `limit` test images with labels."""
    calibration = model_input(dataset, dataset.train_images[: config.calibration_size])
    return calibration, (model_input(dataset, dataset.test_images[:limit]), dataset.test_labels[:limit])


def model_input(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """Turn uint8 images `(n, height, width, channels)` into what the exported graph takes.

    Returns:
      float32 `(n, channels, height, width)`, normalized.
    """
    normalized = [
        np.asarray(normalize(images[i : i + CHUNK], dataset.mean, dataset.std))
        for i in range(0, len(images), CHUNK)
    ]
    return np.ascontiguousarray(np.concatenate(normalized).transpose(0, 3, 1, 2))
