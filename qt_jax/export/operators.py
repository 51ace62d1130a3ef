"""Sort operators by kind, refuse those outside the supported ones, and count what a graph holds and costs."""

import math
from collections import Counter
from typing import Any

import onnx
from onnx import NodeProto

from qt_jax.errors import InvalidInput
from qt_jax.export import graph

ACTIVATIONS = frozenset(
    {"Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "Relu", "Selu"}
    | {"Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)

UNARY = ACTIVATIONS | frozenset(
    {"Abs", "Cast", "Ceil", "Cos", "Erf", "Exp", "Floor", "Identity", "Log", "Neg", "Not", "Reciprocal"}
    | {"Round", "Sign", "Sin", "Sqrt"}
)

BINARY = frozenset(
    {"Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul"}
    | {"Or", "PRelu", "Pow", "Sub", "Where"}
)

POOLING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply by a kernel."""

BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators that multiply by a kernel and take a bias as third input."""

NORMALIZING = frozenset(
    {"BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
)

REDUCING = frozenset(
    {"ArgMax", "LogSoftmax", "LpNormalization", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin"}
    | {"ReduceSum", "Softmax"}
)

SHAPING = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Pad", "Reshape", "Resize"}
    | {"Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)

SUPPORTED = UNARY | BINARY | POOLING | WEIGHTED | NORMALIZING | REDUCING | SHAPING
"""Operators that low-bit compilers can be relied on to take."""

REMEDIES = {
    "CastLike": "build the module with dtype=jnp.float32 for export",
    "Einsum": "write it with jnp.matmul and reshape, or with nn.Dense or nn.DenseGeneral",
    "ReduceProd": "write the product of a few terms out",
    "CumSum": "no low-bit compiler takes it: precompute it, or move it out of the model",
    "NonZero": "its result has no fixed shape: move it out of the model",
    "Range": 'pad with numbers, "SAME" or "CIRCULAR" in place of "REFLECT"; make positions a constant',
    "Mod": "write x - n * jnp.floor(x / n), or take remainders of whole numbers by a constant",
    "TopK": "move the selection out of the model",
}
"""Maps an operator to what to change in the model that holds it."""

ANY_REMEDY = "write this step with layers and functions of flax.linen, or move it out of the model"


def refuse_unsupported(model: onnx.ModelProto) -> None:
    """Refuse a graph that holds operators that low-bit compilers cannot be relied on to take.

    Raises:
      InvalidInput: An operator is outside `SUPPORTED`. The message names the node, what feeds it and the
        remedy.
    """
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SUPPORTED:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            remedy = REMEDIES.get(node.op_type, ANY_REMEDY)
            raise InvalidInput(
                f'node "{node.name}" reading {list(node.input)} is a {operator}, which is outside the '
                f"operators that vendors' compilers share: {remedy}"
            )


def weighted_nodes(model: onnx.ModelProto) -> dict[str, NodeProto]:
    """Return the nodes that multiply by a kernel held in the graph, by name."""
    held = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name: node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in held
    }


def channel_axis(node: NodeProto, rank: int) -> int:
    """Return the axis of the output channels in a kernel of that rank, as ONNX lays it out.

    >>> channel_axis(onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"]), 4)
    1
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        return 0 if node.op_type == "Conv" else 1
    return 0 if graph.attributes(node).get("transB") else rank - 1


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """Count how often each operator occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def summarize(model: onnx.ModelProto, size: int | None = None) -> dict[str, Any]:
    """Summarize the operators, size and work of a graph.

    Args:
      model: Any graph.
      size: Size of the serialized graph in bytes. It is computed where it is not given.

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
    """Count the multiplications of convolutions and matrix products for one image.

    Returns:
      The number, or None if a size is unknown.
    """
    shapes = graph.shapes(model)
    try:
        return sum(_macs(node, shapes) for node in model.graph.node if node.op_type in WEIGHTED)
    except KeyError:
        return None


def _macs(node: NodeProto, shapes: graph.Shapes) -> int:
    """Multiply the elements of one image's output by the terms of each, or count the same from the input."""
    left, right, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if node.op_type == "ConvTranspose":
        return math.prod(left[2:]) * math.prod(right)
    if node.op_type == "Conv":
        return math.prod(output[2:]) * math.prod(right)
    contracted = right[1] if graph.attributes(node).get("transB") else right[-2]
    return math.prod(output[1:]) * contracted
