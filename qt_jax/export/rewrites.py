"""Rewrite small groups of nodes into what one operator says better, and drop nodes that do nothing.

Compilers know a dense layer on a sequence as MatMul, where the program may merge the sequence with the batch,
multiply rows, and split them again.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import math

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.operators import BINARY

IDENTITIES = frozenset({"Dropout", "Identity"})

SAME_SHAPE = frozenset({"Expand", "Reshape", "Slice", "Tile"})
"""Operators that return a tensor as it is where they are given the shape that it has already."""


def drop_identities(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the nodes that return their input.

    These are Identity, Dropout outside training, a Cast to the type that is there already, and a Reshape,
    Expand, Slice or Tile to the shape that is there already.
    """
    shapes, types = graph.shapes(model), graph.element_types(model)
    outputs = {output.name for output in model.graph.output}
    renamed: dict[str, str] = {}

    def current(name: str) -> str:
        while name in renamed:
            name = renamed[name]
        return name

    def does_nothing(node: NodeProto) -> bool:
        source, result = (shapes.get(name) for name in (node.input[0], node.output[0]))
        if node.op_type in SAME_SHAPE:
            backwards = node.op_type == "Slice" and len(node.input) > 4 and _reverses(node, values)
            open_ = node.op_type in ("Slice", "Tile") and source is not None and 0 in source
            return source is not None and source == result and not backwards and not open_
        if node.op_type in ("Cast", "CastLike"):
            wanted = graph.attributes(node).get("to") or types.get(node.input[-1])
            return wanted == types.get(node.input[0])
        return node.op_type in IDENTITIES

    values = graph.constants(model)
    boundary = outputs | {entry.name for entry in model.graph.input} | values.keys()
    kept = []
    for node in model.graph.node:
        if not node.input or not does_nothing(node):
            kept.append(node)
        elif node.output[0] not in outputs:
            renamed[node.output[0]] = current(node.input[0])
        elif current(node.input[0]) not in boundary:
            renamed[current(node.input[0])] = node.output[0]
        else:
            kept.append(helper.make_node("Identity", node.input[:1], node.output))
    nodes = [graph.rewired(node, map(current, node.input), map(current, node.output)) for node in kept]
    return graph.rebuild(model, nodes, values)


def _reverses(node: NodeProto, values: Constants) -> bool:
    """Tell whether a Slice has a negative step, or one that is not known."""
    return bool(np.any(values.get(node.input[4], np.array(-1)) < 0))


def drop_expands(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the Expands that broadcasting makes superfluous, and write ReduceSumSquare out."""
    values, shapes = graph.constants(model), graph.shapes(model)
    expanded = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Expand"}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in BINARY:
            if expanded.keys() & set(node.input):
                others = [expanded.get(other, other) for other in node.input]
                if np.broadcast_shapes(*(shapes[other] for other in others)) == shapes[node.output[0]]:
                    node = graph.rewired(node, others)
        elif node.op_type == "ReduceSumSquare":
            square = f"{node.output[0]}/square"
            nodes.append(helper.make_node("Mul", [node.input[0]] * 2, [square]))
            node = helper.make_node(
                "ReduceSum", [square, *node.input[1:]], node.output, **graph.attributes(node)
            )
        nodes.append(node)
    return graph.rebuild(model, nodes, values)


def plain_reshapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn Squeeze and Unsqueeze into Reshape, and join a Reshape with the one before it.

    A reduction whose axes are put back by a Reshape becomes a reduction that keeps them.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    producers: dict[str, NodeProto] = {}
    read = graph.uses(model)
    for node in model.graph.node:
        if node.op_type in ("Squeeze", "Unsqueeze") and node.output[0] in shapes:
            node = _to_shape(node.input[0], node.output[0], values, shapes)
        before = producers.get(node.input[0]) if node.op_type == "Reshape" else None
        if before is not None and before.op_type == "Reshape":
            node = _to_shape(before.input[0], node.output[0], values, shapes)
            before = producers.get(node.input[0])
        if before is not None and before.op_type.startswith("Reduce") and read[before.output[0]] == 1:
            node = _kept_axes(before, node, values, shapes) or node
        producers[node.output[0]] = node
    unique = {id(node): node for node in producers.values()}
    return graph.rebuild(model, unique.values(), values)


def _to_shape(source: str, output: str, values: Constants, shapes: Shapes) -> NodeProto:
    """Make the Reshape of `source` to the known shape of `output`."""
    values[f"{output}#shape"] = np.array(shapes[output], np.int64)
    return helper.make_node("Reshape", [source, f"{output}#shape"], [output])


def _kept_axes(
    reduction: NodeProto, reshape: NodeProto, values: Constants, shapes: Shapes
) -> NodeProto | None:
    """Make the reduction that keeps its axes; None where the Reshape does not put back just these."""
    source, result = shapes[reduction.input[0]], shapes[reshape.output[0]]
    axes = {axis % len(source) for axis in values[reduction.input[1]].ravel().tolist()}
    kept = tuple(1 if axis in axes else size for axis, size in enumerate(source))
    if kept != result:
        return None
    stated = graph.attributes(reduction) | {"keepdims": 1}
    return helper.make_node(reduction.op_type, reduction.input, reshape.output, **stated)


def unflatten_dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn Reshape to rows, Gemm and Reshape back into MatMul on the tensor as it was.

    The leading axes that the first Reshape merged are kept. Where it merged contracted axes, as in the output
    projection of attention, a Reshape of those remains. On rows that were never merged Gemm stays.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    reshapes = {node.output[0]: node for node in model.graph.node if node.op_type == "Reshape"}
    back = {node.input[0]: shapes.get(node.output[0], ()) for node in reshapes.values()}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        flattened = reshapes.get(node.input[0]) if node.op_type == "Gemm" else None
        if flattened is None or node.input[1] not in values:
            nodes.append(node)
        else:
            nodes.extend(_product(node, flattened.input[0], back, values, shapes))
    return graph.rebuild(model, nodes, values)


def _product(
    gemm: NodeProto,
    source: str,
    back: Shapes,
    values: Constants,
    shapes: Shapes,
) -> list[NodeProto]:
    """Write one Gemm on merged rows as MatMul, or keep it where its rows are not split again.

    Args:
      gemm: Reads the rows.
      source: Tensor that was reshaped to rows.
      back: Maps the output of a Gemm to the shape it is reshaped to.
      values: Constants; the shapes of new Reshapes are added.
      shapes: Shapes of the tensors of the graph.
    """
    rows, width = shapes[gemm.input[0]]
    leading = _leading_axes(shapes[source], rows, back.get(gemm.output[0], ()))
    if len(leading) < 2 or graph.attributes(gemm).get("transB"):
        return [gemm]
    output, kernel = gemm.output[0], gemm.input[1]
    nodes = []
    if shapes[source] != (*leading, width):
        merged = f"{output}/merged"
        values[f"{merged}/shape"] = np.array((*leading, width), np.int64)
        nodes.append(helper.make_node("Reshape", [source, f"{merged}/shape"], [merged]))
        source = merged
    product = f"{output}/product"
    nodes.append(helper.make_node("MatMul", [source, kernel], [product]))
    values[f"{output}/rows"] = np.array(shapes[output], np.int64)
    return [*nodes, helper.make_node("Reshape", [product, f"{output}/rows"], [output])]


def _leading_axes(shape: tuple[int, ...], rows: int, back: tuple[int, ...]) -> tuple[int, ...]:
    """Return the leading axes of `shape` that were merged to `rows` and are split again in `back`."""
    splits = [shape[:axis] for axis in range(1, len(shape)) if math.prod(shape[:axis]) == rows]
    return max((split for split in splits if back[: len(split)] == split), key=len, default=())


def fold_index(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn `x[:, i]`, a Slice of size 1 and a Reshape that drops its axis, into Gather."""
    values, shapes = graph.constants(model), graph.shapes(model)

    def gather(reshape: NodeProto, before: NodeProto) -> NodeProto | None:
        if before.op_type != "Slice":
            return None
        whole, part, result = (
            shapes[name] for name in (before.input[0], before.output[0], reshape.output[0])
        )
        cut = [axis for axis, size in enumerate(part) if size != whole[axis]]
        if len(cut) != 1 or part[cut[0]] != 1 or (*part[: cut[0]], *part[cut[0] + 1 :]) != result:
            return None
        starts, _, axes = (values[name].tolist() for name in before.input[1:4])
        start = starts[[axis % len(whole) for axis in axes].index(cut[0])] % whole[cut[0]]
        values[f"{reshape.output[0]}#index"] = np.array(start, np.int64)
        index = [before.input[0], f"{reshape.output[0]}#index"]
        return helper.make_node("Gather", index, reshape.output, axis=cut[0])

    return graph.fuse(model, values, frozenset({"Reshape"}), gather)


def fold_stack(model: onnx.ModelProto) -> onnx.ModelProto:
    """Read one entry of a stack, such as a recurrent cell's last state, from the tensor that was stacked."""
    values, shapes = graph.constants(model), graph.shapes(model)
    stacks = {node.output[0]: node for node in model.graph.node if node.op_type == "Concat"}

    def taken(node: NodeProto) -> NodeProto:
        stack = stacks.get(node.input[0]) if node.op_type == "Gather" else None
        index = None if stack is None else values.get(node.input[1])
        if stack is None or index is None or index.ndim or any(name not in shapes for name in stack.input):
            return node
        rank = len(shapes[stack.output[0]])
        axes = {graph.attributes(each).get("axis", 0) % rank for each in (node, stack)}
        if len(axes) > 1 or any(shapes[name][min(axes)] != 1 for name in stack.input):
            return node
        return _to_shape(stack.input[index.item()], node.output[0], values, shapes)

    return graph.rebuild(model, [taken(node) for node in model.graph.node], values)


def pad_tokens(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn the join of a sequence and tokens that are the same for each image into Pad, before a sum.

    The tokens become rows of the constant that is added, so that no Expand has to repeat them for each image:
    [token, x] + positions = [0, x] + (positions + [token, 0]).
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    read = graph.uses(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        added = next((name for name in node.input if name in values), "")
        join = next((nodes[name] for name in node.input if name in nodes), None)
        if node.op_type != "Add" or not added or join is None or join.op_type != "Concat":
            continue
        whole, total = join.output[0], node.output[0]
        if read[whole] > 1 or shapes[whole] != shapes[total] or values[added].dtype != np.float32:
            continue
        axis = graph.attributes(join)["axis"] % len(shapes[whole])
        rows = _rows(join, axis, values[added], values, shapes)
        if rows is not None:
            values.add(f"{total}#rows", rows, values.origins.get(added, ""))
            nodes[whole] = _pad(join, axis, values, shapes)
            nodes[total] = graph.rewired(node, [whole, f"{total}#rows"])
    return graph.rebuild(model, nodes.values(), values)


def _rows(
    join: NodeProto, axis: int, added: np.ndarray, values: Constants, shapes: Shapes
) -> np.ndarray | None:
    """Return a constant plus the tokens of a join, with 0 in place of its one tensor.

    Returns:
      float32 `(1, ...)`; None where the join has several tensors or no tokens, or a constant differs among
      the images.
    """
    full = added.reshape((1,) * (len(shapes[join.output[0]]) - added.ndim) + added.shape)
    tokens = [name for name in join.input if name in values]
    constants = [full, *(values[name] for name in tokens)]
    alike = all(np.array_equal(np.broadcast_to(x[:1], x.shape), x) for x in constants)
    batch = shapes[join.output[0]][0]
    if axis == 0 or batch < 2 or not tokens or len(tokens) + 1 != len(join.input) or not alike:
        return None
    parts = [
        values[name][:1] if name in values else np.zeros((1, *shapes[name][1:]), np.float32)
        for name in join.input
    ]
    rows: np.ndarray = np.concatenate(parts, axis) + full[:1]
    return rows


def _pad(join: NodeProto, axis: int, values: Constants, shapes: Shapes) -> NodeProto:
    """Make the Pad that writes 0 where a join of one tensor has its constants."""
    place = next(index for index, name in enumerate(join.input) if name not in values)
    pads = np.zeros((2, len(shapes[join.output[0]])), np.int64)
    for end, names in enumerate((join.input[:place], join.input[place + 1 :])):
        pads[end, axis] = sum(shapes[name][axis] for name in names)
    values[f"{join.output[0]}#pads"] = pads.ravel()
    return helper.make_node("Pad", [join.input[place], f"{join.output[0]}#pads"], join.output)
