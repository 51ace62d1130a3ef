"""Read the program that a forward really runs: one flat graph of values, without calls and loops.

`read` traces the forward with plain JAX, and nothing is replaced in JAX or Flax meanwhile. Compiled calls are
inlined and loops unrolled. What depends on nothing but the variables is computed, so that a layer that
transforms its parameters leaves the transformed ones. A parameter remembers its leaf, and each value the
Flax module in which it was computed.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from qt_jax.dataflow import CALLS, leaves_by_path, opened, split_scan
from qt_jax.errors import InvalidInput
from qt_jax.export.graph import common_leaf

MAX_UNROLLED = 256
"""Number of steps of the longest loop that is unrolled. Each step writes its nodes once more."""

SMALL = 4096
"""Number of elements up to which a known array is computed whole, though its rows may be equal."""

IDENTITIES = frozenset({"copy", "copy_p", "name", "optimization_barrier", "stop_gradient"})
"""Primitives that hand a tensor on as it is."""

REMEMBERED = frozenset({"add", "broadcast_in_dim", "mul", "reshape", "rsqrt"})
"""Primitives of which a known value remembers its operands: those that make the gain of a batch norm."""

REMEMBERED_SIZE = 65536
"""Number of elements up to which it does."""

DRAWS = ("random_bits", "threefry2x32", "random_gamma", "rng_bit_generator", "rng_uniform")
"""Primitives that draw random numbers."""

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """Describe one array of a program.

    Attributes:
      primitive: Name of the JAX primitive that computes it, of a pattern of `patterns`, or "input".
      operands: What it is computed from.
      params: Parameters of the primitive.
      shape: Its shape.
      dtype: Its dtype.
      path: Flax path of the module that computes it, as JAX's name stack states it.
      known: Its value, where it depends on no input: a numpy array, or an array of random keys.
      origin: Leaf of the variables from which a known value stems; "" where it stems from none. The part of
        step 2 of a leaf that nn.scan stacks is `params/layers/kernel[2]`.
      moved: Whether a known value has all elements of its leaf, or of that part, in some layout.
      part: The moved value of which a known value is a part, or None.
      equation: Number that the outputs of one equation share.
      output: Which of its outputs this is.
    """

    primitive: str
    operands: tuple["Expression", ...]
    params: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: Any
    path: str = ""
    known: Any = None
    origin: str = ""
    moved: bool = False
    part: "Expression | None" = None
    equation: int = -1
    output: int = 0

    @property
    def ndim(self) -> int:
        """Return the number of axes."""
        return len(self.shape)

    def number(self) -> float | None:
        """Return the one number that a known array repeats; None for any other value."""
        if self.known is None or not isinstance(self.known, np.ndarray) or self.known.size == 0:
            return None
        packed = packed_rows(self.known)
        return packed.item() if packed.size == 1 else None


def constant(
    array: Any, origin: str = "", path: str = "", moved: bool = False, part: Expression | None = None
) -> Expression:
    """Make the value of a known array."""
    is_key = isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    known = array if is_key else np.asarray(array)
    shape = tuple(known.shape)
    return Expression("known", (), {}, shape, known.dtype, path, known, origin, moved, part, next(_numbers))


def derived(
    primitive: str, operands: Sequence[Expression], like: Any, path: str = "", /, **params: Any
) -> Expression:
    """Make the value of a pattern, with the shape and the dtype of `like`."""
    return Expression(
        primitive, tuple(operands), params, tuple(like.shape), like.dtype, path, equation=next(_numbers)
    )


Simplify = Callable[[Expression], Expression]
"""Returns a value that says the same as the one given, or the one given."""


def leaves_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of Flax's variables by path, `params/stem/kernel`, in the order of `jax.tree.leaves`.

    A box, such as `nn.Partitioned`, is opened.
    """
    return {"/".join(path): leaf for path, leaf in leaves_by_path(nn.unbox(variables)).items()}


def read(
    traced: ClosedJaxpr,
    leaves: Mapping[str, Any],
    simplify: Simplify,
    marks: dict[str, Expression] | None = None,
) -> tuple[list[Expression], list[Expression]]:
    """Flatten a traced forward of variables and inputs.

    Args:
      traced: The program, of which the first arguments are the leaves, and the others the inputs.
      leaves: Values of the variables by path, in the order of the arguments.
      simplify: Called with every value that depends on an input, as soon as its operands are there.
      marks: Where it is given, every value that the program names by `checkpoint_name` is put in there.

    Returns:
      (inputs, outputs).

    Raises:
      InvalidInput: The program branches on data, loops too long, or draws random numbers for each input.
    """
    arguments: Sequence[Any] = traced.jaxpr.invars
    variables, data = arguments[: len(leaves)], arguments[len(leaves) :]
    held = [
        constant(np.asarray(leaf).astype(variable.aval.dtype, copy=False), name, moved=True)
        for variable, (name, leaf) in zip(variables, leaves.items(), strict=True)
    ]
    inputs = [
        Expression("input", (), {}, variable.aval.shape, variable.aval.dtype, equation=next(_numbers))
        for variable in data
    ]
    reader = _Reader(simplify, inputs[0].shape[0], {} if marks is None else marks)
    with np.errstate(all="ignore"):
        return inputs, reader.inline(traced.jaxpr, traced.consts, [*held, *inputs], "")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Inline, unroll and compute, equation by equation."""

    simplify: Simplify
    batch: int
    marks: dict[str, Expression]

    def inline(
        self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Expression], path: str
    ) -> list[Expression]:
        """Return the outputs of a jaxpr."""
        values = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {
            variable: constant(held) for variable, held in zip(jaxpr.constvars, constants, strict=True)
        }

        def value(x: Any) -> Expression:
            literal = isinstance(x, Literal)
            return constant(np.asarray(getattr(x, "val", None), x.aval.dtype)) if literal else values[x]

        for equation in jaxpr.eqns:
            operands = [value(x) for x in equation.invars]
            own = str(equation.source_info.name_stack)
            inside = f"{path}/{own}" if path and own else path or own
            results = self.apply(equation, operands, inside)
            values |= zip(equation.outvars, results, strict=True)
        return [value(x) for x in jaxpr.outvars]

    def apply(self, equation: Any, operands: Sequence[Expression], path: str) -> Sequence[Expression]:
        """Return the outputs of one equation."""
        name, params = equation.primitive.name, equation.params
        inner = params.get(CALLS.get(name, ""))
        if inner is not None:
            outputs = self.inline(*opened(inner), operands, path)
            return [self.simplify(self.called(params.get("name", ""), operands, x, path)) for x in outputs]
        if name == "scan":
            return self.scan(params, operands, [x.aval for x in equation.outvars], path)
        if name == "while":
            return self.loop(params, operands, path)
        if name == "cond":
            if operands[0].known is None:
                raise _control_flow("lax.cond", path)
            index = int(np.clip(operands[0].known, 0, len(params["branches"]) - 1))
            return self.inline(*opened(params["branches"][index]), operands[1:], path)
        if name in IDENTITIES:
            if name == "name":
                self.marks.setdefault(params["name"], operands[0])
            return list(operands)
        avals = [x.aval for x in equation.outvars]
        if all(x.known is not None for x in operands):
            return self.known(equation, operands, avals, path)
        number = next(_numbers)
        return [
            self.simplify(
                Expression(
                    name, tuple(operands), params, aval.shape, aval.dtype, path, equation=number, output=i
                )
            )
            for i, aval in enumerate(avals)
        ]

    def called(self, name: str, operands: Sequence[Expression], output: Expression, path: str) -> Expression:
        """Note on the output of a compiled function what it was called on, where a pattern asks for that."""
        images = [x for x in operands if x.known is None]
        if name != "_resize" or len(images) != 1 or output.known is not None:
            return output
        return derived("resized", [output, images[0]], output, path)

    def known(
        self, equation: Any, operands: Sequence[Expression], avals: Sequence[Any], path: str
    ) -> Sequence[Expression]:
        """Compute an equation at export."""
        name = equation.primitive.name
        if name in DRAWS and any(self.holds_batch(aval.shape) for aval in avals):
            raise random_numbers(path)
        origin = common_leaf([x.origin for x in operands])
        arrays = [x.known for x in operands]
        held = all(isinstance(x, np.ndarray) for x in arrays)
        if held and (name in NUMPY or name in MOVEMENTS):
            aval = avals[0]
            if name in MOVEMENTS:
                result = MOVEMENTS[name](*arrays, equation.params, aval)
            else:
                result = by_rows(NUMPY[name], arrays, aval.shape)
            made = [np.asarray(result, dtype=aval.dtype)]
        else:
            found = equation.primitive.bind(*map(_device, arrays), **equation.params)
            made = [*found] if equation.primitive.multiple_results else [found]
        moved, part = False, None
        if name in MOVEMENTS and operands:
            whole = operands[0]
            moved = whole.moved and math.prod(avals[0].shape) == math.prod(whole.shape)
            moved = moved and (whole.dtype == avals[0].dtype or _widened(whole.dtype, avals[0].dtype))
            part = None if moved else whole if whole.moved else whole.part
        results = [constant(x, origin, path, moved, part) for x in made]
        if name not in REMEMBERED or math.prod(avals[0].shape) > REMEMBERED_SIZE:
            return results
        return [
            dataclasses.replace(x, primitive=name, operands=tuple(operands), params=equation.params)
            for x in results
        ]

    def holds_batch(self, shape: Sequence[int]) -> bool:
        """Tell whether an array has numbers of its own for each entry of the batch."""
        if self.batch == 1:
            return shape[:1] == (1,)
        return any(size and size % self.batch == 0 for size in shape)

    def scan(
        self, params: Mapping[str, Any], operands: Sequence[Expression], outputs: Sequence[Any], path: str
    ) -> list[Expression]:
        """Unroll a scan, whose operands are constants, carries and scanned rows."""
        body, constants = opened(params["jaxpr"])
        steps = params["length"]
        if steps > MAX_UNROLLED:
            raise _too_long("a scan", f"{steps} steps", path)
        first, carries = split_scan(body, [x.ndim for x in operands], [len(x.shape) for x in outputs])
        fixed, carry, scanned = (
            list(operands[:first]),
            list(operands[first : first + carries]),
            operands[first + carries :],
        )
        stacks: list[list[Expression]] = [[] for _ in outputs[carries:]]
        for step in reversed(range(steps)) if params["reverse"] else range(steps):
            taken = [self.row(x, step, path) for x in scanned]
            made = self.inline(body, constants, [*fixed, *carry, *taken], path)
            carry = made[:carries]
            for stack, x in zip(stacks, made[carries:], strict=True):
                stack.append(x)
        if params["reverse"]:
            stacks = [stack[::-1] for stack in stacks]
        return carry + [
            self.stacked(stack, aval, path) for stack, aval in zip(stacks, outputs[carries:], strict=True)
        ]

    def loop(self, params: Mapping[str, Any], operands: Sequence[Expression], path: str) -> list[Expression]:
        """Unroll a while loop whose number of steps does not depend on the inputs."""
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        fixed, carry = operands[: tests + bodies], list(operands[tests + bodies :])
        for _ in range(MAX_UNROLLED + 1):
            (goes_on,) = self.inline(*opened(params["cond_jaxpr"]), [*fixed[:tests], *carry], path)
            if goes_on.known is None:
                raise _control_flow("lax.while_loop", path)
            if not goes_on.known:
                return carry
            carry = self.inline(*opened(params["body_jaxpr"]), [*fixed[tests:], *carry], path)
        raise _too_long("a loop", f"more than {MAX_UNROLLED} steps", path)

    def row(self, x: Expression, index: int, path: str) -> Expression:
        """Return one row of a scanned operand."""
        if x.known is not None:
            return constant(x.known[index], x.origin and f"{x.origin}[{index}]", path, x.moved)
        starts, limits = (index, *(0,) * (x.ndim - 1)), (index + 1, *x.shape[1:])
        params = {"start_indices": starts, "limit_indices": limits, "strides": None}
        part = self.simplify(derived("slice", [x], _like((1, *x.shape[1:]), x), path, **params))
        return self.simplify(derived("squeeze", [part], _like(x.shape[1:], x), path, dimensions=(0,)))

    def stacked(self, rows: Sequence[Expression], aval: Any, path: str) -> Expression:
        """Stack the rows that a scan has made."""
        if not rows or all(x.known is not None for x in rows):
            arrays = [np.asarray(x.known) for x in rows]
            return constant(np.stack(arrays) if arrays else np.zeros(aval.shape, aval.dtype))
        wide = [
            constant(x.known[None], x.origin, path, x.moved)
            if x.known is not None
            else self.simplify(
                derived(
                    "reshape", [x], _like((1, *x.shape), x), path, new_sizes=(1, *x.shape), dimensions=None
                )
            )
            for x in rows
        ]
        return self.simplify(derived("concatenate", wide, aval, path, dimension=0))


def _widened(before: Any, after: Any) -> bool:
    """Tell whether a conversion of floating-point numbers keeps each as it is."""
    if not all(jax.numpy.issubdtype(dtype, jax.numpy.floating) for dtype in (before, after)):
        return False
    narrow, wide = (jax.numpy.finfo(dtype) for dtype in (before, after))
    return bool(narrow.nmant <= wide.nmant and narrow.maxexp <= wide.maxexp)


def _like(shape: Sequence[int], x: Expression) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _device(array: Any) -> Any:
    return jax.numpy.asarray(array) if isinstance(array, np.ndarray) else array


def place(path: str) -> str:
    """Return where in the model something happens, as the end of a sentence; "" at the top.

    >>> place("Net/encoder/jit(_where)")
    ' in Net/encoder'
    """
    modules = [part for part in path.split("/") if part and "(" not in part]
    return f" in {'/'.join(modules)}" if modules else ""


def random_numbers(path: str) -> InvalidInput:
    """Make the error for a forward that draws random numbers."""
    return InvalidInput(
        f"the forward draws random numbers{place(path)}: call it with train=False or deterministic=True, "
        "give them as an input, or hold them in the variables"
    )


def _control_flow(name: str, path: str) -> InvalidInput:
    return InvalidInput(
        f"the model holds control flow{place(path)} that depends on its inputs ({name}), which vendors' "
        "compilers do not take: compute every branch and choose with jnp.where"
    )


def _too_long(what: str, steps: str, path: str) -> InvalidInput:
    return InvalidInput(
        f"{what} of {steps}{place(path)} would be unrolled into as many copies (at most {MAX_UNROLLED}): "
        "shorten the sequence for export"
    )


def packed_rows(array: np.ndarray) -> np.ndarray:
    """Return an array with size 1 along each axis along which it repeats itself in memory.

    >>> packed_rows(np.broadcast_to(np.float32([[1.0, 2.0]]), (5, 2))).shape
    (1, 2)
    """
    repeated = (stride == 0 and size > 1 for stride, size in zip(array.strides, array.shape, strict=True))
    return array[tuple(slice(0, 1) if again else slice(None) for again in repeated)]


def by_rows(function: Callable[..., Any], arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> Any:
    """Compute elementwise, once for all rows that are equal."""
    if math.prod(shape) <= SMALL:
        return function(*arrays)
    return np.broadcast_to(function(*map(packed_rows, arrays)), shape)


def _select(index: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    return np.where(index, cases[1], cases[0]) if len(cases) == 2 else np.choose(index, cases)


NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": lambda x, y: x & y,
    "eq": np.equal,
    "exp": np.exp,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": lambda x, y: x | y,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": _select,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}
"""Maps an elementwise primitive to numpy's function, which is at hand sooner than a compiled one."""


def _broadcast(x: np.ndarray, params: Mapping[str, Any], aval: Any) -> np.ndarray:
    shape = [1] * len(aval.shape)
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(_reshaped(x, tuple(shape)), aval.shape)


def _reshaped(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshape, without a copy of an array that repeats itself and only gains or loses axes of size 1."""
    packed = packed_rows(x)
    kept = [size for size in x.shape if size != 1]
    if packed.size == x.size or kept != [size for size in shape if size != 1]:
        return x.reshape(shape)
    sizes = iter(size for size, whole in zip(packed.shape, x.shape, strict=True) if whole != 1)
    return np.broadcast_to(packed.reshape([1 if size == 1 else next(sizes) for size in shape]), shape)


def _sliced(x: np.ndarray, params: Mapping[str, Any], _: Any) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    ends = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return x[tuple(slice(*end) for end in ends)]


def _iota(params: Mapping[str, Any], aval: Any) -> np.ndarray:
    axis = params["dimension"]
    shape = [size if other == axis else 1 for other, size in enumerate(aval.shape)]
    return np.broadcast_to(np.arange(aval.shape[axis]).astype(aval.dtype).reshape(shape), aval.shape)


MOVEMENTS: dict[str, Callable[..., np.ndarray]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": lambda x, params, _: np.broadcast_to(
        packed_rows(x).astype(params["new_dtype"]), x.shape
    ),
    "iota": _iota,
    "reshape": lambda x, params, aval: _reshaped(x, aval.shape),
    "rev": lambda x, params, _: np.flip(x, params["dimensions"]),
    "slice": _sliced,
    "squeeze": lambda x, params, aval: _reshaped(x, aval.shape),
    "transpose": lambda x, params, _: x.transpose(params["permutation"]),
}
"""Maps a primitive that moves elements to the function `(array, params, aval) -> array` that does so."""


def walk(outputs: Sequence[Expression]) -> Iterator[Expression]:
    """Yield the values that outputs depend on, each after its operands and once."""
    seen: set[int] = set()
    pending = [(value, False) for value in reversed(outputs)]
    while pending:
        value, ready = pending.pop()
        if id(value) in seen:
            continue
        if ready or value.known is not None:
            seen.add(id(value))
            yield value
        else:
            pending.append((value, True))
            pending.extend(
                (operand, False) for operand in reversed(value.operands) if id(operand) not in seen
            )
