"""`python -m experiments.cifar --sched quartic`: train, export, deploy at low bits, compare with a twin.

Stages: train -> (float twin) -> describe -> export -> verify -> evaluate -> table, figure, report. Each
leaves its product in the run's folder; a relaunch goes on from the first that is missing.
`experiments.segmentation` is the same with other presets.

The networks of a run: how their methods are called, and their files.

A run's folder belongs to one config: config.json says which, and a relaunch with another is refused.

`python -m experiments.backends RUN_DIR ...`: finished runs through every vendor's toolchain, compared.

Takes each network that a run of `experiments.cifar` exported (Quant-Trim and its float twin) through all
backends, schemes and runtimes, calibrated on the first images of the training split and judged on the test
set, the same for all, and writes records.jsonl and the report to --out.
"""

import dataclasses
import fnmatch
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

ONNX_NAMES = {QUANT_TRIM: "model.onnx", FLOAT: "twin.onnx"}


def graphs_of(quantizer: str) -> dict[str, str]:
    """Method -> name of its graph in the folder of a run with this `--quantizer`.

    >>> graphs_of("lsq")
    {'lsq': 'model.onnx', 'float': 'twin.onnx'}
    """
    return {quantizer: ONNX_NAMES[QUANT_TRIM], FLOAT: ONNX_NAMES[FLOAT]}


def claim(directory: Path, config: Any, free_to_change: set[str]) -> None:
    """Writes config.json into the run's folder, or checks that the folder belongs to this config.

    A folder with a config.json of this program and nothing else holds no run yet and may be claimed anew.

    Args:
      directory: created if it is not there.
      config: a dataclass of plain values and paths.
      free_to_change: fields in which a relaunch may differ.

    Raises:
      InvalidInput: the folder holds a run of another config (names the fields that differ) or something that
        is no run, or it cannot be written to. Nothing in it has changed then.
    """
    path = directory / "config.json"
    if set("[\\") & set(str(directory.absolute())):
        raise qt.InvalidInput(
            f"{directory.absolute()} contains [ or \\, which orbax takes for a pattern: checkpoints there "
            "could not be read back. Choose another --out."
        )
    mine = {name: _plain(value) for name, value in dataclasses.asdict(config).items()}
    try:
        present = {entry.name for entry in directory.iterdir()} if directory.exists() else set()
        abandoned = set(fnmatch.filter(present, f"{path.name}*.partial"))  # by a killed writer
        begun = present - abandoned - {path.name}
        if path.name in present:
            theirs = _read(path)
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
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(mine, indent=2) + "\n")
        for name in abandoned:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise qt.InvalidInput(
            f"{directory} cannot be the folder of a run ({error.strerror}: {error.filename}). "
            "Choose another --out."
        ) from error


def _differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> list[str]:
    """The fields that may not differ, but do, each with both values."""
    names = [name for name in new | old if name not in free]
    pairs = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in names}
    return [f"{name} {there!r} -> {here!r}" for name, (there, here) in pairs.items() if there != here]


def _read(path: Path) -> dict[str, Any]:
    """The object in a config.json."""
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise qt.InvalidInput(
            f"{path} cannot be read ({error}). Nothing was changed. Restore it, or choose another --out."
        ) from error
    return values


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def read_config_json(folder: Path) -> dict[str, Any]:
    """What config.json of a run says. Raises InvalidInput if it is no run's folder."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise qt.InvalidInput(
            f"{folder} is no folder of a finished `python -m experiments.cifar`: {error}."
        ) from error


def networks(folder: Path, config: dict[str, Any]) -> list[tuple[Path, dict[str, Any]]]:
    """The ONNX files of a run, each with what its records are to say of it.

    Raises InvalidInput if there is none.
    """
    graphs = graphs_of(config.get("quantizer", QUANT_TRIM))  # which older runs do not say
    found = [(method, folder / name) for method, name in graphs.items() if (folder / name).exists()]
    if not found:
        raise qt.InvalidInput(f"{folder} holds none of {', '.join(graphs.values())}: finish the run.")
    shared = {"run": folder.name, "task": config["dataset"], "model": config["model"], "seed": config["seed"]}
    return [
        (
            path,
            {
                **shared,
                "method": method,
                "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest(),
                "training": training_provenance(folder, method),
            },
        )
        for method, path in found
    ]


def model_input(dataset: Dataset, images: np.ndarray) -> np.ndarray:
    """uint8 images as the exported graph takes them: float32, normalised, NCHW."""
    normalised = [
        np.asarray(normalize(images[i : i + 1000], dataset.mean, dataset.std))
        for i in range(0, len(images), 1000)
    ]
    return np.ascontiguousarray(np.concatenate(normalised).transpose(0, 3, 1, 2))


def vendor_arrays(
    config: Config, dataset: Dataset, limit: int | None
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Calibration images, and the first `limit` test images with labels, as `qt.evaluate` takes them."""
    calibration = model_input(dataset, dataset.train_images[: config.calibration_size])
    return calibration, (model_input(dataset, dataset.test_images[:limit]), dataset.test_labels[:limit])


def training_provenance(directory: Path, method: str) -> dict[str, Any]:
    """Commit, versions and device of the last epoch that was trained."""
    last = [row for row in records.read(directory / "metrics.jsonl") if row.get("method") == method][-1:]
    return {key: row.get(key) for row in last for key in ("commit", "versions", "device")}
