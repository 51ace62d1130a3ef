"""Give every tensor of an exported graph a grid: from Quant-Trim's statistics, else by calibration.

`learned.learned_encodings` reads the statistics of each layer's input and kernel. `tensor_ranges` adds the
activations that no statistics describe, by running the graph on real inputs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import Encoding, Ranges, activation_encoding, per_tensor
from qt_jax.export.learned import learned_encodings
from qt_jax.export.operators import weighted_nodes
from qt_jax.export.qdq import insert_qdq, interpolates, quantized_tensors, same_grid_groups
from qt_jax.export.sessions import named_inputs, run_tensors
from qt_jax.export.storage import model_sha256
from qt_jax.grid import QuantSpec


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
      config: Config of training, or of the deployment (`qt_jax.export.integers.deployed_config`).
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
    interpolated = {node.output[0] for node in model.graph.node if interpolates(node)}
    exchanged = quantized_tensors(model, ranges.inputs.keys() & ranges.kernels.keys())
    shared = same_grid_groups(model, [name for name in extremes if name in exchanged])
    found: dict[str, Encoding] = {}
    for group in shared + [[name] for name in extremes if name not in exchanged]:
        following = [node for name in group for node in readers[name] if node.output[0] not in group]
        layers = [node for node in following if node.name in ranges.inputs]
        learned = {ranges.inputs[node.name] for node in layers}
        wider = len(layers) < len(following) or not outputs.isdisjoint(group)
        wider = wider or not interpolated.isdisjoint(group)  # its layer clips behind it, not before it
        if len(learned) == 1 and not (wider and group[0] in exchanged):
            encoding = learned.pop()
        else:
            low, high = zip(*(extremes[name] for name in group), strict=True)
            encoding = activation_encoding(min(low), max(high), spec, "calibrated")
        found |= dict.fromkeys(group, encoding)
    return {name: found[name] for name in extremes}
