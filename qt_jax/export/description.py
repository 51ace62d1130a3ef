"""`model.json`: how a run says which network its checkpoint holds, so that it can be exported without it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qt_jax.errors import InvalidInput
from qt_jax.export.saving import staged
from qt_jax.fake_quant import QuantSpec
from qt_jax.rules import QuantConfig, Rule

VERSION = 1

NAME = "model.json"
"""What the description of a run's network is called."""


@dataclasses.dataclass(frozen=True)
class Description:
    """One trained network.

    Attributes:
      model: `package.module:factory`, a function or class that returns the Linen module.
      arguments: keyword arguments of the factory.
      call: keyword arguments of the module's `__call__` at inference, such as `{"train": False}`.
      input_shape: of the one input, without batch: `(height, width, channels)` for images.
      checkpoint: folder of an orbax checkpoint, or of checkpoints by step (the newest counts), relative to
        the description.
      collections: Flax collection -> key of the checkpoint that holds it. A moving average is exported in
        place of the parameters by `{"params": "average", ...}`. A key that is absent is an empty collection.
      quantization: the config of training; None for a network that was not trained with Quant-Trim.
      samples: file of `write_samples`, relative to the description; None if there is none.
    """

    model: str
    input_shape: tuple[int, ...]
    checkpoint: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    collections: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"params": "params", "batch_stats": "batch_stats"}
    )
    quantization: QuantConfig | None = None
    samples: str | None = None

    def __post_init__(self) -> None:
        shape = self.input_shape
        if not shape or not all(isinstance(size, int) and size > 0 for size in shape):
            raise InvalidInput(f"input_shape must hold whole numbers above 0, without the batch; got {shape}")
        for name in ("arguments", "call", "collections"):
            if not isinstance(getattr(self, name), Mapping):
                raise InvalidInput(
                    f"{name} must be an object of names and values, got {getattr(self, name)!r}"
                )


def write_description(description: Description, path: str | os.PathLike) -> None:
    """Write `description` as JSON, whole or not at all; `read_description` gives an equal value back.

    Keys: `version` and the fields of `Description`, with specs and rules as objects.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), NAME)
    >>> config = QuantConfig(rules=(Rule("head", skip=True),))
    >>> description = Description("nets:Net", (32, 32, 3), "checkpoints", {"width": 2}, quantization=config)
    >>> write_description(description, path)
    >>> read_description(path) == description
    True
    """
    values = {field.name: getattr(description, field.name) for field in dataclasses.fields(description)}
    values |= {name: dict(values[name]) for name in ("arguments", "call", "collections")}
    if description.quantization is not None:
        values["quantization"] = dataclasses.asdict(description.quantization)
    with staged(path) as temporary:
        temporary.write_text(json.dumps({"version": VERSION} | values, indent=1) + "\n")


def read_description(path: str | os.PathLike) -> Description:
    """The description that `write_description` wrote.

    Raises:
      InvalidInput: the file is missing or damaged, is no description, or has another version.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text())
        version = values.pop("version")
        if version != VERSION:
            raise InvalidInput(f"its version is {version!r}, this qt_jax reads {VERSION}")
        if values.get("quantization") is not None:
            values["quantization"] = config_from_json(values["quantization"])
        return Description(**values | {"input_shape": tuple(values["input_shape"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} does not describe a network ({type(error).__name__}: {error}): write it with "
            "qt_jax.export.description.write_description"
        ) from error


def config_from_json(values: Mapping[str, Any]) -> QuantConfig:
    """The config whose fields JSON holds; those left out have their defaults.

    Raises:
      InvalidInput: an unknown field, or a value out of range.

    >>> weights = config_from_json({"weights": {"bits": 4, "axis": -1}, "activations": None}).weights
    >>> weights  # doctest: +NORMALIZE_WHITESPACE
    QuantSpec(bits=4, symmetric=True, axis=-1, narrow_range=None, ste='identity', quantile=0.999,
    grids='own')
    """

    def specs(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: QuantSpec(**value) if isinstance(value, dict) else value for name, value in values.items()
        }

    try:
        rules = tuple(Rule(**specs(rule)) for rule in values.get("rules", ()))
        outputs = tuple(values.get("fused_outputs", ()))
        return QuantConfig(**specs({**values, "rules": rules, "fused_outputs": outputs}))
    except (TypeError, AttributeError) as error:
        raise InvalidInput(f"this is no quantization config: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Real inputs as the model takes them, float32 `(n, *input_shape)`: images NHWC and normalised.

    Attributes:
      calibration: from the training split, to range what has no learned grid. A few hundred.
      parity: inputs on which the exported graph is compared with JAX, at least 7. More say more.
    """

    calibration: np.ndarray
    parity: np.ndarray


def write_samples(samples: Samples, path: str | os.PathLike) -> None:
    """Write `samples` as a compressed .npz of two arrays, `calibration` and `parity`, whole or not at all."""
    with staged(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, calibration=samples.calibration, parity=samples.parity)


def read_samples(path: str | os.PathLike, input_shape: tuple[int, ...]) -> Samples:
    """The samples in a file of `write_samples`.

    Raises:
      InvalidInput: the file is missing or damaged, lacks an array, or holds inputs of another shape.
    """
    path = Path(path)
    try:
        with np.load(path) as file:
            arrays = {name: file[name].astype(np.float32) for name in ("calibration", "parity")}
    except Exception as error:  # numpy raises whatever zipfile and zlib do
        raise InvalidInput(
            f"{path} holds no samples ({type(error).__name__}: {error}): it must be an .npz of two float32 "
            f'arrays, "calibration" and "parity", of shape (n, {", ".join(map(str, input_shape))})'
        ) from error
    for name, array in arrays.items():
        if array.shape[1:] != input_shape or not len(array) or not np.all(np.isfinite(array)):
            raise InvalidInput(
                f'"{name}" of {path} has shape {array.shape} or numbers that are not finite; the model takes '
                f"(n, {', '.join(map(str, input_shape))}), n at least 1"
            )
    return Samples(**arrays)
