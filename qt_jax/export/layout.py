"""Channels-last to channels-first: the Transposes that JAX's NHWC leaves behind are carried away.

A Transpose to NHWC emits nothing: its output is noted as a view of the NCHW tensor before it. Operators that
can work on the NCHW tensor instead do so and hand the view on; a Transpose is written only where one cannot.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph

TO_NHWC = (0, 2, 3, 1)
TO_NCHW = (0, 3, 1, 2)
ELEMENTWISE = frozenset({"Add", "Clip", "Div", "Max", "Min", "Mul", "Relu", "Sigmoid", "Sub"})
GLOBAL_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def channels_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with elementwise operators, Concat and means over height and width working on NCHW tensors.

    A mean (maximum) over height and width becomes GlobalAveragePool (GlobalMaxPool), followed by Flatten
    where the two axes were dropped.
    """
    values = graph.constants(model)
    nodes: list[NodeProto] = []
    views: dict[str, str] = {}  # an NHWC tensor -> the NCHW tensor that holds the same numbers
    written: set[str] = set()  # views that had to be written out
    renamed: dict[str, str] = {}

    for node in model.graph.node:
        inputs = [renamed.get(name, name) for name in node.input]
        if _permutes(node, TO_NHWC) and inputs[0] not in views:
            views[node.output[0]] = inputs[0]
        elif _permutes(node, TO_NCHW) and inputs[0] in views:
            renamed[node.output[0]] = views[inputs[0]]
        elif carried := _carried(node, inputs, views, values):
            nodes.extend(carried)
        else:
            for name in inputs:
                if name in views and name not in written:
                    nodes.append(helper.make_node("Transpose", [views[name]], [name], perm=TO_NHWC))
                    written.add(name)
            nodes.append(graph.rewired(node, inputs))
    return graph.rebuild(model, nodes, values)


def _permutes(node: NodeProto, permutation: Sequence[int]) -> bool:
    return node.op_type == "Transpose" and tuple(graph.attributes(node).get("perm", ())) == permutation


def _carried(
    node: NodeProto, inputs: list[str], views: dict[str, str], values: dict[str, np.ndarray]
) -> list[NodeProto]:
    """`node` on the NCHW tensors behind its inputs; none if it cannot. Adds to `views` and `values`."""
    variable = [name for name in inputs if name and name not in values]
    if not variable or any(name not in views for name in variable):
        return []
    output = f"{node.output[0]}/nchw"
    if node.op_type in ELEMENTWISE:
        sources = [views[name] if name in views else _constant(name, values) for name in inputs]
        carried = [graph.rewired(node, sources, [output])]
    elif node.op_type == "Concat" and len(variable) == len(inputs):
        axis = TO_NHWC[graph.attributes(node)["axis"] % 4]
        carried = [helper.make_node("Concat", [views[name] for name in inputs], [output], axis=axis)]
    elif node.op_type in GLOBAL_POOLS and _reduced_axes(node, inputs, values) == {1, 2}:
        carried = [helper.make_node(GLOBAL_POOLS[node.op_type], [views[inputs[0]]], [output])]
        if not graph.attributes(node).get("keepdims", 1):
            return [*carried, helper.make_node("Flatten", [output], list(node.output), axis=1)]
    else:
        return []
    views[node.output[0]] = output
    return carried


def _constant(name: str, values: dict[str, np.ndarray]) -> str:
    """The constant `name`, which broadcasts against NHWC, as one that broadcasts against NCHW."""
    value = values.get(name)
    if value is None or value.size == 1:
        return name
    moved = graph.derived(name, "nchw")
    values[moved] = value.reshape((1,) * (4 - value.ndim) + value.shape).transpose(TO_NCHW)
    return moved


def _reduced_axes(node: NodeProto, inputs: list[str], values: dict[str, np.ndarray]) -> set[int]:
    """The axes of a reduction: an attribute in older opsets, an input in newer ones (and in jax2onnx's)."""
    axes = graph.attributes(node).get("axes", ())
    if len(inputs) > 1:
        axes = values.get(inputs[1], np.array(())).ravel()
    return {int(axis) % 4 for axis in axes}
