"""Leave batch and heads as two axes where a program merges them into one and splits them again.

Attention is often written on `(batch * heads, tokens, features)`. The operators between the Reshape that
merges the axes and the one that splits them work on `(batch, heads, tokens, features)` as well.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import dataclasses
import math

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.operators import BINARY, UNARY

LAST_AXES = frozenset({"LayerNormalization", "LogSoftmax", "Softmax"})
"""Operators that work along the axis, or from the axis on, that they name in an attribute."""


def keep_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the Reshapes that merge the leading axes of a tensor, as long as that leaves fewer nodes.

    Each is put off until an operator needs it (`_Walk`), and none is needed where the axes are split again.
    """
    walk = _Walk(model)
    for node in model.graph.node:
        walk.visit(node)
    for output in model.graph.output:
        walk.write(output.name)
    kept = graph.rebuild(model, walk.nodes, walk.values)
    return kept if len(kept.graph.node) < len(model.graph.node) else model


@dataclasses.dataclass(frozen=True)
class _Merged:
    """Describe a tensor that is `source` with its first `count` axes merged into one."""

    source: str
    count: int


class _Walk:
    """Hold what is known at one point of the walk through a graph.

    Attributes:
      nodes: Nodes of the new graph.
      values: Constants by name; new ones are added.
      shapes: Shapes of the tensors; those of new ones are added.
      merged: The tensors whose leading axes are not merged yet, by name.
      renamed: Maps a tensor to the one that it equals.
      written: Tensors whose leading axes were merged after all.
      batch: Size of the batch.
      outputs: Outputs of the graph.
    """

    def __init__(self, model: onnx.ModelProto):
        self.nodes: list[NodeProto] = []
        self.values: Constants = graph.constants(model)
        self.shapes: Shapes = graph.shapes(model)
        self.merged: dict[str, _Merged] = {}
        self.renamed: dict[str, str] = {}
        self.written: set[str] = set()
        self.batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        self.outputs = {output.name for output in model.graph.output}

    def visit(self, node: NodeProto) -> None:
        """Put `node` on the tensors before the merge, or write its inputs and then itself."""
        node = graph.rewired(node, [self.renamed.get(name, name) for name in node.input])
        if node.op_type == "Reshape" and self._reshape(node):
            return
        lifted = self._lifted(node)
        if lifted is None:
            for name in node.input:
                self.write(name)
            self.nodes.append(node)
            return
        view = next(self.merged[name] for name in node.input if name in self.merged)
        name = f"{node.output[0]}/axes"
        self.nodes.append(graph.rewired(lifted, lifted.input, [name]))
        leading = self.shapes[view.source][: view.count]
        self.shapes[name] = (*leading, *self.shapes[node.output[0]][1:])
        self.merged[node.output[0]] = _Merged(name, view.count)

    def write(self, name: str) -> None:
        """Merge the axes of the tensor `name` after all, if they are not."""
        if name in self.merged and name not in self.written:
            self.written.add(name)
            self.nodes.append(self._reshaped(self.merged[name].source, name))

    def _reshaped(self, source: str, output: str) -> NodeProto:
        """Make the Reshape of `source` to the shape of `output`."""
        target = self.values.add(f"{output}#axes", np.array(self.shapes[output], np.int64))
        return helper.make_node("Reshape", [source, target], [output])

    def _reshape(self, node: NodeProto) -> bool:
        """Record a Reshape that merges leading axes, or join one with the merge before it."""
        source, output = node.input[0], node.output[0]
        if source in self.merged:
            source = self.merged[source].source
        before, after = self.shapes.get(source), self.shapes.get(output)
        if before is None or after is None or not all(before):
            return False
        if before == after and output not in self.outputs:
            self.renamed[output] = source
            return True
        count = len(before) - len(after) + 1
        leading = before[:count]
        several = min(leading[1:], default=1) > 1 and (leading[0] > 1 or self.batch == 1)
        if several and after and math.prod(leading) == after[0] and before[count:] == after[1:]:
            self.merged[output] = _Merged(source, count)
            return True
        if source == node.input[0]:
            return False
        self.nodes.append(self._reshaped(source, output))
        return True

    def _lifted(self, node: NodeProto) -> NodeProto | None:
        """Return `node` on the tensors before the merge; None where it works along the merged axis."""
        views = {name: self.merged[name] for name in node.input if name in self.merged}
        leading = {self.shapes[view.source][: view.count] for view in views.values()}
        if len(leading) != 1 or len(node.output) > 1 or node.output[0] not in self.shapes:
            return None
        rank, (axes,) = len(self.shapes[node.output[0]]), leading
        whole = self.shapes[node.output[0]][:1] == (math.prod(axes),)
        if not whole or any(len(self.shapes[name]) != rank for name in views):
            return None
        inputs = [views[name].source if name in views else name for name in node.input]
        stated = graph.attributes(node)
        if node.op_type == "Transpose":
            first, *others = stated["perm"]
            moved = [*range(len(axes)), *(axis + len(axes) - 1 for axis in others)]
            return helper.make_node("Transpose", inputs, node.output, perm=moved) if first == 0 else None
        if node.op_type in LAST_AXES:
            axis = stated.get("axis", -1) % rank
            others = [*views] == [node.input[0]] and axis > 0
            stated["axis"] = axis - rank
            return helper.make_node(node.op_type, inputs, node.output, **stated) if others else None
        if node.op_type in UNARY | BINARY or (node.op_type == "MatMul" and rank > 2):
            constants = [name for name in node.input if name in self.values]
            full = [name for name in constants if self.values[name].ndim >= rank]
            known = all(not name or name in views or name in self.values for name in node.input)
            if not known or any(self.values[name].shape[0] != 1 for name in full):
                return None
            beside = {name: self._beside(name, len(axes)) for name in full}
            return graph.rewired(node, [beside.get(name, name) for name in inputs])
        return None

    def _beside(self, name: str, count: int) -> str:
        """Return the constant that stands beside tensors before the merge as `name` does behind it."""
        value = self.values[name]
        return self.values.derive(name, f"axes{count}", value.reshape((*(1,) * count, *value.shape[1:])))
