"""Read from `batch_stats` the grids that training has learned, for the layers of an exported graph.

`learned_layers` tells which layer of the model each node computes, and which step of it where nn.scan or
nn.RNN repeats it. `learned_encodings` reads the grids of its kernel and of its input.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from flax.traverse_util import flatten_dict
from onnx import NodeProto

from qt_jax.config import QuantConfig, Sites
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import (
    Encoding,
    activation_encoding,
    encode_by_magnitude,
    encode_learned,
    kernel_rows,
    least_scale,
    per_tensor,
)
from qt_jax.export.naming import folded_inputs, kernel_origins
from qt_jax.export.operators import BIASED, channel_axis, weighted_nodes
from qt_jax.grid import QuantSpec, quantization_parameters
from qt_jax.interception import COLLECTION, GAIN, INPUT, KERNEL, OUTPUT

SAME = 1e-4
"""Largest relative difference of two gains that rounding explains."""

ROUNDING = 1e-6
"""Largest relative difference of two weights that rounding to float32 explains."""

FLOAT = Sites(None, None, None)
"""The sites of a layer in floating point."""


@dataclasses.dataclass(frozen=True)
class LearnedLayer:
    """Tell which layer of the model a node of the graph computes.

    Attributes:
      path: Path of the module; "" is the model itself.
      kernel: Path of its kernel in `params`.
      steps: Index of its ranges in the statistics: () of a layer that is called by itself, the step of
        nn.scan or nn.RNN of one that these repeat. None where the graph does not tell the step.
      shared: Whether all steps have one kernel, as in nn.RNN.
      gain: What the kernel was multiplied by, as `naming.KernelOrigin` has it.
    """

    path: str
    kernel: str
    steps: tuple[int, ...] | None
    shared: bool
    gain: np.ndarray | None

    def statistic(self, *names: str) -> str:
        """Return the path of one of its statistics."""
        return "/".join((self.path, *names) if self.path else names)


def learned_layers(model: onnx.ModelProto, variables: Mapping[str, Any]) -> dict[str, LearnedLayer]:
    """Tell for each node whose kernel stems from a leaf, by name, which layer it computes.

    Args:
      model: Graph from `to_onnx`.
      variables: Variables with Quant-Trim's statistics, of which only the shapes are read.
    """
    statistics = flatten_dict(dict(variables.get(COLLECTION, {})), sep="/")
    origins = kernel_origins(model)
    found: dict[str, LearnedLayer] = {}
    repeated: dict[str, list[str]] = defaultdict(list)
    for name, node in weighted_nodes(model).items():
        origin = origins.get(node.input[1])
        if origin is None:
            continue
        layer = LearnedLayer(origin.path.rpartition("/")[0], origin.path, origin.steps, False, origin.gain)
        lengths = _lengths(layer, statistics)
        if lengths is None or len(lengths) == len(origin.steps):
            found[name] = layer
        elif not lengths:  # the layer itself takes a part of its leaf
            found[name] = dataclasses.replace(layer, steps=(), gain=None)
        elif len(lengths) == 1:
            found[name] = dataclasses.replace(layer, shared=True)
            repeated[layer.path].append(name)
        else:
            found[name] = dataclasses.replace(layer, steps=None)
    for path, names in repeated.items():
        (length,) = _lengths(found[names[0]], statistics) or ()
        beside = [other for other in repeated if other.rpartition("/")[0] == path.rpartition("/")[0]]
        all_steps = any(len(repeated[other]) == length for other in beside)
        steps = _numbered(model, names, length, all_steps)
        for name, step in zip(names, steps, strict=True):
            found[name] = dataclasses.replace(found[name], steps=step)
    return found


def _lengths(layer: LearnedLayer, statistics: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return for how many steps a layer has ranges: () for one range, None where it has learned none."""
    counts = [statistics.get(layer.statistic(site, "count")) for site in (KERNEL, INPUT, OUTPUT)]
    return next((np.shape(count) for count in counts if count is not None), None)


def _numbered(
    model: onnx.ModelProto, names: Sequence[str], length: int, all_steps: bool
) -> Sequence[tuple[int, ...] | None]:
    """Return the steps of the nodes `names`, which read one kernel, in the order of the graph.

    The first step of a recurrent layer is absent where the state begins as a constant: its product was
    computed at export. The nodes are then a chain, and a layer beside theirs has a node for each step.

    Args:
      model: The graph, whose nodes are in the order in which the steps ran.
      names: Names of nodes.
      length: Number of steps.
      all_steps: Whether this layer or one beside it has a node for each step.
    """
    if len(names) == length:
        return [(step,) for step in range(length)]
    if len(names) == length - 1 and all_steps and _is_chain(model, names):
        return [(step,) for step in range(1, length)]
    return [None] * len(names)


def _is_chain(model: onnx.ModelProto, names: Sequence[str]) -> bool:
    """Tell whether each of the nodes `names` depends on the one before it."""
    reached: dict[str, set[str]] = defaultdict(set)
    chain = set(names)
    for node in model.graph.node:
        before = set().union(*(reached[name] for name in node.input))
        position = names.index(node.name) if node.name in chain else 0
        if position and names[position - 1] not in before:
            return False
        for output in node.output:
            reached[output] = before | ({node.name} & chain)
    return True


def learned_encodings(
    model: onnx.ModelProto, variables: Mapping[str, Any], config: QuantConfig
) -> tuple[dict[str, Encoding], dict[str, Encoding], dict[str, str]]:
    """Read from `batch_stats` the grids of a graph's kernels and of its layers' inputs.

    A layer that has no statistics, because the interceptor does not reach it, is float here as it is in JAX.

    Args:
      model: Graph from `to_onnx`.
      variables: Variables as given to `to_onnx`, with Quant-Trim's statistics in `batch_stats`.
      config: Config of training, or of the deployment (`qt_jax.export.integers.deployed_config`).

    Returns:
      (kernels, inputs, quantized): the encoding of every kernel by initializer, that of the input of every
      quantized layer by node, and the initializer of every quantized kernel by node. A kernel is ranged by
      its own magnitude where its layer is float, or where it is not its leaf of `params` with each output
      channel multiplied by one number, because the layer transforms its parameter.

    Raises:
      InvalidInput: As `qt_jax.export.ranges.tensor_ranges`.
    """
    values, layers, weighted = graph.constants(model), learned_layers(model, variables), weighted_nodes(model)
    statistics = flatten_dict(dict(variables.get(COLLECTION, {})), sep="/")
    leaves = flatten_dict(dict(variables.get("params", {})), sep="/")
    learned = {name for name, layer in layers.items() if _lengths(layer, statistics) is not None}
    sites = {name: _sites(config, layers[name]) if name in learned else FLOAT for name in weighted}
    _refuse_folded_inputs(model, {name: layers[name] for name in learned}, sites)
    inputs: dict[str, Encoding] = {}
    least: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(()))
    for name, node in weighted.items():
        spec = sites[name].inputs
        if spec is not None:
            low, high = _range(statistics, layers[name], INPUT, spec)
            inputs[name] = activation_encoding(low, high, spec, "learned")
            if node.op_type in BIASED and node.input[2:] and node.input[2] in values:
                bound = least_scale(values[node.input[2]], inputs[name].scale[0])
                least[node.input[1]] = np.maximum(least[node.input[1]], bound)
    kernels: dict[str, Encoding] = {}
    for name, node in weighted.items():
        kernel, spec = node.input[1], sites[name].weights
        found = None
        if spec is not None:
            layer = layers[name]
            scale = _scale(statistics, layer, spec)
            trained = statistics.get(layer.statistic(GAIN)) if config.folded else None
            found = _learned(node, values[kernel], layer, scale, trained, leaves.get(layer.kernel))
        axis, spec = channel_axis(node, values[kernel].ndim), spec or config.weights or QuantSpec()
        if found is None:
            encoding = encode_by_magnitude(values[kernel], spec, axis, least[kernel])
        else:
            encoding = encode_learned(*found, spec, axis, least[kernel])
        batched = node.op_type == "MatMul" and values[kernel].ndim > 2  # runtimes have one scale for those
        one = batched and (found is None or len(set(encoding.scale)) == 1)
        kernels[kernel] = per_tensor(encoding) if one else encoding
    quantized = {name: node.input[1] for name, node in weighted.items() if sites[name].weights is not None}
    if not inputs and not quantized:
        raise InvalidInput(
            "no layer of this graph has learned ranges: give the variables of a Quant-Trim checkpoint, with "
            f"its {COLLECTION!r}, the config it was trained with, and the graph as to_onnx returned it"
        )
    return kernels, inputs, quantized


def _refuse_folded_inputs(
    model: onnx.ModelProto, layers: Mapping[str, LearnedLayer], sites: Mapping[str, Sites]
) -> None:
    """Refuse a graph in which a quantized layer does not read the tensor whose range it has learned."""
    folded = folded_inputs(model)
    for name, layer in layers.items():
        quantized = sites[name].inputs is not None or sites[name].weights is not None
        if quantized and layer.kernel in folded:
            raise InvalidInput(
                f"{layer.path!r} does not read what it has learned the range of: the graph was exported "
                "without the ranges, and what stood before this layer was folded into it. Export it from the "
                "variables that hold the ranges"
            )


def _sites(config: QuantConfig, layer: LearnedLayer) -> Sites:
    """Return the sites of a layer that has statistics, checked."""
    sites = config.sites(layer.path)
    if sites.outputs is not None:
        raise InvalidInput(
            f"{layer.path!r} has an output site, and folding batch norm leaves no such tensor: ranges are "
            "exported for inputs and weights. Give a config with outputs=None."
        )
    if layer.steps is None and (sites.weights is not None or sites.inputs is not None):
        raise InvalidInput(
            f"{layer.path!r} has learned a range for each step of nn.scan or copy of nn.vmap, and the graph "
            "does not tell which of its products belongs to which: leave the layer in floating point with "
            f"qt.Rule({layer.path!r}, skip=True)"
        )
    return sites


def _range(
    statistics: Mapping[str, Any], layer: LearnedLayer, site: str, spec: QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Return the learned low and high ends of a site, checked."""
    where = layer.statistic(site)
    if f"{where}/count" not in statistics or not int(statistics[f"{where}/count"][layer.steps]):
        raise InvalidInput(
            f"{where!r} has seen no batch: run training steps with quant_trim(..., train=True), "
            f"or leave the site out with qt.Rule({layer.path!r}, ...)"
        )
    low, high = (np.asarray(statistics[f"{where}/{end}"])[layer.steps] for end in ("low", "high"))
    if low.ndim > (spec.axis is not None):
        raise InvalidInput(
            f"{where!r} has ranges of shape {low.shape}, and the config has axis {spec.axis}: give the "
            "config of training"
        )
    if not np.all(np.isfinite(low) & np.isfinite(high)):
        raise InvalidInput(f"{where!r} holds a range that is not finite: training diverged")
    return low, high


def _scale(statistics: Mapping[str, Any], layer: LearnedLayer, spec: QuantSpec) -> np.ndarray:
    """Return the scale of the raw kernel, float32 `()` or `(channels,)`."""
    if not spec.symmetric or spec.axis not in (None, -1):
        scheme = "symmetric" if spec.symmetric else "asymmetric"
        raise InvalidInput(
            f"the weights of {layer.path!r} are {scheme} along axis {spec.axis}: QDQ export takes symmetric "
            "weights, per tensor or along the last axis (-1)"
        )
    ends = _range(statistics, layer, KERNEL, spec)
    for end, value in zip(("low", "high"), ends, strict=True):
        if layer.shared and np.any(np.asarray(statistics[layer.statistic(KERNEL, end)]) != value):
            raise InvalidInput(
                f"the kernel of {layer.path!r} is one for all steps, and has learned other ranges in other "
                f"steps: leave the layer in floating point with qt.Rule({layer.path!r}, skip=True)"
            )
    return np.asarray(quantization_parameters(*ends, spec)[0])


def _learned(
    node: NodeProto,
    kernel: np.ndarray,
    layer: LearnedLayer,
    scale: np.ndarray,
    trained: Any,
    leaf: Any,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the scale of the kernel in training, and the gain of each output channel since then.

    Args:
      node: Reads the kernel.
      kernel: Kernel of the graph.
      layer: Its layer.
      scale: Scale of the raw kernel, `()` or `(channels,)`.
      trained: Gain with which training folded the raw kernel; None where it did not. Where the exporter has
        folded by the same gain the answer is exactly 1, so that one scale for the tensor stays one.
      leaf: The leaf of `params`, or None.

    Returns:
      (scale, gains), gains float64 `(channels,)`; None where the kernel is not the leaf with each output
      channel multiplied by one number, or has its output channels along another axis than the scales.
    """
    axis = channel_axis(node, kernel.ndim)
    channels = kernel.shape[axis]
    if layer.gain is None or layer.gain.size not in (1, channels) or channels % scale.size:
        return None
    gains = np.broadcast_to(layer.gain, (channels,))
    if scale.size > 1 and (leaf is None or not _by_channel(node, kernel, np.asarray(leaf), layer, gains)):
        return None
    if trained is None:
        return scale, gains
    folded = np.ravel(np.asarray(trained)[layer.steps]).astype(np.float64)
    if channels % folded.size:
        return None
    folded = np.tile(folded, channels // folded.size)
    ratio = np.where(folded == 0, 1.0, gains / np.where(folded == 0, 1.0, folded))
    return scale, np.where(np.abs(ratio - 1.0) < SAME, 1.0, ratio)


def _by_channel(
    node: NodeProto, kernel: np.ndarray, leaf: np.ndarray, layer: LearnedLayer, gains: np.ndarray
) -> bool:
    """Tell whether each output channel of a kernel holds the weights of one feature of its leaf.

    The features are the last axes of the leaf, or the last but one of a transposed convolution. The layout
    within a channel does not matter, and a stacked leaf may have its steps along any axis.
    """
    rows = np.sort(kernel_rows(kernel, channel_axis(node, kernel.ndim)), axis=1)
    parts = [leaf]
    for step in () if layer.shared else layer.steps or ():
        parts = [
            np.take(part, step, axis) for part in parts for axis, size in enumerate(part.shape) if step < size
        ]
    if node.op_type in ("Conv", "ConvTranspose"):
        parts += [part.swapaxes(-1, -2) for part in parts if part.ndim > 2]
    return any(
        np.allclose(rows, np.sort(part.reshape(-1, len(rows)).T * gains[:, None], axis=1), ROUNDING, 0.0)
        for part in parts
        if part.size == rows.size
    )
