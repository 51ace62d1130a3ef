"""Lower a Linen apply function to a raw ONNX graph through jax2onnx, and leave the batch open at the end.

The variables enter jax2onnx as named graph inputs and are then frozen into initializers, so that each keeps
its leaf (`params/stem/kernel`) as its origin. The batch is lowered as one concrete number that no size of the
model can be taken for, which leaves no shape arithmetic in the graph. When all passes have run,
`symbolic_batch` replaces that number by a symbol.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.graph import Constants
from qt_jax.export.jax2onnx_patches import jax2onnx_corrected
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.operators import BINARY

OPSET = 21
"""Opset at which every model is lowered and its activations are recognized.
`opsets.at_opset` restates it in an older one."""

MARKS = (1009, 1013, 1019, 1021)
"""Batches to lower with: primes. A size that is a multiple of the one chosen holds the batch."""

BATCH = "batch"
"""Symbol of the open batch."""

RANDOM = ("Bernoulli", "Multinomial", "Random")
"""Beginnings of the names of operators that draw numbers."""

Inputs = tuple[jax.ShapeDtypeStruct, ...]


def lower(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    input_shape: Any,
    *,
    batch: int | None,
    channels_first: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> onnx.ModelProto:
    """Let jax2onnx write the graph at opset `OPSET`, with an initializer for every variable that is read.

    The graph still holds batch norm, layout changes and constant subgraphs. It records no shapes.

    Args:
      apply_fn: `(variables, *inputs) -> array, or a pytree of arrays`.
      variables: Flax collections of arrays.
      input_shape: Shapes as `qt_jax.export.to_onnx` takes them.
      batch: Batch to lower with; None for one that occurs in no shape of the model.
      channels_first: Whether tensors of rank 4 pass the graph's boundary as NCHW.
      input_names: One name for each input of the graph; None for the defaults of `qt_jax.export.to_onnx`.
      output_names: One name for each leaf that `apply_fn` returns, or None.

    Raises:
      InvalidInput: `apply_fn` does not take these variables or inputs, an output has no batch, or jax2onnx
        does not lower an operation.
    """
    leaves = flatten_dict(unfreeze(dict(variables)))
    sizes = [size for leaf in leaves.values() for size in np.shape(leaf)]
    sizes += [size for spec in input_specs(input_shape, 1) for size in spec.shape]
    inputs = input_specs(input_shape, batch or unused_batch_size(sizes))
    outputs, numbers = _outputs(apply_fn, variables, inputs)
    if batch is None:
        other = input_specs(input_shape, inputs[0].shape[0] + 1)
        if not np.array_equal(numbers, _outputs(apply_fn, variables, other)[1], equal_nan=True):
            raise InvalidInput(
                "the forward computes with the batch size: use x.shape[0] only in reshape and broadcast_to, "
                "or export with dynamic_batch=False"
            )
    input_names = _names("input", input_names, len(inputs), "input")
    output_names = _names("output", output_names, len(outputs), "logits")
    if common := set(input_names) & set(output_names):
        raise InvalidInput(f"the name {common.pop()!r} is given to an input and to an output: change one")

    def positional(*arguments: jax.Array) -> list[jax.Array]:
        data, values = list(arguments[: len(inputs)]), arguments[len(inputs) :]
        if channels_first:
            data = [jnp.transpose(x, TO_CHANNELS_LAST[4]) if x.ndim == 4 else x for x in data]
        held = unflatten_dict(dict(zip(leaves, values, strict=True)))
        outputs = jax.tree.leaves(apply_fn(held, *data))
        named = {id(x) for x in data}
        for index, y in enumerate(outputs):
            outputs[index] = jnp.copy(y) if id(y) in named else y  # a tensor has one name in the graph
            named.add(id(y))
        return [
            jnp.transpose(y, TO_CHANNELS_FIRST[4]) if channels_first and y.ndim == 4 else y for y in outputs
        ]

    names = ["/".join(path) for path in leaves]
    specs = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves.values()]
    boundary = [
        jax.ShapeDtypeStruct((x.shape[0], x.shape[3], *x.shape[1:3]), x.dtype)
        if channels_first and len(x.shape) == 4
        else x
        for x in inputs
    ]
    raw = _convert(
        positional, [*boundary, *specs], input_names=[*input_names, *names], output_names=[*output_names]
    )
    _refuse_unlowered(raw)
    values = graph.constants(raw)
    for name, leaf in zip(names, leaves.values(), strict=True):
        values.add(name, np.asarray(leaf), name if "/" in name else "")
    return graph.rebuild(raw, raw.graph.node, values)


def input_specs(input_shape: Any, batch: int) -> Inputs:
    """Make one spec with batch for each input of the model.

    Args:
      input_shape: One shape without batch, or a sequence of them. An entry that is a `jax.ShapeDtypeStruct`
        (shape without batch) states its dtype too; the others are float32.
      batch: Size of the leading axis.

    Raises:
      InvalidInput: A shape is not a sequence of positive whole numbers.

    >>> input_specs((32, 32, 3), 1)
    (ShapeDtypeStruct(shape=(1, 32, 32, 3), dtype=float32),)
    >>> [spec.shape for spec in input_specs([(8, 8, 3), (5,)], 2)]
    [(2, 8, 8, 3), (2, 5)]
    """
    if not isinstance(input_shape, jax.ShapeDtypeStruct | list | tuple):
        raise InvalidInput(f"input_shape {input_shape!r} must be a tuple of sizes without batch: (32, 32, 3)")
    if isinstance(input_shape, jax.ShapeDtypeStruct) or all(
        isinstance(size, int | np.integer) for size in input_shape
    ):
        entries: Any = [input_shape]
    else:
        entries = input_shape
    specs = []
    for entry in entries:
        shape, dtype = getattr(entry, "shape", entry), getattr(entry, "dtype", jnp.float32)
        if not all(isinstance(size, int | np.integer) and size > 0 for size in shape):
            raise InvalidInput(f"input_shape {input_shape!r}: sizes must be positive whole numbers, no batch")
        specs.append(jax.ShapeDtypeStruct((batch, *shape), dtype))
    return tuple(specs)


def unused_batch_size(sizes: Iterable[int]) -> int:
    """Choose a batch size that occurs in no shape of a model, not even as a factor.

    >>> unused_batch_size([3, 2 * 1009])
    1013
    """
    sizes = set(sizes)
    return next(mark for mark in MARKS if all(size % mark for size in sizes))


def _outputs(
    apply_fn: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[list[jax.ShapeDtypeStruct], list[float]]:
    """Trace the forward, and check what it returns.

    Returns:
      The outputs, and the floating-point numbers that the forward computes with.
    """
    shapes = ", ".join(str((1, *spec.shape[1:])) for spec in inputs)
    try:
        traced, returned = jax.make_jaxpr(apply_fn, return_shape=True)(variables, *inputs)
        outputs = jax.tree.leaves(returned)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        first, *rest = str(error).splitlines()
        place = next((line.strip() for line in rest if "from line" in line), "")
        raise InvalidInput(
            f"the model cannot be traced, by jax.jit either: {first} {place}. It turns an array into a "
            "Python number (float(), int(), .item(), if): compute that with numpy, outside JAX."
        ) from error
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"apply_fn does not take these variables and inputs {shapes}: {error}. "
            "Give the variables of this very model, call it with train=False, and the input_shape it was "
            "initialised with."
        ) from error
    for output in outputs:
        if output.shape[:1] != inputs[0].shape[:1]:
            raise InvalidInput(
                f"every output of apply_fn must lead with the batch, one has shape {output.shape}: return "
                "only logits, without state or scalars"
            )
        if output.dtype not in (jnp.float32, jnp.int32):
            raise InvalidInput(
                f"apply_fn returns {output.dtype}: build the module with dtype=jnp.float32 for export"
            )
    if not outputs:
        raise InvalidInput("apply_fn returns nothing: it must return the logits, or a pytree of arrays")
    constants = [float(value) for value in traced.consts if _is_number(value)]
    return outputs, constants + list(_numbers(traced.jaxpr))


def _is_number(value: Any) -> bool:
    """Tell whether `value` is one floating-point number."""
    return np.size(value) == 1 and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _numbers(jaxpr: Any) -> Iterator[float]:
    """Yield the floating-point literals of a trace, in order.

    Those by which a sum is divided, which makes it a mean, are left out.
    """
    sums: set[int] = set()
    for equation in jaxpr.eqns:
        kept = equation.primitive.name in ("broadcast_in_dim", "reshape") and id(equation.invars[0]) in sums
        if equation.primitive.name == "reduce_sum" or kept:
            sums.update(map(id, equation.outvars))
        if equation.primitive.name == "div" and id(equation.invars[0]) in sums:
            continue
        for operand in equation.invars:
            if hasattr(operand, "val") and _is_number(operand.val):
                yield float(operand.val)
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(parameter, "eqns"):
                yield from _numbers(getattr(parameter, "jaxpr", parameter))


def _names(kind: str, given: Sequence[str] | None, number: int, single: str) -> list[str]:
    """Return the names of the graph's inputs or outputs.

    Args:
      kind: "input" or "output".
      given: The names that the user gave, or None.
      number: How many there are.
      single: Name of an only one, where none is given.
    """
    if given is None:
        return [single] if number == 1 else [f"{kind}_{index}" for index in range(number)]
    named = isinstance(given, list | tuple) and all(isinstance(name, str) and name for name in given)
    if not named or len(given) != number or len(set(given)) != number:
        raise InvalidInput(f"{kind}_names {given!r}: the model has {number} {kind}s, give each its own name")
    return list(given)


def _convert(function: Callable, inputs: Sequence[Any], **options: Any) -> onnx.ModelProto:
    """Call jax2onnx, and make its errors readable."""
    with jax2onnx_corrected() as to_onnx:
        try:
            return to_onnx(function, inputs, opset=OPSET, normalization_mode="prefer_native", **options)
        except InvalidInput:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:500]
            raise InvalidInput(
                f"jax2onnx cannot lower this model: {type(error).__name__}: {reason}. "
                "Write the step it names with layers and functions of flax.linen."
            ) from error


def _refuse_unlowered(raw: onnx.ModelProto) -> None:
    """Refuse a forward that draws random numbers or branches on data."""
    values = graph.constants(raw)
    for node in raw.graph.node:
        training = node.op_type == "Dropout" and np.any(values.get("".join(node.input[2:3]), False))
        if training or node.op_type.startswith(RANDOM):
            raise InvalidInput(
                "the forward draws random numbers"
                + (" in Dropout: call it with train=False or deterministic=True" if training else "")
                + ("" if training else ": give them as an input, or hold them in the variables")
            )
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute):
            raise InvalidInput(
                f"the model holds control flow that becomes a {node.op_type} (lax.while_loop, lax.cond or "
                "fori_loop), which vendors' compilers do not take: unroll it in Python or use nn.scan."
            )


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
    repeated = {name for name, value in values.items() if _repeats(value, mark)}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type in ("Expand", "Reshape") and _holds_batch(values.get(node.input[1]), mark):
            target = values[node.input[1]]
            if node.op_type == "Reshape":
                node = graph.rewired(
                    node, [node.input[0], _shape(values, _inferred(node, target, mark).tolist())]
                )
            elif shapes[node.input[0]][:1] == (mark,) and len(target) == len(shapes[node.input[0]]):
                node = graph.rewired(node, [node.input[0], _shape(values, [1, *target[1:].tolist()])])
            else:
                nodes.extend(_expanded(node.input[0], node.output[0], target.tolist(), values))
                continue
        broadcasts = node.op_type in BINARY and any(
            shapes[name][:1] == (mark,) for name in node.input if name not in repeated
        )
        if not broadcasts:
            for name in repeated.intersection(node.input):
                whole = f"{node.output[0]}/{len(nodes)}"
                nodes.extend(_expanded(name, whole, values[name].shape, values))
                node = graph.rewired(node, [whole if other == name else other for other in node.input])
        nodes.append(node)
    for name in repeated:
        values[name] = values[name][:1]
    size = helper.make_node("Shape", [model.graph.input[0].name], ["batch_size"], start=0, end=1)
    result = graph.rebuild(model, [size, *nodes], values)
    _refuse_held(result, mark)
    return _with_open_batch(result)


def _holds_batch(value: np.ndarray | None, mark: int) -> bool:
    """Tell whether a constant is a shape that holds the batch."""
    if value is None or value.dtype != np.int64 or value.ndim != 1:
        return False
    return bool(np.any((value > 0) & (value % mark == 0)))


def _repeats(value: np.ndarray, mark: int) -> bool:
    """Tell whether a constant holds the same for each image."""
    batched = value.ndim > 0 and value.shape[0] == mark
    floating = np.issubdtype(value.dtype, np.floating)
    return batched and np.array_equal(value, np.broadcast_to(value[:1], value.shape), equal_nan=floating)


def _shape(values: Constants, sizes: Sequence[int]) -> str:
    """Add a shape to the constants; return its name."""
    return values.add(f"shape#{len(values)}", np.array(sizes, np.int64))


def _inferred(node: NodeProto, target: np.ndarray, mark: int) -> np.ndarray:
    """Return the target of a Reshape with -1 in place of the size that holds the batch."""
    inferred = np.where((target > 0) & (target % mark == 0), -1, target)
    if np.sum(inferred == -1) > 1:
        raise InvalidInput(f'the reshape of "{node.input[0]}" to {target.tolist()} splits the batch in two')
    return inferred


def _expanded(source: str, output: str, target: Sequence[int], values: Constants) -> list[NodeProto]:
    """Make the nodes that repeat `source` to (batch, *target[1:]), as `output`."""
    sizes = ["batch_size", *([_shape(values, target[1:])] if len(target) > 1 else [])]
    return [
        helper.make_node("Concat", sizes, [f"{output}/shape"], axis=0),
        helper.make_node("Expand", [source, f"{output}/shape"], [output]),
    ]


def _refuse_held(model: onnx.ModelProto, mark: int) -> None:
    """Refuse a graph in which a constant still holds the batch."""
    for name, value in graph.constants(model).items():
        counted = value.size == 1 and value.item() in (mark, np.float32(1 / mark))
        if _holds_batch(value, mark) or mark in value.shape or counted:
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
