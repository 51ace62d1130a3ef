"""Replace an If whose condition is the same on all samples by the branch that it takes.

Few toolchains take control flow. Exported speech networks are full of it: a branch for each sample rate, and
branches over shapes that never change.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper

from qt_jax.export.graph import graphs_inside, names_read
from qt_jax.export.sessions import open_unoptimized

Arrays = Mapping[str, np.ndarray]


def take_branches(model: ModelProto, samples: Iterable[Arrays]) -> dict[str, str]:
    """Replace each such If of a graph, in place, those inside the branches taken too.

    Args:
      model: Graph whose inputs all have a batch axis in front.
      samples: Sets of arrays `(n, ...)` by input: those of calibration and those to judge by.

    Returns:
      Maps the name of each replaced node, or of its first output, to the branch taken, "then" or "else".

    >>> import onnx.parser
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 17]>
    ... g (float[1, 2] x, bool[1] c) => (float[1, 2] y) { s = Squeeze(c) [pick] y = If(s) <
    ... then_branch = a () => (float[1, 2] t) { t = Relu(x) },
    ... else_branch = b () => (float[1, 2] t) { t = Neg(x) }> }''')
    >>> take_branches(model, [{"x": np.ones((3, 2), np.float32), "c": np.ones(3, bool)}])
    {'pick': 'then'}
    >>> [node.op_type for node in model.graph.node]
    ['Relu']
    """
    sets = list(samples)
    taken: dict[str, str] = {}
    varying: set[str] = set()
    while True:
        found = [n for n in model.graph.node if n.op_type == "If" and n.output[0] not in varying]
        if not found:
            if taken:
                remove_unread(model.graph)
            return taken
        values = _conditions(model, [node.input[0] for node in found], sets)
        for condition, output in [(node.input[0], node.output[0]) for node in found]:
            value = values.get(condition)
            if value is None:
                varying.add(output)
                continue
            [node] = [node for node in model.graph.node if output in node.output]
            branch = "then" if value else "else"
            taken[node.name or output] = branch
            _inline(model.graph, node, f"{branch}_branch")


def _conditions(model: ModelProto, names: list[str], sets: list[Arrays]) -> dict[str, bool]:
    """Return the conditions that are the same on all samples."""
    part = ModelProto()
    part.CopyFrom(model)
    wanted = list(dict.fromkeys(names))
    given = {entry.name for entry in part.graph.input}
    del part.graph.output[:]
    part.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in wanted if name not in given
    )
    remove_unread(part.graph)  # ONNX Runtime fails at some weights that nobody reads
    made = [value.name for value in part.graph.output]
    session = open_unoptimized(part) if made else None
    seen: dict[str, set[bool]] = {name: set() for name in wanted}
    for arrays in sets:
        for i in range(len(next(iter(arrays.values())))):
            feed = {name: array[i : i + 1] for name, array in arrays.items()}
            found = dict(zip(made, session.run(made, feed), strict=True)) if session else {}
            for name in wanted:
                seen[name].add(bool(np.asarray(found.get(name, feed.get(name))).ravel()[0]))
    return {name: values.pop() for name, values in seen.items() if len(values) == 1}


def remove_unread(graph: GraphProto) -> None:
    """Remove what no output needs any more: nodes, and weights."""
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(names_read(node))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


def _inline(graph: GraphProto, node: NodeProto, branch: str) -> None:
    """Replace an If by the nodes of one of its branches."""
    [taken] = [item.g for item in node.attribute if item.name == branch]
    inner = [name for child in taken.node for name in child.output if name]
    inner += [tensor.name for tensor in (*taken.initializer, *(s.values for s in taken.sparse_initializer))]
    names = {name: f"{node.output[0]}/{name}" for name in inner}
    copies = []
    for value, output in zip(taken.output, node.output, strict=True):
        if (
            output
            and value.name in inner
            and names[value.name] not in node.output
            and _made(taken, value.name)
        ):
            names[value.name] = output
        elif output:
            copies.append((value.name, output))
    nodes = []
    for child in taken.node:
        fresh = NodeProto()
        fresh.CopyFrom(child)
        fresh.name = f"{node.name}/{child.name}" if child.name else ""
        _rename(fresh, names)
        nodes.append(fresh)
    nodes += [
        helper.make_node("Identity", [names.get(name, name)], [output], name=f"{node.name}/{output}")
        for name, output in copies
    ]
    for tensor in taken.initializer:
        tensor.name = names[tensor.name]
        graph.initializer.append(tensor)
    place = list(graph.node).index(node)
    others = list(graph.node)
    others[place : place + 1] = nodes
    del graph.node[:]
    graph.node.extend(others)


def _made(graph: GraphProto, name: str) -> bool:
    return any(name in child.output for child in graph.node)


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Rename tensors in a node and in its subgraphs."""
    for field in (node.input, node.output):
        field[:] = [names.get(name, name) for name in field]
    for graph in graphs_inside(node):
        own = {name for child in graph.node for name in child.output} | {t.name for t in graph.initializer}
        outer = {name: new for name, new in names.items() if name not in own}
        for child in graph.node:
            _rename(child, outer)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)
