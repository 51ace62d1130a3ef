"""The grid of every tensor of an exported graph: from Quant-Trim's statistics, else by calibration.

Quant-Trim's statistics as encodings of the graph: the input and the kernel of each quantized layer.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike
from onnx import NodeProto, TensorProto

from qt_jax.config import QuantConfig, Sites
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import Encoding, Ranges, Source, model_sha256
from qt_jax.export.kernels import (
    channel_axis,
    folded_kernel,
    learned_kernel,
    least_scale,
    output_gains,
    per_tensor,
    weighted_nodes,
)
from qt_jax.export.qdq import insert_qdq, quantized_tensors, same_grid_groups, tensor_readers
from qt_jax.export.sessions import named_inputs, run_tensors
from qt_jax.grid import QuantSpec, quantization_parameters
from qt_jax.interception import COLLECTION, GAIN, INPUT, KERNEL, OUTPUT

ACTIVATION_BITS = (8, 16)

SAME = 1e-4
"""Relative difference of gains that rounding explains."""


def learned_encodings(
    model: onnx.ModelProto, variables: Mapping[str, Any], config: QuantConfig
) -> tuple[dict[str, Encoding], dict[str, Encoding], dict[str, str]]:
    """What `batch_stats` says of a graph.

    A layer that has no statistics, since the interceptor does not reach it, is float here as it is in JAX.

    Args:
      model, variables, config: as `tensor_ranges` takes them.

    Returns:
      (kernels, inputs, quantized): the encoding of every kernel by initializer, that of the input of every
      quantized layer by node, and the initializer of every quantized kernel by node. Kernels of float layers,
      and those that are no multiple of the leaf of `params` they are called after, are ranged by their own
      magnitude.

    Raises:
      InvalidInput: as `tensor_ranges`.
    """
    values = graph.constants(model)
    leaves = flatten_dict(dict(variables.get("params", {})), sep="/")
    statistics = flatten_dict(dict(variables.get(COLLECTION, {})), sep="/")
    kernels: dict[str, Encoding] = {}
    inputs: dict[str, Encoding] = {}
    quantized: dict[str, str] = {}
    for name, node in weighted_nodes(model).items():
        kernel = node.input[1]
        leaf = kernel if kernel in leaves else re.sub(r"_\d+$", "", kernel)
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


def activation_encoding(low: ArrayLike, high: ArrayLike, spec: QuantSpec, source: Source) -> Encoding:
    """The signed encoding of an activation's range; the zero-point of an unsigned grid is shifted.

    Raises:
      InvalidInput: other than 8 or 16 bits, where ONNX would clip at other integers, or an axis.

    >>> activation_encoding(0.0, 255.0, QuantSpec(symmetric=False), "calibrated").zero_point
    (-128,)
    """
    if spec.axis is not None or spec.bits not in ACTIVATION_BITS:
        raise InvalidInput(
            f"activations on {spec.bits} bits along axis {spec.axis} have no QDQ form: it clips at the ends "
            "of an integer type and has one scale. Deploy on 8 or 16 bits, see qt_jax.export.deploy."
        )
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    scale, zero_point = quantization_parameters(low, high, spec)
    shift = 0 if spec.symmetric else 2 ** (spec.bits - 1)
    q_min, q_max = spec.integer_range
    return Encoding(
        scale=(float(scale),),
        zero_point=(int(zero_point) - shift,),
        low=(float(low),),
        high=(float(high),),
        bits=spec.bits,
        symmetric=spec.symmetric,
        axis=None,
        q_min=q_min - shift,
        q_max=q_max - shift,
        source=source,
    )


def _sites(config: QuantConfig, path: str, statistics: Mapping[str, Any]) -> Sites:
    """The sites of the layer at `path`, all None where it has no statistics at all."""
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
    return "/".join((path, *names) if path else names)


def _range(statistics: Mapping[str, Any], path: str, site: str) -> tuple[np.ndarray, np.ndarray]:
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
    """The scale of the raw kernel, float32 `()` or `(channels,)`."""
    if not spec.symmetric or spec.axis not in (None, -1):
        scheme = "symmetric" if spec.symmetric else "asymmetric"
        raise InvalidInput(
            f"the weights of {path!r} are {scheme} along axis {spec.axis}: QDQ export takes symmetric "
            "weights, per tensor or along the last axis (-1)"
        )
    return np.asarray(quantization_parameters(*_range(statistics, path, KERNEL), spec)[0])


def _gains(node: NodeProto, kernel: np.ndarray, raw: np.ndarray, gain: Any) -> np.ndarray | None:
    """What the graph's kernel is of the one that training laid its grid over, by channel.

    Args:
      gain: with which training folded the raw kernel; None where it did not. Where the exporter has folded it
        just so the answer is exactly 1, so that a scale for the tensor stays one.
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
    """The grid of the graph's kernel: the learned one where that has a place, else by its magnitude."""
    axis = channel_axis(node, kernel.ndim)
    if gains is None or scale is None or len(gains) % scale.size:
        return folded_kernel(kernel, spec, axis, least)
    return learned_kernel(scale, gains, spec, axis, least)


def tensor_ranges(
    model: onnx.ModelProto,
    variables: Mapping[str, Any],
    config: QuantConfig,
    calibration: np.ndarray | Mapping[str, np.ndarray],
    *,
    per_channel: bool = True,
) -> Ranges:
    """The grid of each float activation and of each kernel of a graph.

    Learned: the input and the kernel of every layer that `config` quantizes; on them the integers are those
    of the JAX forward at lambda = 1, in a folded kernel too (see `integer_weights`). Calibrated: every
    activation that anything but quantized layers reads, by its minimum and maximum while the learned grids
    are in force. A quantile would not do: a shortcut carries what the layer beside it clips.

    Args:
      model: from `to_onnx`.
      variables: as given to `to_onnx`, with Quant-Trim's statistics in `batch_stats`.
      config: as in training, or as deployed (`qt_jax.export.deploy`).
      calibration: real inputs as the graph takes them, float32 `(n, ...)`, images NCHW; by name where the
        graph has several. A few hundred will do.
      per_channel: one scale for each output channel of a kernel. Otherwise one a kernel, the largest: the
        integers are then not those of training where a batch norm was folded.

    Raises:
      InvalidInput: no statistics, or a site that has seen no batch; a spec that QDQ cannot express
        (asymmetric weights, activations per channel or on other than 8 or 16 bits, output sites); no
        calibration inputs; a tensor without a finite range.

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
    """The float32 graph inputs and node outputs of a graph with inferred shapes, in graph order."""
    entries = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {entry.name for entry in entries if entry.type.tensor_type.elem_type == TensorProto.FLOAT}
    made = [name for node in model.graph.node for name in node.output]
    return [name for name in (*(entry.name for entry in model.graph.input), *made) if name in floats]


def check_complete(model: onnx.ModelProto, ranges: Ranges) -> None:
    """Raises InvalidInput naming the float activations and kernels of `model` that have no range."""
    kernels = [node.input[1] for node in weighted_nodes(model).values()]
    missing = [name for name in (*float_activations(model), *kernels) if name not in ranges.tensors]
    if missing:
        raise InvalidInput(f"no range for {', '.join(missing[:8])} ({len(missing)} tensors in all)")


def _extremes(
    model: onnx.ModelProto, names: Sequence[str], calibration: np.ndarray | Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """The least and the largest value of the tensors `names`, run as the graph is written."""
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
    """The encoding of each activation, in the order of `extremes`."""
    readers = tensor_readers(model)
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
