"""Fold what follows a layer into its constants.

Batch norm and arithmetic by feature disappear into initializers. The kernel behind a flattened image is
permuted instead of the image.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import math

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.layout import TO_CHANNELS_LAST
from qt_jax.export.operators import BIASED, channel_axis


def fold_batch_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold each BatchNormalization into the Conv, ConvTranspose or Gemm whose only reader it is.

    With gain = scale / sqrt(var + epsilon): kernel' = kernel * gain and bias' = (bias - mean) * gain + shift,
    computed in float64 (Jacob et al. 2018, arXiv 1712.05877, section 3.2). Kernel and batch norm may be
    shared: every layer gets its own folded copy. A batch norm without such a layer before it stays.
    """
    values = graph.constants(model)

    def folded(norm: NodeProto, before: NodeProto) -> NodeProto | None:
        if before.op_type not in BIASED or not values.keys() >= {*norm.input[1:], *before.input[1:]}:
            return None
        scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:])
        gain = scale / np.sqrt(variance + graph.attributes(norm)["epsilon"])
        name, how = before.input[1], norm.output[0]
        kernel, *bias = (values[name] for name in before.input[1:])
        folded_kernel = values.derive(name, how, _scaled(kernel, gain, before).astype(np.float32), gain)
        folded_bias = values.add(
            f"{how}#bias", ((sum(bias) - mean) * gain + shift).astype(np.float32), _bias_of(name, values)
        )
        return graph.rewired(before, [before.input[0], folded_kernel, folded_bias], norm.output)

    return graph.fuse(model, values, frozenset({"BatchNormalization"}), folded)


def _scaled(kernel: np.ndarray, gain: np.ndarray, node: NodeProto) -> np.ndarray:
    """Multiply each output feature of `kernel` by its gain, in the layout that `node` reads."""
    stated = graph.attributes(node)
    if node.op_type == "ConvTranspose":
        groups = stated.get("group", 1)
        grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
        return (grouped * gain.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2))).reshape(kernel.shape)
    axis = channel_axis(node, kernel.ndim)
    return kernel * gain.reshape([-1 if axis == other else 1 for other in range(kernel.ndim)])


def fold_shift(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold a constant that is added to each feature of a layer into the layer's bias."""
    return _fold_affine(model, frozenset({"Add", "Sub"}))


def fold_affine(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants that scale and shift each feature of a layer into its kernel and bias.

    A batch norm that is written out by hand leaves such constants behind. A product of rows by a constant
    matrix becomes Gemm. On longer tensors MatMul and Add stay two nodes.
    """
    return _fold_affine(model, frozenset({"Add", "Div", "Mul", "Sub"}))


def _fold_affine(model: onnx.ModelProto, operators: frozenset[str]) -> onnx.ModelProto:
    """Fold arithmetic by feature, in these operators, into the layer before it."""
    values, shapes = graph.constants(model), graph.shapes(model)

    def folded(node: NodeProto, layer: NodeProto) -> NodeProto | None:
        constant = next((name for name in node.input if name in values), "")
        fixed = layer.op_type in (*BIASED, "MatMul") and values.keys() >= {*layer.input[1:]}
        reversed_ = node.op_type in ("Div", "Sub") and node.input[0] == constant
        if not constant or not fixed or reversed_:
            return None
        shape = shapes[node.output[0]]
        if shapes.get(layer.output[0], shape) != shape:
            return None
        by_feature = _by_feature(values[constant], shape, layer)
        if by_feature is None or (layer.op_type == "MatMul" and (len(shape) != 2 or node.op_type != "Add")):
            return None
        return _affine(node.op_type, by_feature, constant, layer, node.output[0], values)

    return graph.fuse(model, values, operators, folded)


def _by_feature(value: np.ndarray, shape: tuple[int, ...], layer: NodeProto) -> np.ndarray | None:
    """Return a constant as one number per output feature of a layer; None if it varies along another axis.

    Args:
      value: The constant, which broadcasts against the output.
      shape: Shape of the output.
      layer: Writes the output.

    Returns:
      float64 `(features,)`.
    """
    axis = len(shape) - 1 if layer.op_type in ("Gemm", "MatMul") else 1
    if value.ndim > len(shape):
        return None
    full = (1,) * (len(shape) - value.ndim) + value.shape
    if any(size != 1 for other, size in enumerate(full) if other != axis):
        return None
    return np.broadcast_to(value.reshape(-1), (shape[axis],)).astype(np.float64)


def _affine(
    operator: str,
    number: np.ndarray,
    constant: str,
    layer: NodeProto,
    output: str,
    values: Constants,
) -> NodeProto:
    """Write a layer and the arithmetic behind it as one layer.

    Args:
      operator: "Add", "Sub", "Mul" or "Div".
      number: Second operand, float64 `(features,)`.
      constant: Its name.
      layer: Computes the first operand.
      output: Tensor to write.
      values: Constants; the new kernel and bias are added.
    """
    gain = {"Mul": lambda: number, "Div": lambda: 1.0 / number}.get(operator, lambda: None)()
    shift = {"Add": number, "Sub": -number}.get(operator, 0.0)
    kernel, *bias = layer.input[1:]
    before = sum(values[name].astype(np.float64) for name in bias)
    inputs = [layer.input[0], kernel]
    if gain is not None:
        scaled = _scaled(values[kernel], gain, layer).astype(np.float32)
        inputs[1] = values.derive(kernel, output, scaled, gain)
    after = before * (1.0 if gain is None else gain) + shift
    if bias or gain is None:
        own = "" if bias else values.origins.get(constant, "")
        value = np.broadcast_to(after, number.shape).astype(np.float32)
        inputs.append(values.add(f"{output}#bias", value, own or _bias_of(kernel, values)))
    stated = graph.attributes(layer) if layer.op_type != "MatMul" else {}
    return helper.make_node(
        "Gemm" if layer.op_type == "MatMul" else layer.op_type, inputs, [output], **stated
    )


def _bias_of(kernel: str, values: Constants) -> str:
    """Return the leaf `bias` beside the leaf of a kernel; "" for a kernel that stems from none."""
    module = values.origins.get(kernel, "").rpartition("/")[0]
    return module and f"{module}/bias"


def fold_flatten(model: onnx.ModelProto) -> onnx.ModelProto:
    """Flatten images channels-first, and permute the kernel of the Gemm that follows instead.

    In Flax `x.reshape(batch, -1)` orders the features (height, width, channel).
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    transposes = {node.output[0]: node for node in model.graph.node if node.op_type == "Transpose"}
    read, readers = graph.uses(model), graph.readers(model)
    reordered: Shapes = {}  # maps a flattened tensor to the sizes of its features as they were

    def flattened(node: NodeProto) -> NodeProto:
        transpose = transposes.get(node.input[0]) if node.op_type == "Reshape" else None
        if transpose is not None:
            shape = shapes[transpose.output[0]]
            last = tuple(graph.attributes(transpose)["perm"]) == TO_CHANNELS_LAST.get(len(shape))
            rows = shapes[node.output[0]] == (shape[0], math.prod(shape[1:]))
            layers = readers[node.output[0]]
            fixed = all(by_constant(reader, node.output[0]) for reader in layers)
            if last and rows and layers and fixed and read[node.output[0]] == len(layers):
                reordered[node.output[0]] = shape[1:]
                return helper.make_node("Flatten", transpose.input, node.output, axis=1)
        if node.op_type == "Gemm" and node.input[0] in reordered and node.input[1] in values:
            kernel, sizes = values[node.input[1]], reordered[node.input[0]]
            permuted = np.moveaxis(kernel.reshape(*sizes, -1), len(sizes) - 1, 0)
            name = values.derive(node.input[1], node.output[0], permuted.reshape(kernel.shape))
            return graph.rewired(node, [node.input[0], name, *node.input[2:]])
        return node

    def by_constant(reader: NodeProto, rows: str) -> bool:
        plain = reader.op_type == "Gemm" and not graph.attributes(reader).get("transB")
        return plain and reader.input[0] == rows and reader.input[1] in values

    return graph.rebuild(model, [flattened(node) for node in model.graph.node], values)
