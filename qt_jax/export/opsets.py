"""Restate a graph, which every other pass builds at opset 21, in the operators of an older opset."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import NodeProto, defs, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes

OPSETS = range(13, 22)
"""Opsets of ai.onnx that an export may have."""

REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd"})
"""Operators that take their axes as an input from opset 18 on; ReduceSum does so from 13 on."""


def at_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Restate `model`, written at opset 21, in the operators of an earlier opset.

    Operators that came later are decomposed: GroupNormalization (21), Gelu (20), Mish (18),
    LayerNormalization (17), HardSwish (14), Shape with a start (15). Reductions take their axes as an
    attribute before 18.

    Raises:
      InvalidInput: The graph holds an operator that ONNX does not have at that opset.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        since, restate = RESTATED.get(node.op_type, (0, None))
        if restate is not None and opset < since:
            nodes.extend(restate(node, values, shapes))
        elif not defs.has(node.op_type, opset):
            raise InvalidInput(f"ONNX has no {node.op_type} at opset {opset}: choose a later one")
        else:
            nodes.append(node)
    target = onnx.ModelProto()
    target.CopyFrom(model)
    del target.opset_import[:]
    target.opset_import.append(helper.make_opsetid("", opset))
    return graph.rebuild(target, nodes, values)


def _scalar(values: Constants, number: float) -> str:
    """Add a float32 number to the constants; return its name."""
    return values.add(f"constant#{number}", np.array(number, np.float32))


def _chain(output: str, *steps: tuple) -> list[NodeProto]:
    """Make a chain of nodes, of which the last writes `output`.

    Args:
      output: Tensor to write.
      steps: `(operator, inputs, attributes)` for each node, attributes being optional. An input `...` is the
        output of the step before.
    """
    nodes: list[NodeProto] = []
    for index, (operator, inputs, *attributes) in enumerate(steps):
        before = nodes[-1].output[0] if nodes else ""
        read = [before if name is ... else name for name in inputs]
        name = output if index == len(steps) - 1 else f"{output}/{index}"
        nodes.append(helper.make_node(operator, read, [name], **(attributes[0] if attributes else {})))
    return nodes


def _hard_swish(node: NodeProto, values: Constants, _: Shapes) -> list[NodeProto]:
    """Compute x * max(0, min(1, x / 6 + 1 / 2))."""
    (x,), (y,) = node.input, node.output
    return _chain(y, ("HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}), ("Mul", [x, ...]))


def _gelu(node: NodeProto, values: Constants, _: Shapes) -> list[NodeProto]:
    """Compute x / 2 * (1 + erf(x / sqrt(2))), or its tanh approximation.

    Both are by Hendrycks and Gimpel, arXiv 1606.08415.
    """
    (x,), (y,) = node.input, node.output
    one, half = _scalar(values, 1.0), _scalar(values, 0.5)
    if graph.attributes(node).get("approximate", b"none") == b"none":
        inner = [("Div", [x, _scalar(values, float(np.sqrt(2)))]), ("Erf", [...])]
    else:
        inner = [
            ("Mul", [x, x]),
            ("Mul", [..., x]),
            ("Mul", [..., _scalar(values, 0.044715)]),
            ("Add", [x, ...]),
            ("Mul", [..., _scalar(values, float(np.sqrt(2 / np.pi)))]),
            ("Tanh", [...]),
        ]
    return _chain(y, *inner, ("Add", [..., one]), ("Mul", [x, ...]), ("Mul", [..., half]))


def _mish(node: NodeProto, values: Constants, _: Shapes) -> list[NodeProto]:
    """Compute x * tanh(softplus(x))."""
    (x,), (y,) = node.input, node.output
    return _chain(y, ("Softplus", [x]), ("Tanh", [...]), ("Mul", [x, ...]))


def _layer_norm(node: NodeProto, values: Constants, shapes: Shapes) -> list[NodeProto]:
    """Compute (x - mean) / sqrt(var + epsilon) * scale + bias, over the axes from `axis` on."""
    (x, scale, *bias), y = node.input, node.output[0]
    stated = graph.attributes(node)
    rank = len(shapes[x])
    axes = list(range(stated.get("axis", -1) % rank, rank))
    mean = helper.make_node("ReduceMean", [x], [f"{y}/mean"], axes=axes)
    centred = helper.make_node("Sub", [x, f"{y}/mean"], [f"{y}/centred"])
    return [
        mean,
        centred,
        *_chain(
            y,
            ("Mul", [f"{y}/centred", f"{y}/centred"]),
            ("ReduceMean", [...], {"axes": axes}),
            ("Add", [..., _scalar(values, stated.get("epsilon", 1e-5))]),
            ("Sqrt", [...]),
            ("Div", [f"{y}/centred", ...]),
            ("Mul", [..., scale]),
            *[("Add", [..., name]) for name in bias],
        ),
    ]


def _group_norm(node: NodeProto, values: Constants, shapes: Shapes) -> list[NodeProto]:
    """Normalize each group as an instance, then apply the scale and bias of each channel."""
    (x, scale, bias), y = node.input, node.output[0]
    stated = graph.attributes(node)
    groups, trailing = stated["num_groups"], (1,) * (len(shapes[x]) - 2)
    values |= {
        f"{y}/ones": np.ones(groups, np.float32),
        f"{y}/zeros": np.zeros(groups, np.float32),
        f"{y}/groups": np.array((0, groups, -1), np.int64),
        f"{y}/full": np.array((-1, *shapes[x][1:]), np.int64),
    }
    scale, bias = (values.derive(name, y, values[name].reshape(-1, *trailing)) for name in (scale, bias))
    return _chain(
        y,
        ("Reshape", [x, f"{y}/groups"]),
        ("InstanceNormalization", [..., f"{y}/ones", f"{y}/zeros"], {"epsilon": stated["epsilon"]}),
        ("Reshape", [..., f"{y}/full"]),
        ("Mul", [..., scale]),
        ("Add", [..., bias]),
    )


def _reduction(node: NodeProto, values: Constants, _: Shapes) -> list[NodeProto]:
    """Reduce over axes that are an attribute."""
    axes = values[node.input[1]].ravel().tolist()
    stated = graph.attributes(node)
    return [helper.make_node(node.op_type, node.input[:1], node.output, axes=axes, **stated)]


def _shape(node: NodeProto, values: Constants, _: Shapes) -> list[NodeProto]:
    """Slice the whole Shape from `start` to `end`."""
    stated = graph.attributes(node)
    values |= {f"shape#{end}": np.array([stated[end]], np.int64) for end in ("start", "end")}
    return _chain(node.output[0], ("Shape", [node.input[0]]), ("Slice", [..., "shape#start", "shape#end"]))


RESTATED: dict[str, tuple[int, Callable[..., list[NodeProto]]]] = {
    **dict.fromkeys(REDUCTIONS, (18, _reduction)),
    "Gelu": (20, _gelu),
    "GroupNormalization": (21, _group_norm),
    "HardSwish": (14, _hard_swish),
    "LayerNormalization": (17, _layer_norm),
    "Mish": (18, _mish),
    "Shape": (15, _shape),
}
"""Maps an operator to the opset it came with, and to the function that decomposes it before."""
