"""Move images from channels-last to channels-first, and leave none of the Transposes of JAX's layout behind.

The pass walks through the graph and removes every Transpose that it meets. The output of a Transpose is
recorded as a view of the tensor before it (`View`). An operator that can work on that tensor instead does so,
and its output becomes a view in turn (`_on_sources`). A Transpose is written only where an operator cannot.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.operators import BINARY, UNARY

TO_CHANNELS_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
"""Maps a rank to the permutation that brings the channels to the last axis."""

TO_CHANNELS_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}
"""Maps a rank to the permutation that brings the channels to the second axis."""

GLOBAL_POOLS = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}

REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"})

AXIS_ATTRIBUTE = frozenset({"Concat", "LogSoftmax", "Softmax", "Split"})
"""Operators that name the axis they work along in an attribute."""


def as_graph(array: Any, layout: str) -> np.ndarray:
    """Return an array of JAX as a graph takes it: rank 4 is channels-first where `layout` is "nchw"."""
    array = np.asarray(array)
    moved = layout == "nchw" and array.ndim == 4
    return np.ascontiguousarray(array.transpose(TO_CHANNELS_FIRST[4])) if moved else array


@dataclasses.dataclass(frozen=True)
class View:
    """Describe a tensor that equals Transpose(source, permutation).

    Attributes:
      source: Name of the tensor that the graph holds.
      permutation: Axis `i` of the view is axis `permutation[i]` of the source.
    """

    source: str
    permutation: tuple[int, ...]

    @property
    def inverse(self) -> tuple[int, ...]:
        """Return the permutation that leads from the view to its source."""
        return tuple(int(axis) for axis in np.argsort(self.permutation))


@dataclasses.dataclass
class Views:
    """Hold what is known at one point of the walk through the graph.

    Attributes:
      values: Constants by name; new ones are added.
      shapes: Shapes of the tensors of the graph, with a concrete batch.
      views: Tensors that equal a Transpose of another, by name.
      renamed: Maps a tensor to the tensor that it equals.
      written: Views that a node of the new graph writes after all.
    """

    values: Constants
    shapes: Shapes
    views: dict[str, View] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    written: set[str] = dataclasses.field(default_factory=set)

    def constant(self, base: str, value: Sequence[int] | np.ndarray) -> str:
        """Add a constant derived from the constant `base`, or named by the word `base`; return its name."""
        return self.values.derive(base, f"layout{len(self.values)}", np.asarray(value))

    def trivial(self, view: View) -> bool:
        """Tell whether the view moves axes of size 1 only: a Reshape then does what its Transpose would."""
        shape = self.shapes.get(view.source)
        if shape is None:
            return False
        moved = [axis for axis in view.permutation if shape[axis] != 1]
        return moved == sorted(moved)

    def materialize(self, name: str) -> list[NodeProto]:
        """Make the node that writes the tensor `name`, if it is a view that was not written before."""
        view = self.views.get(name)
        if view is None or name in self.written:
            return []
        self.written.add(name)
        if self.trivial(view):
            shape = [self.shapes[view.source][axis] for axis in view.permutation]
            target = self.constant("shape", np.array(shape, np.int64))
            return [helper.make_node("Reshape", [view.source, target], [name])]
        return [helper.make_node("Transpose", [view.source], [name], perm=view.permutation)]

    def constant_for_source(self, name: str, view: View) -> str:
        """Return the constant that broadcasts against the source as `name` does against the view."""
        return name if self.values[name].size == 1 else self.transposed(name, view)

    def transposed(self, name: str, view: View) -> str:
        """Add the constant `name`, which has the view's layout, in that of the source; return its name."""
        value = self.values[name]
        full = (1,) * (len(view.permutation) - value.ndim) + value.shape
        return self.constant(name, value.reshape(full).transpose(view.inverse))


def channels_first(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put convolutions, elementwise operators, pools, concats and resizes on channels-first tensors.

    A mean (maximum) over height and width becomes GlobalAveragePool (GlobalMaxPool), followed by Flatten
    where the two axes were dropped. A matrix product over the channels of an image becomes a 1x1 convolution.
    Two Transposes that cancel vanish. A Transpose that only moves axes of size 1 becomes a Reshape.
    """
    views = Views(graph.constants(model), graph.shapes(model))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        inputs = [views.renamed.get(name, name) for name in node.input]
        node = graph.rewired(node, inputs)
        if node.op_type == "Transpose" and inputs[0] not in views.values:
            _record(node, views)
            continue
        rewritten = _on_sources(node, views)
        if rewritten is None:
            for name in inputs:
                nodes.extend(views.materialize(name))
            nodes.append(node)
        else:
            nodes.extend(rewritten)
    for output in model.graph.output:
        nodes.extend(views.materialize(output.name))
        if output.name in views.renamed:
            nodes.append(helper.make_node("Identity", [views.renamed[output.name]], [output.name]))
    return graph.rebuild(model, nodes, views.values)


def _record(transpose: NodeProto, views: Views) -> None:
    """Record the output of `transpose` as a view, or as the tensor that an earlier Transpose started from."""
    (source,), (output,) = transpose.input, transpose.output
    permutation = tuple(graph.attributes(transpose)["perm"])
    if source in views.views:
        earlier = views.views[source]
        source, permutation = earlier.source, tuple(earlier.permutation[axis] for axis in permutation)
    if permutation == tuple(range(len(permutation))):
        views.renamed[output] = source
    else:
        views.views[output] = View(source, permutation)


def _on_sources(node: NodeProto, views: Views) -> list[NodeProto] | None:
    """Rewrite `node` to work on the sources of the views that it reads, and record its outputs as views.

    Returns:
      The nodes that replace it. None where it cannot work on the sources, or reads no view.
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
        return _rewritten(graph.rewired(node, inputs), view, views, axis=axis)
    handler = HANDLERS.get(node.op_type)
    return None if handler is None else handler(node, view, views)


def _rewritten(
    node: NodeProto, view: View, views: Views, extra: list[str] | None = None, **attributes: Any
) -> list[NodeProto]:
    """Copy `node` to read the sources of its views, and record its outputs as views.

    Args:
      node: Reads views of one permutation.
      view: One of these views.
      views: Extended by the outputs.
      extra: Inputs that replace all but the first, where they are given.
      attributes: Attributes that replace those of the node.
    """
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
    """Bring every input to the layout of the source: constants at export, small tensors by a Reshape."""
    before, sources = [], []
    for name in node.input:
        if name in views.views:
            sources.append(views.views[name].source)
        elif name in views.values:
            sources.append(views.constant_for_source(name, view))
        elif name:
            aligned = _align(name, view, views)
            if aligned is None:
                return None
            before.append(aligned)
            sources.append(aligned.output[0])
        else:
            sources.append(name)
    node = graph.rewired(node, sources)
    return before + _rewritten(node, view, views)


def _align(name: str, view: View, views: Views) -> NodeProto | None:
    """Make the node that brings a tensor beside a view to the layout of the source; None if none does."""
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
    """Reshape the source where only axes of size 1 moved: it holds the same elements in the same order."""
    if node.input[0] in views.views and views.trivial(view):
        return [graph.rewired(node, [view.source, node.input[1]])]
    return None


def _reduction(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Reduce the axes of the source; over height and width that is a global pool."""
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
        return _rewritten(node, view, views, [moved])
    return [graph.rewired(node, [view.source, moved])]


def _expand(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Expand the source to the target shape in the source's order."""
    target = views.values.get(node.input[1])
    if target is None or target.size != len(view.permutation):
        return None
    return _rewritten(node, view, views, [views.constant(node.input[1], target[list(view.inverse)])])


def _pad(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Pad every axis of the source, with the pads in its order."""
    pads = views.values[node.input[1]].reshape(2, -1)
    if len(node.input) > 3 or pads.shape[1] != len(view.permutation):
        return None
    moved = views.constant(node.input[1], pads[:, list(view.inverse)].ravel())
    return _rewritten(node, view, views, [moved, *node.input[2:]])


def _resize(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Resize the source, with the scales or sizes of every axis in its order."""
    if "axes" in graph.attributes(node):
        return None
    moved = [
        views.constant(name, views.values[name][list(view.inverse)])
        if name and views.values[name].size == len(view.permutation)
        else name
        for name in node.input[1:]
    ]
    return _rewritten(node, view, views, moved)


def _slice(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Slice the axes of the source that the axes of the view come from."""
    starts, ends, axes, *steps = node.input[1:]
    if axes not in views.values:
        return None
    rank = len(view.permutation)
    moved = np.array([view.permutation[axis % rank] for axis in views.values[axes].tolist()], np.int64)
    return _rewritten(node, view, views, [starts, ends, views.constant(axes, moved), *steps])


def _gather(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Gather entries along one axis where all axes are kept, as in `x[:, ::-1]`."""
    if views.values.get(node.input[1], np.zeros(())).ndim != 1:
        return None
    axis = graph.attributes(node).get("axis", 0) % len(view.permutation)
    return _rewritten(node, view, views, axis=view.permutation[axis])


def _matmul(node: NodeProto, view: View, views: Views) -> list[NodeProto] | None:
    """Turn a product over the channels of an image, `(.., C) @ (C, N)`, into a 1x1 convolution."""
    rank = len(view.permutation)
    kernel = views.values.get(node.input[1])
    if rank < 4 or view.permutation != TO_CHANNELS_LAST.get(rank) or kernel is None or kernel.ndim != 2:
        return None
    points = kernel.T.reshape(*kernel.T.shape, *(1,) * (rank - 2))
    moved = _rewritten(node, view, views, [views.constant(node.input[1], points)])[0]
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
"""Maps an operator to the function that puts it on the source of the view it reads."""
