"""Arithmetic done at export: constant subgraphs, batch norm into convolutions, bounds and biases."""

import math
from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import graph

IDENTITIES = frozenset({"Dropout", "Identity"})


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with every node computed that depends on constants alone (by ONNX's reference evaluator).

    A result that stems from a single leaf of the variables keeps that leaf as its origin.
    """
    values = graph.constants(model)
    known = set(values)
    names: dict[str, str] = {}  # a computed tensor -> the constant it becomes
    constant: list[NodeProto] = []
    variable: list[NodeProto] = []
    for node in model.graph.node:
        inputs = [names.get(name, name) for name in node.input if name]
        if known.issuperset(inputs):
            leaves = {graph.origin(name) for name in inputs if graph.flax_path(name)}
            origin = leaves.pop() if len(leaves) == 1 else ""
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


def drop_identities(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without Identity and without Dropout, which is the identity outside training."""
    outputs = {output.name for output in model.graph.output}
    renamed: dict[str, str] = {}

    def current(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    kept = []
    for node in model.graph.node:
        if node.op_type not in IDENTITIES:
            kept.append(node)
        elif node.output[0] in outputs:
            renamed[current(node.input[0])] = node.output[0]
        else:
            renamed[node.output[0]] = current(node.input[0])
    nodes = [graph.rewired(node, map(current, node.input), map(current, node.output)) for node in kept]
    return graph.rebuild(model, nodes, graph.constants(model))


def fold_clip(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with `Min(Max(x, low), high)`, as jax2onnx writes relu6, made `Clip(x, low, high)`."""
    values = graph.constants(model)

    def clip(node: NodeProto, before: NodeProto) -> NodeProto | None:
        bounds = [name for name in (*before.input, *node.input) if name in values and values[name].size == 1]
        data = [name for name in before.input if name not in values]
        if before.op_type != "Max" or len(bounds) != 2 or len(data) != 1:
            return None
        for name in bounds:
            values[name] = values[name].reshape(())
        return helper.make_node("Clip", [*data, *bounds], node.output)

    return _fuse(model, values, frozenset({"Min"}), clip)


def fold_mean(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a sum divided by the number of its terms, as in `x.mean()`, made ReduceMean."""
    values = graph.constants(model)
    shapes = graph.shapes(model)

    def mean(division: NodeProto, before: NodeProto) -> NodeProto | None:
        if before.op_type != "ReduceSum" or before.input[0] not in shapes:
            return None
        axes, divisor = (values.get(node.input[-1]) for node in (before, division))
        if axes is None or divisor is None or divisor.size != 1:
            return None
        terms = math.prod(shapes[before.input[0]][axis] for axis in axes.ravel())
        if terms == 0 or divisor.item() != terms:
            return None
        return helper.make_node("ReduceMean", before.input, division.output, **graph.attributes(before))

    return _fuse(model, values, frozenset({"Div"}), mean)


def fold_batch_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with each BatchNormalization that alone reads a convolution folded into it.

    With gain = scale / sqrt(var + epsilon): kernel' = kernel * gain and bias' = (bias - mean) * gain + shift,
    computed in float64 (Jacob et al. 2018, arXiv 1712.05877, section 3.2). The kernel may be shared: every
    convolution gets its own folded copy. A batch norm without such a convolution stays.
    """
    values = graph.constants(model)

    def convolution(norm: NodeProto, before: NodeProto) -> NodeProto | None:
        if before.op_type != "Conv" or not values.keys() >= {*norm.input[1:], *before.input[1:]}:
            return None
        scale, shift, mean, variance = (values[name].astype(np.float64) for name in norm.input[1:])
        gain = scale / np.sqrt(variance + graph.attributes(norm)["epsilon"])
        kernel_name = before.input[1]
        kernel, *bias = (values[name] for name in before.input[1:])
        folded = {
            graph.derived(kernel_name, norm.output[0]): kernel * gain.reshape(-1, *[1] * (kernel.ndim - 1)),
            graph.derived(_sibling(kernel_name, "bias"), norm.output[0]): (sum(bias) - mean) * gain + shift,
        }
        values.update({name: value.astype(np.float32) for name, value in folded.items()})
        return graph.rewired(before, [before.input[0], *folded], norm.output)

    return _fuse(model, values, frozenset({"BatchNormalization"}), convolution)


def fold_dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with a matrix product by a constant, and the constant row added to it, made one Gemm."""
    values = graph.constants(model)

    def gemm(addition: NodeProto, before: NodeProto) -> NodeProto | None:
        bias = next((name for name in addition.input if name in values), "")
        plain = before.op_type == "MatMul" or (before.op_type == "Gemm" and _without_bias(before, values))
        if not plain or not bias or values.get(before.input[1], np.array(0)).ndim != 2:
            return None
        width = values[before.input[1]].shape[0 if graph.attributes(before).get("transB") else 1]
        if values[bias].shape not in {(width,), (1, width)}:
            return None
        row = graph.derived(bias, addition.output[0])
        values[row] = values[bias].reshape(width)
        stated = graph.attributes(before) | {"beta": 1.0}
        return helper.make_node("Gemm", [*before.input[:2], row], addition.output, **stated)

    return _fuse(model, values, frozenset({"Add"}), gemm)


def _without_bias(gemm: NodeProto, values: dict[str, np.ndarray]) -> bool:
    if len(gemm.input) < 3 or graph.attributes(gemm).get("beta", 1.0) == 0.0:
        return True
    bias = values.get(gemm.input[2])
    return bias is not None and not np.any(bias)


def _sibling(name: str, leaf: str) -> str:
    """The leaf of that name in the module of the constant `name`."""
    return f"{graph.origin(name).rpartition('/')[0]}/{leaf}"


def _fuse(
    model: onnx.ModelProto,
    values: dict[str, np.ndarray],
    operators: frozenset[str],
    fused: Callable[[NodeProto, NodeProto], NodeProto | None],
) -> onnx.ModelProto:
    """Replace a node and the one before it by `fused(node, before)`, where it has a result.

    Asked only for pairs in which the first node's output is read by the second alone.
    """
    uses = graph.uses(model)
    nodes: dict[str, NodeProto] = {}
    for node in model.graph.node:
        before = [nodes[name] for name in node.input if name in nodes and uses[name] == 1]
        if node.op_type in operators:
            node = next(filter(None, (fused(node, candidate) for candidate in before)), node)
        nodes[node.output[0]] = node
    return graph.rebuild(model, nodes.values(), values)
