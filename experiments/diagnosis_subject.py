"""What is to be diagnosed, of a run's folder or of an ONNX file: graph, ranges, images."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from google.protobuf.message import DecodeError

import qt_jax as qt
from experiments.data import load
from experiments.run_summary import metric_of
from experiments.runs import model_input, networks, read_config_json
from qt_jax.backends.inputs import read_arrays
from qt_jax.diagnosis.layers import Bounds
from qt_jax.diagnosis.loading import prepared
from qt_jax.export.deploy import ranges_path
from qt_jax.export.encodings import model_sha256, read_ranges

if TYPE_CHECKING:
    from experiments.diagnose import Options


@dataclasses.dataclass(frozen=True)
class Subject:
    """A float graph and what it is judged on.

    Attributes:
      name: for titles.
      model: the graph.
      bounds: learned ranges of layers' inputs; none where they are to be calibrated.
      bounds_source: where ranges are from, in words.
      calibration, images: float32 `(n, ...)`, as the graph takes them.
      labels: integers `(n,)`.
      out: folder for what is found.
    """

    name: str
    model: onnx.ModelProto
    bounds: Bounds
    bounds_source: str
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    out: Path


def subject_of(options: "Options") -> Subject:
    """The subject that the command line names. Raises InvalidInput if it cannot be had."""
    if not options.subject.exists():
        raise qt.InvalidInput(f"{options.subject} is not there: name the folder of a run, or an ONNX file.")
    return _of_run(options) if options.subject.is_dir() else _of_file(options)


def _of_run(options: "Options") -> Subject:
    if options.calibration or options.test:
        raise qt.InvalidInput("--calibration and --test go with a MODEL.onnx: a run brings its own data.")
    folder = options.subject
    config = read_config_json(folder)
    if metric_of(config["dataset"])[0] != "top1":
        raise qt.InvalidInput(
            f"{folder} segments ({config['dataset']}): diagnose judges classifiers. `python -m "
            "experiments.layer_sqnr` needs no labels."
        )
    found = {identity["method"]: path for path, identity in networks(folder, config)}
    method = options.method or next(iter(found))
    if method not in found:
        raise qt.InvalidInput(f"{folder} has no network {method!r}: choose among {sorted(found)}.")
    dataset = load(config["dataset"], options.data_dir, seed=0)
    splits = {
        "validation": (dataset.validation_images, dataset.validation_labels),
        "test": (dataset.test_images, dataset.test_labels),
    }
    images, labels = (array[: options.limit] for array in splits[options.split])
    calibration = dataset.train_images[: config["calibration_size"]]
    return _subject(
        options,
        f"{folder.resolve().name}, {method}",
        found[method],
        model_input(dataset, calibration),
        model_input(dataset, images),
        labels,
        folder,
    )


def _of_file(options: "Options") -> Subject:
    path = options.subject
    if options.method is not None:
        raise qt.InvalidInput("--method goes with the folder of a run.")
    if options.calibration is None or options.test is None:
        raise qt.InvalidInput(
            f"{path} is a file: say on what to calibrate and to judge it, with --calibration c.npz and "
            "--test t.npz."
        )
    test = read_arrays(options.test, ("images", "labels"))
    return _subject(
        options,
        path.name,
        path,
        read_arrays(options.calibration, ("images",))["images"],
        test["images"][: options.limit],
        test["labels"][: options.limit],
        path.with_suffix(".diagnosis"),
    )


def _subject(
    options: "Options",
    name: str,
    path: Path,
    calibration: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    out: Path,
) -> Subject:
    try:
        written = onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise qt.InvalidInput(f"{path} is no ONNX graph ({error}).") from error
    bounds = {} if options.ranges == "minmax" else _learned(path, written)
    model = prepared(written)
    for what, arrays in (("calibration", calibration), ("test", images)):
        _check(model, arrays, what)
    if not bounds and options.ranges == "learned":
        raise qt.InvalidInput(
            f"{ranges_path(path)} is not there, or of another graph: leave --ranges out to calibrate."
        )
    measured = f"minimum and maximum on {len(calibration)} calibration images"
    source = f"learned ranges, where there are any, else {measured}" if bounds else measured
    return Subject(name, model, bounds, source, calibration, images, labels, options.out or out)


def _check(model: onnx.ModelProto, images: np.ndarray, what: str) -> None:
    """Raises InvalidInput where images are none, not finite, or not of the shape that the graph reads."""
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    wanted = tuple(dimension.dim_value or None for dimension in dimensions)[1:]
    given = images.shape[1:]
    fits = len(given) == len(wanted) and all(b in (None, a) for a, b in zip(given, wanted, strict=True))
    if not len(images) or not fits:
        raise qt.InvalidInput(
            f"The {what} images have shape {images.shape}, the graph reads (n, {str(wanted)[1:]}: our own "
            "exports are channels-first."
        )
    if not np.all(np.isfinite(images)):
        raise qt.InvalidInput(f"The {what} images hold NaN or infinite numbers.")


def _learned(path: Path, model: onnx.ModelProto) -> Bounds:
    """Layer -> the range of its input that training learned; none without a ranges file of this graph."""
    if not ranges_path(path).exists():
        return {}
    ranges = read_ranges(ranges_path(path))
    if ranges.model_sha256 != model_sha256(model):
        return {}
    return {name: (min(grid.low), max(grid.high)) for name, grid in ranges.inputs.items()}
