"""From a Linen apply function to a raw ONNX graph, through jax2onnx.

The variables enter jax2onnx as named graph inputs and are then frozen into initializers, so that each keeps
its path (`params/stem/kernel`) as its name. The batch is lowered as one concrete, unmistakable number, which
leaves no shape arithmetic in the graph; `batch.symbolic_batch` makes it a symbol at the end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.batch import unmistakable
from qt_jax.export.layout import TO_CHANNELS_FIRST, TO_CHANNELS_LAST
from qt_jax.export.shims import jax2onnx_corrected

OPSET = 21
"""Every model is lowered to this one dialect; `opsets.at_opset` restates it in an older one."""

RANDOM = ("Bernoulli", "Multinomial", "Random")
"""What operators that draw numbers are called."""

Inputs = tuple[jax.ShapeDtypeStruct, ...]


def input_specs(input_shape: Any, batch: int) -> Inputs:
    """One spec with batch for each input of the model.

    Args:
      input_shape: one shape without batch, or a sequence of them; an entry that is a `jax.ShapeDtypeStruct`
        (shape without batch) states its dtype too, the others are float32.
      batch: size of the leading axis.

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
    """The graph as jax2onnx writes it at opset `OPSET`, every variable that is read an initializer.

    Batch norm, layout changes and constant subgraphs are still there, and recorded shapes are not.

    Args:
      apply_fn: `(variables, *inputs) -> array, or a pytree of arrays`.
      variables: Flax collections of arrays.
      input_shape: as in `qt_jax.export.to_onnx`.
      batch: to lower with; None for one that no size of the model can be taken for.
      channels_first: whether tensors of rank 4 pass the graph's boundary as NCHW.
      input_names: of the graph's inputs, one for each; None for the defaults of `qt_jax.export.to_onnx`.
      output_names: of the graph's outputs, one for each leaf that `apply_fn` returns, or None.

    Raises:
      InvalidInput: variables or inputs that `apply_fn` does not take, an output without batch, or an
        operation that jax2onnx does not lower.
    """
    leaves = flatten_dict(unfreeze(dict(variables)))
    sizes = [size for leaf in leaves.values() for size in np.shape(leaf)]
    sizes += [size for spec in input_specs(input_shape, 1) for size in spec.shape]
    inputs = input_specs(input_shape, batch or unmistakable(sizes))
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
    frozen = {name: np.asarray(leaf) for name, leaf in zip(names, leaves.values(), strict=True)}
    return graph.rebuild(raw, raw.graph.node, graph.constants(raw) | frozen)


def _refuse_unlowered(raw: onnx.ModelProto) -> None:
    """Raise where the forward draws random numbers or branches on data."""
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


def _outputs(
    apply_fn: Callable, variables: Mapping[str, Any], inputs: Inputs
) -> tuple[list[jax.ShapeDtypeStruct], list[float]]:
    """What the forward returns, checked, and the floating-point numbers that it computes with."""
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
                "logits alone, without state or scalars"
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
    return np.size(value) == 1 and jnp.issubdtype(jnp.result_type(value), jnp.floating)


def _numbers(jaxpr: Any) -> Iterator[float]:
    """The floating-point literals of a trace, in order, but for those by which a sum is made a mean."""
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
    if given is None:
        return [single] if number == 1 else [f"{kind}_{index}" for index in range(number)]
    named = isinstance(given, list | tuple) and all(isinstance(name, str) and name for name in given)
    if not named or len(given) != number or len(set(given)) != number:
        raise InvalidInput(f"{kind}_names {given!r}: the model has {number} {kind}s, give each its own name")
    return list(given)


def _convert(function: Callable, inputs: Sequence[Any], **options: Any) -> onnx.ModelProto:
    """jax2onnx's result, its errors made readable."""
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
