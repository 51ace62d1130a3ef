"""From the one concrete batch a graph was lowered with to a symbolic one."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.operators import BINARY

MARKS = (1009, 1013, 1019, 1021)
"""Batches to lower with: primes. A size that is a multiple of the one chosen holds the batch."""

NAME = "batch"

Values = dict[str, np.ndarray]


def unmistakable(sizes: Iterable[int]) -> int:
    """A batch that no size of a model can be taken for.

    >>> unmistakable([3, 2 * 1009])
    1013
    """
    sizes = set(sizes)
    return next(mark for mark in MARKS if all(size % mark for size in sizes))


def _mark(model: onnx.ModelProto) -> int:
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value


def symbolic_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` for batches of any size: "batch" leads every input and output.

    A Reshape infers the axis that holds the batch; an Expand leaves it to its input. A constant that is
    repeated for each image is kept once: where broadcasting does not repeat it (a class token), an Expand
    takes the batch from the graph's input.

    Raises:
      InvalidInput: the batch is held where it cannot be left open; names the node.
    """
    values, shapes, mark = graph.constants(model), graph.shapes(model), _mark(model)
    repeated = {name for name, value in values.items() if _repeats(value, mark)}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in ("Expand", "Reshape") and _holds_batch(values.get(node.input[1]), mark):
            target = values[node.input[1]]
            if node.op_type == "Reshape":
                node = graph.rewired(
                    node, [node.input[0], _shape(values, _inferred(node, target, mark).tolist())]
                )
            elif shapes[node.input[0]][:1] == (mark,) and len(target) == len(shapes[node.input[0]]):
                node = graph.rewired(node, [node.input[0], _shape(values, [1, *target[1:].tolist()])])
            else:
                nodes.extend(_expanded(node.input[0], node.output[0], target.tolist(), values))
                continue
        broadcasts = node.op_type in BINARY and any(
            shapes[name][:1] == (mark,) for name in node.input if name not in repeated
        )
        if not broadcasts:
            for name in repeated.intersection(node.input):
                whole = f"{node.output[0]}/{len(nodes)}"
                nodes.extend(_expanded(name, whole, values[name].shape, values))
                node = graph.rewired(node, [whole if other == name else other for other in node.input])
        nodes.append(node)
    for name in repeated:
        values[name] = values[name][:1]
    size = helper.make_node("Shape", [model.graph.input[0].name], ["batch_size"], start=0, end=1)
    result = graph.rebuild(model, [size, *nodes], values)
    _refuse_held(result, mark)
    return _with_boundary(result)


def _holds_batch(value: np.ndarray | None, mark: int) -> bool:
    """Whether a constant is a shape that holds the batch."""
    if value is None or value.dtype != np.int64 or value.ndim != 1:
        return False
    return bool(np.any((value > 0) & (value % mark == 0)))


def _repeats(value: np.ndarray, mark: int) -> bool:
    """Whether a constant holds the same for each image."""
    batched = value.ndim > 0 and value.shape[0] == mark
    floating = np.issubdtype(value.dtype, np.floating)
    return batched and np.array_equal(value, np.broadcast_to(value[:1], value.shape), equal_nan=floating)


def _shape(values: Values, sizes: Sequence[int]) -> str:
    name = f"shape#{len(values)}"
    values[name] = np.array(sizes, np.int64)
    return name


def _inferred(node: NodeProto, target: np.ndarray, mark: int) -> np.ndarray:
    inferred = np.where((target > 0) & (target % mark == 0), -1, target)
    if np.sum(inferred == -1) > 1:
        raise InvalidInput(f'the reshape of "{node.input[0]}" to {target.tolist()} splits the batch in two')
    return inferred


def _expanded(source: str, output: str, target: Sequence[int], values: Values) -> list[NodeProto]:
    """`source` repeated to (batch, *target[1:])."""
    sizes = ["batch_size", *([_shape(values, target[1:])] if len(target) > 1 else [])]
    return [
        helper.make_node("Concat", sizes, [f"{output}/shape"], axis=0),
        helper.make_node("Expand", [source, f"{output}/shape"], [output]),
    ]


def _refuse_held(model: onnx.ModelProto, mark: int) -> None:
    for name, value in graph.constants(model).items():
        counted = value.size == 1 and value.item() in (mark, np.float32(1 / mark))
        if _holds_batch(value, mark) or mark in value.shape or counted:
            reader = next(node for node in model.graph.node if name in node.input)
            raise InvalidInput(
                f"the batch is a fixed number in the {reader.op_type} that reads {list(reader.input)[:1]}: "
                "use x.shape[0] only in reshape and broadcast_to"
            )


def _with_boundary(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the symbol "batch" as the leading size of inputs and outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for entry in (*result.graph.input, *result.graph.output):
        leading = entry.type.tensor_type.shape.dim[0]
        leading.Clear()
        leading.dim_param = NAME
    return result
