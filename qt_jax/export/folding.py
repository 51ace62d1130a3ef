"""Arithmetic done at export: constant subgraphs, batch norm into convolutions, bounds and biases."""

import math

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import graph
from qt_jax.export.products import is_absent
from qt_jax.export.views import TO_CHANNELS_LAST

FEATURE_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}
"""Axis of a kernel's output features."""


def known_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with Shape computed: with a concrete batch every shape is a constant."""
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes = []
    for node in model.graph.node:
        if node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
            values[node.output[0]] = np.array(shapes[node.input[0]], np.int64)
        else:
            nodes.append(node)
    return graph.rebuild(model, nodes, values)


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with every node computed that depends on constants alone (by ONNX's reference evaluator).

    A result that stems from leaves of the variables keeps their origin, as `graph.common_origin` has it.
    """
    values = graph.constants(model)
    known = set(values)
    names: dict[str, str] = {}  # a computed tensor -> the constant it becomes
    constant: list[NodeProto] = []
    variable: list[NodeProto] = []
    for node in model.graph.node:
        inputs = [names.get(name, name) for name in node.input if name]
        if known.issuperset(inputs):
            origin = graph.common_origin(name for name in inputs if graph.flax_path(name))
            names |= {output: graph.derived(origin, output) if origin else output for output in node.output}
            known.update(names[output] for output in node.output)
            constant.append(node)
        else:
            variable.append(node)
    read = {name for node in variable for name in node.input}
    wanted = [name for name in names if name in read]
    values |= {names[name]: value for name, value in _evaluate(model, constant, wanted).items()}
    nodes = [graph.rewired(node, [names.get(name, name) for name in node.input]) for node in variable]
    return graph.rebuild(model, nodes, values)


def _evaluate(model: onnx.ModelProto, nodes: list[NodeProto], wanted: list[str]) -> dict[str, np.ndarray]:
    """The tensors `wanted` as `nodes` compute them from the initializers of `model`."""
    outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
    read = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in read]
    subgraph = helper.make_graph(nodes, "constants", [], outputs, initializers)
    evaluator = ReferenceEvaluator(helper.make_model(subgraph, opset_imports=model.opset_import))
    return dict(zip(wanted, map(np.asarray, evaluator.run(None, {})), strict=True))


def fold_batch_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with each BatchNormalization that alone reads a layer folded into it.

    With gain = scale / sqrt(var + epsilon): kernel' = kernel * gain and bias' = (bias - mean) * gain + shift,
    computed in float64 (Jacob et al. 2018, arXiv 1712.05877, section 3.2), for Conv, ConvTranspose and Gemm.
    Kernel and batch norm may be shared: every layer gets its own folded copy. A batch norm without such a
    layer before it stays.
    """
    values = graph.constants(model)

    def folded(norm: NodeProto, before: NodeProto) -> NodeProto | None:
        if before.op_type not in FEATURE_AXIS or not values.keys() >= {*norm.input[1:], *before.input[1:]}:
            return None
        scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:])
        gain = scale / np.sqrt(variance + graph.attributes(norm)["epsilon"])
        kernel_name = before.input[1]
        kernel, *bias = (values[name] for name in before.input[1:])
        new = {
            graph.derived(kernel_name, norm.output[0]): _scaled(kernel, gain, before),
            graph.derived(_sibling(kernel_name, "bias"), norm.output[0]): (sum(bias) - mean) * gain + shift,
        }
        values.update({name: value.astype(np.float32) for name, value in new.items()})
        return graph.rewired(before, [before.input[0], *new], norm.output)

    return graph.fuse(model, values, frozenset({"BatchNormalization"}), folded)


def _scaled(kernel: np.ndarray, gain: np.ndarray, node: NodeProto) -> np.ndarray:
    """`kernel` with each output feature times its gain, in the layout that `node` reads."""
    stated = graph.attributes(node)
    if node.op_type == "ConvTranspose":
        groups = stated.get("group", 1)
        grouped = kernel.reshape(groups, -1, *kernel.shape[1:])
        return (grouped * gain.reshape(groups, 1, -1, *[1] * (kernel.ndim - 2))).reshape(kernel.shape)
    axis = 0 if stated.get("transB") else FEATURE_AXIS[node.op_type]
    return kernel * gain.reshape([-1 if axis == other else 1 for other in range(kernel.ndim)])


def fold_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a constant added to each feature of a layer made the layer's bias.

    A product of rows by a constant matrix becomes Gemm; on longer tensors MatMul and Add stay two.
    """
    values, shapes = graph.constants(model), graph.shapes(model)

    def biased(addition: NodeProto, before: NodeProto) -> NodeProto | None:
        bias = next((name for name in addition.input if name in values), "")
        if before.op_type not in (*FEATURE_AXIS, "MatMul") or not bias or not _without_bias(before, values):
            return None
        shape = shapes[addition.output[0]]
        axis = len(shape) - 1 if before.op_type in ("Gemm", "MatMul") else 1
        full = (1,) * (len(shape) - values[bias].ndim) + values[bias].shape
        constant = before.input[1] in values
        if full != tuple(size if other == axis else 1 for other, size in enumerate(shape)) or not constant:
            return None
        row = graph.derived(bias, addition.output[0])
        stated = graph.attributes(before)
        if before.op_type == "MatMul":
            if len(shape) != 2:
                return None
            stated = {"beta": 1.0}
        values[row] = values[bias].reshape(-1)
        operator = "Gemm" if before.op_type == "MatMul" else before.op_type
        return helper.make_node(operator, [*before.input[:2], row], addition.output, **stated)

    return graph.fuse(model, values, frozenset({"Add"}), biased)


def _without_bias(node: NodeProto, values: dict[str, np.ndarray]) -> bool:
    return len(node.input) < 3 or not np.any(values.get(node.input[2], np.ones(1)))


def drop_absent_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with layers that have no bias in Flax, for which jax2onnx writes zeros, reading none."""
    values = graph.constants(model)
    nodes = [
        graph.rewired(node, node.input[:2])
        if node.op_type in FEATURE_AXIS and len(node.input) > 2 and is_absent(node.input[2], values)
        else node
        for node in model.graph.node
    ]
    return graph.rebuild(model, nodes, values)


def fold_flatten(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with images flattened channels-first: the kernel of the Gemm that follows is permuted instead.

    In Flax `x.reshape(batch, -1)` orders the features (height, width, channel).
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    transposes = {node.output[0]: node for node in model.graph.node if node.op_type == "Transpose"}
    read = graph.uses(model)
    reordered: dict[str, tuple[int, ...]] = {}  # a flattened tensor -> sizes of its features as they were

    def flattened(node: NodeProto) -> NodeProto:
        transpose = transposes.get(node.input[0]) if node.op_type == "Reshape" else None
        if transpose is not None:
            shape = shapes[transpose.output[0]]
            last = tuple(graph.attributes(transpose)["perm"]) == TO_CHANNELS_LAST.get(len(shape))
            rows = shapes[node.output[0]] == (shape[0], math.prod(shape[1:]))
            gemm = all(reader.op_type == "Gemm" for reader in readers[node.output[0]])
            if last and rows and gemm and read[node.output[0]] == len(readers[node.output[0]]):
                reordered[node.output[0]] = shape[1:]
                return helper.make_node("Flatten", transpose.input, node.output, axis=1)
        if node.op_type == "Gemm" and node.input[0] in reordered and node.input[1] in values:
            kernel, sizes = values[node.input[1]], reordered[node.input[0]]
            permuted = np.moveaxis(kernel.reshape(*sizes, -1), len(sizes) - 1, 0)
            name = graph.derived(node.input[1], node.output[0])
            values[name] = permuted.reshape(kernel.shape)
            return graph.rewired(node, [node.input[0], name, *node.input[2:]])
        return node

    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return graph.rebuild(model, [flattened(node) for node in model.graph.node], values)


def _sibling(name: str, leaf: str) -> str:
    """The leaf of that name in the module of the constant `name`."""
    return f"{graph.origin(name).rpartition('/')[0]}/{leaf}"
