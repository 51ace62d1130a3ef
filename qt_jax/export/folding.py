"""Arithmetic done at export: constant subgraphs, batch norm into convolutions, bounds and biases."""

import math
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import graph
from qt_jax.export.layout import TO_CHANNELS_LAST
from qt_jax.export.rewrites import is_absent

FEATURE_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}
"""Axis of a kernel's output features."""


def known_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with each Shape whose sizes are all known made a constant."""
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes = []
    for node in model.graph.node:
        sizes = _sizes(node, shapes)
        if sizes is not None:
            values[node.output[0]] = np.array(sizes, np.int64)
        else:
            nodes.append(node)
    return graph.rebuild(model, nodes, values)


def _sizes(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """What a Shape writes; None for any other node, and where a size is open."""
    if node.op_type != "Shape" or node.input[0] not in shapes:
        return None
    stated = graph.attributes(node)
    sizes = shapes[node.input[0]][stated.get("start", 0) : stated.get("end")]
    return sizes if all(sizes) else None


def written_axes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the axes of each reduction over all of them written out, as opset 18 reads them."""
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes = []
    for node in model.graph.node:
        if node.op_type.startswith("Reduce") and len(node.input) == 1:
            values[f"{node.output[0]}#axes"] = np.arange(len(shapes[node.input[0]]), dtype=np.int64)
            node = graph.rewired(node, [node.input[0], f"{node.output[0]}#axes"])
        nodes.append(node)
    return graph.rebuild(model, nodes, values)


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with every node computed that depends on constants alone (by ONNX's reference evaluator), but
    for one that writes an output of the graph.

    A result that stems from leaves of the variables keeps their origin, as `graph.common_origin` has it.
    """
    values = graph.constants(model)
    known = set(values)
    outputs = {output.name for output in model.graph.output}
    names: dict[str, str] = {}  # a computed tensor -> the constant it becomes
    constant: list[NodeProto] = []
    variable: list[NodeProto] = []
    for node in model.graph.node:
        inputs = [names.get(name, name) for name in node.input if name]
        if known.issuperset(inputs) and outputs.isdisjoint(node.output):
            origin = graph.common_origin(name for name in inputs if graph.flax_path(name))
            names |= {output: graph.derived(origin, output) if origin else output for output in node.output}
            known.update(names[output] for output in node.output)
            constant.append(node)
        else:
            variable.append(node)
    read = {name for node in variable for name in node.input}
    wanted = [name for name in names if name in read]
    computed = _evaluate(constant, wanted, values, model.opset_import)
    values |= {names[name]: value for name, value in computed.items()}
    nodes = [graph.rewired(node, [names.get(name, name) for name in node.input]) for node in variable]
    return graph.rebuild(model, nodes, values)


def _evaluate(
    nodes: list[NodeProto], wanted: list[str], values: dict[str, np.ndarray], opset_imports: Any
) -> dict[str, np.ndarray]:
    """The tensors `wanted` as `nodes` compute them from the constants `values`."""
    read = {name for node in nodes for name in node.input}
    given = {name: value for name, value in values.items() if name in read}
    inputs, outputs = (
        [helper.make_empty_tensor_value_info(name) for name in names] for names in (given, wanted)
    )
    subgraph = helper.make_graph(nodes, "constants", inputs, outputs)
    evaluator = ReferenceEvaluator(helper.make_model(subgraph, opset_imports=opset_imports))
    return dict(zip(wanted, map(np.asarray, evaluator.run(None, given)), strict=True))


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


def fold_shift(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a constant added to each feature of a layer made part of the layer's bias."""
    return _fold_affine(model, frozenset({"Add", "Sub"}))


def fold_affine(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with constants that scale and shift each feature of a layer folded into kernel and bias.

    What a batch norm written out by hand leaves behind. A product of rows by a constant matrix becomes Gemm;
    on longer tensors MatMul and Add stay two.
    """
    return _fold_affine(model, frozenset({"Add", "Div", "Mul", "Sub"}))


def _fold_affine(model: onnx.ModelProto, operators: frozenset[str]) -> onnx.ModelProto:
    values, shapes = graph.constants(model), graph.shapes(model)

    def folded(node: NodeProto, layer: NodeProto) -> NodeProto | None:
        constant = next((name for name in node.input if name in values), "")
        fixed = layer.op_type in (*FEATURE_AXIS, "MatMul") and values.keys() >= {*layer.input[1:]}
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
    """A constant as one number for each feature of the layer's output of that shape; None if it is not."""
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
    values: dict[str, np.ndarray],
) -> NodeProto:
    """`layer` followed by one arithmetic operator, as one layer that writes `output`."""
    gain = {"Mul": lambda: number, "Div": lambda: 1.0 / number}.get(operator, lambda: None)()
    shift = {"Add": number, "Sub": -number}.get(operator, 0.0)
    kernel, *bias = layer.input[1:]
    before = sum(values[name].astype(np.float64) for name in bias)
    inputs = [layer.input[0], kernel]
    if gain is not None:
        inputs[1] = graph.derived(kernel, output)
        values[inputs[1]] = _scaled(values[kernel], gain, layer).astype(np.float32)
    after = before * (1.0 if gain is None else gain) + shift
    if bias or gain is None:
        own = graph.flax_path(constant) and not bias
        inputs.append(graph.derived(constant if own else _sibling(kernel, "bias"), output))
        values[inputs[2]] = np.broadcast_to(after, number.shape).astype(np.float32)
    stated = graph.attributes(layer) if layer.op_type != "MatMul" else {}
    return helper.make_node(
        "Gemm" if layer.op_type == "MatMul" else layer.op_type, inputs, [output], **stated
    )


def drop_absent_bias(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with layers that have no bias in Flax, for which jax2onnx writes zeros or a beta of 0, reading
    none, so that a bias folded into them counts."""
    values = graph.constants(model)

    def plain(node: NodeProto) -> NodeProto:
        stated = graph.attributes(node)
        absent = stated.get("beta") == 0.0 or (len(node.input) > 2 and is_absent(node.input[2], values))
        if node.op_type not in FEATURE_AXIS or not absent:
            return node
        stated.pop("beta", None)
        return helper.make_node(node.op_type, node.input[:2], node.output, **stated)

    return graph.rebuild(model, [plain(node) for node in model.graph.node], values)


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
            layers = readers.get(node.output[0], [])
            fixed = all(by_constant(reader, node.output[0]) for reader in layers)
            if last and rows and layers and fixed and read[node.output[0]] == len(layers):
                reordered[node.output[0]] = shape[1:]
                return helper.make_node("Flatten", transpose.input, node.output, axis=1)
        if node.op_type == "Gemm" and node.input[0] in reordered and node.input[1] in values:
            kernel, sizes = values[node.input[1]], reordered[node.input[0]]
            permuted = np.moveaxis(kernel.reshape(*sizes, -1), len(sizes) - 1, 0)
            name = graph.derived(node.input[1], node.output[0])
            values[name] = permuted.reshape(kernel.shape)
            return graph.rewired(node, [node.input[0], name, *node.input[2:]])
        return node

    def by_constant(reader: NodeProto, rows: str) -> bool:
        plain = reader.op_type == "Gemm" and not graph.attributes(reader).get("transB")
        return plain and reader.input[0] == rows and reader.input[1] in values

    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return graph.rebuild(model, [flattened(node) for node in model.graph.node], values)


def _sibling(name: str, leaf: str) -> str:
    """The leaf of that name in the module of the constant `name`."""
    return f"{graph.origin(name).rpartition('/')[0]}/{leaf}"
