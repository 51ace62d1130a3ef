"""A run's folder belongs to one config: config.json says which, and a relaunch with another is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import qt_jax as qt
from qt_jax.reporting.files import write_whole


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
        begun = present - {path.name, f"{path.name}.partial"}
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
