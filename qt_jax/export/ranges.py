"""Give every tensor of an exported graph a grid: from Quant-Trim's statistics, else by calibration.

`learned_encodings` reads the statistics of each layer's input and kernel. `tensor_ranges` adds the
activations that no statistics describe, by running the graph on real inputs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from flax.traverse_util import flatten_dict
from onnx import NodeProto, TensorProto

from qt_jax.config import QuantConfig, Sites
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import (
    Encoding,
    Ranges,
    activation_encoding,
    encode_by_magnitude,
    encode_learned,
    kernel_rows,
    least_scale,
    model_sha256,
    per_tensor,
)
from qt_jax.export.naming import leaf_of
from qt_jax.export.operators import channel_axis, weighted_nodes
from qt_jax.export.qdq import insert_qdq, quantized_tensors, same_grid_groups
from qt_jax.export.sessions import named_inputs, run_tensors
from qt_jax.grid import QuantSpec, quantization_parameters
from qt_jax.interception import COLLECTION, GAIN, INPUT, KERNEL, OUTPUT

FIT = 1e-5
"""Largest relative residual of a channel that is called a multiple of another: float32 rounding only."""

SAME = 1e-4
"""Largest relative difference of two gains that rounding explains."""


def tensor_ranges(
    model: onnx.ModelProto,
    variables: Mapping[str, Any],
    config: QuantConfig,
    calibration: np.ndarray | Mapping[str, np.ndarray],
    *,
    per_channel: bool = True,
) -> Ranges:
    """Set the grid of each float activation and of each kernel of a graph.

    The input and the kernel of every layer that `config` quantizes have learned grids. On these the integers
    are those of the JAX forward at lambda = 1, in a folded kernel too (`encodings.encode_learned`). Every
    activation that anything but quantized layers reads is calibrated by its minimum and maximum, while the
    learned grids are in force. A quantile would not do, because a shortcut holds numbers that the layer
    beside it clips.

    Args:
      model: Graph from `to_onnx`.
      variables: Variables as given to `to_onnx`, with Quant-Trim's statistics in `batch_stats`.
      config: Config of training, or of the deployment (`qt_jax.export.deploy.deployed_config`).
      calibration: Real inputs as the graph takes them, float32 `(n, ...)`, images NCHW; by name where the
        graph has several. A few hundred will do.
      per_channel: Whether each output channel of a kernel has its own scale. Otherwise a kernel has one
        scale, the largest. The integers are then not those of training where a batch norm was folded.

    Raises:
      InvalidInput: There are no statistics, or a site has seen no batch. A spec is one that QDQ cannot
        express (asymmetric weights, activations per channel or on other than 8 or 16 bits, output sites).
        There are no calibration inputs. A tensor has no finite range.

    >>> import flax.linen as nn, jax
    >>> import qt_jax as qt
    >>> from qt_jax.export import to_onnx
    >>> net, x = nn.Dense(2), np.float32([[-1.0, 0.0, 3.0], [0.5, 1.0, 2.0]])
    >>> variables = qt.attach_statistics(net, net.init(jax.random.key(0), x), QuantConfig(), x)
    >>> with qt.quant_trim(QuantConfig(), 0.0, train=True):
    ...     _, seen = net.apply(variables, x, mutable=["batch_stats"])
    >>> ranges = tensor_ranges(to_onnx(net.apply, variables, (3,)), variables | seen, QuantConfig(), x)
    >>> {name: encoding.source for name, encoding in ranges.tensors.items()}
    {'input': 'learned', 'logits': 'calibrated', 'kernel': 'learned'}
    """
    kernels, inputs, quantized = learned_encodings(model, variables, config)
    if not per_channel:
        kernels = {name: per_tensor(encoding) for name, encoding in kernels.items()}
    opset = model.opset_import[0].version
    ranges = Ranges(model_sha256(model), opset, kernels, inputs, quantized)
    observed = insert_qdq(model, ranges, learned_only=True)
    extremes = _extremes(observed, float_activations(model), calibration)
    spec = dataclasses.replace(config.activations or QuantSpec(), symmetric=False, narrow_range=None)
    activations = _activations(model, ranges, extremes, spec)
    ranges = dataclasses.replace(ranges, tensors=activations | kernels)
    check_complete(model, ranges)
    return ranges


def float_activations(model: onnx.ModelProto) -> list[str]:
    """List the float32 graph inputs and node outputs of a graph with inferred shapes, in graph order."""
    entries = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {entry.name for entry in entries if entry.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = [name for node in model.graph.node for name in node.output]
    return [name for name in (*(entry.name for entry in model.graph.input), *made) if name in floats]


def check_complete(model: onnx.ModelProto, ranges: Ranges) -> None:
    """Check that every float activation and kernel of `model` has a range.

    Raises:
      InvalidInput: Some have none. The message names them.
    """
    kernels = [node.input[1] for node in weighted_nodes(model).values()]
    missing = [name for name in (*float_activations(model), *kernels) if name not in ranges.tensors]
    if missing:
        raise InvalidInput(f"no range for {', '.join(missing[:8])} ({len(missing)} tensors in all)")


def _extremes(
    model: onnx.ModelProto, names: Sequence[str], calibration: np.ndarray | Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Measure the least and the largest value of the tensors `names`, in the graph as it is written."""
    inputs = named_inputs(model, calibration)
    extremes = {name: (value.min(), value.max()) for name, value in inputs.items()}
    for batch in run_tensors(model, names, inputs):
        for name, value in batch.items():
            low, high = extremes.get(name, (np.inf, -np.inf))
            extremes[name] = (min(low, value.min()), max(high, value.max()))
    wild = [name for name in names if not np.all(np.isfinite(extremes[name]))]
    if wild:
        raise InvalidInput(f"calibration gives no finite range for {', '.join(wild[:8])}: look at its inputs")
    return {name: extremes[name] for name in names}


def _activations(
    model: onnx.ModelProto, ranges: Ranges, extremes: Mapping[str, tuple[float, float]], spec: QuantSpec
) -> dict[str, Encoding]:
    """Return the encoding of each activation, in the order of `extremes`."""
    readers = graph.readers(model)
    outputs = {output.name for output in model.graph.output}
    exchanged = quantized_tensors(model, ranges.inputs.keys() & ranges.kernels.keys())
    shared = same_grid_groups(model, [name for name in extremes if name in exchanged])
    found: dict[str, Encoding] = {}
    for group in shared + [[name] for name in extremes if name not in exchanged]:
        following = [node for name in group for node in readers[name] if node.output[0] not in group]
        layers = [node for node in following if node.name in ranges.inputs]
        learned = {ranges.inputs[node.name] for node in layers}
        wider = len(layers) < len(following) or not outputs.isdisjoint(group)
        if len(learned) == 1 and not (wider and group[0] in exchanged):
            encoding = learned.pop()
        else:
            low, high = zip(*(extremes[name] for name in group), strict=True)
            encoding = activation_encoding(min(low), max(high), spec, "calibrated")
        found |= dict.fromkeys(group, encoding)
    return {name: found[name] for name in extremes}


def learned_encodings(
    model: onnx.ModelProto, variables: Mapping[str, Any], config: QuantConfig
) -> tuple[dict[str, Encoding], dict[str, Encoding], dict[str, str]]:
    """Read from `batch_stats` the grids of a graph's kernels and of its layers' inputs.

    A layer that has no statistics, because the interceptor does not reach it, is float here as it is in JAX.

    Args:
      model, variables, config: As `tensor_ranges` takes them.

    Returns:
      (kernels, inputs, quantized): the encoding of every kernel by initializer, that of the input of every
      quantized layer by node, and the initializer of every quantized kernel by node. A kernel is ranged by
      its own magnitude where its layer is float, or where it is not a multiple of the leaf of `params` that
      it is named after.

    Raises:
      InvalidInput: As `tensor_ranges`.
    """
    values = graph.constants(model)
    leaves = flatten_dict(dict(variables.get("params", {})), sep="/")
    statistics = flatten_dict(dict(variables.get(COLLECTION, {})), sep="/")
    kernels: dict[str, Encoding] = {}
    inputs: dict[str, Encoding] = {}
    quantized: dict[str, str] = {}
    for name, node in weighted_nodes(model).items():
        kernel = node.input[1]
        leaf = leaf_of(kernel, leaves)
        path = leaf.rpartition("/")[0]
        sites = _sites(config, path, statistics)
        if sites.inputs is not None:
            low, high = _range(statistics, path, INPUT)
            inputs[name] = activation_encoding(low, high, sites.inputs, "learned")
        learned = None
        if sites.weights is not None:
            quantized[name] = kernel
            learned = _scale(statistics, path, sites.weights)
        biased = name in inputs and node.op_type != "MatMul" and len(node.input) > 2
        least = least_scale(values[node.input[2]], inputs[name].scale[0]) if biased else 0.0
        spec = sites.weights or config.weights or QuantSpec()
        raw = None if leaf not in leaves else np.asarray(leaves[leaf])
        gains = None
        if learned is not None and raw is not None:
            gain = statistics.get(_key(path, GAIN)) if config.folded else None
            gains = _gains(node, values[kernel], raw, gain)
        kernels[kernel] = _kernel(node, values[kernel], gains, learned, spec, least)
    if not inputs and not quantized:
        raise InvalidInput(
            "no layer of this graph has learned ranges: give the variables of a Quant-Trim checkpoint, with "
            f"its {COLLECTION!r}, and the config it was trained with"
        )
    return kernels, inputs, quantized


def _sites(config: QuantConfig, path: str, statistics: Mapping[str, Any]) -> Sites:
    """Return the sites of the layer at `path`, all None where it has no statistics at all."""
    if not any(_key(path, site, "count") in statistics for site in (KERNEL, INPUT, OUTPUT)):
        return Sites(None, None, None)
    sites = config.sites(path)
    if sites.outputs is not None:
        raise InvalidInput(
            f"{path!r} has an output site, and folding batch norm leaves no such tensor: ranges are exported "
            "for inputs and weights. Give a config with outputs=None."
        )
    return sites


def _key(path: str, *names: str) -> str:
    """Return the path of a statistic of the layer at `path`."""
    return "/".join((path, *names) if path else names)


def _range(statistics: Mapping[str, Any], path: str, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the learned low and high ends of a site, checked."""
    count = statistics.get(_key(path, site, "count"))
    if count is None or not int(count):
        raise InvalidInput(
            f"{_key(path, site)!r} has seen no batch: run training steps with quant_trim(..., train=True), "
            f"or leave the site out with qt.Rule({path!r}, ...)"
        )
    low, high = (np.asarray(statistics[_key(path, site, end)]) for end in ("low", "high"))
    if not np.all(np.isfinite(low) & np.isfinite(high)):
        raise InvalidInput(f"{_key(path, site)!r} holds a range that is not finite: training diverged")
    return low, high


def _scale(statistics: Mapping[str, Any], path: str, spec: QuantSpec) -> np.ndarray:
    """Return the scale of the raw kernel, float32 `()` or `(channels,)`."""
    if not spec.symmetric or spec.axis not in (None, -1):
        scheme = "symmetric" if spec.symmetric else "asymmetric"
        raise InvalidInput(
            f"the weights of {path!r} are {scheme} along axis {spec.axis}: QDQ export takes symmetric "
            "weights, per tensor or along the last axis (-1)"
        )
    return np.asarray(quantization_parameters(*_range(statistics, path, KERNEL), spec)[0])


def _gains(node: NodeProto, kernel: np.ndarray, raw: np.ndarray, gain: Any) -> np.ndarray | None:
    """Return the gain of each channel from the kernel that training quantized to the graph's kernel.

    Args:
      node: Weighted node that reads the kernel.
      kernel: Kernel of the graph.
      raw: The leaf of `params`.
      gain: Gain with which training folded the raw kernel; None where it did not. Where the exporter has
        folded by the same gain the answer is exactly 1, so that one scale for the tensor stays one.

    Returns:
      float64 `(channels,)`, or None as from `output_gains`.
    """
    found = output_gains(node, kernel, raw)
    if found is None or gain is None:
        return found
    folded = np.tile(np.ravel(gain).astype(np.float64), len(found) // np.size(gain))
    ratio = np.where(folded == 0, 1.0, found / np.where(folded == 0, 1.0, folded))
    return np.where(np.abs(ratio - 1.0) < SAME, 1.0, ratio)


def _kernel(
    node: NodeProto,
    kernel: np.ndarray,
    gains: np.ndarray | None,
    scale: np.ndarray | None,
    spec: QuantSpec,
    least: np.ndarray | float,
) -> Encoding:
    """Make the grid of the graph's kernel: the learned one where there is one, else by its magnitude."""
    axis = channel_axis(node, kernel.ndim)
    if gains is None or scale is None or len(gains) % scale.size:
        return encode_by_magnitude(kernel, spec, axis, least)
    return encode_learned(scale, gains, spec, axis, least)


def output_gains(node: NodeProto, folded: np.ndarray, raw: np.ndarray) -> np.ndarray | None:
    """Compute gain_c = <folded_c, raw_c> / <raw_c, raw_c> for each output channel, in float64.

    Args:
      node: Weighted node that reads the kernel.
      folded: Kernel of the graph, float32, in the node's layout.
      raw: Leaf of `params`, float32, in Flax's layout.

    Returns:
      float64 `(channels,)`, 0 for a channel that is zero throughout. None where the folded kernel is not
      the raw kernel with each channel scaled by one number.

    >>> node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"])
    >>> raw = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> output_gains(node, raw * np.float32([2.0, -0.5]), raw).tolist()
    [2.0, -0.5]
    """
    axis = channel_axis(node, folded.ndim)
    rows = kernel_rows(folded, axis).astype(np.float64)
    for layout in _layouts(node, raw, folded):
        original = kernel_rows(layout, axis).astype(np.float64)
        energy = np.sum(original**2, axis=1)
        gains = np.sum(rows * original, axis=1) / np.where(energy > 0, energy, 1.0)
        residual = np.linalg.norm(rows - gains[:, None] * original, axis=1)
        if np.all(residual <= FIT * np.linalg.norm(rows, axis=1)):
            return gains
    return None


def _layouts(node: NodeProto, raw: np.ndarray, folded: np.ndarray) -> list[np.ndarray]:
    """Return `raw` in each layout of the shape of `folded` in which the node may hold it."""
    shape = folded.shape
    if raw.size != math.prod(shape):
        return []
    if node.op_type in ("Gemm", "MatMul"):  # several input or feature axes (DenseGeneral) became one
        transposed = graph.attributes(node).get("transB")
        kernel = raw.reshape(shape[::-1]).T if transposed else raw.reshape(shape)
        return [kernel, *_channels_first_rows(kernel, folded)]
    if raw.ndim == 2:  # a dense layer on images, made a 1x1 convolution
        return [raw.T.reshape(shape)]
    spatial = tuple(range(raw.ndim - 2))
    kernels = [raw.transpose(-1, -2, *spatial)]
    if node.op_type == "ConvTranspose":  # ONNX mirrors the kernel; JAX with transpose_kernel
        both = [raw.transpose(-2, -1, *spatial), *kernels]
        kernels = [np.flip(kernel, range(2, kernel.ndim)) for kernel in both] + both
    return [kernel for kernel in kernels if kernel.shape == shape]


def _channels_first_rows(kernel: np.ndarray, folded: np.ndarray) -> list[np.ndarray]:
    """Reorder the rows of a kernel on flattened images from (height, width, channel) to channels first.

    The number of channels is the one with which a column of `kernel` is a multiple of that of `folded`.

    Returns:
      A list of that one kernel, or an empty list.
    """
    rows = len(kernel)
    column = int(np.argmax(np.sum(np.square(folded, dtype=np.float64), axis=0)))
    wanted, original = (array[:, column].astype(np.float64) for array in (folded, kernel))
    length = np.linalg.norm(wanted) * np.linalg.norm(original)
    for channels in (number for number in range(2, rows) if rows % number == 0):
        moved = original.reshape(-1, channels).T.ravel()
        if abs(moved @ wanted) >= (1.0 - FIT) * length > 0.0:
            return [kernel.reshape(-1, channels, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)]
    return []
