"""How each operator works on the source of a view instead of on the view (see `layout`)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.operators import BINARY, UNARY
from qt_jax.export.views import TO_CHANNELS_LAST, View, Views

GLOBAL_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"})
AXIS_ATTRIBUTE = frozenset({"Concat", "LogSoftmax", "Softmax", "Split"})


def carry(node: NodeProto, views: Views) -> list[NodeProto] | None:
    """`node` working on the sources of the views it reads; None if it cannot, or reads none.

    Its outputs are noted as views.
    """
    data = [name for name in node.input if name and name not in views.values]
    seen = {views.views[name].permutation for name in data if name in views.views}
    if len(seen) != 1:
        return None
    view = next(views.views[name] for name in data if name in views.views)
    if node.op_type == "Reshape":
        return _reshape(node, view, views)
    if node.op_type in UNARY | BINARY:
        return _elementwise(node, data, view, views)
    if any(name not in views.views for name in data):
        return None
    if node.op_type in AXIS_ATTRIBUTE:
        axis = view.permutation[graph.attributes(node).get("axis", -1) % len(view.permutation)]
        inputs = [
            views.transposed(name, view) if node.op_type == "Concat" and name in views.values else name
            for name in node.input
        ]
        return _moved(graph.rewired(node, inputs), view, views, axis=axis)
    handler = HANDLERS.get(node.op_type)
    return None if handler is None else handler(node, view, views)


def _moved(
    node: NodeProto, view: View, views: Views, extra: list[str] | None = None, **attributes: Any
) -> list[NodeProto]:
    """`node` on the sources of its views, with other constant inputs and attributes; outputs become views."""
    sources = [views.views[name].source if name in views.views else name for name in node.input]
    if extra is not None:
        sources = [sources[0], *extra]
    outputs = [f"{name}/source" for name in node.output]
    stated = graph.attributes(node) | attributes
    moved = helper.make_node(node.op_type, sources, outputs, **stated)
    for name, output in zip(node.output, outputs, strict=True):
        views.views[name] = View(output, view.permutation)
        if name in views.shapes:
            views.shapes[output] = tuple(views.shapes[name][axis] for axis in view.inverse)
    return [moved]


def _elementwise(node: NodeProto, data: list[str], view: View, views: Views) -> list[NodeProto] | None:
    """Every input brought to the layout of the source: constants now, small tensors by a Reshape."""
    before, sources = [], []
    for name in node.input:
        if name in views.views:
            sources.append(views.views[name].source)
        elif name in views.values:
            sources.append(views.constant_for_source(name, view))
        elif name:
            brought = _brought(name, view, views)
            if brought is None:
                return None
            before.append(brought)
            sources.append(brought.output[0])
        else:
            sources.append(name)
    node = graph.rewired(node, sources)
    return before + _moved(node, view, views)


def _brought(name: str, view: View, views: Views) -> NodeProto | None:
    """The node that brings a tensor beside a view to the source's layout."""
    shape, rank = views.shapes.get(name), len(view.permutation)
    if shape is None:
        return None
    full = (1,) * (rank - len(shape)) + shape
    output = f"{name}/source{len(views.values)}"
    views.shapes[output] = target = tuple(full[axis] for axis in view.inverse)
    order = [axis for axis in view.inverse if full[axis] != 1]
    if order == sorted(order):
        return helper.make_node(
            "Reshape", [name, views.constant("shape", np.array(target, np.int64))], [output]
        )
    if len(shape) == rank >= 4 and view.permutation == TO_CHANNELS_LAST.get(rank):
        return helper.make_node("Transpose", [name], [output], perm=view.inverse)
    return None


def _reshape(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Where only axes of size 1 moved, the source holds the same elements in the same order."""
    if node.input[0] in views.views and views.trivial(view):
        return [graph.rewired(node, [view.source, node.input[1]])]
    return None


def _reduction(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    rank = len(view.permutation)
    axes = {view.permutation[axis % rank] for axis in views.values[node.input[1]].ravel().tolist()}
    kept = graph.attributes(node).get("keepdims", 1)
    left = [axis for axis in view.permutation if axis not in axes]
    if not kept and left != sorted(left):
        return None
    if axes == set(range(2, rank)) and node.op_type in GLOBAL_POOLS:
        pool = helper.make_node(GLOBAL_POOLS[node.op_type], [view.source], [f"{node.output[0]}/source"])
        if kept:
            views.views[node.output[0]] = View(pool.output[0], view.permutation)
            shape = views.shapes[view.source]
            views.shapes[pool.output[0]] = (*shape[:2], *(1 for _ in shape[2:]))
            return [pool]
        return [pool, helper.make_node("Flatten", list(pool.output), list(node.output), axis=1)]
    moved = views.constant(node.input[1], np.array(sorted(axes), np.int64))
    if kept:
        return _moved(node, view, views, [moved])
    return [graph.rewired(node, [view.source, moved])]


def _expand(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    target = views.values.get(node.input[1])
    if target is None or target.size != len(view.permutation):
        return None
    return _moved(node, view, views, [views.constant(node.input[1], target[list(view.inverse)])])


def _pad(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    pads = views.values[node.input[1]].reshape(2, -1)
    if len(node.input) > 3 or pads.shape[1] != len(view.permutation):
        return None
    moved = views.constant(node.input[1], pads[:, list(view.inverse)].ravel())
    return _moved(node, view, views, [moved, *node.input[2:]])


def _resize(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Scales or sizes of every axis, in the source's order."""
    if "axes" in graph.attributes(node):
        return None
    moved = [
        views.constant(name, views.values[name][list(view.inverse)])
        if name and views.values[name].size == len(view.permutation)
        else name
        for name in node.input[1:]
    ]
    return _moved(node, view, views, moved)


def _slice(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    starts, ends, axes, *steps = node.input[1:]
    if axes not in views.values:
        return None
    rank = len(view.permutation)
    moved = np.array([view.permutation[axis % rank] for axis in views.values[axes].tolist()], np.int64)
    return _moved(node, view, views, [starts, ends, views.constant(axes, moved), *steps])


def _gather(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Entries along one axis, all axes kept, as in `x[:, ::-1]`."""
    if views.values.get(node.input[1], np.zeros(())).ndim != 1:
        return None
    axis = graph.attributes(node).get("axis", 0) % len(view.permutation)
    return _moved(node, view, views, axis=view.permutation[axis])


def _matmul(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """A product over the channels of an image, `(.., C) @ (C, N)`, is a 1x1 convolution."""
    rank = len(view.permutation)
    kernel = views.values.get(node.input[1])
    if rank < 4 or view.permutation != TO_CHANNELS_LAST.get(rank) or kernel is None or kernel.ndim != 2:
        return None
    points = kernel.T.reshape(*kernel.T.shape, *(1,) * (rank - 2))
    moved = _moved(node, view, views, [views.constant(node.input[1], points)])[0]
    return [helper.make_node("Conv", moved.input, moved.output, kernel_shape=[1] * (rank - 2))]


HANDLERS: dict[str, Callable[[NodeProto, View, Views], list[NodeProto] | None]] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    "Expand": _expand,
    "Gather": _gather,
    "MatMul": _matmul,
    "Pad": _pad,
    "Resize": _resize,
    "Slice": _slice,
}
