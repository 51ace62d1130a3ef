"""Large constants kept beside the graph while passes rewrite it.

A pass makes a new ModelProto, and a ModelProto owns a copy of every weight. Inside `aside()` a large constant
is a reference instead, ONNX's external data with a location in this process, and nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LARGE = 4096
"""Bytes from which on a constant is kept aside."""

_kept: ContextVar[dict[str, np.ndarray] | None] = ContextVar("weights_kept_aside", default=None)


@contextmanager
def aside() -> Iterator[None]:
    """Keep large constants beside the models that are built inside; `attached` puts them in again."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def tensor_of(value: np.ndarray, name: str) -> TensorProto:
    """The initializer `name`: a copy of `value`, or inside `aside` a reference to it if it is large."""
    kept = _kept.get()
    if kept is None or value.nbytes < LARGE:
        return numpy_helper.from_array(value, name)
    location = f"memory:{id(value)}"
    kept[location] = value
    tensor = TensorProto(name=name, dims=value.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(value.dtype)
    tensor.external_data.add(key="location", value=location)
    return tensor


def value_of(tensor: TensorProto) -> np.ndarray:
    """The value of an initializer, wherever it is kept."""
    kept = _kept.get()
    if kept is not None and tensor.data_location == TensorProto.EXTERNAL:
        return kept[tensor.external_data[0].value]
    return numpy_helper.to_array(tensor)


def attached(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the weights that were kept aside copied into it."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(value_of(tensor), tensor.name))
    return whole
