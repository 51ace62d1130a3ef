"""Load what is diagnosed: a float graph, the ranges of its inputs, and the samples to judge it by."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from qt_jax.backends.arrays import LABELS, Arrays, first, read_arrays
from qt_jax.backends.fidelity import Output, count_broken
from qt_jax.backends.inputs import load, prepare
from qt_jax.backends.judging import Criterion, Metric, choose, plain_labels
from qt_jax.backends.protocol import Batch
from qt_jax.backends.samples import check_labels, range_warnings
from qt_jax.diagnosis.layers import InputBounds
from qt_jax.diagnosis.loading import with_own_kernels
from qt_jax.diagnosis.meter import collected
from qt_jax.diagnosis.running import count
from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import ranges_path, read_ranges
from qt_jax.export.storage import model_sha256
from qt_jax.files import writing

RangeSource = Literal["learned", "minmax"] | None
"""Where input ranges come from: the file of learned ranges, calibration, or the file if there is one."""


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Choose what of a network is judged, and by what.

    Attributes:
      outputs: Names of the outputs to judge; none for all that can be judged.
      metric: Metric of the user's own, or its name "module:function"; None for what the labels tell.
      void_label: Label of pixels without a class; None if there is no such label.
    """

    outputs: tuple[str, ...] = ()
    metric: str | Metric | None = None
    void_label: int | None = None


@dataclasses.dataclass(frozen=True)
class Subject:
    """Hold a float graph and what it is judged on.

    Attributes:
      name: Name for titles.
      model: Float graph, as `with_own_kernels` makes it.
      bounds: Learned ranges of layers' inputs; empty where all are to be calibrated.
      bounds_source: Source of the ranges, in words.
      calibration, samples: Arrays `(n, ...)` by input, as the graph takes them.
      labels: Labels `(n, ...)`; None without.
      task: What is judged, and by which metric.
      reference: Outputs `(n, ...)` of the float graph whose SQNR is measured, by name.
      whole: Outputs without a batch axis. The graph then takes one image at once.
      left_out: Outputs that are not judged.
      warnings: What looks wrong with graph or data, in sentences.
    """

    name: str
    model: onnx.ModelProto
    bounds: InputBounds
    bounds_source: str
    calibration: Mapping[str, np.ndarray]
    samples: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    task: Criterion
    reference: Mapping[str, np.ndarray]
    whole: frozenset[str]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def read_subject(
    path: Path,
    calibration: Path,
    test: Path,
    *,
    ranges: RangeSource = None,
    limit: int | None = None,
    criteria: Criteria = Criteria(),
) -> Subject:
    """Read an ONNX file, and the samples to calibrate it on and to judge it by.

    Args:
      path: Float ONNX graph.
      calibration: Samples as `read_arrays` reads them: a .npz file, a .npy file or a folder.
      test: The same, with labels if there are any.
      ranges: Source of the input ranges.
      limit: Number of test images to use, from the first; None for all.
      criteria: What is judged, and by what.

    Raises:
      InvalidInput: A file is missing, cannot be read, or does not fit the others.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not there"
        raise InvalidInput(f"{path} {problem}: give the path of a float ONNX model.")
    samples = _arrays(test)
    labels = samples.pop(LABELS, None)
    check_labels(samples, labels)
    return load_subject(
        path,
        path.name,
        _arrays(calibration),
        first(samples, limit),
        None if labels is None else first(labels, limit),
        ranges=ranges,
        criteria=criteria,
    )


def _arrays(path: Path) -> Arrays:
    """Read arrays. Parts of a large one are joined in a file beside them, for which there must be room."""
    with writing(path):
        return read_arrays(path)


def load_subject(
    path: Path,
    name: str,
    calibration: Batch,
    samples: Batch,
    labels: np.ndarray | None,
    *,
    ranges: RangeSource = None,
    criteria: Criteria = Criteria(),
) -> Subject:
    """Read an ONNX file to be judged on arrays. The arguments are those of `Subject` and `read_subject`.

    Raises:
      InvalidInput: The file is not a graph that can be diagnosed, the arrays do not fit it, or learned ranges
        are asked for and there are none.
    """
    written = load(path)
    bounds = {} if ranges == "minmax" else _learned(path, written)
    if not bounds and ranges == "learned":
        raise InvalidInput(
            f"{ranges_path(path)} is not there, or of another graph: leave --ranges out to calibrate."
        )
    prepared = prepare(written, calibration, samples, outputs=criteria.outputs)
    check_labels(prepared.samples, labels)
    if labels is not None and criteria.metric is None:
        labels = plain_labels(labels)
    model = with_own_kernels(prepared.model)
    whole = frozenset(name for name, has_axis in prepared.outputs.items() if has_axis is False)
    outputs = collected(model, prepared.samples, prepared.outputs, whole)
    task, warnings, notes = choose(
        outputs,
        labels,
        metric=criteria.metric,
        void_label=criteria.void_label,
        left_out=prepared.left_out,
    )
    reference = _measurable({name: outputs[name] for name in task.judged}, criteria.outputs)
    left_out = [name for name in outputs if name not in reference and name not in task.judged]
    measured = f"minimum and maximum on {count(prepared.calibration)} calibration images"
    return Subject(
        name=name,
        model=model,
        bounds=bounds,
        bounds_source=f"learned ranges, where there are any, else {measured}" if bounds else measured,
        calibration=prepared.calibration,
        samples=prepared.samples,
        labels=labels,
        task=task,
        reference=reference,
        whole=whole,
        left_out=(*left_out, *prepared.left_out),
        warnings=(*range_warnings(prepared.scans), *warnings, *prepared.notes, *notes),
    )


def _learned(path: Path, model: onnx.ModelProto) -> InputBounds:
    """Return the input ranges that training learned; none if no file of ranges belongs to this graph."""
    if not ranges_path(path).exists():
        return {}
    ranges = read_ranges(ranges_path(path))
    if ranges.model_sha256 != model_sha256(model):
        return {}
    return {name: (min(grid.low), max(grid.high)) for name, grid in ranges.inputs.items()}


def _measurable(found: Mapping[str, Output], wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the outputs whose noise can be measured: floating point, of one size for all images.

    Raises:
      InvalidInput: There is none, one that is asked for is not among them, or numbers are not finite.
    """
    good = {}
    problems = []
    for name, output in found.items():
        if not isinstance(output, np.ndarray):
            problems.append(f"the size of {name} varies from image to image")
        elif output.dtype.kind != "f":
            problems.append(f"{name} holds {output.dtype}")
        elif broken := count_broken(output):
            raise InvalidInput(
                f"The float model cannot serve as a reference: {name} of {broken} of {len(output)} images "
                "are not finite."
            )
        else:
            good[name] = output
    if problems and (wanted or not good):
        raise InvalidInput(
            f"The noise of this output cannot be measured: {'; '.join(problems)}. Judge an output in "
            "floating point that lies before it, with --output NAME, or export the graph without its last "
            "steps."
        )
    return good
