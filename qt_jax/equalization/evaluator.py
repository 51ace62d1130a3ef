"""Run a float ONNX graph in JAX, differentiable in its constants.

A graph is run node by node while JAX traces. What follows from constants and shapes alone is computed in
numpy at that time (`operators`), so that sizes and axes are known. What products multiply can be changed on
the way, for example rounded. No library serves: jaxonnxruntime 0.3.0,
the only one in pure Python, runs none of this project's other networks than ResNet.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from onnx import NodeProto

from qt_jax.equalization.operators import OPERATORS
from qt_jax.errors import InvalidInput
from qt_jax.export import graph

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators that multiply their first two inputs."""

FIRST_OPSET = 13
"""Opset of ai.onnx from which on operators mean what `operators` computes."""

Operand = Callable[[NodeProto, int, jax.Array, bool], jax.Array]
"""Takes a product, the position of one of its first two inputs, that input, and whether it follows from
constants alone. Returns what is multiplied in its place."""


def run_graph(
    model: onnx.ModelProto,
    inputs: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    operand: Operand | None = None,
) -> dict[str, Any]:
    """Compute the outputs of a graph.

    Args:
      model: Float graph of ai.onnx operators, opset 13 or later.
      inputs: Arrays by input, in the graph's dtypes.
      weights: Arrays that stand for initializers, by name; the others are as in the graph. What shapes and
        axes are computed from cannot be given here under `jax.jit`.
      operand: Changes what a Conv, ConvTranspose, Gemm or MatMul multiplies; None for no change.

    Returns:
      The outputs by name: JAX arrays, or numpy arrays where they follow from constants and shapes.

    Raises:
      InvalidInput: The graph is older than opset 13, an operator is unknown, or sizes depend on the values
        of the inputs. The message names the node.

    >>> nodes = [onnx.helper.make_node("Mul", ["x", "w"], ["y"])]
    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    >>> w = onnx.numpy_helper.from_array(np.float32([2, 3]), "w")
    >>> model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], [w]))
    >>> run_graph(model, {"x": np.float32([1, 10])})["y"].tolist()
    [2.0, 30.0]
    >>> one = jnp.float32([1, 10])
    >>> jax.grad(lambda w: run_graph(model, {"x": one}, {"w": w})["y"].sum())(jnp.ones(2)).tolist()
    [1.0, 10.0]
    """
    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(opsets, default=0)
    if opset < FIRST_OPSET:
        raise InvalidInput(f"the graph has opset {opset}: convert it to opset {FIRST_OPSET} or later")
    values: dict[str, Any] = {**graph.constants(model), **(weights or {})}
    constant = set(values)
    values |= {name: jnp.asarray(array) for name, array in inputs.items()}
    for node in model.graph.node:
        missing = [name for name in node.input if name and name not in values]
        if missing:
            raise InvalidInput(f"{_title(node)} reads {', '.join(missing)}: give all inputs of the graph")
        arguments = [values[name] if name else None for name in node.input]
        if operand is not None and node.op_type in PRODUCTS:
            for place, name in enumerate(node.input[:2]):
                arguments[place] = operand(node, place, jnp.asarray(arguments[place]), name in constant)
        outputs = _computed(node, arguments)
        values |= {name: value for name, value in zip(node.output, outputs, strict=False) if name}
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
    return {entry.name: values[entry.name] for entry in model.graph.output}


def _computed(node: NodeProto, arguments: list[Any]) -> list[Any]:
    """Return the outputs of one node."""
    known_domain = node.domain in ("", "ai.onnx")
    if not known_domain or node.op_type not in OPERATORS:
        operator = node.op_type if known_domain else f"{node.domain}.{node.op_type}"
        raise InvalidInput(f"{_title(node)} is a {operator}, an operator that is not written in JAX here")
    attributes = {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in graph.attributes(node).items()
    }
    if node.op_type == "Split":
        attributes.setdefault("num_outputs", len(node.output))
    try:
        found = OPERATORS[node.op_type](attributes, *arguments)
    except InvalidInput as error:
        raise InvalidInput(f"{_title(node)}, a {node.op_type}, cannot run in JAX: {error}") from None
    outputs = list(found) if isinstance(found, tuple) else [found]
    asked = [name for name in node.output[len(outputs) :] if name]
    if asked:
        raise InvalidInput(f"{_title(node)}, a {node.op_type}, cannot give {', '.join(asked)} in JAX")
    return [np.asarray(value) if isinstance(value, np.generic) else value for value in outputs]


def _title(node: NodeProto) -> str:
    """Return how messages call a node."""
    return f'node "{node.name or next(filter(None, node.output), "")}"'
