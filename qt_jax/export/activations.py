"""Recognize activations that were traced as arithmetic, and write them as the operators they are.

In the program that runs, an activation is its arithmetic, whatever the function is called.
"""

import functools
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import graph
from qt_jax.export.emission import OPSET
from qt_jax.export.graph import Constants
from qt_jax.export.operators import BINARY, UNARY

Producers = dict[str, NodeProto]
"""Maps a tensor to the node that writes it, in the order of the graph."""

FAR = np.array([15, 17, 20, 25, 30, 40, 60, 80, 1e2, 3e2, 7e2], np.float32)
PROBES = np.concatenate([np.linspace(-12.0, 12.0, 97, dtype=np.float32), FAR, -FAR])
"""Numbers at which an expression is compared with a curve."""

TOLERANCE = 4e-6
"""Largest difference at a probe x, divided by max(1, |x|)."""

LONGEST = 16
"""Largest number of nodes of an expression that is tried."""

LAST = frozenset({"Add", "Div", "Mul", "Where"})
"""Operators that such an expression ends with."""

CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu, tanh": ("Gelu", {"approximate": "tanh"}),
    "hard sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hard swish": ("HardSwish", {}),
    "elu": ("Elu", {}),
    "selu": ("Selu", {}),
    "softplus": ("Softplus", {}),
}
"""Maps the name of a curve to its operator and attributes."""


def fold_activations(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn the arithmetic of activations into their operators.

    Relu, Clip and LeakyRelu, which have parameters, are recognized by their form. The `CURVES` are recognized
    by their values: an expression of one tensor and of numbers that has a curve's values at every probe is
    that curve.

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
        for recognized in (_relu, _clip, _leaky_relu, _by_value):
            node = recognized(node, producers, values) or node
        producers[node.output[0]] = node
        nodes.append(node)
    return graph.rebuild(model, nodes, values)


def _joined(node: NodeProto | None, values: Constants) -> tuple[float | None, str]:
    """Return the number and the tensor that a binary node joins; (None, "") where it joins others."""
    if node is None or len(node.input) != 2:
        return None, ""
    numbers = [name for name in node.input if name in values and values[name].size == 1]
    tensors = [name for name in node.input if name not in numbers]
    if any(values[name].dtype != np.float32 for name in numbers):
        return None, ""
    return (values[numbers[0]].item(), tensors[0]) if len(numbers) == len(tensors) == 1 else (None, "")


def _relu(node: NodeProto, _: Producers, values: Constants) -> NodeProto | None:
    """Recognize max(x, 0)."""
    number, tensor = _joined(node, values) if node.op_type == "Max" else (None, "")
    return helper.make_node("Relu", [tensor], node.output) if number == 0.0 else None


def _bounds(node: NodeProto | None, values: Constants) -> tuple[float, float, str] | None:
    """Return the interval that a node bounds a tensor to, and the tensor; None for any other node."""
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


def _clip(node: NodeProto, producers: Producers, values: Constants) -> NodeProto | None:
    """Recognize min(max(x, low), high), max(min(x, high), low), and bounds within bounds."""
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


def _leaky_relu(node: NodeProto, producers: Producers, values: Constants) -> NodeProto | None:
    """Recognize where(x >= 0, x, slope * x): PRelu where the slope is a parameter."""
    if node.op_type != "Where":
        return None
    condition, x, scaled = node.input
    test, product = producers.get(condition), producers.get(scaled)
    slope, source = _joined(product, values)
    if test is None or product is None or slope is None or product.op_type != "Mul" or source != x:
        return None
    positive = test.op_type in ("Greater", "GreaterOrEqual") and test.input[0] == x
    if not positive or test.input[1] not in values or np.any(values[test.input[1]]):
        return None
    learned = next((name for name in product.input if values.flax_path(name)), "")
    if learned:
        return helper.make_node("PRelu", [x, learned], node.output)
    return helper.make_node("LeakyRelu", [x], node.output, alpha=slope)


def _by_value(node: NodeProto, producers: Producers, values: Constants) -> NodeProto | None:
    """Recognize a curve of `CURVES` that the expression ending in `node` computes from a tensor before it."""
    if node.op_type not in LAST:
        return None
    order = {name: position for position, name in enumerate(producers)}
    expression, open_ends = [node], _tensors(node, values)
    while open_ends and len(expression) < LONGEST:
        if len(open_ends) == 1 and len(expression) > 1:
            (source,) = open_ends
            curve = _curve(expression[::-1], source, values)
            if curve is not None:
                operator, stated = CURVES[curve]
                return helper.make_node(operator, [source], node.output, **stated)
        latest = max(open_ends, key=lambda name: order.get(name, -1))
        before = producers.get(latest)
        if before is None or before.op_type not in UNARY | BINARY:
            return None
        more = _tensors(before, values)
        if more is None:
            return None
        expression.append(before)
        open_ends = (open_ends - {latest}) | more
    return None


def _tensors(node: NodeProto, values: Constants) -> set[str] | None:
    """Return what `node` reads besides numbers; None if that includes a constant tensor."""
    constants = [values[name].size for name in node.input if name in values]
    return None if any(size != 1 for size in constants) else {x for x in node.input if x and x not in values}


def _curve(expression: list[NodeProto], source: str, values: Constants) -> str | None:
    """Return the name of the curve that nodes, in order, compute from `source`; None if it is another.

    The values at the probes decide.
    """
    numbers = {name: values[name] for node in expression for name in node.input if name in values}
    if any(value.dtype != np.float32 for value in numbers.values()):
        return None
    found = _evaluated(expression, {source: PROBES} | numbers)
    if not np.all(np.isfinite(found)):
        return None
    near = TOLERANCE * np.maximum(1.0, np.abs(PROBES))
    return next((name for name in CURVES if np.all(np.abs(found - _wanted(name)) <= near)), None)


@functools.cache
def _wanted(curve: str) -> np.ndarray:
    """Evaluate a curve at the probes, in float64."""
    operator, stated = CURVES[curve]
    curve_node = helper.make_node(operator, ["x"], ["y"], **stated)
    return _evaluated([curve_node], {"x": PROBES.astype(np.float64)})


def _evaluated(nodes: list[NodeProto], given: dict[str, np.ndarray]) -> np.ndarray:
    """Evaluate the last of `nodes` on the tensors `given`, by ONNX's reference evaluator."""
    inputs = [helper.make_empty_tensor_value_info(name) for name in given]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    body = helper.make_graph(nodes, "expression", inputs, [output])
    opset = [helper.make_opsetid("", OPSET)]
    with np.errstate(all="ignore"):
        (result,) = ReferenceEvaluator(helper.make_model(body, opset_imports=opset)).run(None, given)
    return np.asarray(result)
