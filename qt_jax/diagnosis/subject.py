"""Load what is diagnosed: a float graph, the ranges of its inputs, and the images to judge it by."""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from qt_jax.backends.inputs import load, read_arrays
from qt_jax.diagnosis.layers import InputBounds
from qt_jax.diagnosis.loading import prepared
from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import ranges_path, read_ranges
from qt_jax.export.storage import model_sha256

RangeSource = Literal["learned", "minmax"] | None
"""Where input ranges come from: the file of learned ranges, calibration, or the file if there is one."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """Hold a float graph and what it is judged on.

    Attributes:
      name: Name for titles.
      model: Float graph, as `prepared` makes it.
      bounds: Learned ranges of layers' inputs; empty where all are to be calibrated.
      bounds_source: Source of the ranges, in words.
      calibration, images: float32 `(n, ...)`, as the graph takes them.
      labels: integers `(n,)`.
    """

    name: str
    model: onnx.ModelProto
    bounds: InputBounds
    bounds_source: str
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray


def read_subject(
    path: Path, calibration: Path, test: Path, *, ranges: RangeSource = None, limit: int | None = None
) -> Subject:
    """Read an ONNX file, and the images to calibrate it on and to judge it by.

    Args:
      path: Float ONNX classifier with one input.
      calibration: .npz file with "images", float32 as the graph takes them.
      test: .npz file with "images" and integer "labels".
      ranges: Source of the input ranges.
      limit: Number of test images to use, from the first; None for all.

    Raises:
      InvalidInput: A file is missing, cannot be read, or does not fit the others.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise InvalidInput(f"{path} {problem}: give the path of a float ONNX model.")
    judged = read_arrays(test, ("images", "labels"))
    images, labels = (judged[name][:limit] for name in ("images", "labels"))
    calibrated = read_arrays(calibration, ("images",))["images"]
    return load_subject(path, path.name, calibrated, images, labels, ranges)


def load_subject(
    path: Path,
    name: str,
    calibration: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    ranges: RangeSource = None,
) -> Subject:
    """Read an ONNX file to be judged on arrays. The arguments are those of `Subject`.

    Raises:
      InvalidInput: The file is not a graph that can be diagnosed, the images do not fit it, or learned ranges
        are asked for and there are none.
    """
    written = load(path)
    bounds = {} if ranges == "minmax" else _learned(path, written)
    model = prepared(written)
    for what, arrays in (("calibration", calibration), ("test", images)):
        _check(model, arrays, what)
    if not bounds and ranges == "learned":
        raise InvalidInput(
            f"{ranges_path(path)} is not there, or of another graph: leave --ranges out to calibrate."
        )
    measured = f"minimum and maximum on {len(calibration)} calibration images"
    source = f"learned ranges, where there are any, else {measured}" if bounds else measured
    return Subject(name, model, bounds, source, calibration, images, labels)


def _learned(path: Path, model: onnx.ModelProto) -> InputBounds:
    """Return the input ranges that training learned; none if no file of ranges belongs to this graph."""
    if not ranges_path(path).exists():
        return {}
    ranges = read_ranges(ranges_path(path))
    if ranges.model_sha256 != model_sha256(model):
        return {}
    return {name: (min(grid.low), max(grid.high)) for name, grid in ranges.inputs.items()}


def _check(model: onnx.ModelProto, images: np.ndarray, what: str) -> None:
    """Check that there are images, that they are finite, and that they have the shape that the graph reads.

    Raises:
      InvalidInput: One of these fails.
    """
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    wanted = tuple(dimension.dim_value or None for dimension in dimensions)[1:]
    given = images.shape[1:]
    fits = len(given) == len(wanted) and all(b in (None, a) for a, b in zip(given, wanted, strict=True))
    if not len(images) or not fits:
        raise InvalidInput(
            f"The {what} images have shape {images.shape}, the graph reads (n, {str(wanted)[1:]}: our own "
            "exports are channels-first."
        )
    if not np.all(np.isfinite(images)):
        raise InvalidInput(f"The {what} images hold NaN or infinite numbers.")
