"""Simulate low-bit layers in a float graph, and compare a low-bit graph with its float graph layer by layer.

A simulated graph rounds kernels and the inputs of layers. Kernels are symmetric, s = max|w| / (2^(b-1) - 1),
with one scale per tensor or per output channel. A layer's input is asymmetric over its range. The arithmetic
between stays in float32. So onnxruntime runs the graph at full speed, and any choice of layers, widths and
ranges can be simulated. Sums and pooling are not requantized.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import helper

from qt_jax.backends.protocol import Batch
from qt_jax.diagnosis.layers import InputBounds, layer_outputs, layers_of
from qt_jax.diagnosis.running import batch_size, tensors
from qt_jax.export import graph
from qt_jax.export.encodings import Encoding, activation_encoding, encode_by_magnitude, per_tensor
from qt_jax.grid import QuantSpec


@dataclasses.dataclass(frozen=True)
class Precision:
    """Give the bits of a layer's weights and of its input; None stands for floating point.

    >>> str(Precision(4, 8)), str(Precision(8, 16, per_channel=True)), str(Precision(None, None))
    ('w4a8 pt', 'w8a16 pc', 'float')
    """

    weights: int | None
    inputs: int | None
    per_channel: bool = False

    def __str__(self) -> str:
        if self.weights is None and self.inputs is None:
            return "float"
        bits = ("32" if width is None else width for width in (self.weights, self.inputs))
        return "w{}a{} {}".format(*bits, "pc" if self.per_channel else "pt")


FLOAT = Precision(None, None)

SIMULATED_SCHEMES = {
    "int8-pt": Precision(8, 8),
    "int8-pc": Precision(8, 8, per_channel=True),
    "int4w-pt": Precision(4, 8),
    "int4w-pc": Precision(4, 8, per_channel=True),
}
"""Precision of all layers: bits of the weights, with one scale per tensor (pt) or per channel (pc)."""

Ratios = dict[str, float | None]
"""Maps a layer to the SQNR of its output in dB; None where nothing differs."""


def kernel_encoding(
    kernel: np.ndarray, precision: Precision, axis: int, least: np.ndarray | float = 0.0
) -> Encoding:
    """Return the grid of a kernel whose output channels lie along `axis`; its scales are at least `least`.

    >>> kernel_encoding(np.float32([[7.0, 0.4], [3.6, -1.0]]), Precision(4, None), 0).scale
    (1.0,)
    """
    assert precision.weights is not None
    encoding = encode_by_magnitude(kernel, QuantSpec(precision.weights), axis, least)
    return encoding if precision.per_channel else per_tensor(encoding)


def rounded_kernel(kernel: np.ndarray, precision: Precision, axis: int) -> np.ndarray:
    """Round a kernel to its grid; the result is float32 in the kernel's shape.

    >>> rounded_kernel(np.float32([[7.0, 0.4], [3.6, -1.0]]), Precision(4, None), 0).tolist()
    [[7.0, 0.0], [4.0, -1.0]]
    """
    encoding = kernel_encoding(kernel, precision, axis)
    shape = [1] * kernel.ndim
    if encoding.axis is not None:
        shape[axis] = -1
    scale = np.asarray(encoding.scale, np.float64).reshape(shape)
    return (encoding.integers(kernel) * scale).astype(np.float32)


def simulated(
    model: onnx.ModelProto, precisions: Mapping[str, Precision], bounds: InputBounds
) -> onnx.ModelProto:
    """Return `model` with its layers rounded to `precisions`; layers that are left out stay in float.

    Args:
      model: Float graph.
      precisions: Maps a layer to its bits.
      bounds: Ends of the grids of those layers' inputs. A layer without bounds reads its input in float.
    """
    layers = layers_of(model)
    values = graph.constants(model)
    new_values = dict(values)
    nodes, rounded = [], {}
    for node in model.graph.node:
        precision = precisions.get(node.name, FLOAT)
        layer = layers.get(node.name)
        if layer is None or precision == FLOAT:
            nodes.append(node)
            continue
        inputs = list(node.input)
        if precision.weights is not None:
            inputs[1] = f"{node.name}/rounded kernel"
            new_values[inputs[1]] = rounded_kernel(values[layer.kernel], precision, layer.axis)
        if precision.inputs is not None and node.name in bounds:
            key = layer.source, precision.inputs, bounds[node.name]
            if key not in rounded:
                steps, constants, rounded[key] = _rounding(node.name, *key)
                nodes += steps
                new_values |= constants
            inputs[0] = rounded[key]
        nodes.append(graph.rewired(node, inputs))
    return graph.rebuild(model, nodes, new_values)


def _rounding(
    layer: str, tensor: str, bits: int, bounds: tuple[float, float]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]:
    """Round a tensor: clip it to the grid's ends, divide by the step, round, and multiply by the step.

    Returns:
      The nodes, their constants by name, and the name of the result.
    """
    spec = QuantSpec(bits, symmetric=False)
    encoding = activation_encoding(*bounds, spec, "calibrated")
    [scale], [zero_point] = encoding.scale, encoding.zero_point
    base = f"{layer}/input on {bits} bits"
    names = {part: f"{base}/{part}" for part in ("low", "high", "inverse", "scale")}
    ends = ((end - zero_point) * scale for end in (encoding.q_min, encoding.q_max))
    numbers = map(np.float32, (*ends, 1.0 / scale, scale))
    chain = [
        ("Clip", [tensor, names["low"], names["high"]], f"{base}/clipped"),
        ("Mul", [f"{base}/clipped", names["inverse"]], f"{base}/steps"),
        ("Round", [f"{base}/steps"], f"{base}/integers"),
        ("Mul", [f"{base}/integers", names["scale"]], f"{base}/rounded"),
    ]
    nodes = [helper.make_node(kind, inputs, [out], name=out) for kind, inputs, out in chain]
    return nodes, dict(zip(names.values(), map(np.asarray, numbers), strict=True)), f"{base}/rounded"


def everywhere(layers: Iterable[str], precision: Precision) -> dict[str, Precision]:
    """Give all `layers` the same precision."""
    return dict.fromkeys(layers, precision)


def compare(
    model: onnx.ModelProto, deployed: Mapping[str, onnx.ModelProto], samples: Batch
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Ratios]]:
    """Run the float graph and its deployments, and measure the noise behind each layer.

    Args:
      model: Float graph.
      deployed: Maps a name to a low-bit graph, as `layer_ratios` takes it.
      samples: Arrays `(n, ...)` by input, or the array of the only input.

    Returns:
      The logits of the float graph, which are its first output; the logits of each deployment; and the SQNR
      in dB by deployment and layer, as `layer_ratios` gives it.
    """
    sums = _NoiseSums(model, deployed)
    reference: list[np.ndarray] = []
    logits: dict[str, list[np.ndarray]] = {name: [] for name in deployed}
    for mine, others in sums.batches(samples):
        reference.append(mine[model.graph.output[0].name])
        for name, other in others.items():
            logits[name].append(other[deployed[name].graph.output[0].name])
    found = {name: np.concatenate(parts) for name, parts in logits.items()}
    return np.concatenate(reference), found, sums.ratios()


def layer_ratios(
    model: onnx.ModelProto, deployed: Mapping[str, onnx.ModelProto], samples: Batch
) -> dict[str, Ratios]:
    """Measure the noise behind each layer of the deployments of a float graph.

    The SQNR of a layer's output is 10 log10(sum x^2 / sum (x - x_hat)^2) over all samples. Here x is the
    float graph's tensor, and x_hat is what the next layer of the deployment reads. The SQNR is None where the
    two are equal. A layer whose output the quantizer has removed from the graph is left out.

    Args:
      model: Float graph.
      deployed: Maps a name to a low-bit graph. Its tensors have the same names as in `model`, or those that
        onnxruntime gives to dequantized tensors.
      samples: Arrays `(n, ...)` by input, or the array of the only input.

    Returns:
      The SQNR in dB by deployment and layer.
    """
    sums = _NoiseSums(model, deployed)
    for _ in sums.batches(samples):
        pass
    return sums.ratios()


class _NoiseSums:
    """Add up signal and noise behind each layer while a float graph and its deployments run side by side."""

    def __init__(self, model: onnx.ModelProto, deployed: Mapping[str, onnx.ModelProto]):
        self.model, self.deployed = model, deployed
        self.own = layer_outputs(model)
        self.outputs = {name: _found(self.own, other) for name, other in deployed.items()}
        self.sums = {name: {layer: np.zeros(2) for layer in self.outputs[name]} for name in deployed}

    def batches(
        self, samples: Batch
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]]:
        """Run all graphs on the samples; yield the tensors of the float graph and of each deployment."""
        names = [self.model.graph.output[0].name, *self.own.values()]
        size = batch_size(self.model, names)
        ours = tensors(self.model, names, samples, optimize=True, size=size)
        theirs = [
            tensors(other, [other.graph.output[0].name, *self.outputs[name].values()], samples, size=size)
            for name, other in self.deployed.items()
        ]
        for mine, *others in zip(ours, *theirs, strict=True):
            by_name = dict(zip(self.deployed, others, strict=True))
            for name, other in by_name.items():
                self._add(name, mine, other)
            yield mine, by_name

    def _add(self, name: str, mine: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
        for layer, tensor in self.outputs[name].items():
            x = mine[self.own[layer]].ravel()
            error = x - other[tensor].ravel()
            self.sums[name][layer] += np.vdot(x, x), np.vdot(error, error)

    def ratios(self) -> dict[str, Ratios]:
        """Return the SQNR in dB by deployment and layer."""
        return {
            name: {
                layer: 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
                for layer, (signal, noise) in found.items()
            }
            for name, found in self.sums.items()
        }


def _found(outputs: Mapping[str, str], deployed: onnx.ModelProto) -> dict[str, str]:
    """Return, for each layer, the tensor of a deployed graph that stands for its output in `outputs`."""
    made = {name for node in deployed.graph.node for name in node.output}
    found = {}
    for layer, name in outputs.items():
        dequantized = f"{name}_DequantizeLinear_Output"
        if dequantized in made or name in made:
            found[layer] = dequantized if dequantized in made else name
    return found
