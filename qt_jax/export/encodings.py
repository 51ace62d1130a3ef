"""Describe the integer grid of every tensor of an exported graph, and keep the grids in a JSON file.

`Encoding` is one tensor's grid. `activation_encoding`, `encode_learned` and `encode_by_magnitude` make one
from a range, from a scale of training and from a kernel. `Ranges` holds the encodings of one graph;
`write_ranges` writes them to a file that compilers read.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.typing import ArrayLike

from qt_jax.errors import InvalidInput
from qt_jax.files import write_whole
from qt_jax.grid import SCALE_FLOOR, QuantSpec, quantization_parameters

VERSION = 1
"""Version of the JSON file."""

ACTIVATION_BITS = (8, 16)
"""Widths of activations that ONNX has integer types for."""

BIAS_LIMIT = 2**31 - 2**10
"""Largest integer of a bias. It stays below 2^31 by more than the rounding of its float32 scale."""

Source = Literal["learned", "calibrated", "folded kernel"]
"""Names what set a grid."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Describe one tensor's grid, x_hat = scale * (q - zero_point) with q a signed integer.

    Attributes:
      scale: float32 values, one, or one for each channel.
      zero_point: As many integers. An unsigned grid of b bits is shifted by -2^(b-1): the integers of
        `qt_jax.grid` in [0, 255] are [-128, 127] here.
      low, high: The range that set the scale, as many values each.
      bits: Width of the integers.
      symmetric: Whether the zero-point is 0.
      axis: Channel axis of the tensor in the graph; None for one scale.
      q_min, q_max: Least and largest integer.
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
        """Return what two encodings share if they put every number on the same integer."""
        return self.scale, self.zero_point, self.axis, self.q_min, self.q_max

    def integers(self, x: np.ndarray) -> np.ndarray:
        """Compute clip(round(x / scale) + zero_point, q_min, q_max) as int32, in the shape of `x`."""
        shape = [1] * x.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        scale = np.asarray(self.scale, np.float64).reshape(shape)
        zero_point = np.asarray(self.zero_point).reshape(shape)
        return np.clip(np.rint(x / scale) + zero_point, self.q_min, self.q_max).astype(np.int32)


def activation_encoding(low: ArrayLike, high: ArrayLike, spec: QuantSpec, source: Source) -> Encoding:
    """Make the signed encoding of an activation's range.

    The zero-point of an unsigned grid is shifted, as `Encoding` says.

    Args:
      low: Low end of the range, `()`.
      high: High end of the range, `()`.
      spec: Spec of the activation.
      source: What set the range.

    Raises:
      InvalidInput: The spec has an axis, or other than 8 or 16 bits, where ONNX would clip at other integers.

    >>> activation_encoding(0.0, 255.0, QuantSpec(symmetric=False), "calibrated").zero_point
    (-128,)
    """
    if spec.axis is not None or spec.bits not in ACTIVATION_BITS:
        raise InvalidInput(
            f"activations on {spec.bits} bits along axis {spec.axis} have no QDQ form: it clips at the ends "
            "of an integer type and has one scale. Deploy on 8 or 16 bits, as the modes of "
            "qt_jax.export.integers.QDQ_BITS do."
        )
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    scale, zero_point = quantization_parameters(low, high, spec)
    shift = 0 if spec.symmetric else 2 ** (spec.bits - 1)
    q_min, q_max = spec.integer_range
    return Encoding(
        scale=(float(scale),),
        zero_point=(int(zero_point) - shift,),
        low=(float(low),),
        high=(float(high),),
        bits=spec.bits,
        symmetric=spec.symmetric,
        axis=None,
        q_min=q_min - shift,
        q_max=q_max - shift,
        source=source,
    )


def encode_learned(
    scale: np.ndarray, gains: np.ndarray, spec: QuantSpec, axis: int, least: np.ndarray | float = 0.0
) -> Encoding:
    """Make the grid on which a folded kernel has the integers of the raw one.

    Folding multiplies output channel c of a kernel by gain_c. On the scale s * |gain_c| the folded kernel has
    the integers that round(w / s) had in training, negated where gain_c < 0: only the scale has changed. On a
    full symmetric range (`narrow_range=False`) the lowest integer of a negated channel becomes the highest,
    which is one less in magnitude.

    Args:
      scale: float32, `()` or one for each channel of the last Flax axis. It is repeated where several feature
        axes became one.
      gains: float64 `(channels,)`, from `qt_jax.export.learned.LearnedLayer`.
      spec: Spec of the weights.
      axis: Axis of the output channels in the graph.
      least: Lower bound of the scale, from `least_scale`.
    """
    repeated = np.tile(scale.reshape(-1).astype(np.float64), len(gains) // scale.size)
    return _symmetric(np.maximum(repeated * np.abs(gains), least), spec, axis, "learned")


def encode_by_magnitude(
    kernel: np.ndarray, spec: QuantSpec, axis: int, least: np.ndarray | float = 0.0
) -> Encoding:
    """Make the grid of a kernel by the largest magnitude of each channel.

    Args:
      kernel: float32, in the layout of the graph.
      spec: Spec of the weights.
      axis: Axis of the output channels.
      least: Lower bound of the scale, from `least_scale`.
    """
    peak = np.max(np.abs(kernel_rows(kernel, axis).astype(np.float64)), axis=1)
    return _symmetric(np.maximum(peak / spec.integer_range[1], least), spec, axis, "folded kernel")


def kernel_rows(kernel: np.ndarray, axis: int) -> np.ndarray:
    """Reshape a kernel to `(channels, weights of one channel)`; `axis` is that of the channels.

    >>> kernel_rows(np.arange(6).reshape(3, 2), axis=1).tolist()
    [[0, 2, 4], [1, 3, 5]]
    """
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)


def _symmetric(scale: np.ndarray, spec: QuantSpec, axis: int, source: Source) -> Encoding:
    """Make the symmetric encoding of a kernel with those scales, float64 `(channels,)`."""
    q_min, q_max = spec.integer_range
    stored = np.maximum(scale, SCALE_FLOOR).astype(np.float32)
    high = stored.astype(np.float64) * q_max
    return Encoding(
        scale=tuple(stored.tolist()),
        zero_point=(0,) * len(stored),
        low=tuple((-high).tolist()),
        high=tuple(high.tolist()),
        bits=spec.bits,
        symmetric=True,
        axis=axis,
        q_min=q_min,
        q_max=q_max,
        source=source,
    )


def least_scale(bias: np.ndarray, input_scale: float) -> np.ndarray:
    """Return the least kernel scales at which a bias fits int32 on input scale * kernel scale.

    Only a dead channel, whose kernel is next to nothing beside its bias, is bounded by it.

    Args:
      bias: float32 `(channels,)`.
      input_scale: Scale of the layer's input.

    Returns:
      float64 `(channels,)`.

    >>> float(least_scale(np.float32([1.0]), input_scale=0.01)[0]) < 1e-7
    True
    """
    return np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)


def per_tensor(encoding: Encoding) -> Encoding:
    """Return the encoding with one scale, the largest of its channels'.

    Where a batch norm was folded the channels' scales differ. The integers are then no longer the trained
    ones.
    """
    largest = int(np.argmax(encoding.scale))
    one: dict[str, Any] = {
        name: (getattr(encoding, name)[largest],) for name in ("scale", "zero_point", "low", "high")
    }
    return dataclasses.replace(encoding, axis=None, **one)


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Hold the grids of one graph.

    Attributes:
      model_sha256: Hash of the graph, from `qt_jax.export.storage`: that of the one file that `save` writes.
      opset: Opset of ai.onnx.
      tensors: Maps an activation or kernel to its grid. An activation that only quantized layers read,
        all on one grid, has that grid. An activation that others read too is ranged by calibration.
      inputs: Maps a quantized layer (the name of its node) to the learned grid of its input.
      kernels: Maps a quantized layer to the name of its kernel.
    """

    model_sha256: str
    opset: int
    tensors: dict[str, Encoding]
    inputs: dict[str, Encoding]
    kernels: dict[str, str]


def ranges_path(out: Path) -> Path:
    """Return the file that holds the ranges of the graph in `out`.

    >>> ranges_path(Path("run/model.onnx")).name
    'model.ranges.json'
    """
    return out.with_name(f"{out.name.removesuffix('.onnx')}.ranges.json")


def write_ranges(ranges: Ranges, path: str | os.PathLike) -> None:
    """Write `ranges` as JSON, whole or not at all; `read_ranges` gives the same value back.

    The keys are `version`, `model_sha256`, `opset`, `tensors`, `inputs` and `kernels`. `tensors` and
    `inputs` map a tensor or a layer to `scale`, `zero_point`, `min`, `max` (lists of one value, or of one
    for each channel), `bits`, `scheme` ("symmetric" or "asymmetric"), `axis` (null for one scale), `q_min`,
    `q_max` and `source`. Integers are signed.

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
    write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_ranges(path: str | os.PathLike) -> Ranges:
    """Read the ranges that `write_ranges` wrote.

    Raises:
      InvalidInput: The file is not a ranges file, or has another version.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
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
            f"{path} is not a ranges file ({type(error).__name__}: {error}): write it with write_ranges"
        ) from error


_RENAMED = {"low": "min", "high": "max"}
"""Maps a field of `Encoding` to its key in JSON, where that is another."""


def _as_json(encoding: Encoding) -> dict[str, Any]:
    """Return the JSON object of an encoding."""
    entry = {_RENAMED.get(name, name): value for name, value in dataclasses.asdict(encoding).items()}
    entry["scheme"] = "symmetric" if entry.pop("symmetric") else "asymmetric"
    return entry


def _from_json(entry: dict[str, Any]) -> Encoding:
    """Return the encoding that a JSON object holds."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    values["symmetric"] = values.pop("scheme") == "symmetric"
    values |= {name: values.pop(key) for name, key in _RENAMED.items()}
    return Encoding(**values)
