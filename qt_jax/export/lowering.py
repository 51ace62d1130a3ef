"""Lower a Linen apply function to a raw ONNX graph, and leave the batch open at the end.

The forward is traced by JAX, read as one flat program (`program`), whose norms, pools and resizes are
recognized (`patterns`), and written node by node (`emission`, `products`). A constant keeps the leaf of the
variables from which it stems (`params/stem/kernel`) as its origin. The batch is lowered as one concrete
number that no size of the model can be taken for, which leaves no shape arithmetic in the graph. When all
passes have run, `symbolic_batch` replaces that number by a symbol.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import gathers, graph, products, scatters
from qt_jax.export.emission import OPSET, emit
from qt_jax.export.graph import Constants
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.naming import note_outputs
from qt_jax.export.operators import BINARY
from qt_jax.export.patterns import simplify
from qt_jax.export.program import leaves_of, read
from qt_jax.export.tracing import trace

__all__ = [
    "BATCH",
    "OPSET",
    "gathers",
    "input_specs",
    "lower",
    "output_paths",
    "products",
    "scatters",
    "symbolic_batch",
]

MARKS = (1009, 1013, 1019, 1021)
"""Batches to lower with: primes. A size that is a multiple of the one chosen holds the batch."""

BATCH = "batch"
"""Symbol of the open batch."""

TAKING = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
"""Operators that take some entries along an axis."""

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
    try:
        traced, returned = _traced(apply_fn, variables, specs)
    except InvalidInput as error:
        if batch is not None:
            raise
        raise InvalidInput(
            "the forward takes one image and not several, because its variables or its program are tied to "
            "the batch size, as by a parameter whose shape holds x.shape[0]: make them independent of it, or "
            "export with dynamic_batch=False"
        ) from error
    _refuse_outputs(returned, specs)
    if batch is None:
        _refuse_counted(single, traced)
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
    note_outputs(skeleton, dict(zip(named, output_paths(returned)[0], strict=True)))
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
    """Trace the forward; return the program, and the pytree of the shapes that it returns."""
    shapes = ", ".join(str((1, *spec.shape[1:])) for spec in inputs)
    try:
        return trace(apply_fn, variables, *inputs)
    except InvalidInput:
        raise
    except (flax.errors.FlaxError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"apply_fn does not take these variables and inputs {shapes}: {error}. "
            "Give the variables of this very model, call it with train=False, and the input_shape it was "
            "initialised with."
        ) from error


def _refuse_outputs(returned: Any, inputs: Inputs) -> None:
    """Refuse outputs without the batch, or of a dtype that a graph does not return."""
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


def _refuse_counted(single: ClosedJaxpr, traced: ClosedJaxpr) -> None:
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
