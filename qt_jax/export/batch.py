"""Lower with one concrete batch, refuse programs that compute with its size, and open it at the end.

The batch is lowered as a number that no size of the model can be taken for. Where a program computes with the
batch, as in `x / x.shape[0]`, its numbers at batch 1 are others than at that one. A size of the graph that is
a multiple of the number holds the batch, and `symbolic_batch` replaces it by a symbol.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.graph import Constants
from qt_jax.export.operators import BINARY

MARKS = (1009, 1013, 1019, 1021)
"""Batches to lower with: primes. A size that is a multiple of the one chosen holds the batch."""

BATCH = "batch"
"""Symbol of the open batch."""

TAKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
"""Operators that take some entries along an axis."""


def unused_batch_size(sizes: Iterable[int]) -> int:
    """Choose a batch size that occurs in no shape of a model, not even as a factor.

    >>> unused_batch_size([3, 2 * 1009])
    1013
    """
    sizes = set(sizes) - {0}
    return next(mark for mark in MARKS if all(size % mark for size in sizes))


def sizes_of(program: ClosedJaxpr) -> list[int]:
    """Return the sizes of all arrays of a program, and the whole numbers in it."""
    held = [np.ravel(x) for x in program.consts if np.size(x) and _is_whole(x)]
    return _sizes_of(program.jaxpr) + [int(x) for array in held for x in array]


def refuse_counted(single: ClosedJaxpr, traced: ClosedJaxpr) -> None:
    """Refuse a program that computes with other numbers at batch 1 than at another."""
    numbers, others = (list(_numbers(x.jaxpr, _never(x))) for x in (single, traced))
    alike = len(single.consts) == len(traced.consts) and np.array_equal(numbers, others, equal_nan=True)
    if not alike or not all(map(_is_repeated, single.consts, traced.consts)):
        raise InvalidInput(
            "the forward computes with the batch size: use x.shape[0] only in reshape and broadcast_to, "
            "or export with dynamic_batch=False"
        )


def _is_repeated(one: Any, several: Any) -> bool:
    """Tell whether a constant for several images repeats that for one, or numbers them from 0."""
    if not jnp.issubdtype(jnp.result_type(several), jnp.number):
        return True
    one, several = np.asarray(one), np.asarray(several)
    counts = several.size in several.shape and np.array_equal(several.ravel(), np.arange(several.size))
    if counts and one.shape != several.shape:
        return True
    shapes = zip(one.shape[::-1], several.shape[::-1], strict=False)
    if one.ndim != several.ndim or any(first not in (1, second) for first, second in shapes):
        return False
    return bool(np.all((one == several) | ((one != one) & (several != several))))


def _is_number(value: Any) -> bool:
    """Tell whether `value` is one number."""
    dtype = jnp.result_type(value)
    return np.size(value) == 1 and (jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating))


def _is_whole(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.integer))


def _sizes_of(jaxpr: Any) -> list[int]:
    """Return the sizes of all arrays of a program, and the whole numbers among its literals and slices."""
    found: list[int] = []
    for equation in jaxpr.eqns:
        found += [size for x in (*equation.invars, *equation.outvars) for size in x.aval.shape]
        literals = [x.val for x in equation.invars if hasattr(x, "val") and _is_number(x.val)]
        found += [int(value) for value in literals if np.isfinite(value) and float(value).is_integer()]
        found += [x for x in _parameters(equation) if type(x) is int]
        for inner in _inner(equation):
            found += _sizes_of(inner)
    return found


def _parameters(equation: Any) -> list[Any]:
    """Return the leaves of an equation's parameters, of which a jaxpr is one."""
    return jax.tree.leaves([*equation.params.values()], is_leaf=lambda leaf: hasattr(leaf, "eqns"))


def _inner(equation: Any) -> list[Any]:
    """Return the jaxprs that an equation calls."""
    return [getattr(x, "jaxpr", x) for x in _parameters(equation) if hasattr(x, "eqns")]


def _never(traced: ClosedJaxpr) -> set[int]:
    """Return the identities of the constants that are False throughout."""
    held = zip(traced.jaxpr.constvars, traced.consts, strict=True)
    return {id(x) for x, value in held if getattr(value, "dtype", None) == np.bool_ and not np.any(value)}


def _numbers(jaxpr: Any, never: Collection[int] = ()) -> Iterator[float]:
    """Yield the numbers among the literals of a trace, in order.

    Those by which a sum is divided, which makes it a mean, are left out, and those that are never chosen.
    `never` are the identities of variables that are False.
    """
    sums: set[int] = set()
    idle = _never_chosen(jaxpr, never)
    for equation in jaxpr.eqns:
        kept = equation.primitive.name in ("broadcast_in_dim", "reshape") and id(equation.invars[0]) in sums
        if equation.primitive.name == "reduce_sum" or kept:
            sums.update(map(id, equation.outvars))
        if equation.primitive.name == "div" and id(equation.invars[0]) in sums:
            continue
        for operand in () if idle.intersection(map(id, equation.outvars)) else equation.invars:
            if hasattr(operand, "val") and _is_number(operand.val):
                yield float(operand.val)
        for inner in _inner(equation):
            yield from _numbers(inner)


def _never_chosen(jaxpr: Any, never: Collection[int]) -> set[int]:
    """Return the identities of the variables that are read only by a choice that falls on another.

    `select_n(i < 0, i, i + n)` counts negative indices from the end. Where `jnp.arange` made i, none is.
    """
    readers = Counter(id(x) for equation in jaxpr.eqns for x in equation.invars)
    readers.update(map(id, jaxpr.outvars))
    counts: set[int] = set()
    false, found = set(never), set()
    for equation in jaxpr.eqns:
        name, operands, made = equation.primitive.name, equation.invars, map(id, equation.outvars)
        moved = name in ("broadcast_in_dim", "reshape") and id(operands[0]) in counts
        if name == "iota" or moved:
            counts.update(made)
        elif name == "lt" and id(operands[0]) in counts and getattr(operands[1], "val", None) == 0:
            false.update(made)
        elif name == "select_n" and id(operands[0]) in false and readers[id(operands[2])] == 1:
            found.add(id(operands[2]))
    return found


def symbolic_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Open `model` to batches of any size, so that the symbol "batch" leads every input and output.

    A Reshape infers the axis that holds the batch. An Expand leaves it to its input. A constant that is
    repeated for each image is kept once. Where broadcasting does not repeat it, as for a class token, an
    Expand takes the batch from the graph's input.

    Raises:
      InvalidInput: The batch is held where it cannot be left open. The message names the node.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    mark = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    axes = {name: axis for name, value in values.items() if (axis := _repeated(value, mark)) is not None}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        _refuse_part(node, values, shapes, mark)
        if node.op_type in ("Expand", "Reshape") and _holds_batch(values.get(node.input[1]), mark):
            target = values[node.input[1]]
            if node.op_type == "Reshape":
                node = graph.rewired(
                    node, [node.input[0], _shape(values, _inferred(node, target, mark).tolist())]
                )
            elif shapes[node.input[0]][:1] == (mark,) and len(target) == len(shapes[node.input[0]]):
                node = graph.rewired(node, [node.input[0], _shape(values, [1, *target[1:].tolist()])])
            else:
                nodes.extend(_expanded(node.input[0], node.output[0], target.tolist(), mark, values))
                continue
        for name in axes.keys() & set(node.input):
            if not _broadcasts(node, values[name].ndim - axes[name], axes, shapes, mark):
                whole = f"{node.output[0]}/{len(nodes)}"
                nodes.extend(_expanded(name, whole, values[name].shape, mark, values))
                node = graph.rewired(node, [whole if other == name else other for other in node.input])
        nodes.append(node)
    for name, axis in axes.items():
        values[name] = values[name].take([0], axis)
    size = helper.make_node("Shape", [model.graph.input[0].name], ["batch_size"], start=0, end=1)
    result = graph.rebuild(model, [size, *nodes], values)
    _refuse_held(result, mark)
    return _with_open_batch(result)


def _refuse_part(node: NodeProto, values: Constants, shapes: graph.Shapes, mark: int) -> None:
    """Refuse a node that takes some entries of the batch."""
    if node.op_type not in TAKING or shapes.get(node.input[0], ())[:1] != (mark,):
        return
    axes = [graph.attributes(node).get("axis", 0)]
    if node.op_type == "GatherND":
        axes = [graph.attributes(node).get("batch_dims", 0)]
    if node.op_type == "Slice":
        axes = values[node.input[3]].ravel().tolist() if len(node.input) > 3 else [0]
    if any(axis % len(shapes[node.input[0]]) == 0 for axis in axes):
        raise InvalidInput(
            f"the {node.op_type} that reads {list(node.input)[:1]} takes a part of the batch: treat all "
            "inputs alike, or export with dynamic_batch=False"
        )


def _holds_batch(value: np.ndarray | None, mark: int) -> bool:
    """Tell whether a constant is a shape that holds the batch."""
    if value is None or value.dtype != np.int64 or value.ndim != 1:
        return False
    return bool(np.any((value > 0) & (value % mark == 0)))


def _repeated(value: np.ndarray, mark: int) -> int | None:
    """Return the axis along which a constant holds the same for each image; None without one."""
    if value.shape.count(mark) != 1:
        return None
    axis = value.shape.index(mark)
    floating = np.issubdtype(value.dtype, np.floating)
    once = np.broadcast_to(value.take([0], axis), value.shape)
    return axis if np.array_equal(value, once, equal_nan=floating) else None


def _broadcasts(
    node: NodeProto, from_end: int, repeated: Collection[str], shapes: graph.Shapes, mark: int
) -> bool:
    """Tell whether a node repeats a constant, for another input has the batch at the same place."""
    others = [shapes.get(name, ()) for name in node.input if name not in repeated]
    return node.op_type in BINARY and any(
        len(shape) >= from_end and shape[-from_end] == mark for shape in others
    )


def _shape(values: Constants, sizes: Sequence[int]) -> str:
    """Add a shape to the constants; return its name."""
    return values.add(f"shape#{len(values)}", np.array(sizes, np.int64))


def _inferred(node: NodeProto, target: np.ndarray, mark: int) -> np.ndarray:
    """Return the target of a Reshape with -1 in place of the size that holds the batch."""
    inferred = np.where((target > 0) & (target % mark == 0), -1, target)
    if np.sum(inferred == -1) > 1:
        raise InvalidInput(f'the reshape of "{node.input[0]}" to {target.tolist()} splits the batch in two')
    return inferred


def _expanded(
    source: str, output: str, target: Sequence[int], mark: int, values: Constants
) -> list[NodeProto]:
    """Make the nodes that repeat `source` to `target`, in which the batch stands for `mark`, as `output`."""
    if list(target).count(mark) != 1 or any(size % mark == 0 for size in target if size not in (0, mark)):
        raise InvalidInput(
            f'"{source}" is repeated a multiple of the batch: broadcast to x.shape[0] alone, or export with '
            "dynamic_batch=False"
        )
    axis = list(target).index(mark)
    parts = [target[:axis], target[axis + 1 :]]
    before, behind = ([_shape(values, sizes)] if sizes else [] for sizes in parts)
    sizes = [*before, "batch_size", *behind]
    return [
        helper.make_node("Concat", sizes, [f"{output}/shape"], axis=0),
        helper.make_node("Expand", [source, f"{output}/shape"], [output]),
    ]


def _refuse_held(model: onnx.ModelProto, mark: int) -> None:
    """Refuse a graph in which a constant still holds the batch."""
    for name, value in graph.constants(model).items():
        counted = value.size == 1 and value.item() in (mark, np.float32(1 / mark))
        if _holds_batch(value, mark) or any(n and n % mark == 0 for n in value.shape) or counted:
            reader = next(node for node in model.graph.node if name in node.input)
            raise InvalidInput(
                f"the batch is a fixed number in the {reader.op_type} that reads {list(reader.input)[:1]}: "
                "use x.shape[0] only in reshape and broadcast_to"
            )


def _with_open_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put the symbol "batch" in the place of the leading size of inputs and outputs."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for entry in (*result.graph.input, *result.graph.output):
        leading = entry.type.tensor_type.shape.dim[0]
        leading.Clear()
        leading.dim_param = BATCH
    return result
