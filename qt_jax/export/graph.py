"""Reading an ONNX graph and rebuilding it: what every pass of this package is written with.

Constants carry their origin in their name: `params/stem/kernel` is a leaf of the variables, and whatever a
pass computes from it is called `params/stem/kernel#<how>`, so that `naming` can still see the Flax path.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper, shape_inference


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes that `node` states, by name."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def uses(model: onnx.ModelProto) -> Counter[str]:
    """How often each tensor is read, by nodes and as a graph output."""
    read = [name for node in model.graph.node for name in node.input]
    return Counter(read + [output.name for output in model.graph.output])


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The inferred shape of each tensor, 0 for a symbolic dimension; tensors of unknown rank are left out."""
    inferred = shape_inference.infer_shapes(model).graph
    return {
        entry.name: tuple(dimension.dim_value for dimension in entry.type.tensor_type.shape.dim)
        for entry in (*inferred.input, *inferred.value_info, *inferred.output)
        if entry.type.tensor_type.HasField("shape")
    }


def derived(name: str, how: str) -> str:
    """The name of a constant computed from the constant `name`."""
    return f"{name}#{how}"


def origin(name: str) -> str:
    """The leaf of the variables (`params/stem/kernel`) from which the constant `name` was computed.

    >>> origin(derived("params/stem/kernel", "Transpose_1"))
    'params/stem/kernel'
    """
    return name.partition("#")[0]


def flax_path(name: str) -> str:
    """The path in its collection of the leaf from which the constant `name` stems; "" for any other constant.

    >>> flax_path("params/stem/kernel#Transpose_1")
    'stem/kernel'
    """
    return origin(name).partition("/")[2]


def rewired(node: NodeProto, inputs: Iterable[str], outputs: Iterable[str] | None = None) -> NodeProto:
    """A copy of `node` that reads `inputs` and, where given, writes `outputs`."""
    copy = NodeProto()
    copy.CopyFrom(node)
    del copy.input[:]
    copy.input.extend(inputs)
    if outputs is not None:
        del copy.output[:]
        copy.output.extend(outputs)
    return copy


def rebuild(
    model: onnx.ModelProto, nodes: Iterable[NodeProto], values: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    """`model` with other nodes and constants.

    Nodes that no output depends on, constants that no node reads, inputs that have become constants and
    every recorded intermediate shape are left out.

    Args:
      model: gives inputs, outputs and opset.
      nodes: in topological order.
      values: the constants by name; those that no node reads are dropped.
    """
    needed = {output.name for output in model.graph.output}
    live: list[NodeProto] = []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            live.append(node)
            needed.update(node.input)
    graph = helper.make_graph(
        live[::-1],
        "main_graph",
        [entry for entry in model.graph.input if entry.name not in values],
        list(model.graph.output),
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in needed],
    )
    opset = list(model.opset_import)
    return helper.make_model(
        graph, producer_name="qt_jax", opset_imports=opset, ir_version=helper.find_min_ir_version_for(opset)
    )
