"""Place the Transposes that stay between channels-first and channels-last operators where they are fewest.

Layer norm and matrix products read the channels last, convolutions and pools read them first. Elementwise
operators between these work in either layout. `layout.channels_first` decides operator by operator. Here the
layouts are chosen together, as a minimum cut (Ford and Fulkerson 1956): the operators that read the channels
first stand on one side, the others on the other side, and a tensor that both sides know costs a Transpose.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import dataclasses
import enum
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.layout import AXIS_ATTRIBUTE, TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.operators import BINARY, UNARY, WEIGHTED


class Layout(enum.Enum):
    """Say where a tensor has its channels. The two are the ends of the network of flows as well."""

    FIRST = "channels_first"
    LAST = "channels_last"


FIRST, LAST = Layout

RANKS = (4, 5)
"""Ranks of images and volumes. On rank 3 the two layouts change into each other by one permutation."""

TRANSPOSE = 1000
"""Cost of a Transpose."""

PARTING = 1
"""Cost of a Transpose between a layer and the operator behind it, on top."""

End = str | Layout
"""An operator that works in either layout, by the name of its first output, or a layout that others want."""

Place = End | tuple[str, Layout]
"""A place of the network of flows. Two stand for each image: one passes on what its writer has, if that is
`FIRST`, and one if that is `LAST`."""

Flows = dict[Place, dict[Place, float]]
"""Maps two places to the capacity that is left from the one to the other."""


@dataclasses.dataclass
class _Images:
    """Hold what is known of the images of a graph.

    Attributes:
      layout: Layout of each tensor that a Transpose, or elementwise operators, tie to another layout.
      content: Maps each of these to the tensor, perhaps itself, of which it is a Transpose.
      free: The operators that work in either layout, by the name of their first output.
      readers: The nodes that read each tensor.
      writers: The node that writes each tensor.
      outputs: The outputs of the graph.
    """

    layout: dict[str, Layout]
    content: dict[str, str]
    free: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    writers: dict[str, NodeProto]
    outputs: set[str]

    def copies(self) -> dict[str, list[str]]:
        """Return the tensors that are Transposes of each content, itself among them."""
        found: dict[str, list[str]] = defaultdict(list)
        for name, content in self.content.items():
            found[content].append(name)
        return found


def place_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Choose the layout of elementwise operators, Concat, Split and Softmax for the fewest Transposes.

    Where as few remain, nothing changes.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    images = _images(model, values, shapes)
    interface = [entry.name for entry in (*model.graph.input, *model.graph.output)]
    ends = [(images.content[name], images.layout[name]) for name in interface if name in images.layout]
    chosen = _fewest(images)
    if not chosen or len(set(ends)) < len(ends):
        return model
    return _in_layouts(model, images, chosen, values, shapes)


def _changes(node: NodeProto) -> tuple[Layout, Layout] | None:
    """Return the layouts between which a Transpose changes; None for any other node."""
    if node.op_type != "Transpose":
        return None
    order = tuple(graph.attributes(node)["perm"])
    if len(order) not in RANKS:
        return None
    ends = {TO_CHANNELS_LAST[len(order)]: (FIRST, LAST), TO_CHANNELS_FIRST[len(order)]: (LAST, FIRST)}
    return ends.get(order)


def _images(model: onnx.ModelProto, values: Constants, shapes: Shapes) -> _Images:
    """Find the images of a graph, and the operators that work on them in either layout."""
    writers = {name: node for node in model.graph.node for name in node.output}
    free = {node.output[0]: node for node in model.graph.node if _is_free(node, writers, values, shapes)}
    groups = _Groups()
    for node in free.values():
        names = [name for name in (*node.input, *node.output) if name and name not in values]
        for name in names:
            groups.join(names[0], name)
    found: dict[str, set[Layout]] = defaultdict(set)
    for node in model.graph.node:
        for name, end in zip((*node.input, *node.output), _changes(node) or (), strict=False):
            found[groups.of(name)].add(end)
    single = {group: next(iter(layouts)) for group, layouts in found.items() if len(layouts) == 1}
    names = [entry.name for entry in model.graph.input] + [*writers]
    known = [name for name in names if len(shapes.get(name, ())) in RANKS]
    layout = {name: single[groups.of(name)] for name in known if groups.of(name) in single}
    content: dict[str, str] = {}
    for name in layout:
        writer = writers.get(name)
        moved = writer is not None and _changes(writer) and writer.input[0] in layout
        content[name] = content[writer.input[0]] if writer is not None and moved else name
    outputs = {entry.name for entry in model.graph.output}
    free = {name: node for name, node in free.items() if name in layout}
    return _Images(layout, content, free, graph.readers(model), writers, outputs)


class _Groups:
    """Join names to groups. A name that was joined to no other is a group of its own."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        while self._parent.get(name, name) != name:
            name = self._parent[name]
        return name

    def join(self, one: str, other: str) -> None:
        self._parent[self.of(other)] = self.of(one)


def _is_free(node: NodeProto, writers: dict[str, NodeProto], values: Constants, shapes: Shapes) -> bool:
    """Tell whether a node works on images in either layout. The bias of a matrix product stays with it."""
    shape = shapes.get(node.output[0], ())
    tensors = [name for name in node.input if name and name not in values]
    if (
        len(shape) not in RANKS
        or not tensors
        or not all(len(shapes.get(x, ())) == len(shape) for x in tensors)
    ):
        return False
    if node.op_type in AXIS_ATTRIBUTE:
        return node.op_type != "Concat" or len(tensors) == len(node.input)
    if node.op_type not in UNARY | BINARY or any(shapes[name] != shape for name in tensors):
        return False
    writer = writers.get(tensors[0])
    bias = len(tensors) == 1 and len(node.input) == 2 and writer is not None and writer.op_type == "MatMul"
    return not bias


def _fewest(images: _Images) -> dict[str, Layout]:
    """Return the layout of each free operator that changes its layout."""
    flows: Flows = defaultdict(lambda: defaultdict(float))
    together = _Groups()
    for content, names in images.copies().items():
        writer = _end(images, content, images.writers.get(content))
        found = dict.fromkeys(end for name in names for end in _readers(images, name))
        readers = [end for end in found if end != writer]
        cost = TRANSPOSE + PARTING * _is_layer(images.writers.get(content))
        for reader in readers:
            flows[writer][content, FIRST] = flows[content, LAST][writer] = cost
            flows[content, FIRST][reader] = flows[reader][content, LAST] = np.inf
        free = [end for end in (writer, *readers) if not isinstance(end, Layout)]
        for end in free:
            together.join(free[0], end)
    side = _sources(flows)
    before: dict[End, Layout] = {FIRST: FIRST, LAST: LAST} | {
        name: images.layout[name] for name in images.free
    }
    after: dict[End, Layout] = {end: FIRST if end in side else LAST for end in before}
    saved: dict[str, int] = defaultdict(int)
    for content, names in images.copies().items():
        ends = [_end(images, content, images.writers.get(content))]
        ends += [end for name in names for end in _readers(images, name)]
        group = next((together.of(end) for end in ends if not isinstance(end, Layout)), "")
        for layouts, sign in ((before, 1), (after, -1)):
            saved[group] += sign * (len({layouts[end] for end in ends}) > 1)
    return {
        name: after[name]
        for name in images.free
        if after[name] != before[name] and saved[together.of(name)] > 0
    }


def _end(images: _Images, name: str, node: NodeProto | None) -> End:
    """Return the free operator that `node` is, or the layout that it wants for the tensor `name`."""
    return node.output[0] if node is not None and node.output[0] in images.free else images.layout[name]


def _readers(images: _Images, name: str) -> Iterator[End]:
    """Yield the free operators that read a tensor, and the layout in which others read it."""
    for node in images.readers[name]:
        if not (_changes(node) and node.output[0] in images.layout):
            yield _end(images, name, node)
    if name in images.outputs:
        yield images.layout[name]


def _is_layer(node: NodeProto | None) -> bool:
    return node is not None and node.op_type in WEIGHTED


def _sources(flows: Flows) -> set[Place]:
    """Return the side of `FIRST` in a minimum cut, which shortest augmenting paths find."""
    while True:
        came: dict[Place, Place] = {FIRST: FIRST}
        queue: deque[Place] = deque([FIRST])
        while queue and LAST not in came:
            place = queue.popleft()
            for other, capacity in flows[place].items():
                if capacity > 0 and other not in came:
                    came[other] = place
                    queue.append(other)
        if LAST not in came:
            return set(came)
        path: list[Place] = [LAST]
        while path[-1] != FIRST:
            path.append(came[path[-1]])
        steps = list(zip(path[1:], path, strict=False))
        amount = min(flows[start][end] for start, end in steps)
        for start, end in steps:
            flows[start][end] -= amount
            flows[end][start] += amount


def _in_layouts(
    model: onnx.ModelProto, images: _Images, chosen: dict[str, Layout], values: Constants, shapes: Shapes
) -> onnx.ModelProto:
    """Rebuild a graph with free operators in the layouts `chosen`."""
    names: dict[tuple[str, Layout], str] = {}
    for name in sorted(images.layout, key=lambda name: name not in images.outputs):
        names.setdefault((images.content[name], images.layout[name]), name)
    written = {entry.name for entry in model.graph.input}
    nodes: list[NodeProto] = []

    def order(name: str, layout: Layout) -> tuple[int, ...]:
        """Return the order of axes that brings an image to `layout` from the other one."""
        return (TO_CHANNELS_FIRST if layout is FIRST else TO_CHANNELS_LAST)[len(shapes[name])]

    def in_layout(name: str, layout: Layout) -> str:
        """Return the name of an image in `layout`, and write its Transpose where it is in the other one."""
        content = images.content[name]
        wanted = names.setdefault((content, layout), f"{content}/{layout.value}")
        other = names.get((content, LAST if layout is FIRST else FIRST), "")
        if wanted not in written and other in written:
            nodes.append(helper.make_node("Transpose", [other], [wanted], perm=order(name, layout)))
            written.add(wanted)
        return wanted

    for node in model.graph.node:
        if _changes(node) and {node.input[0], node.output[0]} <= images.layout.keys():
            continue
        layout = chosen.get(node.output[0])
        images_of = dict.fromkeys(name for name in (*node.input, *node.output) if name in images.layout)
        moved = {name: in_layout(name, layout or images.layout[name]) for name in images_of}
        if layout is not None:
            node = _turned(node, order(node.output[0], layout), values)
        inputs, outputs = ([moved.get(name, name) for name in each] for each in (node.input, node.output))
        nodes.append(graph.rewired(node, inputs, outputs))
        written.update(outputs)
    for output in model.graph.output:
        if output.name in images.layout:
            in_layout(output.name, images.layout[output.name])
    return graph.rebuild(model, nodes, values)


def _turned(node: NodeProto, order: Sequence[int], values: Constants) -> NodeProto:
    """Turn the axis and the constants of a free operator, whose tensors are transposed by `order`."""
    if node.op_type in AXIS_ATTRIBUTE:
        stated = graph.attributes(node)
        axis = order.index(stated.get("axis", -1 if node.op_type != "Split" else 0) % len(order))
        return helper.make_node(node.op_type, node.input, node.output, **stated | {"axis": axis})
    inputs = list(node.input)
    for place, name in enumerate(node.input):
        if name in values and values[name].size > 1:
            full = (1,) * (len(order) - values[name].ndim) + values[name].shape
            moved = values[name].reshape(full).transpose(order)
            inputs[place] = values.derive(name, f"{node.output[0]}#turned", moved)
    return graph.rewired(node, inputs)
