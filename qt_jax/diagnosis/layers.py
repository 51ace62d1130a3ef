"""The layers of a graph: its convolutions and matrix products with a kernel held in the graph.

What a network's kernels and activations look like: tails, ranges, channels that never change.

A float graph that computes what a low-bit one would: rounded kernels, rounded inputs of layers.

Kernels are symmetric, s = max|w| / (2^(b-1) - 1), one scale a tensor or an output channel. A layer's input is
asymmetric over its range. The arithmetic between stays in float32, so that onnxruntime runs the graph at full
speed and any choice of layers, widths and ranges can be asked for. Sums and pooling are not requantized.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from qt_jax.export import graph
from qt_jax.export.kernels import channel_axis, weighted_nodes
from qt_jax.export.qdq import ABSORBED, tensor_readers
from qt_jax.export.sessions import named_inputs, run_tensors

Bounds = Mapping[str, tuple[float, float]]
"""Layer -> least and largest value of its input's grid."""


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


TAIL = 0.995
"""Quantile of |w| beyond which a weight belongs to the tail; at least one weight always does."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A layer's weights.

    Attributes:
      size: their number.
      largest: max|w|.
      tail: the quantile `TAIL` of |w|, that of the weights less the largest where there are few.
      rms: root mean square.
      channel_largest: max|w| of each output channel, float32 `(channels,)`.
      biased: whether the layer adds a bias held in the graph.
    """

    size: int
    largest: float
    tail: float
    rms: float
    channel_largest: np.ndarray
    biased: bool


@dataclasses.dataclass(frozen=True)
class Activation:
    """The input of a layer, and what the layer hands on.

    Attributes:
      low, high: least and largest value of the input.
      zeros: share of zeros in the input, in [0, 1].
      saturated: share of the input beyond the ends of its grid, in [0, 1]; None without a grid.
      output_low, output_high: of each channel of the output, float32 `(channels,)`.
    """

    low: float
    high: float
    zeros: float
    saturated: float | None
    output_low: np.ndarray
    output_high: np.ndarray

    @property
    def constant(self) -> np.ndarray:
        """The channels of the output that had one value on all inputs, as their indices."""
        return np.flatnonzero(self.output_low == self.output_high)


def kernels(model: onnx.ModelProto) -> dict[str, Kernel]:
    """Layer -> what its weights look like.

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
        largest = np.abs(channels(kernel, layer.axis)).max(axis=1)
        ends = float(magnitude[-1]), float(magnitude[place])
        found[name] = Kernel(kernel.size, *ends, rms, largest, bool(layer.bias))
    return found


def activations(model: onnx.ModelProto, images: np.ndarray, bounds: Bounds) -> dict[str, Activation]:
    """Layer -> what it reads and hands on, over all images, while the graph runs in float.

    Args:
      model: a float graph of one input.
      images: float32 `(n, ...)`, as the graph takes them.
      bounds: of the grids of layers' inputs; a layer may be absent.
    """
    layers = layers_of(model)
    inputs = named_inputs(model, images)
    given = set(inputs)
    watched = [name for layer in layers.values() for name in (layer.source, layer.output)]
    found: dict[str, list[Any]] = {}
    batches = run_tensors(model, watched, inputs, optimize=True)
    start = 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        batch |= {name: inputs[name][start : start + size] for name in given.intersection(watched)}
        start += size
        for name, layer in layers.items():
            seen = _seen(batch[layer.source], batch[layer.output], bounds.get(name), layer.operator)
            found[name] = seen if name not in found else _joined(found[name], seen)
    return {name: _activation(seen, name in bounds) for name, seen in found.items()}


def _seen(
    source: np.ndarray, output: np.ndarray, bounds: tuple[float, float] | None, operator: str
) -> list[Any]:
    """Least and largest input; counts of all, of zeros, of those beyond; least and largest by channel."""
    low, high = (-np.inf, np.inf) if bounds is None else bounds
    axis = 1 if operator in ("Conv", "ConvTranspose") else output.ndim - 1
    by_channel = np.moveaxis(output, axis, 0).reshape(output.shape[axis], -1)
    beyond = np.count_nonzero((source < low) | (source > high))
    counts = np.array([source.size, source.size - np.count_nonzero(source), beyond])
    return [source.min(), source.max(), counts, by_channel.min(axis=1), by_channel.max(axis=1)]


def _joined(one: list[Any], two: list[Any]) -> list[Any]:
    joins = (np.minimum, np.maximum, np.add, np.minimum, np.maximum)
    return [join(a, b) for join, a, b in zip(joins, one, two, strict=True)]


def _activation(seen: list[Any], has_grid: bool) -> Activation:
    low, high, (size, zeros, beyond), output_low, output_high = seen
    saturated = float(beyond / size) if has_grid else None
    return Activation(float(low), float(high), float(zeros / size), saturated, output_low, output_high)


def minmax(found: Mapping[str, Activation]) -> Bounds:
    """The ranges of layers' inputs as a minimum-maximum calibration has them."""
    return {name: (activation.low, activation.high) for name, activation in found.items()}
