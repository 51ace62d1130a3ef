"""The layers of a graph: its convolutions and matrix products with a kernel held in the graph."""

import dataclasses
import math

import numpy as np
import onnx

from qt_jax.export import graph
from qt_jax.export.integer_weights import channel_axis, weighted_nodes
from qt_jax.export.placement import ABSORBED, tensor_readers


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution or matrix product.

    Attributes:
      name: of its node, which in our exports is the Flax path.
      operator: such as "Conv".
      kernel, bias: names of its constants; no bias is "".
      source: the tensor it reads.
      output: the tensor it hands on, behind the Relu or Clip that alone reads its product, if one does.
      axis: of the output channels in the kernel.
    """

    name: str
    operator: str
    kernel: str
    bias: str
    source: str
    output: str
    axis: int


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    """The layers by name, in the order of the graph.

    >>> nodes = [
    ...     onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
    ...     onnx.helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ... ]
    >>> kernel = onnx.numpy_helper.from_array(np.ones((2, 1, 3, 3), np.float32), "w")
    >>> found = layers_of(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [kernel])))
    >>> found["conv"].output, found["conv"].axis
    ('z', 0)
    """
    values = graph.constants(model)
    outputs = layer_outputs(model)
    found = {}
    for name, node in weighted_nodes(model).items():
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in values else ""
        axis = channel_axis(node, values[node.input[1]].ndim)
        found[name] = Layer(name, node.op_type, node.input[1], bias, node.input[0], outputs[name], axis)
    return found


def layer_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Layer -> the tensor it hands on: that of the Relu or Clip which alone reads its output, if one does."""
    readers = tensor_readers(model)
    found = {}
    for node in weighted_nodes(model).values():
        name = node.output[0]
        while len(readers[name]) == 1 and readers[name][0].op_type in ABSORBED:
            name = readers[name][0].output[0]
        found[node.name] = name
    return found


def kernel_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Layer -> number of weights in its kernel."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return {name: sizes[node.input[1]] for name, node in weighted_nodes(model).items()}


def channels(kernel: np.ndarray, axis: int) -> np.ndarray:
    """The kernel as `(channels, weights of one channel)`."""
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1)
