"""Constant folding: what a graph computes from the shapes of its tensors alone, computed."""

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

ARITHMETIC = {
    *("Constant", "ConstantOfShape", "Shape", "Size", "Range", "Concat", "Expand", "Gather", "Slice", "Tile"),
    *("Squeeze", "Unsqueeze", "Reshape", "Transpose", "Cast", "Equal", "Where"),
    *("Add", "Sub", "Mul", "Div", "Mod"),
}
"""The operators that exporters do arithmetic on shapes with."""


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model in which `ARITHMETIC` that needs no data is replaced by initializers, names kept.

    With a fixed batch nothing is left of what an open one asks for. A class token, for example, is spread
    over the batch by Shape, Concat and Expand.

    >>> from onnx import TensorProto, helper, numpy_helper
    >>> row = numpy_helper.from_array(np.ones((1, 2), np.float32), "row")
    >>> x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [3, 2]) for n in "xy")
    >>> shape = helper.make_node("Shape", ["x"], ["of_x"])
    >>> expand = helper.make_node("Expand", ["row", "of_x"], ["rows"])
    >>> nodes = [shape, expand, helper.make_node("Add", ["x", "rows"], ["y"])]
    >>> graph = helper.make_graph(nodes, "g", [x], [y], [row])
    >>> lean = folded(helper.make_model(graph)).graph
    >>> [node.op_type for node in lean.node], [tensor.name for tensor in lean.initializer]
    (['Add'], ['row', 'rows'])
    """
    lean = onnx.shape_inference.infer_shapes(model)
    graph = lean.graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.value_info)}
    outputs = {value.name for value in graph.output}
    nodes, computed = [], []
    for node in graph.node:
        data = {name: constants[name] for name in node.input if name in constants}
        if node.op_type in ("Shape", "Size") and shapes.get(node.input[0]):
            data = {node.input[0]: np.broadcast_to(np.float32(0), shapes[node.input[0]])}
        known = data.keys() == {*node.input} - {""} and not outputs & {*node.output}
        if known and node.op_type in ARITHMETIC and not node.domain:
            constants[node.output[0]] = ReferenceEvaluator(node).run(None, data)[0]
            computed.append(node.output[0])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    needed = {name for node in nodes for name in node.input}
    for name in filter(needed.__contains__, computed):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(constants[name]), name))
    del graph.value_info[:]
    return lean


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """The sizes of a tensor; None unless all are known."""
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return tuple(sizes) if sizes and all(sizes) else None
