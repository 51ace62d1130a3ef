"""Find the layers of a graph, and measure their kernels and activations.

A layer is a convolution or a matrix product whose kernel is held in the graph, in float32. Of its kernel and
activations the diagnosis looks at tails, ranges, and channels that never change. Products of two activations
and recurrent cells are no layers: they stay in floating point (`unrounded`).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from qt_jax.backends.protocol import Batch
from qt_jax.diagnosis.running import tensors
from qt_jax.export import graph
from qt_jax.export.encodings import kernel_rows
from qt_jax.export.operators import WEIGHTED, channel_axis, weighted_nodes
from qt_jax.export.qdq import ABSORBED

InputBounds = Mapping[str, tuple[float, float]]
"""Maps a layer to the least and the largest value of its input's grid."""

PRODUCTS = WEIGHTED | {"Einsum", "GRU", "LSTM", "RNN"}
"""Operators that multiply and add up."""

TAIL = 0.995
"""Quantile of |w| beyond which a weight belongs to the tail. At least one weight always does."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Describe one convolution or matrix product.

    Attributes:
      name: Name of its node. In our exports this is the Flax path.
      operator: ONNX operator, such as "Conv".
      kernel, bias: Names of its constants. The bias is "" where there is none.
      source: Tensor that the layer reads.
      output: Tensor that the layer passes on. Where only a Relu or Clip reads the product, it is the output
        of that Relu or Clip.
      axis: Axis of the output channels in the kernel.
    """

    name: str
    operator: str
    kernel: str
    bias: str
    source: str
    output: str
    axis: int


def layers_of(model: onnx.ModelProto) -> dict[str, Layer]:
    """Return the layers by name, in the order of the graph.

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
    for name, node in _layer_nodes(model).items():
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in values else ""
        axis = channel_axis(node, values[node.input[1]].ndim)
        found[name] = Layer(name, node.op_type, node.input[1], bias, node.input[0], outputs[name], axis)
    return found


def layer_outputs(model: onnx.ModelProto) -> dict[str, str]:
    """Return, for each layer, the tensor that it passes on, as `Layer.output` defines it."""
    readers = graph.readers(model)
    found = {}
    for node in _layer_nodes(model).values():
        name = node.output[0]
        while len(readers[name]) == 1 and readers[name][0].op_type in ABSORBED:
            name = readers[name][0].output[0]
        found[node.name] = name
    return found


def kernel_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Return, for each layer, the number of weights in its kernel."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    return {name: sizes[node.input[1]] for name, node in _layer_nodes(model).items()}


def unrounded(model: onnx.ModelProto) -> dict[str, int]:
    """Count the operators that multiply and are no layers, the most frequent first.

    >>> product = onnx.helper.make_node("MatMul", ["x", "y"], ["z"])
    >>> unrounded(onnx.helper.make_model(onnx.helper.make_graph([product], "g", [], [])))
    {'MatMul': 1}
    """
    layers = _layer_nodes(model)
    others = [node.op_type for node in model.graph.node if node.name not in layers]
    return dict(Counter(kind for kind in others if kind in PRODUCTS).most_common())


def _layer_nodes(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the nodes of the layers by name."""
    kernels = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1 and all(tensor.dims)
    }
    return {name: node for name, node in weighted_nodes(model).items() if node.input[1] in kernels}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Summarize a layer's weights.

    Attributes:
      size: Number of weights.
      largest: max|w|.
      tail: Quantile `TAIL` of |w|. Where there are few weights, the quantile of all but the largest.
      rms: Root mean square.
      channel_largest: max|w| of each output channel, float32 `(channels,)`.
      biased: True if the layer adds a bias that is held in the graph.
    """

    size: int
    largest: float
    tail: float
    rms: float
    channel_largest: np.ndarray
    biased: bool


@dataclasses.dataclass(frozen=True)
class Activation:
    """Summarize the input and the output of a layer.

    Attributes:
      low, high: Least and largest value of the input.
      zeros: Share of zeros in the input, in [0, 1].
      saturated: Share of the input beyond the ends of its grid, in [0, 1]. None without a grid.
      output_low, output_high: Least and largest value of each channel of the output, float32 `(channels,)`.
    """

    low: float
    high: float
    zeros: float
    saturated: float | None
    output_low: np.ndarray
    output_high: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """Return the indices of the output channels that had one value on all inputs."""
        return np.flatnonzero(self.output_low == self.output_high)


def kernels(model: onnx.ModelProto) -> dict[str, Kernel]:
    """Summarize the weights of each layer.

    >>> nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], name="head")]
    >>> weights = onnx.numpy_helper.from_array(np.float32([[1.0, -2.0], [0.5, 30.0]]), "w")
    >>> model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [weights]))
    >>> kernel = kernels(model)["head"]
    >>> kernel.largest, kernel.tail
    (30.0, 2.0)
    """
    values = graph.constants(model)
    found = {}
    for name, layer in layers_of(model).items():
        kernel = values[layer.kernel]
        magnitude = np.sort(np.abs(kernel), axis=None)
        place = max(min(int(np.ceil(TAIL * kernel.size)), kernel.size - 1) - 1, 0)
        rms = float(np.sqrt(np.mean(np.square(kernel, dtype=np.float64))))
        largest = np.abs(kernel_rows(kernel, layer.axis)).max(axis=1)
        ends = float(magnitude[-1]), float(magnitude[place])
        found[name] = Kernel(kernel.size, *ends, rms, largest, bool(layer.bias))
    return found


def activations(model: onnx.ModelProto, samples: Batch, bounds: InputBounds) -> dict[str, Activation]:
    """Summarize what each layer reads and passes on over all samples, while the graph runs in float.

    Args:
      model: Float graph.
      samples: Arrays `(n, ...)` by input, or the array of the only input.
      bounds: Ends of the grids of layers' inputs. A layer may be absent.
    """
    layers = layers_of(model)
    names = [name for layer in layers.values() for name in (layer.source, layer.output)]
    found: dict[str, list[Any]] = {}
    for batch in tensors(model, names, samples, optimize=True):
        for name, layer in layers.items():
            seen = _seen(batch[layer.source], batch[layer.output], bounds.get(name), layer.operator)
            found[name] = seen if name not in found else _joined(found[name], seen)
    return {name: _activation(seen, name in bounds) for name, seen in found.items()}


def _seen(
    source: np.ndarray, output: np.ndarray, bounds: tuple[float, float] | None, operator: str
) -> list[Any]:
    """Return the statistics of one batch, in an order that `_joined` can merge.

    These are the least and the largest input; the counts of all inputs, of zeros and of those beyond the
    bounds; and the least and the largest output by channel.
    """
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    axis = 1 if operator in ("Conv", "ConvTranspose") else output.ndim - 1
    by_channel = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1)
    beyond = np.count_nonzero((source < low) | (source > high))
    counts = np.array([source.size, source.size - np.count_nonzero(source), beyond])
    ends = np.min(source, initial=np.inf), np.max(source, initial=-np.inf)
    return [*ends, counts, by_channel.min(1, initial=np.inf), by_channel.max(1, initial=-np.inf)]


def _joined(one: list[Any], two: list[Any]) -> list[Any]:
    joins = (np.minimum, np.maximum, np.add, np.minimum, np.maximum)
    return [join(a, b) for join, a, b in zip(joins, one, two, strict=True)]


def _activation(seen: list[Any], has_grid: bool) -> Activation:
    low, high, (size, zeros, beyond), output_low, output_high = seen
    saturated = float(beyond / max(size, 1)) if has_grid else None
    share = float(zeros / max(size, 1))
    return Activation(float(low), float(high), share, saturated, output_low, output_high)


def minmax(found: Mapping[str, Activation]) -> InputBounds:
    """Return the ranges of layers' inputs that a minimum-maximum calibration gives.

    A layer whose input has no finite range, such as scores masked with minus infinity, is left out.
    """
    ends = {name: (activation.low, activation.high) for name, activation in found.items()}
    return {name: pair for name, pair in ends.items() if np.all(np.isfinite(pair))}
