"""The grid of every tensor of an exported graph: from Quant-Trim's statistics, else by calibration."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import Encoding, Ranges, model_sha256
from qt_jax.export.integer_weights import per_tensor, weighted_nodes
from qt_jax.export.learned import activation_encoding, learned_encodings
from qt_jax.export.placement import quantized_tensors, same_grid_groups, tensor_readers
from qt_jax.export.qdq import insert_qdq
from qt_jax.export.sessions import named_inputs, run_tensors
from qt_jax.fake_quant import QuantSpec
from qt_jax.rules import QuantConfig


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
      config: as in training, or as deployed (`qt_jax.export.modes`).
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
