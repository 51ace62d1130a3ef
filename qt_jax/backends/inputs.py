"""Read a float model and its data, check that they fit, and prepare the model for all toolchains."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import onnx
from onnx import version_converter

from qt_jax.errors import InvalidInput

OLDEST_OPSET = 13
"""The first opset with a per-channel QuantizeLinear. Older graphs are converted to it."""


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read the arrays called `names` from an .npz file.

    The name does not matter if one array is asked for and the file holds one.

    Raises:
      InvalidInput: The file cannot be read, or lacks an array.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "c.npz"
    >>> np.savez(path, np.zeros((2, 3)))
    >>> read_arrays(path, ("images",))["images"].shape
    (2, 3)
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile) as error:
        raise InvalidInput(f"{path} cannot be read as an .npz file: {error}.") from error
    if len(names) == len(found) == 1:
        return {names[0]: next(iter(found.values()))}
    lacking = [name for name in names if name not in found]
    if lacking:
        raise InvalidInput(f"{path} lacks the arrays {lacking}, it holds {sorted(found)}.")
    return {name: found[name] for name in names}


def load(model: onnx.ModelProto | str | Path) -> onnx.ModelProto:
    """Return the model, read from its file if it is a path. Raises InvalidInput if it cannot be read."""
    if isinstance(model, onnx.ModelProto):
        return model
    try:
        return onnx.load(model)
    except Exception as error:
        raise InvalidInput(
            f"{model} cannot be read as an ONNX model: {error}. Check the path, or export it again."
        ) from error


def prepare(
    model: onnx.ModelProto, calibration: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> onnx.ModelProto:
    """Check that the data fit the model, and return the model as all toolchains get it.

    Of several outputs the first is kept. Open sizes of the input, except the batch, become those of the
    images. Weights are no longer listed among the inputs. An opset before `OLDEST_OPSET` is converted to it.

    Args:
      model: A float ONNX model.
      calibration: Images `(n, ...)` float32.
      images: Test images `(n, ...)` float32.
      labels: Labels `(n,)`, or `(n, height, width)` for segmentation; integers.

    Returns:
      A changed copy, or `model` itself if it needs no change.

    Raises:
      InvalidInput: The model has several inputs, the arrays do not fit, or the batch is fixed above 1.
    """
    given = single_input(model)
    _check_images(given, calibration, images)
    _check_labels(images, labels)
    prepared = onnx.ModelProto()
    prepared.CopyFrom(model)
    taken = single_input(prepared)
    batch, *others = taken.type.tensor_type.shape.dim
    if batch.dim_value < 1:
        batch.dim_param = batch.dim_param or "batch"
    for dim, size in zip(others, images.shape[1:], strict=True):
        dim.dim_value = size
    listed = [value for value in prepared.graph.input if value.name == taken.name]
    del prepared.graph.input[:]
    prepared.graph.input.extend(listed)
    del prepared.graph.output[1:]
    if _opset(prepared) < OLDEST_OPSET:
        try:
            prepared = version_converter.convert_version(prepared, OLDEST_OPSET)
        except Exception as error:
            raise InvalidInput(
                f"The model is of opset {_opset(model)} and onnx cannot convert it to {OLDEST_OPSET}: "
                f"{error}. Export it again with a newer opset."
            ) from error
    return model if prepared == model else prepared


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """Return how many images the graph takes at once; None if it takes any number."""
    size = single_input(model).type.tensor_type.shape.dim[0].dim_value
    return size if size > 0 else None


def single_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the graph's one input. Weights listed among the inputs do not count.

    Raises:
      InvalidInput: There is no input, or more than one.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        raise InvalidInput(
            f"The ONNX model must have exactly one input, found {[value.name for value in inputs]}: export a "
            "forward that takes one array, and slices from it what the model takes."
        )
    return inputs[0]


def _check_images(given: onnx.ValueInfoProto, calibration: np.ndarray, images: np.ndarray) -> None:
    """Raise InvalidInput for images that the model's input does not take, or that are not finite."""
    dims = given.type.tensor_type.shape.dim
    expected = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
    for what, array in (("calibration", calibration), ("test images", images)):
        fits = array.ndim == len(expected) and all(
            want in (None, got) for want, got in zip(expected[1:], array.shape[1:], strict=True)
        )
        if array.dtype != np.float32 or not fits:
            raise InvalidInput(
                f"{what} is {array.dtype} {array.shape}, but the model's input {given.name!r} takes float32 "
                f"(n, {', '.join(str(want or '*') for want in expected[1:])}): our exports are "
                "channels-first."
            )
        if not np.isfinite(array).all():
            raise InvalidInput(f"{what} has values that are not finite (NaN or infinite): mend the data.")
    if calibration.shape[1:] != images.shape[1:]:
        raise InvalidInput(
            f"calibration has images of shape {calibration.shape[1:]}, the test set of {images.shape[1:]}: "
            "give images of one shape."
        )
    if expected[0] not in (None, 1):
        raise InvalidInput(
            f"The model takes batches of exactly {expected[0]}: export it with an open batch, or with 1."
        )


def _check_labels(images: np.ndarray, labels: np.ndarray) -> None:
    """Raise InvalidInput for labels that are not integers, or not one per image or pixel."""
    are_integers = labels.ndim in (1, 3) and np.issubdtype(labels.dtype, np.integer)
    if not len(images) or labels.shape[:1] != (len(images),) or not are_integers:
        raise InvalidInput(
            f"test labels must be one integer per image, or (n, height, width) for segmentation, for at "
            f"least one image, got {labels.dtype} {labels.shape} for {len(images)} images."
        )


def _opset(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
