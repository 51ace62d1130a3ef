"""What a network's kernels and activations look like: tails, ranges, channels that never change."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from qt_jax.diagnosis.layers import channels, layers_of
from qt_jax.diagnosis.simulation import Bounds
from qt_jax.export import graph
from qt_jax.export.sessions import named_inputs, run_tensors

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
