"""Compute once what a graph computes several times.

The module imports numpy, onnx and modules of qt_jax that need no more, as `graph` explains.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.export import graph
from qt_jax.export.graph import Constants, Shapes
from qt_jax.export.operators import WEIGHTED


def merge_equal(model: onnx.ModelProto) -> onnx.ModelProto:
    """Merge nodes that apply one operator to the same tensors, such as the activation of a shared embedding.

    A layer called twice on one tensor stays twice, because each call has a name. So does a node that writes
    an output of the graph.
    """
    values = graph.constants(model)
    outputs = {output.name for output in model.graph.output}
    renamed: dict[str, str] = {}
    first: dict[Hashable, NodeProto] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        node = graph.rewired(node, [renamed.get(name, name) for name in node.input])
        layer = node.op_type in WEIGHTED and not values.keys().isdisjoint(node.input)
        if layer or not outputs.isdisjoint(node.output):
            nodes.append(node)
            continue
        same = first.setdefault(_identity(node, values), node)
        if same is node:
            nodes.append(node)
        else:
            renamed |= dict(zip(node.output, same.output, strict=True))
    return graph.rebuild(model, nodes, values)


def _identity(node: NodeProto, values: Constants) -> Hashable:
    """Return what two nodes have in common that write the same; small constants are told by their value."""
    inputs = tuple(
        (values[name].dtype.str, values[name].shape, values[name].tobytes())
        if name in values and values[name].size <= graph.SHAPE_SIZE and name not in values.origins
        else name
        for name in node.input
    )
    stated = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    return node.op_type, inputs, tuple(stated), len(node.output)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Describe a part of a tensor that is transposed.

    Attributes:
      cut: Writes the part: a Split, a Slice or a Gather.
      entry: The axis of the whole that is dropped, and which of its entries the part is. None where the part
        has all axes.
      permutation: Axes of the whole that are left, in the order that the Transpose gives them.
      output: Name of the transposed part.
    """

    cut: NodeProto
    entry: tuple[int, int] | None
    permutation: tuple[int, ...]
    output: str


def share_transposes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Transpose a tensor once, where several parts of it are cut out and transposed alike.

    Queries, keys and values from one dense layer are such parts. A part that is one entry of an axis becomes
    a Gather, and one in another order is transposed once more. Where no two parts are transposed alike,
    nothing changes.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    groups: dict[Hashable, list[_Part]] = {}
    for part in _parts(model, values, shapes):
        dropped = None if part.entry is None else part.entry[0]
        groups.setdefault((part.cut.input[0], dropped), []).append(part)
    inserted: dict[str, list[NodeProto]] = {}
    written: set[str] = set()
    for parts in groups.values():
        common, often = Counter(part.permutation for part in parts).most_common(1)[0]
        if often > 1:
            inserted[parts[0].cut.output[0]] = _together(parts, common, values)
            written.update(part.output for part in parts)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(inserted.get(node.output[0], ()))
        if node.output[0] not in written:
            nodes.append(node)
    return graph.rebuild(model, nodes, values)


def _parts(model: onnx.ModelProto, values: Constants, shapes: Shapes) -> Iterator[_Part]:
    """Yield the transposed parts of tensors. A Split counts only where all its parts are transposed."""
    readers, read = graph.readers(model), graph.uses(model)

    def only_reader(name: str) -> NodeProto | None:
        return readers[name][0] if read[name] == 1 and readers[name] else None

    def part(cut: NodeProto, number: int) -> _Part | None:
        """Follow one output of `cut` through a Reshape that drops an axis and a Transpose, in any order."""
        whole, name = shapes[cut.input[0]], cut.output[number]
        axes = tuple(range(len(whole)))
        entry = _entry(cut, number, values, shapes)
        if cut.op_type == "Gather":
            if entry is None:
                return None
            axes = axes[: entry[0]] + axes[entry[0] + 1 :]
        transposed, dropped = False, cut.op_type == "Gather"
        while (reader := only_reader(name)) is not None:
            left = [axis for axis in axes if entry is None or axis != entry[0]]
            if reader.op_type == "Transpose" and not transposed:
                axes = tuple(axes[axis] for axis in graph.attributes(reader)["perm"])
                transposed = True
            elif (
                reader.op_type == "Reshape"
                and entry is not None
                and not dropped
                and shapes[reader.output[0]] == tuple(whole[axis] for axis in left)
            ):
                axes, dropped = tuple(left), True
            else:
                break
            name = reader.output[0]
        return _Part(cut, entry if dropped else None, axes, name) if transposed else None

    for node in model.graph.node:
        if node.op_type in ("Gather", "Slice", "Split") and shapes.get(node.input[0]):
            found = [part(node, number) for number in range(len(node.output))]
            parts = [each for each in found if each is not None]
            if len(parts) == len(found) and len({each.entry is None for each in parts}) == 1:
                yield from parts


def _entry(cut: NodeProto, number: int, values: Constants, shapes: Shapes) -> tuple[int, int] | None:
    """Return the axis of which an output of `cut` is one entry, and which entry that is."""
    whole, part = shapes[cut.input[0]], shapes[cut.output[number]]
    axis = graph.attributes(cut).get("axis", 0) % len(whole)
    if cut.op_type == "Gather":
        index = values.get(cut.input[1])
        return None if index is None or index.ndim else (axis, int(index) % whole[axis])
    if cut.op_type == "Split":
        before = sum(shapes[name][axis] for name in cut.output[:number])
        return (axis, before) if part[axis] == 1 else None
    changed = [each for each, size in enumerate(part) if size != whole[each]]
    if len(changed) != 1 or part[changed[0]] != 1:
        return None
    starts, axes = (values[cut.input[place]].tolist() for place in (1, 3))
    start = starts[[each % len(whole) for each in axes].index(changed[0])]
    return changed[0], start % whole[changed[0]]


def _together(parts: Sequence[_Part], common: tuple[int, ...], values: Constants) -> list[NodeProto]:
    """Make the nodes that transpose a tensor to the order `common`, and cut the parts out of that.

    The axis of which the parts are entries comes behind the batch.
    """
    source, target = parts[0].cut.input[0], f"{parts[0].output}/whole"
    order = list(common)
    place = int(common[0] == 0)
    if parts[0].entry is not None:
        order.insert(place, parts[0].entry[0])
    nodes = [helper.make_node("Transpose", [source], [target], perm=order)]
    behind: list[NodeProto] = []
    names: dict[str, str] = {}
    for part in parts:
        again = [common.index(axis) for axis in part.permutation]
        names[part.output] = part.output
        if again != sorted(again):
            names[part.output] = f"{part.output}/part"
            behind.append(helper.make_node("Transpose", [names[part.output]], [part.output], perm=again))
    cuts = {part.cut.output[0]: part.cut for part in parts}
    for output, cut in cuts.items():
        own = [part for part in parts if part.cut.output[0] == output]
        if own[0].entry is None:
            nodes.append(_moved(cut, target, common, [names[part.output] for part in own], values))
            continue
        for part in own:
            _, number = part.entry or (0, 0)
            index = values.add(f"{part.output}#entry", np.array(number, np.int64))
            nodes.append(helper.make_node("Gather", [target, index], [names[part.output]], axis=place))
    return [*nodes, *behind]


def _moved(
    cut: NodeProto, target: str, order: Sequence[int], outputs: Sequence[str], values: Constants
) -> NodeProto:
    """Make the Split or Slice that cuts out of the transposed tensor what `cut` does of the whole."""
    if cut.op_type == "Split":
        stated = graph.attributes(cut)
        axis = order.index(stated.get("axis", 0) % len(order))
        return helper.make_node("Split", [target, *cut.input[1:]], outputs, **stated | {"axis": axis})
    axes = [order.index(axis % len(order)) for axis in values[cut.input[3]].tolist()]
    moved = values.add(f"{outputs[0]}#axes", np.array(axes, np.int64))
    return helper.make_node("Slice", [target, *cut.input[1:3], moved, *cut.input[4:]], outputs)
