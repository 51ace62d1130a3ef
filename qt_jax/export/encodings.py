"""The integer grid of every tensor of an exported graph, and the JSON file that hands them to a compiler."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from qt_jax.errors import InvalidInput
from qt_jax.files import staged

VERSION = 1


Source = Literal["learned", "calibrated", "folded kernel"]
"""What a grid was set by."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One tensor's grid, x_hat = scale * (q - zero_point) with q a signed integer.

    Attributes:
      scale: float32 values, one, or one for each channel.
      zero_point: as many integers. An unsigned grid of b bits is shifted by -2^(b-1): the integers of
        `qt_jax.grid` in [0, 255] are [-128, 127] here.
      low, high: the range that set the scale, as many values each.
      bits: width of the integers.
      symmetric: zero-point 0.
      axis: channel axis of the tensor in the graph; None for one scale.
      q_min, q_max: least and largest integer.
      source: "learned" (a layer's own statistics), "calibrated" (minimum and maximum on real inputs) or
        "folded kernel" (largest magnitude of a kernel that no statistics describe).

    >>> grid = Encoding((0.5,), (-8,), (0.0,), (7.5,), 4, False, None, -8, 7, "calibrated")
    >>> grid.integers(np.float32([0.0, 1.2, 99.0])).tolist()
    [-8, -6, 7]
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    bits: int
    symmetric: bool
    axis: int | None
    q_min: int
    q_max: int
    source: Source

    @property
    def grid(self) -> tuple:
        """What two encodings share if they put every number on the same integer."""
        return self.scale, self.zero_point, self.axis, self.q_min, self.q_max

    def integers(self, x: np.ndarray) -> np.ndarray:
        """clip(round(x / scale) + zero_point, q_min, q_max) as int32, in the shape of `x`."""
        shape = [1] * x.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale = np.asarray(self.scale, np.float64).reshape(shape)
        zero_point = np.asarray(self.zero_point).reshape(shape)
        return np.clip(np.rint(x / scale) + zero_point, self.q_min, self.q_max).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The grids of one graph.

    Attributes:
      model_sha256: of the serialised graph, which is what `qt_jax.export.save` writes.
      opset: of ai.onnx.
      tensors: activation or kernel -> its grid. An activation that quantized layers alone read, on one grid,
        has that one; an activation that others read too is ranged by calibration.
      inputs: quantized layer (name of its node) -> the learned grid of its input.
      kernels: quantized layer -> name of its kernel.
    """

    model_sha256: str
    opset: int
    tensors: dict[str, Encoding]
    inputs: dict[str, Encoding]
    kernels: dict[str, str]


def model_sha256(model: onnx.ModelProto) -> str:
    """SHA-256 of the serialised graph."""
    return hashlib.sha256(model.SerializeToString()).hexdigest()


def write_ranges(ranges: Ranges, path: str | os.PathLike) -> None:
    """Write `ranges` as JSON, whole or not at all; `read_ranges` gives the same value back.

    Keys: `version`, `model_sha256`, `opset`; `tensors` and `inputs`, from a tensor or a layer to `scale`,
    `zero_point`, `min`, `max` (lists of one value, or of one for each channel), `bits`, `scheme` ("symmetric"
    or "asymmetric"), `axis` (null for one scale), `q_min`, `q_max`, `source`; `kernels`. Integers are signed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ranges.json"
    >>> grid = Encoding((0.5,), (-128,), (0.0,), (127.5,), 8, False, None, -128, 127, "learned")
    >>> write_ranges(Ranges("0" * 64, 17, {"input": grid}, {}, {}), path)
    >>> read_ranges(path).tensors["input"] == grid
    True
    """
    document = {
        "version": VERSION,
        "model_sha256": ranges.model_sha256,
        "opset": ranges.opset,
        "tensors": {name: _as_json(encoding) for name, encoding in ranges.tensors.items()},
        "inputs": {name: _as_json(encoding) for name, encoding in ranges.inputs.items()},
        "kernels": ranges.kernels,
    }
    with staged(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_ranges(path: str | os.PathLike) -> Ranges:
    """The ranges that `write_ranges` wrote.

    Raises:
      InvalidInput: the file is no such file, or one of another version.
    """
    try:
        document = json.loads(Path(path).read_text())
        if document["version"] != VERSION:
            raise InvalidInput(f"{path} has version {document['version']}, this qt_jax reads {VERSION}")
        return Ranges(
            model_sha256=document["model_sha256"],
            opset=document["opset"],
            tensors={name: _from_json(entry) for name, entry in document["tensors"].items()},
            inputs={name: _from_json(entry) for name, entry in document["inputs"].items()},
            kernels=document["kernels"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{path} is no ranges file ({type(error).__name__}: {error}): write it with write_ranges"
        ) from error


_RENAMED = {"low": "min", "high": "max"}


def _as_json(encoding: Encoding) -> dict[str, Any]:
    entry = {_RENAMED.get(name, name): value for name, value in dataclasses.asdict(encoding).items()}
    entry["scheme"] = "symmetric" if entry.pop("symmetric") else "asymmetric"
    return entry


def _from_json(entry: dict[str, Any]) -> Encoding:
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    values["symmetric"] = values.pop("scheme") == "symmetric"
    values |= {name: values.pop(key) for name, key in _RENAMED.items()}
    return Encoding(**values)
