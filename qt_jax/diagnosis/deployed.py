"""A deployment as files for compilers: learned ranges for the float graph, and its QDQ form."""

import dataclasses

import numpy as np
import onnx
from onnx import version_converter

from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.remedies import Deployment
from qt_jax.diagnosis.simulation import FLOAT, kernel_encoding
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.encodings import Ranges, model_sha256
from qt_jax.export.kernels import least_scale
from qt_jax.export.qdq import FIRST_OPSET, insert_qdq, storage_bits
from qt_jax.export.ranges import activation_encoding
from qt_jax.grid import QuantSpec


def restated(deployment: Deployment) -> Deployment:
    """The deployment with its float graph at an opset that has integers of all widths asked for.

    Raises InvalidInput if ONNX cannot convert it.
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
        model = version_converter.convert_version(deployment.model, opset)
    except RuntimeError as error:
        raise InvalidInput(
            f"the graph cannot be restated at opset {opset}, which has integers of these widths ({error}): "
            "export it at that opset"
        ) from error
    return dataclasses.replace(deployment, model=model)


def ranges_of(deployment: Deployment) -> Ranges:
    """The grids of the deployment's kernels and layers' inputs, for its graph."""
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


def quantized(deployment: Deployment) -> onnx.ModelProto:
    """The deployment in QuantizeLinear and DequantizeLinear at kernels and inputs of layers."""
    whole = restated(deployment)
    return insert_qdq(whole.model, ranges_of(whole), learned_only=True)
