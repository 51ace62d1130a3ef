"""Bring a prepared float graph into the form that the diagnosis works on.

`qt_jax.backends.inputs.prepare` has checked the graph and named its nodes. The diagnosis also changes kernels
one by one, so every layer needs one of its own, as a constant.
"""

from collections import Counter

import numpy as np
import onnx
from onnx import NodeProto, inliner

from qt_jax.backends.constant_folding import folded
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED, channel_axis

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def with_own_kernels(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` with a kernel of its own, held as a constant, for each layer.

    Functions are inlined. What depends on constants alone is computed. A kernel that several layers share is
    copied for each, and the bias of a Gemm becomes `(channels,)`.

    Args:
      model: Graph from `qt_jax.backends.inputs.prepare`.

    Raises:
      InvalidInput: The graph has subgraphs, operators outside ONNX's own, or kernels in another floating
        point than float32.

    >>> kernel = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32))
    >>> nodes = [
    ...     onnx.helper.make_node("Constant", [], ["w"], value=kernel),
    ...     onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="head"),
    ... ]
    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, ["b", 2]) for name in "xy")
    >>> found = with_own_kernels(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y])))
    >>> [node.name for node in found.graph.node], [tensor.name for tensor in found.graph.initializer]
    (['head'], ['w'])
    """
    model = inliner.inline_local_functions(model) if model.functions else model
    for node in model.graph.node:
        _check(node)
    model = folded(model)
    values = graph.constants(model)
    nodes = _own_kernels(list(model.graph.node), values)
    for node in nodes:
        kernel = values.get(node.input[1]) if node.op_type in WEIGHTED else None
        if kernel is not None and kernel.dtype.kind not in "biu" and kernel.dtype != np.float32:
            raise InvalidInput(
                f"The kernel of {node.name!r} is {kernel.dtype}: the diagnosis rounds float32, give the "
                "float32 graph."
            )
    return graph.rebuild(model, nodes, values)


def _check(node: NodeProto) -> None:
    """Raise InvalidInput for a node that holds a graph, or is not one of ONNX's own."""
    name = node.name or node.output[0]
    if node.domain not in STANDARD:
        raise InvalidInput(
            f"The node {name!r} is a {node.domain}.{node.op_type}, which is not one of ONNX's own operators: "
            "give the float graph, before any vendor's tool has changed it."
        )
    if any(item.type in (item.GRAPH, item.GRAPHS) for item in node.attribute):
        raise InvalidInput(
            f"The node {name!r} is a {node.op_type}, which holds a graph of its own, and the diagnosis does "
            "not look into that: export the model without control flow."
        )


def _own_kernels(nodes: list[NodeProto], values: dict[str, np.ndarray]) -> list[NodeProto]:
    """Give every layer its own kernel, and a bias of shape `(channels,)`; add the copies to `values`."""
    seen: Counter[str] = Counter()
    own = []
    for node in nodes:
        if node.op_type in WEIGHTED and node.input[1] in values:
            name = node.input[1]
            if seen[name]:
                inputs = list(node.input)
                inputs[1] = f"{name}#copy {seen[name]}"
                values[inputs[1]] = values[name]
                node = graph.rewired(node, inputs)
            seen[name] += 1
            node = _flat_bias(node, values)
        own.append(node)
    return own


def _flat_bias(node: NodeProto, values: dict[str, np.ndarray]) -> NodeProto:
    """Return a Gemm with its bias as `(channels,)`, and any other node as it is."""
    bias = values.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
    kernel = values[node.input[1]]
    channels = kernel.shape[channel_axis(node, kernel.ndim)] if kernel.ndim else 0
    if bias is None or bias.shape == (channels,) or bias.size not in (1, channels):
        return node
    inputs = list(node.input)
    inputs[2] = f"{inputs[2]}#of {node.name}"
    values[inputs[2]] = np.broadcast_to(bias.ravel(), (channels,)).copy()
    return graph.rewired(node, inputs)
