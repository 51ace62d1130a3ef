"""A float ONNX graph made fit for onnx2tf, so that TensorFlow can quantize what comes out."""

import re

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from qt_jax.backends.protocol import Refused
from qt_jax.export.folding import fold_constants, known_shapes

_NEVER_NEGATIVE = ("Relu", "Sigmoid")
_GELU_SINCE = 20


def prepared(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The same function of an input of the given shape, batch included; the model itself is changed.

    The arithmetic on shapes that an open batch asks for, to spread a class token over it, say, is computed
    beforehand: onnx2tf loses track of it.

    Raises:
      Refused: the graph has not exactly one input.
    """
    model = fold_constants(known_shapes(fixed(model, shape)))
    model = fold_constants(whole_gelus(model))  # attributes that have become inputs are Constant nodes
    pad_with_zeros(model.graph)
    return model


def fixed(model: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The graph with the shape of its one input fixed, its first output of the same batch, and nodes named in
    characters that TensorFlow takes for a scope."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise Refused(f"the graph has inputs {[value.name for value in inputs]}; one is taken")
    dimensions = inputs[0].type.tensor_type.shape.dim
    for dimension, size in zip(dimensions, shape, strict=True):
        dimension.dim_value = size
    for output in model.graph.output:
        if output.type.tensor_type.shape.dim:
            output.type.tensor_type.shape.dim[0].dim_value = shape[0]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = re.sub(r"[^A-Za-z0-9_.\\/>-]", "_", node.name)
    return model


def pad_with_zeros(graph: onnx.GraphProto) -> None:
    """MaxPool(x, pads) as MaxPool(Pad(x, 0)) where no element of x is below 0: the same maxima.

    onnx2tf pads with the lowest float, which ruins the int8 range of the padded tensor: logits all alike, or
    a refusal. Behind other activations it is left as it is.
    """
    producers = {name: node.op_type for node in graph.node for name in node.output}
    nodes = []
    for node in graph.node:
        pads = next((item for item in node.attribute if item.name == "pads"), None)
        if node.op_type == "MaxPool" and pads and producers.get(node.input[0]) in _NEVER_NEGATIVE:
            widths, padded = f"{node.output[0]}_pads", f"{node.output[0]}_padded"
            before, after = np.split(np.int64(pads.ints), 2)
            edges = np.concatenate([[0, 0], before, [0, 0], after])
            graph.initializer.append(numpy_helper.from_array(edges, widths))
            nodes.append(helper.make_node("Pad", [node.input[0], widths], [padded]))
            node.input[0] = padded
            node.attribute.remove(pads)
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def whole_gelus(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with x (1 + erf(x / sqrt 2)) / 2, in whatever order its factors are multiplied, as one Gelu,
    and of opset 20, the first that has it; the model as it is where there is none.

    TFLite has no Erf, but a Gelu, with a kernel for int8.
    """
    if all(node.op_type != "Erf" for node in model.graph.node):
        return model
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    newer = version_converter.convert_version(model, max(opset, _GELU_SINCE))
    _join_gelus(newer.graph)
    return newer if any(node.op_type == "Gelu" for node in newer.graph.node) else model


def _join_gelus(graph: onnx.GraphProto) -> None:
    values = {t.name: numpy_helper.to_array(t).item() for t in graph.initializer if np.prod(t.dims) == 1}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for erf in [node for node in graph.node if node.op_type == "Erf"]:
        scaled = producers.get(erf.input[0])
        if scaled is None:
            continue
        x = _scaled_by(scaled, np.sqrt(0.5), values)
        chain, factors = [erf], []
        while x and len(readers.get(chain[-1].output[0], [])) == 1 and chain[-1].output[0] not in outputs:
            [node] = readers[chain[-1].output[0]]
            others = [name for name in node.input if name != chain[-1].output[0]]
            one = node.op_type == "Add" and len(chain) == 1 and np.isclose(values.get(others[0], 0.0), 1.0)
            if not one and (node.op_type != "Mul" or len(chain) == 1 or len(others) != 1):
                break
            chain.append(node)
            factors += [] if one else others
            if _is_half_of(x, factors, producers, values):
                node.CopyFrom(helper.make_node("Gelu", [x], list(node.output), name=erf.name))
                for dead in chain[:-1]:
                    graph.node.remove(dead)
                if len(readers[scaled.output[0]]) == 1:
                    graph.node.remove(scaled)
                break


def _scaled_by(node: onnx.NodeProto, factor: float, values: dict[str, float]) -> str | None:
    """The x of a node that computes `factor` x, by a product or a quotient."""
    first, *rest = node.input
    if node.op_type == "Div" and np.isclose(values.get(rest[0], 0.0), 1 / factor):
        return first
    if node.op_type == "Mul":
        for x, other in ((first, rest[0]), (rest[0], first)):
            if np.isclose(values.get(other, 0.0), factor):
                return x
    return None


def _is_half_of(x: str, factors: list[str], producers: dict, values: dict[str, float]) -> bool:
    """Whether the product of the factors is x / 2."""
    if len(factors) == 2:
        return x in factors and any(np.isclose(values.get(name, 0.0), 0.5) for name in factors)
    return (
        len(factors) == 1 and factors[0] in producers and _scaled_by(producers[factors[0]], 0.5, values) == x
    )
