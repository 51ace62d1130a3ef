"""Lower a Linen apply function to a raw ONNX graph.

The forward is traced by JAX, read as one flat program (`program`), whose norms, pools and resizes are
recognized (`patterns`), and written node by node (`emission`, `products`). A constant keeps the leaf of the
variables from which it stems (`params/stem/kernel`) as its origin. The batch is lowered as one concrete
number (`batch`), which leaves no shape arithmetic in the graph.
"""

from collections.abc import Callable, Mapping, Sequence
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
from qt_jax.export.batch import refuse_counted, sizes_of, unused_batch_size
from qt_jax.export.emission import OPSET, emit
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.naming import note_outputs
from qt_jax.export.patterns import simplify
from qt_jax.export.program import leaves_of, read
from qt_jax.export.tracing import trace

__all__ = ["OPSET", "gathers", "input_specs", "lower", "output_paths", "products", "scatters"]

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
        sizes += sizes_of(single)
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
        refuse_counted(single, traced)
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
