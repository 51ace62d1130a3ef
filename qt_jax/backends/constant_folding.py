"""Compute what does not depend on the images, and leave it as constants, for compilers that cannot.

The module imports numpy, onnx and modules of qt_jax that need no more, because vendors' environments hold
nothing else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qt_jax.export import graph
from qt_jax.export.graph import Shapes


def known_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Turn each Shape whose sizes are all known into a constant."""
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes = []
    for node in model.graph.node:
        sizes = _sizes(node, shapes)
        if sizes is not None:
            values[node.output[0]] = np.array(sizes, np.int64)
        else:
            nodes.append(node)
    return graph.rebuild(model, nodes, values)


def _sizes(node: NodeProto, shapes: Shapes) -> tuple[int, ...] | None:
    """Return what a Shape writes; None for any other node, and where a size is open."""
    if node.op_type != "Shape" or node.input[0] not in shapes:
        return None
    stated = graph.attributes(node)
    sizes = shapes[node.input[0]][stated.get("start", 0) : stated.get("end")]
    return sizes if all(sizes) else None


def fold_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute every node that depends only on constants, by ONNX's reference evaluator.

    A node that writes an output of the graph stays. A result that stems from leaves of the variables keeps
    their common origin (`Constants.common_origin`).
    """
    values = graph.constants(model)
    known = set(values)
    outputs = {output.name for output in model.graph.output}
    constant: list[NodeProto] = []
    variable: list[NodeProto] = []
    for node in model.graph.node:
        inputs = list(graph.names_read(node))
        if known.issuperset(inputs) and outputs.isdisjoint(node.output):
            origin = values.common_origin(inputs)
            values.origins |= dict.fromkeys(node.output, origin) if origin else {}
            known.update(node.output)
            constant.append(node)
        else:
            variable.append(node)
    read = {name for node in variable for name in graph.names_read(node)}
    wanted = [name for node in constant for name in node.output if name in read]
    values |= _evaluate(constant, wanted, values, model.opset_import)
    return graph.rebuild(model, variable, values)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute what depends on constants alone; where ONNX's reference cannot, take only what nodes hold."""
    try:
        return fold_constants(model)
    except Exception:  # whatever an operator of the reference evaluator raises
        values = graph.constants(model)
        kept = []
        for node in model.graph.node:
            held = graph.attributes(node).get("value") if node.op_type == "Constant" else None
            if held is not None:
                values[node.output[0]] = numpy_helper.to_array(held)
            else:
                kept.append(node)
        return graph.rebuild(model, kept, values)


def _evaluate(
    nodes: list[NodeProto], wanted: list[str], values: Mapping[str, np.ndarray], opset_imports: Any
) -> dict[str, np.ndarray]:
    """Compute the tensors `wanted` with `nodes`, which read the constants `values`."""
    read = {name for node in nodes for name in graph.names_read(node)}
    given = {name: value for name, value in values.items() if name in read}
    inputs, outputs = (
        [helper.make_empty_tensor_value_info(name) for name in names] for names in (given, wanted)
    )
    subgraph = helper.make_graph(nodes, "constants", inputs, outputs)
    evaluator = ReferenceEvaluator(helper.make_model(subgraph, opset_imports=opset_imports))
    return dict(zip(wanted, map(np.asarray, evaluator.run(None, given)), strict=True))
