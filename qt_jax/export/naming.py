"""Names a reader can trace back: nodes, tensors and initializers called by their Flax path."""

from collections.abc import Iterator
from itertools import chain, count

import numpy as np
import onnx
from onnx import NodeProto, defs

from qt_jax.export import graph
from qt_jax.export.operators import NORMALIZING, WEIGHTED

MODULES = WEIGHTED | NORMALIZING | {"Gather"}
"""Operators that stand for a module of their own, if a leaf of the variables is among their inputs."""


def name_by_path(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with names that are Flax paths.

    A convolution or Gemm is called after its module (`stage1_block1/conv1`), its weights after their leaves
    (`stage1_block1/conv1/kernel`). A node without weights takes the scope of the latest node that feeds it
    and its operator (`stage1_block1/Relu`); any other constant its node and the operator's name for it
    (`stage1_block1/Clip/min`). A tensor has its node's name, graph inputs and outputs keep theirs. A name
    that is taken gets `_1`, `_2` and so on; equal constants of one name are one.
    """
    values = graph.constants(model)
    interface = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    tensors = {name: name for name in interface}
    order = {name: -1 for name in interface}
    scopes = {name: "" for name in interface}
    taken = set(interface)
    named: dict[str, np.ndarray] = {}
    nodes = []

    def constant(base: str, value: np.ndarray) -> str:
        name = next(
            candidate
            for candidate in _candidates(base)
            if candidate not in taken or (candidate in named and np.array_equal(named[candidate], value))
        )
        named[name] = value
        taken.add(name)
        return name

    for position, node in enumerate(model.graph.node):
        feeds = [name for name in node.input if name and name not in values]
        feed = max(feeds, key=order.__getitem__, default="")
        base, scope = _place(node, values, scopes.get(feed, ""), taken)
        occupied = taken.difference(node.output)  # the module `logits` may write the tensor `logits`
        name = next(candidate for candidate in _candidates(base) if candidate not in occupied)
        taken.add(name)
        inputs = [tensors.get(source, "") for source in node.input]
        for index, source in enumerate(node.input):
            if source in values:
                inputs[index] = constant(_constant_base(node, index, name), values[source])
        for index, output in enumerate(node.output):
            tensors.setdefault(output, f"{name}/{index}" if index else name)
            scopes[output], order[output] = scope, position
        copy = graph.rewired(node, inputs, [tensors[output] for output in node.output])
        copy.name = name
        nodes.append(copy)
    return graph.rebuild(model, nodes, named)


def _place(node: NodeProto, values: dict[str, np.ndarray], scope: str, taken: set[str]) -> tuple[str, str]:
    """The wanted name of `node`, and the scope of its output: the module that called it."""
    leaves = filter(None, (graph.flax_path(name) for name in node.input if name in values))
    module = next((path.rpartition("/")[0] for path in leaves), "")
    caller = module.rpartition("/")[0]
    if module and node.op_type in MODULES:
        return module, caller
    base = f"{module or scope}/{node.op_type}".removeprefix("/")
    if module:
        scope = caller if module in taken else module  # the bias of a layer that stands already, or a leaf
    return base, scope


def _constant_base(node: NodeProto, index: int, name: str) -> str:
    formal = defs.get_schema(node.op_type).inputs
    argument = formal[min(index, len(formal) - 1)].name.lower()
    return graph.flax_path(node.input[index]) or f"{name}/{argument}"


def _candidates(base: str) -> Iterator[str]:
    return chain([base], (f"{base}_{number}" for number in count(1)))
