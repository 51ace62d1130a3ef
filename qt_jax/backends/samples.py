"""Match arrays to the inputs of a graph, check that they fit, and tell what looks wrong with them."""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ValueInfoProto, helper

from qt_jax.backends.arrays import IMAGES, LABELS, Arrays, Scan
from qt_jax.backends.protocol import Batch
from qt_jax.errors import InvalidInput


def samples_of(wanted: Sequence[ValueInfoProto], given: Batch, what: str) -> Arrays:
    """Match arrays to the inputs of a graph, and check their types and shapes.

    Args:
      wanted: The graph's inputs.
      given: The array of the only input, or arrays by name. The array of an only input may have its name, the
        name "images", or be the only one beside "labels".
      what: What the arrays are for, for messages.

    Returns:
      The arrays by input.

    Raises:
      InvalidInput: An array is missing, or does not fit its input.
    """
    if not isinstance(given, Mapping):
        given = {wanted[0].name: given}
    arrays = {name: array for name, array in given.items() if name != LABELS}
    if len(wanted) == 1 and wanted[0].name not in arrays and (IMAGES in arrays or len(arrays) == 1):
        arrays = {wanted[0].name: arrays.get(IMAGES, next(iter(arrays.values())))}
    lacking = [entry.name for entry in wanted if entry.name not in arrays]
    if lacking:
        needs = "; ".join(f"{entry.name} {_signature(entry)}" for entry in wanted)
        only = ' (or "images")' if len(wanted) == 1 else ""
        raise InvalidInput(
            f"{what} lacks the arrays {lacking}{only}, it holds {sorted(given)}. The model takes {needs}."
        )
    found = {entry.name: _fitting(entry, np.asanyarray(arrays[entry.name]), what) for entry in wanted}
    sizes = {name: len(array) for name, array in found.items()}
    if len(set(sizes.values())) > 1:
        raise InvalidInput(
            f"{what} has different numbers of samples by input, {sizes}: give as many of each."
        )
    return found


def _fitting(entry: ValueInfoProto, array: np.ndarray, what: str) -> np.ndarray:
    """Return an array as it is. Raises InvalidInput if the input does not take it."""
    expected = stated_sizes(entry)
    dtype = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
    fits = array.ndim > 0
    if expected is not None and array.ndim == len(expected) + 1:
        fits = all(want in (None, got) for want, got in zip(expected, array.shape[1:], strict=True))
    elif expected is not None:
        fits = fits and array.ndim == len(expected)
        fits = fits and all(
            want in (None, got) for want, got in zip(expected[1:], array.shape[1:], strict=True)
        )
        if fits and expected[0] not in (None, 1):
            raise InvalidInput(
                f"The model takes batches of exactly {expected[0]}: export it with an open batch, or with 1."
            )
    if array.dtype != dtype or not fits:
        raise InvalidInput(
            f"{what} is {array.dtype} {array.shape}, but the model's input {entry.name!r} takes "
            f"{_signature(entry)}."
        )
    return array


def stated_sizes(entry: ValueInfoProto) -> list[int | None] | None:
    """Return the sizes that an input states, None for an open one; None if it does not state how many."""
    if not entry.type.tensor_type.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else None for dim in entry.type.tensor_type.shape.dim]


def _signature(entry: ValueInfoProto) -> str:
    """Write the type and the shape of the samples that an input takes."""
    sizes = stated_sizes(entry)
    dtype = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
    if sizes is None:
        return str(dtype)
    rest = sizes[1:] if sizes and sizes[0] in (None, 1) else sizes
    return f"{dtype} ({', '.join(['n', *(str(want or '*') for want in rest)])})"


def check_alike(calibration: Arrays, samples: Arrays) -> None:
    """Raise InvalidInput unless there are samples, and those of calibration have the same shape."""
    for name, array in samples.items():
        if not len(array):
            raise InvalidInput("The test set is empty: give at least one sample.")
        if calibration[name].shape[1:] != array.shape[1:]:
            raise InvalidInput(
                f"calibration has images of shape {calibration[name].shape[1:]}, the test set of "
                f"{array.shape[1:]}: give images of one shape."
            )


def check_finite(scans: Mapping[str, Mapping[str, Scan]]) -> None:
    """Raise InvalidInput for a value that is not finite."""
    for what, found in scans.items():
        for name, one in found.items():
            if not one.finite:
                which = "calibration" if what == "calibration" else "the test set"
                raise InvalidInput(
                    f"{which} has values that are not finite (NaN or infinite) for {name!r}: mend the data."
                )


def range_warnings(scans: Mapping[str, Mapping[str, Scan]]) -> list[str]:
    """Return a warning for each float input whose test data are scaled otherwise than its calibration data.

    Test data count as outside if they reach beyond the range of calibration by more than its width, or if
    they fill less than a twentieth of it.

    >>> ranges = {"calibration": {"x": Scan("", True, 0, 1)}, "samples": {"x": Scan("", True, 0, 255)}}
    >>> range_warnings(ranges)[0][:59]
    'The test data of x reach from 0 to 255, the calibration dat'
    """
    found = []
    for name, own in scans["samples"].items():
        ranged = scans["calibration"][name]
        if not own.ranged or not ranged.ranged:
            continue
        width, reach = ranged.high - ranged.low, own.high - own.low
        beyond = max(own.high - ranged.high, ranged.low - own.low)
        if beyond > width or 0 < 20 * reach < width:
            found.append(
                f"The test data of {name} reach from {own.low:g} to {own.high:g}, the calibration data from "
                f"{ranged.low:g} to {ranged.high:g}: scale both in the same way, or every range is wrong."
            )
    return found


def are_numbers(labels: np.ndarray) -> bool:
    """Tell whether labels are an array of numbers with an axis of samples."""
    return labels.dtype.kind in "biuf" and labels.ndim > 0


def check_labels(samples: Batch, labels: np.ndarray | None) -> None:
    """Raise InvalidInput if there are labels without samples, or not as many labels as samples."""
    arrays = list(samples.values()) if isinstance(samples, Mapping) else [samples]
    n = len(arrays[0]) if arrays and arrays[0].ndim else 0
    if labels is not None and not arrays:
        raise InvalidInput(
            f"The test set holds {LABELS!r}, which outputs are compared with, and no samples: add them. If "
            "the model has an input of this name, rename it."
        )
    if labels is not None and not are_numbers(labels):
        raise InvalidInput(f"test labels must be an array of numbers, got {labels.dtype} {labels.shape}.")
    if labels is not None and len(labels) != n:
        raise InvalidInput(
            f"There must be one label, or one array of labels, per image: got {labels.dtype} {labels.shape} "
            f"for {n} images."
        )
