"""Matrix products in the form compilers know: Gemm on rows, MatMul on sequences and in attention.

jax2onnx writes every dense layer as a Gemm between two Reshapes, and attention as Einsum.
"""

import math

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph

ELLIPSIS = "0123456789"
"""Labels for the axes that "..." stands for."""


def unflatten_dense(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with Reshape to rows, Gemm, Reshape back made MatMul and Add on the tensor as it was.

    The leading axes that the first Reshape merged are kept; where it merged contracted axes (the output
    projection of attention), a Reshape of those remains. On rows that were never merged Gemm stays.
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
    back: dict[str, tuple[int, ...]],
    values: dict[str, np.ndarray],
    shapes: dict[str, tuple[int, ...]],
) -> list[NodeProto]:
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
    bias = gemm.input[2] if len(gemm.input) > 2 else ""
    if bias and not is_absent(bias, values):
        nodes.append(helper.make_node("Add", [product, bias], [f"{output}/biased"]))
        product = f"{output}/biased"
    values[f"{output}/rows"] = np.array(shapes[output], np.int64)
    return [*nodes, helper.make_node("Reshape", [product, f"{output}/rows"], [output])]


def is_absent(bias: str, values: dict[str, np.ndarray]) -> bool:
    """Whether a bias is the zeros that jax2onnx puts where a layer has none."""
    return bias in values and not graph.flax_path(bias) and not np.any(values[bias])


def _leading_axes(shape: tuple[int, ...], rows: int, back: tuple[int, ...]) -> tuple[int, ...]:
    """The leading axes of `shape` that were merged to `rows` and are split again in the shape `back`."""
    splits = [shape[:axis] for axis in range(1, len(shape)) if math.prod(shape[:axis]) == rows]
    return max((split for split in splits if back[: len(split)] == split), key=len, default=())


def einsum_to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with each Einsum of two tensors made MatMul, with the Transposes that it implies.

    Raises:
      InvalidInput: an equation that is no matrix product between single axes.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(_matmul(node, values, shapes) if node.op_type == "Einsum" else [node])
    return graph.rebuild(model, nodes, values)


def _matmul(
    einsum: NodeProto, values: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> list[NodeProto]:
    """Left as (batch, rows, contracted), right as (batch, contracted, columns), the product as is wanted."""
    equation = graph.attributes(einsum)["equation"].decode().replace(" ", "")
    terms, wanted = equation.split("->")
    operands = terms.split(",")
    if len(operands) != 2:
        raise _no_product(einsum, equation)
    free = max(
        len(shapes[name]) - len(term.replace("...", ""))
        for name, term in zip(einsum.input, operands, strict=True)
    )
    left, right, wanted = (term.replace("...", ELLIPSIS[:free]) for term in (*operands, wanted))
    contracted = [label for label in left if label in right and label not in wanted]
    batch = [label for label in wanted if label in left and label in right]
    rows = [label for label in left if label not in right]
    columns = [label for label in right if label not in left]
    kernel = not batch and einsum.input[1] in values and len(columns) == 1
    if len(contracted) != 1 or len(columns) != 1 or (len(rows) != 1 and not kernel):
        raise _no_product(einsum, equation)
    output = einsum.output[0]
    product = [*batch, *rows, *columns]
    if sorted(product) != sorted(wanted) or len(set(left)) < len(left) or len(set(right)) < len(right):
        raise _no_product(einsum, equation)
    nodes = []
    sources = []
    for name, labels, order in (
        (einsum.input[0], left, [*batch, *rows, *contracted]),
        (einsum.input[1], right, [*batch, *contracted, *columns]),
    ):
        permutation = [labels.index(label) for label in order]
        if permutation == sorted(permutation):
            sources.append(name)
        else:
            sources.append(f"{output}/operand{len(sources)}")
            nodes.append(helper.make_node("Transpose", [name], [sources[-1]], perm=permutation))
    if list(wanted) == product:
        return [*nodes, helper.make_node("MatMul", sources, [output])]
    back = [product.index(label) for label in wanted]
    return [
        *nodes,
        helper.make_node("MatMul", sources, [f"{output}/product"]),
        helper.make_node("Transpose", [f"{output}/product"], [output], perm=back),
    ]


def _no_product(einsum: NodeProto, equation: str) -> InvalidInput:
    return InvalidInput(
        f'einsum "{equation}" of {list(einsum.input)} is no matrix product between single axes: write it '
        "with jnp.matmul and reshape, or with nn.Dense or nn.DenseGeneral"
    )
