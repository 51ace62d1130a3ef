"""What an exported graph holds and costs."""

import math
from typing import Any

import onnx
from onnx import NodeProto

from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED, count_operators


def summarize(model: onnx.ModelProto, size: int | None = None) -> dict[str, Any]:
    """Operators, size and work of `model`; its `size` in bytes is counted anew unless it is given.

    Returns:
      `operators` (name -> count), `parameters` (elements of the constants of floating point), `macs`
      (multiplications of convolutions and matrix products for one image; None if a size is unknown),
      `bytes`, `opset`.

    >>> import numpy as np
    >>> from onnx import helper, numpy_helper
    >>> kernel = numpy_helper.from_array(np.ones((3, 2), np.float32), "kernel")
    >>> x, y = (helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 3), ("y", 2)))
    >>> product = helper.make_node("MatMul", ["x", "kernel"], ["y"])
    >>> summarize(helper.make_model(helper.make_graph([product], "g", [x], [y], [kernel])))["macs"]
    6
    """
    return {
        "operators": count_operators(model),
        "parameters": sum(
            math.prod(tensor.dims)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.FLOAT
        ),
        "macs": multiply_accumulates(model),
        "bytes": model.ByteSize() if size is None else size,
        "opset": model.opset_import[0].version,
    }


def multiply_accumulates(model: onnx.ModelProto) -> int | None:
    """Multiplications of convolutions and matrix products for one image; None if a size is unknown."""
    shapes = graph.shapes(model)
    try:
        return sum(_macs(node, shapes) for node in model.graph.node if node.op_type in WEIGHTED)
    except KeyError:
        return None


def _macs(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Elements of one image's output times the terms of each, or the same counted from the input."""
    left, right, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type == "ConvTranspose":
        return math.prod(left[2:]) * math.prod(right)
    if node.op_type == "Conv":
        return math.prod(output[2:]) * math.prod(right)
    contracted = right[1] if graph.attributes(node).get("transB") else right[-2]
    return math.prod(output[1:]) * contracted
