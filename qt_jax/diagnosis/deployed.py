"""Write a deployment as files for compilers: the float graph, its ranges, and its QDQ form."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import version_converter

from qt_jax.backends.protocol import Batch
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.running import outputs_of
from qt_jax.diagnosis.simulation import FLOAT, kernel_encoding
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import Ranges, activation_encoding, least_scale, write_ranges
from qt_jax.export.qdq import FIRST_OPSET, insert_qdq, storage_bits
from qt_jax.export.storage import is_large, model_sha256, save, with_initializers
from qt_jax.grid import QuantSpec

FILES = {
    "mended.onnx": "the float graph with mended kernels, for any vendor's own quantizer. It holds neither "
    "bits nor ranges: give those to the quantizer",
    "mended.ranges.json": "the advised grid of each kernel and of each layer's input",
    "mended.qdq.onnx": "QuantizeLinear and DequantizeLinear on those grids",
}
"""Name of each file that `write_files` writes, and what it holds."""


def write_files(deployment: Deployment, folder: Path, samples: Batch, outputs: Sequence[str]) -> None:
    """Write `FILES` of a deployment into `folder`.

    Args:
      deployment: Network to write.
      folder: Existing folder.
      samples: Arrays `(n, ...)` by input, or the array of the only input.
      outputs: Outputs in which the written graph must compute the same on `samples` as the given one.

    Raises:
      InvalidInput: ONNX cannot convert the graph to the opset that its bits need, or the converted graph
        computes something else on `samples`.
    """
    mended = at_required_opset(deployment)
    if mended is not deployment:
        before, after = (outputs_of(item.model, samples, outputs) for item in (deployment, mended))
        for name, wanted in before.items():
            if not np.allclose(wanted, after[name], rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max())):
                opset = mended.model.opset_import[0].version
                raise InvalidInput(
                    f"ONNX converts this graph wrongly to opset {opset}: export the graph at that opset."
                )
    save(mended.model, folder / "mended.onnx")
    write_ranges(ranges_of(mended), folder / "mended.ranges.json")
    save(qdq_graph(mended), folder / "mended.qdq.onnx")


def at_required_opset(deployment: Deployment) -> Deployment:
    """Convert the float graph to an opset that has integers of all the deployment's widths.

    Raises:
      InvalidInput: ONNX cannot convert the graph.
    """
    widths = {
        storage_bits(bits)
        for precision in deployment.precisions.values()
        for bits in (precision.weights, precision.inputs)
        if bits is not None
    }
    opset = max((FIRST_OPSET[width] for width in widths), default=0)
    if opset <= deployment.model.opset_import[0].version:
        return deployment
    try:
        model = _converted(deployment.model, opset)
    except (RuntimeError, ValueError) as error:
        raise InvalidInput(
            f"ONNX cannot convert the graph to opset {opset}, which has integers of these widths ({error}): "
            "export the graph at that opset"
        ) from error
    return dataclasses.replace(deployment, model=model)


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a graph to an opset; of a large one all but its larger constants, which do not change."""
    if not is_large(model):
        return version_converter.convert_version(model, opset)
    light = graph.without_weights(model)
    known = {tensor.name for tensor in light.graph.initializer}
    converted = version_converter.convert_version(light, opset)
    weights = [tensor for tensor in model.graph.initializer if tensor.name not in known]
    names = {tensor.name for tensor in weights}
    inputs = [entry for entry in converted.graph.input if entry.name not in names]
    del converted.graph.input[:]
    converted.graph.input.extend(inputs)
    return with_initializers(converted, [*converted.graph.initializer, *weights])


def ranges_of(deployment: Deployment) -> Ranges:
    """Return the grids of the deployment's kernels and layers' inputs, for its graph."""
    model = deployment.model
    values = graph.constants(model)
    kernels, inputs, tensors = {}, {}, {}
    for name, layer in layers_of(model).items():
        precision = deployment.precisions.get(name, FLOAT)
        least: np.ndarray | float = 0.0
        if precision.inputs is not None and name in deployment.bounds:
            spec = QuantSpec(precision.inputs, symmetric=False)
            inputs[name] = activation_encoding(*deployment.bounds[name], spec, "calibrated")
            if layer.bias:
                least = least_scale(values[layer.bias], inputs[name].scale[0])
                channels = values[layer.kernel].shape[layer.axis]
                least = least.reshape(-1, channels).max(axis=0)  # groups of a transposed convolution
        if precision.weights is not None:
            kernels[name] = layer.kernel
            grid = kernel_encoding(values[layer.kernel], precision, layer.axis, least)
            tensors[layer.kernel] = grid
    return Ranges(model_sha256(model), model.opset_import[0].version, tensors, inputs, kernels)


def qdq_graph(deployment: Deployment) -> onnx.ModelProto:
    """Return the deployment with QuantizeLinear and DequantizeLinear at kernels and inputs of layers."""
    whole = at_required_opset(deployment)
    return insert_qdq(whole.model, ranges_of(whole), learned_only=True)
