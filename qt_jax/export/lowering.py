"""Lower a Linen apply function to a raw ONNX graph, and leave the batch open at the end.

The forward is traced by JAX, read as one flat program (`program`), whose norms, pools and resizes are
recognized (`patterns`), and written node by node (`emission`, `products`). A constant keeps the leaf of the
variables from which it stems (`params/stem/kernel`) as its origin. The batch is lowered as one concrete
number that no size of the model can be taken for, which leaves no shape arithmetic in the graph. When all
passes have run, `symbolic_batch` replaces that number by a symbol.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph, products
from qt_jax.export.emission import OPSET, emit
from qt_jax.export.graph import Constants
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.operators import BINARY
from qt_jax.export.patterns import simplify
from qt_jax.export.program import leaves_of, read

__all__ = ["BATCH", "OPSET", "input_specs", "lower", "output_paths", "products", "symbolic_batch"]

MARKS = (1009, 1013, 1019, 1021)
"""Batches to lower with: primes. A size that is a multiple of the one chosen holds the batch."""

BATCH = "batch"
"""Symbol of the open batch."""

Inputs = tuple[jax.ShapeDtypeStruct, ...]


def lower(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    input_shape: Any,
    *,
    batch: int | None,
    channels_first: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | Mapping[str, str] | None,
) -> onnx.ModelProto:
    """Write the graph at opset `OPSET`, with an initializer for every variable that is read.

    The graph still holds batch norm and layout changes. It records no shapes of tensors inside.

    Args:
      apply_fn: `(variables, *inputs) -> array, or a pytree of arrays`.
      variables: Flax collections of arrays.
      input_shape: Shapes as `qt_jax.export.to_onnx` takes them.
      batch: Batch to lower with; None for one that occurs in no shape of the model.
      channels_first: Whether tensors of rank 4 pass the graph's boundary as NCHW.
      input_names: One name for each input of the graph; None for the defaults of `qt_jax.export.to_onnx`.
      output_names: Names of what `apply_fn` returns, as `qt_jax.export.to_onnx` takes them.

    Raises:
      InvalidInput: `apply_fn` does not take these variables or inputs, an output has no batch, or ONNX has
        no operator for a step.
    """
    leaves = leaves_of(variables)
    sizes = [size for leaf in leaves.values() for size in np.shape(leaf)]
    sizes += [size for spec in input_specs(input_shape, 1) for size in spec.shape]
    if batch is None:
        single, _ = _traced(apply_fn, variables, input_specs(input_shape, 1))
        held = [np.ravel(x) for x in single.consts if np.size(x) and _is_whole(x)]
        sizes += _sizes_of(single.jaxpr) + [int(x) for array in held for x in array]
    specs = input_specs(input_shape, batch or unused_batch_size(sizes))
    traced, returned = _traced(apply_fn, variables, specs)
    if batch is None and not np.array_equal(_numbers_of(traced), _numbers_of(single), equal_nan=True):
        raise InvalidInput(
            "the forward computes with the batch size: use x.shape[0] only in reshape and broadcast_to, "
            "or export with dynamic_batch=False"
        )
    input_names = _names("input", input_names, len(specs), "input")
    named = _output_names(returned, output_names)
    for name in (*input_names, *named):
        if "#" in name or name == "batch_size" or name in leaves:
            raise InvalidInput(f"the name {name!r} is one that the graph uses inside: choose another")
    if common := set(input_names) & set(named):
        raise InvalidInput(f"the name {common.pop()!r} is given to an input and to an output: change one")
    inputs, outputs = read(traced, leaves, simplify)
    before: list[NodeProto] = []
    tensors = {}
    for name, x in zip(input_names, inputs, strict=True):
        tensors[id(x)] = name
        if channels_first and x.ndim == 4:
            tensors[id(x)] = f"{name}/channels_last"
            before.append(helper.make_node("Transpose", [name], [tensors[id(x)]], perm=TO_CHANNELS_LAST[4]))
    emitter, made = emit(outputs, tensors)
    after: list[NodeProto] = []
    for name, source, y in zip(named, made, outputs, strict=True):
        moved = channels_first and y.ndim == 4
        options: dict[str, Any] = {"perm": TO_CHANNELS_FIRST[4]} if moved else {}
        after.append(helper.make_node("Transpose" if moved else "Identity", [source], [name], **options))
    order = named if output_names is None or isinstance(output_names, Mapping) else list(output_names)
    entries = {
        name: _entry(name, y.shape, y.dtype, channels_first) for name, y in zip(named, outputs, strict=True)
    }
    body = helper.make_graph(
        [],
        "main_graph",
        [_entry(name, x.shape, x.dtype, channels_first) for name, x in zip(input_names, inputs, strict=True)],
        [entries[name] for name in order],
    )
    skeleton = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])
    return graph.rebuild(skeleton, [*before, *emitter.nodes, *after], emitter.values)


def _entry(name: str, shape: Sequence[int], dtype: Any, channels_first: bool) -> onnx.ValueInfoProto:
    """Describe an input or output of the graph."""
    if channels_first and len(shape) == 4:
        shape = [shape[axis] for axis in TO_CHANNELS_FIRST[4]]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def input_specs(input_shape: Any, batch: int) -> Inputs:
    """Make one spec with batch for each input of the model.

    Args:
      input_shape: One shape without batch, or a sequence of them. An entry that is a `jax.ShapeDtypeStruct`
        (shape without batch) states its dtype too; the others are float32. JAX has no int64 and float64
        unless x64 is on: they are int32 and float32.
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
        specs.append(jax.ShapeDtypeStruct((batch, *shape), jax.dtypes.canonicalize_dtype(dtype)))
    return tuple(specs)


def unused_batch_size(sizes: Iterable[int]) -> int:
    """Choose a batch size that occurs in no shape of a model, not even as a factor.

    >>> unused_batch_size([3, 2 * 1009])
    1013
    """
    sizes = set(sizes) - {0}
    return next(mark for mark in MARKS if all(size % mark for size in sizes))


def _traced(apply_fn: Callable, variables: Mapping[str, Any], inputs: Inputs) -> tuple[ClosedJaxpr, Any]:
    """Trace the forward, and check what it returns.

    Returns:
      The program, and the pytree of the shapes that it returns.
    """
    shapes = ", ".join(str((1, *spec.shape[1:])) for spec in inputs)
    try:
        traced, returned = jax.make_jaxpr(apply_fn, return_shape=True)(variables, *inputs)
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
    outputs = jax.tree.leaves(returned)
    for output in outputs:
        if output.shape[:1] != inputs[0].shape[:1]:
            raise InvalidInput(
                f"every output of apply_fn must lead with the batch, one has shape {output.shape}: return "
                "only logits, without state or scalars"
            )
        if output.dtype not in (jnp.float32, jnp.int32):
            floating = jnp.issubdtype(output.dtype, jnp.floating)
            remedy = (
                "build the module with dtype=jnp.float32 for export" if floating else "return it as int32"
            )
            raise InvalidInput(f"apply_fn returns {output.dtype}: {remedy}, with .astype")
    if not outputs:
        raise InvalidInput("apply_fn returns nothing: it must return the logits, or a pytree of arrays")
    return traced, returned


def _numbers_of(traced: ClosedJaxpr) -> list[float]:
    """Return the numbers that a program computes with."""
    constants = [float(value) for value in traced.consts if _is_number(value)]
    return constants + list(_numbers(traced.jaxpr))


def _is_number(value: Any) -> bool:
    """Tell whether `value` is one number."""
    return np.size(value) == 1 and jnp.issubdtype(jnp.result_type(value), jnp.number)


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


def _numbers(jaxpr: Any) -> Iterator[float]:
    """Yield the numbers among the literals of a trace, in order.

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
        for inner in _inner(equation):
            yield from _numbers(inner)


def output_paths(returned: Any) -> tuple[list[str], bool]:
    """Return the path of each leaf that a forward returns, and whether a dict holds several of them.

    >>> output_paths({"logits": 1.0, "boxes": 2.0}), output_paths((1.0, 2.0))
    ((['boxes', 'logits'], True), (['0', '1'], False))
    """
    leaves = jax.tree.leaves_with_path(returned)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    keyed = any(isinstance(key, jax.tree_util.DictKey) for path, _ in leaves for key in path)
    return paths, keyed and len(paths) > 1


def _output_names(returned: Any, given: Sequence[str] | Mapping[str, str] | None) -> list[str]:
    """Return the name of each leaf that the forward returns, in the order of `jax.tree.leaves`.

    The entries of a dict have no order that a list of names could follow: they are named by their keys.
    """
    paths, keyed = output_paths(returned)
    if isinstance(given, Mapping):
        if sorted(given) != sorted(paths):
            raise InvalidInput(
                f"output_names {given!r}: its keys must be those that apply_fn returns, {paths}"
            )
        return _names("output", [given[path] for path in paths], len(paths), "logits")
    if not keyed:
        return _names("output", given, len(paths), "logits")
    if given is None:
        return _names("output", paths, len(paths), "logits")
    _names("output", given, len(paths), "logits")
    if sorted(given) != sorted(paths):
        raise InvalidInput(
            f"output_names {given!r}: apply_fn returns a dict, whose entries have no order. Name its keys, "
            f"{paths}, or map each key to a name"
        )
    return paths


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


def _refuse_part(node: NodeProto, values: Constants, shapes: graph.Shapes, mark: int) -> None:
    """Refuse a node that takes some entries of the batch."""
    if node.op_type not in ("Gather", "Slice") or shapes.get(node.input[0], ())[:1] != (mark,):
        return
    axes = [graph.attributes(node).get("axis", 0)]
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
