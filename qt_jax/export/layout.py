"""Channels-last to channels-first: the Transposes that JAX's layout leaves behind are carried away.

A Transpose emits nothing: its output is noted as a view of the tensor before it. Operators that can work on
that tensor instead do so and hand the view on (`carrying`); a Transpose is written only where one cannot.
"""

import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.carrying import carry
from qt_jax.export.views import TO_CHANNELS_FIRST, TO_CHANNELS_LAST, View, Views

__all__ = ["TO_CHANNELS_FIRST", "TO_CHANNELS_LAST", "channels_first"]


def channels_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with convolutions, elementwise operators, pools, concats and resizes on channels-first tensors.

    A mean (maximum) over height and width becomes GlobalAveragePool (GlobalMaxPool), followed by Flatten
    where the two axes were dropped; a matrix product over the channels of an image a 1x1 convolution. Two
    Transposes that cancel vanish, one that only moves axes of size 1 becomes a Reshape.
    """
    views = Views(graph.constants(model), graph.shapes(model))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        inputs = [views.renamed.get(name, name) for name in node.input]
        node = graph.rewired(node, inputs)
        if node.op_type == "Transpose" and inputs[0] not in views.values:
            _note(node, views)
            continue
        carried = carry(node, views)
        if carried is None:
            for name in inputs:
                nodes.extend(views.written_out(name))
            nodes.append(node)
        else:
            nodes.extend(carried)
    for output in model.graph.output:
        nodes.extend(views.written_out(output.name))
        if output.name in views.renamed:
            nodes.append(helper.make_node("Identity", [views.renamed[output.name]], [output.name]))
    return graph.rebuild(model, nodes, views.values)


def _note(transpose: NodeProto, views: Views) -> None:
    """Remember the output of `transpose` as a view, or as the tensor that an earlier one started from."""
    (source,), (output,) = transpose.input, transpose.output
    permutation = tuple(graph.attributes(transpose)["perm"])
    if source in views.views:
        earlier = views.views[source]
        source, permutation = earlier.source, tuple(earlier.permutation[axis] for axis in permutation)
    if permutation == tuple(range(len(permutation))):
        views.renamed[output] = source
    else:
        views.views[output] = View(source, permutation)
