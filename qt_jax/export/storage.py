"""Write a graph to a file, or to two where it is too large for one, and give it to those that read it.

Protobuf serializes no message of 2 GB or more. The weights of a larger graph stand in a second file,
`model.onnx.data` beside `model.onnx`, which is the external data of ONNX. Both must be moved together.
"""

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from qt_jax.files import staged_folder

LARGEST = 2_000_000_000
"""Size in bytes of the weights up to which a graph is one file. The limit of 2**31 holds the nodes too."""

EXTERNAL = 4096
"""Size in bytes from which on a weight stands in the second file. It begins at a multiple of that there."""


def save(model: ModelProto, path: str | os.PathLike) -> None:
    """Write `model` to `path`, whole or not at all; a file already there is replaced at the end.

    Weights of more than `LARGEST` bytes go to a second file, `<path>.data`.
    """
    with staged_model(model, path):
        pass


@contextmanager
def staged_model(model: ModelProto, path: str | os.PathLike) -> Iterator[Path]:
    """Give the block a scratch file of `model`, which becomes `path` if the block ends without an error.

    A second file becomes `<path>.data`. One that is there from an earlier model is replaced or removed. No
    reader finds a graph beside the weights of another: where both files are replaced there is none for a
    moment.
    """
    path = Path(path)
    data = data_path(path)
    with staged_folder(path) as folder:
        scratch = folder / path.name
        _write(model, scratch)
        yield scratch
        if data_path(scratch).exists():
            if data.exists():
                path.unlink(missing_ok=True)
            os.replace(data_path(scratch), data)
            os.replace(scratch, path)
        else:
            os.replace(scratch, path)
            data.unlink(missing_ok=True)


@contextmanager
def readable(model: ModelProto) -> Iterator[bytes | str]:
    """Give the block what onnx and onnxruntime read: bytes, or for a large model the path of a file."""
    if not is_large(model):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="qt_jax-") as folder:
        path = Path(folder, "model.onnx")
        _write(model, path)
        yield str(path)


def data_path(path: Path) -> Path:
    """Return the file that holds the weights of a large graph in `path`."""
    return path.with_name(f"{path.name}.data")


def stored_size(path: Path) -> int:
    """Return the size in bytes of the graph in `path`, with the weights in a second file."""
    return sum(file.stat().st_size for file in (path, data_path(path)) if file.exists())


def is_large(model: ModelProto) -> bool:
    """Tell whether the weights of a graph need a file of their own."""
    return sum(map(_size, model.graph.initializer)) > LARGEST


def model_sha256(model: ModelProto) -> str:
    """Return the SHA-256 of the serialized graph; for a large one that of its nodes, then of its weights."""
    if not is_large(model):
        return hashlib.sha256(model.SerializeToString()).hexdigest()
    digest = hashlib.sha256(with_initializers(model, []).SerializeToString())
    for tensor in model.graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {tensor.dims} ".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def with_initializers(model: ModelProto, initializers: Iterable[TensorProto]) -> ModelProto:
    """Return the model with other initializers, without a copy of those that it has."""
    light = GraphProto(initializer=initializers, **_fields(model.graph, "initializer"))
    return ModelProto(graph=light, **_fields(model, "graph"))


def _raw(tensor: TensorProto) -> bytes:
    """Return the elements of an initializer as ONNX stores them in a file."""
    if tensor.HasField("raw_data"):
        return tensor.raw_data
    return numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data


def _size(tensor: TensorProto) -> int:
    """Return the size of an initializer in bytes, with a byte for each integer that is packed."""
    return math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _write(model: ModelProto, path: Path) -> None:
    """Write a graph to `path`, and its weights to the file beside that if they need one.

    The weights are written one by one, so that no second copy of all is made.
    """
    if not is_large(model):
        path.write_bytes(model.SerializeToString())
        return
    with data_path(path).open("wb") as file:
        weights = [_external(tensor, file) for tensor in model.graph.initializer]
    path.write_bytes(with_initializers(model, weights).SerializeToString())


def _fields(message: Any, without: str) -> dict[str, Any]:
    """Return what a message of protobuf holds, by field, without one of the fields."""
    return {field.name: value for field, value in message.ListFields() if field.name != without}


def _external(tensor: TensorProto, file: BinaryIO) -> TensorProto:
    """Append the bytes of a weight to `file`, and return the initializer that refers to them there."""
    if _size(tensor) < EXTERNAL:
        return tensor
    file.write(bytes(-file.tell() % EXTERNAL))
    offset = file.tell()
    file.write(_raw(tensor))
    held = TensorProto(
        name=tensor.name,
        dims=tensor.dims,
        data_type=tensor.data_type,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", Path(file.name).name),
        ("offset", offset),
        ("length", file.tell() - offset),
    ):
        held.external_data.add(key=key, value=str(value))
    return held
