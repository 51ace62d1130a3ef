"""Activations that were traced as arithmetic, made the operators they are.

jax2onnx knows `nn.hard_swish` by that name alone: a model that keeps the function in a field of its own, as
many do, is traced through to its arithmetic.
"""

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph

Values = dict[str, np.ndarray]
Producers = dict[str, NodeProto]


def fold_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the arithmetic of Relu, Clip, LeakyRelu, HardSigmoid and HardSwish made these operators.

    >>> from onnx import numpy_helper
    >>> bounds = [numpy_helper.from_array(np.array(bound, np.float32), str(bound)) for bound in (0, 6)]
    >>> x, y = (helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy")
    >>> nodes = [helper.make_node("Max", ["x", "0"], ["m"]), helper.make_node("Min", ["m", "6"], ["y"])]
    >>> body = helper.make_graph(nodes, "g", [x], [y], bounds)
    >>> [node.op_type for node in fold_activations(helper.make_model(body)).graph.node]
    ['Clip']
    """
    values = graph.constants(model)
    producers: Producers = {}
    nodes = []
    for node in model.graph.node:
        for recognised in (_relu, _clip, _leaky_relu, _hard_sigmoid, _hard_swish):
            node = recognised(node, producers, values) or node
        producers[node.output[0]] = node
        nodes.append(node)
    return graph.rebuild(model, nodes, values)


def _joined(node: NodeProto | None, values: Values) -> tuple[float | None, str]:
    """The number and the tensor that a binary node joins; None without such a number."""
    if node is None or len(node.input) != 2:
        return None, ""
    numbers = [name for name in node.input if name in values and values[name].size == 1]
    tensors = [name for name in node.input if name not in numbers]
    return (values[numbers[0]].item(), tensors[0]) if len(numbers) == len(tensors) == 1 else (None, "")


def _relu(node: NodeProto, _: Producers, values: Values) -> NodeProto | None:
    """max(x, 0)."""
    number, tensor = _joined(node, values) if node.op_type == "Max" else (None, "")
    return helper.make_node("Relu", [tensor], node.output) if number == 0.0 else None


def _bounds(node: NodeProto | None, values: Values) -> tuple[float, float, str] | None:
    """The interval that a node bounds a tensor to, and the tensor."""
    if node is None or node.op_type not in ("Clip", "Max", "Min", "Relu"):
        return None
    if node.op_type == "Relu":
        return 0.0, np.inf, node.input[0]
    if node.op_type == "Clip":
        names = [*node.input[1:], "", ""][:2]
        if not all(not name or name in values for name in names):
            return None
        low, high = (values[name].item() if name else None for name in names)
        return (-np.inf if low is None else low), (np.inf if high is None else high), node.input[0]
    number, tensor = _joined(node, values)
    if number is None:
        return None
    return (number, np.inf, tensor) if node.op_type == "Max" else (-np.inf, number, tensor)


def _clip(node: NodeProto, producers: Producers, values: Values) -> NodeProto | None:
    """min(max(x, low), high), max(min(x, high), low), and bounds within bounds."""
    outer = _bounds(node, values)
    inner = _bounds(producers.get(outer[2]), values) if outer else None
    if outer is None or inner is None or outer[0] > inner[1] or outer[1] < inner[0]:
        return None
    low, high = max(inner[0], outer[0]), min(inner[1], outer[1])
    if np.inf in (-low, high):
        return None
    names = [f"{node.output[0]}#low", f"{node.output[0]}#high"]
    values |= dict(zip(names, (np.array(bound, np.float32) for bound in (low, high)), strict=True))
    return helper.make_node("Clip", [inner[2], *names], node.output)


def _leaky_relu(node: NodeProto, producers: Producers, values: Values) -> NodeProto | None:
    """where(x >= 0, x, slope * x)."""
    if node.op_type != "Where":
        return None
    condition, x, scaled = node.input
    test, product = producers.get(condition), producers.get(scaled)
    slope, source = _joined(product, values)
    positive = test is not None and test.op_type in ("Greater", "GreaterOrEqual") and test.input[0] == x
    zero = positive and test.input[1] in values and not np.any(values[test.input[1]])
    if not zero or slope is None or product.op_type != "Mul" or source != x:
        return None
    return helper.make_node("LeakyRelu", [x], node.output, alpha=slope)


def _hard_sigmoid(node: NodeProto, producers: Producers, values: Values) -> NodeProto | None:
    """clip(x + 3, 0, 6) / 6 (Howard et al. 2019, arXiv 1905.02244)."""
    number, tensor = _joined(node, values)
    sixth = node.op_type == "Div" and number == 6.0 and node.input[0] == tensor
    sixth |= node.op_type == "Mul" and number == np.float32(1 / 6)
    bounded = _bounds(producers.get(tensor), values) if sixth else None
    if bounded is None or bounded[:2] != (0.0, 6.0):
        return None
    shift = producers.get(bounded[2])
    three, x = _joined(shift, values)
    if three != 3.0 or shift.op_type != "Add":
        return None
    return helper.make_node("HardSigmoid", [x], node.output, alpha=1 / 6, beta=0.5)


def _hard_swish(node: NodeProto, producers: Producers, _: Values) -> NodeProto | None:
    """x times its hard sigmoid."""
    if node.op_type != "Mul":
        return None
    for x, gate in (node.input, node.input[::-1]):
        sigmoid = producers.get(gate)
        if sigmoid is not None and sigmoid.op_type == "HardSigmoid" and sigmoid.input[0] == x:
            stated = graph.attributes(sigmoid)
            if np.allclose((stated.get("alpha", 0.2), stated.get("beta", 0.5)), (1 / 6, 0.5), atol=1e-6):
                return helper.make_node("HardSwish", [x], node.output)
    return None
