"""Write the values of a program as ONNX nodes, at opset `OPSET`.

`emit` goes through the values that the outputs depend on. `EMIT` maps each primitive to the function that
writes its nodes; `products` holds those of convolutions, matrix products, pools and norms. Images stay as JAX
has them: a convolution stands between two Transposes, which `layout` removes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export.graph import Constants
from qt_jax.export.program import DRAWS, Expression, packed_rows, place, random_numbers, walk

OPSET = 21
"""Opset at which every model is lowered and its activations are recognized.
`opsets.at_opset` restates it in an older one."""

DTYPES = ("bool", "float32", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
"""Dtypes that a graph may compute in."""


class Emitter:
    """Collect the nodes and constants of a graph.

    Attributes:
      nodes: The nodes, each after those whose outputs it reads.
      values: The constants by name.
    """

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.values = Constants()
        self.names: dict[int, str] = {}
        self.packed: dict[int, str] = {}
        self.written: dict[tuple, str] = {}

    def name(self, value: Expression) -> str:
        """Return the name of a value's tensor. A known one becomes a constant."""
        if id(value) not in self.names:
            self.names[id(value)] = self.held(value, value.known)
        return self.names[id(value)]

    def held(self, value: Expression, array: np.ndarray) -> str:
        """Add an array that is computed from a known value by movement; return its name."""
        free = value.origin if value.moved and value.origin not in self.values else ""
        name = free or f"{value.origin or 'constant'}#{len(self.values)}"
        return self.values.add(name, array, value.origin, np.ones(()) if value.moved else None)

    def constant(self, array: Any, dtype: Any = np.int64) -> str:
        """Add a constant that stems from no leaf; return its name."""
        array = np.asarray(array, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        if key not in self.written:
            self.written[key] = self.values.add(f"constant#{len(self.values)}", array)
        return self.written[key]

    def add(self, operator: str, inputs: Sequence[str], outputs: int = 1, **stated: Any) -> Any:
        """Add a node; return the name of its output, or a list of names where it has several."""
        made = [f"{operator}#{len(self.nodes)}/{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, made, **stated))
        return made[0] if outputs == 1 else made

    def reshaped(self, source: str, shape: Sequence[int]) -> str:
        """Add a Reshape."""
        return self.add("Reshape", [source, self.constant(list(shape))])

    def transposed(self, value: Expression, permutation: Sequence[int]) -> str:
        """Return the name of a value with its axes permuted."""
        return (
            self.moved(self.name(value), permutation)
            if value.known is None
            else self.held(value, np.transpose(value.known, permutation))
        )

    def moved(self, source: str, permutation: Any) -> str:
        """Add a Transpose by a sequence of axes, where it moves anything."""
        permutation = [int(axis) for axis in permutation]
        if permutation == sorted(permutation):
            return source
        return self.add("Transpose", [source], perm=permutation)

    def broadcast(self, operands: Sequence[Expression], shape: tuple[int, ...]) -> list[str]:
        """Return the names of operands that broadcast to a shape, without what repeats itself.

        Where nothing would repeat them to the shape, they are named whole.
        """
        shapes = [self.unrepeated(x) for x in operands]
        if np.broadcast_shapes(*shapes) != shape:
            return [self.name(x) for x in operands]
        return [self.small(x, own) for x, own in zip(operands, shapes, strict=True)]

    def unrepeated(self, value: Expression) -> tuple[int, ...]:
        """Return the shape of a value along whose repeated axes there is one entry."""
        if isinstance(value.known, np.ndarray):
            return packed_rows(value.known).shape
        if value.primitive == "broadcast_in_dim":
            source, places = value.operands[0], value.params["broadcast_dimensions"]
            shape = [1] * value.ndim
            for axis, size in zip(places, self.unrepeated(source), strict=True):
                shape[axis] = size
            return tuple(shape)
        return value.shape

    def small(self, value: Expression, shape: tuple[int, ...]) -> str:
        """Return the name of a value in the shape of `unrepeated`, without leading axes of size 1."""
        if isinstance(value.known, np.ndarray):
            packed = packed_rows(value.known)
            lead = next((axis for axis, size in enumerate(packed.shape) if size != 1), packed.ndim)
            if id(value) not in self.packed:
                array = packed.reshape(packed.shape[lead:])
                unchanged = array.shape == value.known.shape
                self.packed[id(value)] = self.name(value) if unchanged else self.held(value, array)
            return self.packed[id(value)]
        if value.primitive != "broadcast_in_dim" or shape == value.shape:
            return self.name(value)
        source = value.operands[0]
        inner = self.small(source, self.unrepeated(source))
        trimmed = shape[next((axis for axis, size in enumerate(shape) if size != 1), len(shape)) :]
        if self.unrepeated(source) in (shape, trimmed):
            return inner
        return self.reshaped(inner, shape)


def emit(outputs: Sequence[Expression], names: Mapping[int, str]) -> tuple[Emitter, list[str]]:
    """Write the nodes that compute values.

    Args:
      outputs: The values that are wanted.
      names: Names of the tensors that the inputs are, by the identity of their values.

    Returns:
      The emitter, and the names of the outputs' tensors.

    Raises:
      InvalidInput: A primitive has no operator, or a value has a dtype that is none of `DTYPES`.
    """
    emitter = Emitter()
    emitter.names.update(names)
    equations: dict[int, list[str]] = {}
    for value in walk(outputs):
        if id(value) in emitter.names or value.known is not None:
            continue
        if value.equation not in equations:
            _refuse(value)
            made = EMIT[value.primitive](emitter, value)
            equations[value.equation] = [made] if isinstance(made, str) else made
        emitter.names[id(value)] = equations[value.equation][value.output]
    return emitter, [emitter.name(x) for x in outputs]


def _refuse(value: Expression) -> None:
    """Refuse a value that no operator computes, or of a dtype that vendors' compilers do not take."""
    for x in (value, *value.operands):
        if str(x.dtype) not in DTYPES:
            raise InvalidInput(
                f"the forward computes in {x.dtype}{place(value.path)}: build the module with "
                "dtype=jnp.float32 for export, or cast to float32"
            )
    if value.primitive in DRAWS or value.primitive.startswith("random_"):
        raise random_numbers(value.path)
    if value.primitive not in EMIT:
        raise InvalidInput(
            f"the forward computes {value.primitive!r}{place(value.path)}, which no operator that vendors' "
            "compilers share expresses: write this step with layers and functions of flax.linen, or move it "
            "out of the model"
        )


Emit = Callable[[Emitter, Expression], str | list[str]]
EMIT: dict[str, Emit] = {}
"""Maps a primitive to the function that writes its nodes and returns the names of its outputs."""


def emits(*primitives: str) -> Callable[[Emit], Emit]:
    """Register the function that writes a primitive."""

    def register(function: Emit) -> Emit:
        EMIT.update(dict.fromkeys(primitives, function))
        return function

    return register


OPERATORS = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "atan": "Atan",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
    "xor": "Xor",
}
"""Maps an elementwise primitive to the operator that says the same."""


@emits(*OPERATORS)
def _elementwise(emitter: Emitter, value: Expression) -> str:
    inputs = emitter.broadcast(value.operands, value.shape)
    operator = OPERATORS[value.primitive]
    if operator in ("And", "Not", "Or", "Xor") and value.operands[0].dtype != np.bool_:
        raise InvalidInput(
            f"the forward computes {value.primitive!r} on the bits of whole numbers{place(value.path)}, "
            "which vendors' compilers do not take: move it out of the model"
        )
    return emitter.add(operator, inputs)


def _composed(*steps: tuple[str, tuple[Any, ...]]) -> Emit:
    """Return the function that writes a chain of operators, for a primitive of one operand.

    An operand `"x"` is the primitive's own, `...` the output of the step before, and a number a constant.
    """

    def write(emitter: Emitter, value: Expression) -> str:
        x = emitter.name(value.operands[0])
        result = x
        for operator, operands in steps:
            named = [
                x if y == "x" else result if y is ... else emitter.constant(y, value.dtype) for y in operands
            ]
            result = emitter.add(operator, named)
        return result

    return write


EMIT |= {
    "erfc": _composed(("Erf", ("x",)), ("Sub", (1.0, ...))),
    "exp2": _composed(("Pow", (2.0, "x"))),
    "log2": _composed(("Log", ("x",)), ("Mul", (..., 1.0 / math.log(2.0)))),
    "ne": lambda emitter, value: emitter.add(
        "Not", [emitter.add("Equal", emitter.broadcast(value.operands, value.shape))]
    ),
    "one_minus_square": _composed(("Mul", ("x", "x")), ("Sub", (1.0, ...))),
    "rsqrt": _composed(("Sqrt", ("x",)), ("Reciprocal", (...,))),
    "square": _composed(("Mul", ("x", "x"))),
}


@emits("expm1")
def _expm1(emitter: Emitter, value: Expression) -> str:
    """Write exp(x) - 1 as tanh(x / 2) * (exp(x) + 1), which keeps the digits of a small x."""
    x = emitter.name(value.operands[0])
    half, one = (emitter.constant(number, value.dtype) for number in (0.5, 1.0))
    tangent = emitter.add("Tanh", [emitter.add("Mul", [x, half])])
    return emitter.add("Mul", [tangent, emitter.add("Add", [emitter.add("Exp", [x]), one])])


@emits("log1p")
def _log1p(emitter: Emitter, value: Expression) -> str:
    """Write log(1 + x) with the digits of a small x.

    Rounding v = 1 + x takes x - (v - 1) from it, and so that by v from the logarithm. Beyond 1/2 this does
    not matter: x is clipped there, and nothing is added.
    """
    x = emitter.name(value.operands[0])
    one, low, high = (emitter.constant(number, value.dtype) for number in (1.0, -0.5, 0.5))
    logarithm = emitter.add("Log", [emitter.add("Add", [x, one])])
    small = emitter.add("Clip", [x, low, high])
    rounded = emitter.add("Add", [small, one])
    lost = emitter.add("Sub", [small, emitter.add("Sub", [rounded, one])])
    return emitter.add("Add", [logarithm, emitter.add("Div", [lost, rounded])])


@emits("integer_pow")
def _integer_pow(emitter: Emitter, value: Expression) -> str:
    x, power = emitter.name(value.operands[0]), value.params["y"]
    if power in (1, 2, 3):
        result = x
        for _ in range(power - 1):
            result = emitter.add("Mul", [result, x])
        return result
    if power == -1:
        return emitter.add("Reciprocal", [x])
    if not np.issubdtype(value.dtype, np.floating):
        raise InvalidInput(
            f"the forward takes power {power} of whole numbers{place(value.path)}, which overflows in "
            "another way in ONNX: cast to float32"
        )
    return emitter.add("Pow", [x, emitter.constant(power, value.dtype)])


@emits("round")
def _round(emitter: Emitter, value: Expression) -> str:
    """Round half to even, or half away from zero: sign(x) * floor(|x| + 1/2)."""
    x = emitter.name(value.operands[0])
    if int(value.params["rounding_method"]) == 1:
        return emitter.add("Round", [x])
    up = emitter.add("Add", [emitter.add("Abs", [x]), emitter.constant(0.5, value.dtype)])
    return emitter.add("Mul", [emitter.add("Sign", [x]), emitter.add("Floor", [up])])


@emits("rem")
def _rem(emitter: Emitter, value: Expression) -> str:
    """Write the remainder of whole numbers by known ones as x - (x / n) * n, where Div drops the fraction."""
    x, n = emitter.broadcast(value.operands, value.shape)
    divisor = value.operands[1].known
    if divisor is None or not np.issubdtype(value.dtype, np.integer) or np.any(divisor == 0):
        return emitter.add("Mod", [x, n], fmod=1)
    return emitter.add("Sub", [x, emitter.add("Mul", [emitter.add("Div", [x, n]), n])])


@emits("is_finite")
def _is_finite(emitter: Emitter, value: Expression) -> str:
    x = emitter.name(value.operands[0])
    largest = emitter.constant(np.finfo(np.float32).max, np.float32)
    return emitter.add("LessOrEqual", [emitter.add("Abs", [x]), largest])


@emits("convert_element_type")
def _cast(emitter: Emitter, value: Expression) -> str:
    to = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    return emitter.add("Cast", [emitter.name(value.operands[0])], to=to)


@emits("reduce_precision")
def _reduce_precision(emitter: Emitter, value: Expression) -> str:
    params = value.params
    if params["exponent_bits"] < 8 or params["mantissa_bits"] < 23:
        raise InvalidInput(
            f"the forward rounds to fewer bits with reduce_precision{place(value.path)}: export in float32"
        )
    return emitter.name(value.operands[0])


@emits("select_n")
def _select(emitter: Emitter, value: Expression) -> str:
    index, *cases = value.operands
    if len(cases) != 2 or index.dtype != np.bool_:
        raise InvalidInput(
            f"the forward chooses among {len(cases)} arrays by a whole number{place(value.path)}: choose "
            "between two at a time with jnp.where"
        )
    return emitter.add("Where", emitter.broadcast([index, cases[1], cases[0]], value.shape))


@emits("clamp")
def _clamp(emitter: Emitter, value: Expression) -> str:
    low, x, high = value.operands
    if low.number() is not None and high.number() is not None and x.known is None:
        bounds = [emitter.constant(y.number(), value.dtype) for y in (low, high)]
        return emitter.add("Clip", [emitter.name(x), *bounds])
    above = emitter.add("Max", emitter.broadcast([x, low], value.shape))
    return emitter.add("Min", [above, emitter.broadcast([high, x], value.shape)[0]])


REDUCTIONS = {
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_sum": "ReduceSum",
    "mean": "ReduceMean",
}


@emits(*REDUCTIONS)
def _reduce(emitter: Emitter, value: Expression) -> str:
    source = emitter.name(value.operands[0])
    axes = [int(axis) for axis in value.params["axes"]]
    if not axes:
        return source
    kept = int(value.params.get("keepdims", False))
    return emitter.add(REDUCTIONS[value.primitive], [source, emitter.constant(axes)], keepdims=kept)


@emits("reduce_and", "reduce_or")
def _reduce_logical(emitter: Emitter, value: Expression) -> str:
    numbers = emitter.add("Cast", [emitter.name(value.operands[0])], to=TensorProto.INT32)
    operator = "ReduceMin" if value.primitive == "reduce_and" else "ReduceMax"
    axes = emitter.constant([int(axis) for axis in value.params["axes"]])
    return emitter.add("Cast", [emitter.add(operator, [numbers, axes], keepdims=0)], to=TensorProto.BOOL)


@emits("argmax", "argmin")
def _argmax(emitter: Emitter, value: Expression) -> str:
    """Write ArgMax. The smallest is the largest of -x, or of -1 - x, which overflows for no integer."""
    (axis,) = value.params["axes"]
    x, dtype = emitter.name(value.operands[0]), value.operands[0].dtype
    if dtype.itemsize < 4:  # neither ArgMax nor Sub takes all of these at every opset
        x, dtype = emitter.add("Cast", [x], to=TensorProto.INT32), np.dtype(np.int32)
    if value.primitive == "argmin" and np.issubdtype(dtype, np.integer):
        x = emitter.add("Sub", [emitter.constant(np.array(-1).astype(dtype), dtype), x])
    elif value.primitive == "argmin":
        x = emitter.add("Neg", [x])
    found = emitter.add("ArgMax", [x], axis=int(axis), keepdims=0)
    return emitter.add("Cast", [found], to=helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype)))


@emits("softmax", "log_softmax")
def _softmax(emitter: Emitter, value: Expression) -> str:
    operator = "Softmax" if value.primitive == "softmax" else "LogSoftmax"
    return emitter.add(operator, [emitter.name(value.operands[0])], axis=value.params["axis"])


@emits("cumsum")
def _cumsum(emitter: Emitter, value: Expression) -> str:
    params = value.params
    axis = emitter.constant(params["axis"])
    return emitter.add("CumSum", [emitter.name(value.operands[0]), axis], reverse=int(params["reverse"]))


@emits("top_k")
def _top_k(emitter: Emitter, value: Expression) -> list[str]:
    inputs = [emitter.name(value.operands[0]), emitter.constant([value.params["k"]])]
    found, indices = emitter.add("TopK", inputs, outputs=2, axis=value.params.get("axis", -1))
    return [found, emitter.add("Cast", [indices], to=TensorProto.INT32)]
