"""Where QuantizeLinear and DequantizeLinear go: the tensors that integer kernels hand to one another.

A compiler makes a convolution an integer kernel when its input, kernel and output are quantized. What lies
between two of them must be quantized on both sides too, or it is an island of floating point.
"""

from collections import defaultdict
from collections.abc import Collection

import onnx
from onnx import NodeProto

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
ABSORBED = frozenset({"Clip", "Relu"})
"""Computed by the operator before them, whose own output is then not quantized."""
SAME_GRID = frozenset({"Flatten", "MaxPool", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move, select or interpolate numbers: their output is on the grid of their input."""
MERGING = frozenset({"Add", "Concat", "Mul"})
"""Operators of which every input is an activation; of the others here only the first is."""
BETWEEN = SAME_GRID | ABSORBED | MERGING | {"AveragePool", "GlobalAveragePool"}
"""Operators between layers that have integer kernels."""


def tensor_readers(model: onnx.ModelProto) -> dict[str, list[NodeProto]]:
    """The nodes that read each tensor, once for each time they do."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def activation_inputs(node: NodeProto) -> list[str]:
    """The inputs of an operator of `BETWEEN` that are activations."""
    return list(node.input) if node.op_type in MERGING else list(node.input[:1])


def quantized_tensors(model: onnx.ModelProto, layers: Collection[str]) -> set[str]:
    """The tensors that get a Q/DQ pair, besides the inputs of the layers themselves.

    They are the output of each quantized convolution, and what goes into and comes out of operators of
    `BETWEEN` that lead to quantized layers only. A tensor that only a Relu or Clip reads is passed over in
    favour of theirs. An operator stays float that also leads to one without an integer kernel
    (LayerNormalization, Softmax, Gelu), or to the end of the graph, or merges an activation with a constant.
    A linear layer's output is quantized only where an operator of `BETWEEN` reads it: logits on eight bits
    tie.

    Args:
      model: a graph with named nodes.
      layers: names of the nodes whose input and kernel are quantized.

    >>> nodes = [
    ...     onnx.helper.make_node("Conv", ["x", "w"], ["conv"], name="conv"),
    ...     onnx.helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
    ... ]
    >>> model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    >>> quantized_tensors(model, {"conv"})
    {'relu'}
    """
    outputs = {output.name for output in model.graph.output}
    readers = tensor_readers(model)
    integer = set(layers) | _integer_between(model, layers, readers)

    def settled(name: str) -> str:
        """The tensor itself, or that of the Relu or Clip that alone reads it."""
        alone = readers[name][0] if len(readers[name]) == 1 and name not in outputs else None
        return alone.output[0] if alone is not None and alone.op_type in ABSORBED else name

    convolutions = CONVOLUTIONS | BETWEEN
    makers = {node.output[0]: node for node in model.graph.node}
    found: set[str] = set()
    for node in model.graph.node:
        if node.name not in integer:
            continue
        if node.op_type in convolutions:
            found.add(settled(node.output[0]))
        if node.op_type in BETWEEN:
            computed = {name for name in node.input if name in makers and makers[name].name in integer}
            found.update(
                name for name in activation_inputs(node) if name not in computed or settled(name) == name
            )
    return found


def _integer_between(
    model: onnx.ModelProto, layers: Collection[str], readers: dict[str, list[NodeProto]]
) -> set[str]:
    """Names of the operators of `BETWEEN` that work on integers."""
    held = {tensor.name for tensor in model.graph.initializer}
    found: set[str] = set()
    for node in reversed(model.graph.node):
        following = [reader.name for reader in readers[node.output[0]]]
        leads_on = following and all(name in layers or name in found for name in following)
        constant = not held.isdisjoint(activation_inputs(node))
        is_output = any(output.name == node.output[0] for output in model.graph.output)
        if node.op_type in BETWEEN and leads_on and not constant and not is_output:
            found.add(node.name)
    return found


def same_grid_groups(model: onnx.ModelProto, tensors: Collection[str]) -> list[list[str]]:
    """`tensors` by shared grid: each group one tensor and what operators of `SAME_GRID` make of it."""
    groups = {name: [name] for name in tensors}
    for node in model.graph.node:
        source, output = node.input[0], node.output[0]
        if node.op_type in SAME_GRID and source in groups and output in groups:
            groups[source].append(output)
            groups[output] = groups[source]
    return list({id(group): group for group in groups.values()}.values())
