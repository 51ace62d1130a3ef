"""Prepare a float graph of any origin for the diagnosis: name its nodes, make its constants initializers."""

from collections import Counter

import numpy as np
import onnx
from onnx import NodeProto, inliner, numpy_helper, version_converter

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED, channel_axis

LEAST_OPSET = 13
"""Lowest opset that is diagnosed. Per-channel QuantizeLinear begins here."""

STANDARD = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return `model` in the form that the diagnosis takes.

    Functions are inlined, and the opset is raised to 13 if it is lower. Every node gets a name of its own.
    Constants become initializers. A kernel that several layers share is copied for each. Only the first
    output stays.

    Raises:
      InvalidInput: The graph has subgraphs, operators outside ONNX's own, inputs other than one float32
        input, or kernels that are not float32.

    >>> node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"])
    >>> entries = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["b", 2]) for n in "xy"]
    >>> weights = numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")
    >>> opset = [onnx.helper.make_opsetid("", 17)]
    >>> made = onnx.helper.make_graph([node], "g", entries[:1], entries[1:], [weights])
    >>> prepared(onnx.helper.make_model(made, opset_imports=opset)).graph.node[0].name
    'y'
    """
    model = _standard(inliner.inline_local_functions(model) if model.functions else model)
    values = graph.constants(model)
    nodes = _named(_folded(model.graph.node, values))
    own = _own_kernels(nodes, values)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[1:]
    found = graph.rebuild(copy, own, values)
    types = [entry.type.tensor_type.elem_type for entry in found.graph.input]
    if types != [onnx.TensorProto.FLOAT]:
        names = ", ".join(entry.name for entry in found.graph.input) or "nothing"
        raise InvalidInput(f"The graph reads {names}: the diagnosis takes one float32 input.")
    if other := [n.name for n in own if n.op_type in WEIGHTED and _is_other(values.get(n.input[1]))]:
        raise InvalidInput(f"The kernels of {', '.join(other[:4])} are not float32: give the float32 graph.")
    return found


def _standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the graph at `LEAST_OPSET` or later.

    Raises:
      InvalidInput: A node is not one of ONNX's own operators or holds a subgraph, or ONNX cannot convert the
        graph.
    """
    for node in model.graph.node:
        if node.domain not in STANDARD:
            raise InvalidInput(
                f"The node {node.name or node.output[0]!r} is a {node.domain}.{node.op_type}, which is not "
                "one of ONNX's own operators: give the float graph, before any vendor's tool has changed it."
            )
        if any(item.type in (item.GRAPH, item.GRAPHS) for item in node.attribute):
            raise InvalidInput(
                f"The node {node.name or node.output[0]!r} is a {node.op_type}, which holds a graph of its "
                "own: export the model without control flow."
            )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    imported = [item for item in model.opset_import if item.domain in STANDARD]
    del copy.opset_import[:]
    copy.opset_import.extend(imported)
    if not imported or imported[0].version >= LEAST_OPSET:
        return copy
    try:
        return version_converter.convert_version(copy, LEAST_OPSET)
    except RuntimeError as error:
        raise InvalidInput(
            f"The graph is of opset {imported[0].version} and cannot be restated at {LEAST_OPSET} ({error}): "
            "export it again at a later opset."
        ) from error


def _folded(nodes: list[NodeProto], values: dict[str, np.ndarray]) -> list[NodeProto]:
    """Drop the nodes that hold or rename a constant, and add these constants to `values`."""
    kept = []
    for node in nodes:
        given = {item.name: item for item in node.attribute}
        if node.op_type == "Constant" and "value" in given:
            values[node.output[0]] = numpy_helper.to_array(given["value"].t)
        elif node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        else:
            kept.append(node)
    return kept


def _named(nodes: list[NodeProto]) -> list[NodeProto]:
    """Return copies with unique names: the node's name if it is unique, else that of its first output."""
    count = Counter(node.name for node in nodes)
    taken = {name for name, number in count.items() if number == 1 and name}
    named: list[NodeProto] = []
    for node in nodes:
        copy = graph.rewired(node, node.input)
        if copy.name not in taken:
            copy.name = next(
                name
                for name in (node.output[0], f"{node.output[0]}/{node.op_type}", f"#{len(named)}")
                if name not in taken
            )
            taken.add(copy.name)
        named.append(copy)
    return named


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
    channels = kernel.shape[channel_axis(node, kernel.ndim)]
    if bias is None or bias.shape == (channels,) or bias.size not in (1, channels):
        return node
    inputs = list(node.input)
    inputs[2] = f"{inputs[2]}#of {node.name}"
    values[inputs[2]] = np.broadcast_to(bias.ravel(), (channels,)).copy()
    return graph.rewired(node, inputs)


def _is_other(kernel: np.ndarray | None) -> bool:
    return kernel is not None and kernel.dtype != np.float32
