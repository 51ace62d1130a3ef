"""Write ONNX's operators as functions of arrays: what is known in numpy, the rest in JAX.

Each function takes the attributes of a node and its inputs. An input is a numpy array where it follows from
constants and shapes alone, and a JAX array otherwise; an optional one that is missing is None. Functions
that graphs compute shapes with keep numpy arrays, so that shapes stay known while JAX traces. Ranks are made
equal before arrays meet, and no dtype is promoted, as strict settings of JAX ask for.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onnx import helper, numpy_helper

from qt_jax.equalization import normalizations, windows
from qt_jax.equalization.windows import Attributes
from qt_jax.errors import InvalidInput

Operator = Callable[..., Any]
"""Takes attributes and inputs, and returns the output, or a tuple of outputs."""


def library(*arrays: Any) -> Any:
    """Return numpy where all arrays are numpy's, and jax.numpy otherwise.

    >>> library(np.ones(2), np.ones(3)).__name__, library(np.ones(2), jnp.ones(3)).__name__
    ('numpy', 'jax.numpy')
    """
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def known(array: Any, what: str) -> np.ndarray:
    """Return an array that has to be known while JAX traces.

    Raises:
      InvalidInput: It depends on the inputs' values.
    """
    if not isinstance(array, np.ndarray):
        raise InvalidInput(f"its {what} depend on the values of the graph's inputs")
    return array


def integers(array: Any, what: str) -> list[int]:
    """Return a list of integers that has to be known: axes, sizes, pads."""
    return [int(value) for value in known(array, what).ravel()]


def aligned(*arrays: Any) -> list[Any]:
    """Return arrays of one library, with ones before their shapes, so that all have the same rank."""
    rank = max(array.ndim for array in arrays)
    as_array = library(*arrays).asarray
    return [as_array(array).reshape((1,) * (rank - array.ndim) + array.shape) for array in arrays]


def _elementwise(name: str) -> Operator:
    """Return a function that numpy and JAX give the same name."""

    def compute(attributes: Attributes, *inputs: Any) -> Any:
        arrays = aligned(*inputs)
        return getattr(library(*arrays), name)(*arrays)

    return compute


def _in_jax(function: Callable[..., Any], **defaults: Any) -> Operator:
    """Return a function of JAX arrays and of the attributes that have `defaults`."""

    def compute(attributes: Attributes, *inputs: Any) -> Any:
        chosen = {name: attributes.get(name, default) for name, default in defaults.items()}
        return function(*map(jnp.asarray, aligned(*inputs)), **chosen)

    return compute


def _variadic(name: str) -> Operator:
    """Return a function of any number of arrays that combines two at a time."""
    combine = _elementwise(name)

    def compute(attributes: Attributes, *inputs: Any) -> Any:
        return functools.reduce(functools.partial(combine, attributes), inputs)

    return compute


def _mean(attributes: Attributes, *inputs: Any) -> Any:
    total = _variadic("add")(attributes, *inputs)
    return total / total.dtype.type(len(inputs))


def _divide(attributes: Attributes, a: Any, b: Any) -> Any:
    """Divide; quotients of integers are truncated."""
    a, b = aligned(a, b)
    both = library(a, b)
    if jnp.issubdtype(a.dtype, jnp.floating):
        return both.divide(a, b)
    return both.sign(a) * both.sign(b) * (both.abs(a) // both.abs(b))


def _power(attributes: Attributes, base: Any, exponent: Any) -> Any:
    """Raise to a power. One that is a known whole number is multiplied out, which has exact gradients."""
    if isinstance(exponent, np.ndarray) and exponent.size == 1 and not isinstance(base, np.ndarray):
        value = float(exponent.item())
        if value.is_integer() and abs(value) <= 8 and exponent.ndim <= base.ndim:
            return jax.lax.integer_pow(base, int(value))
    base, exponent = aligned(base, exponent)
    return library(base, exponent).power(base, exponent.astype(base.dtype))


def _modulo(attributes: Attributes, a: Any, b: Any) -> Any:
    return _elementwise("fmod" if attributes.get("fmod") else "mod")(attributes, a, b)


def _clip(attributes: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
    if low is not None:
        x = _elementwise("maximum")(attributes, x, low)
    return x if high is None else _elementwise("minimum")(attributes, x, high)


def _hard_sigmoid(x: jax.Array, *, alpha: float, beta: float) -> jax.Array:
    return jnp.clip(alpha * x + beta, 0, 1)


def _gelu(x: jax.Array, *, approximate: str) -> jax.Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _selu(x: jax.Array, *, alpha: float, gamma: float) -> jax.Array:
    return gamma * jax.nn.elu(x, alpha)


def _celu(x: jax.Array, *, alpha: float) -> jax.Array:
    return jnp.maximum(x, 0) + jnp.minimum(alpha * jnp.expm1(jnp.minimum(x, 0) / alpha), 0)


def _cast(attributes: Attributes, x: Any) -> Any:
    return _as_type(x, helper.tensor_dtype_to_np_dtype(attributes["to"]))


def _as_type(x: Any, dtype: Any) -> Any:
    """Convert; JAX's arrays have at most 32 bits unless its settings allow 64."""
    return x.astype(dtype if isinstance(x, np.ndarray) else jax.dtypes.canonicalize_dtype(dtype))


def _softmax(function: Callable[..., Any]) -> Operator:
    return lambda attributes, x: function(jnp.asarray(x), axis=attributes.get("axis", -1))


def _reduction(reduce: Callable[..., Any]) -> Operator:
    """Return a reduction over the axes that an attribute or the second input names."""

    def compute(attributes: Attributes, x: Any, axes: Any = None) -> Any:
        stated = attributes.get("axes", ()) if axes is None else integers(axes, "axes")
        if not stated and attributes.get("noop_with_empty_axes"):
            return x
        chosen = tuple(axis % x.ndim for axis in stated) or tuple(range(x.ndim))
        return reduce(library(x), x, axis=chosen, keepdims=bool(attributes.get("keepdims", 1)))

    return compute


def _named_reduction(name: str) -> Operator:
    return _reduction(lambda both, x, **options: getattr(both, name)(x, **options))


REDUCTIONS: Mapping[str, Operator] = {
    "ReduceMean": _named_reduction("mean"),
    # numpy would widen the sums of small integers
    "ReduceSum": _reduction(lambda both, x, **options: both.sum(x, **options).astype(x.dtype)),
    "ReduceProd": _reduction(lambda both, x, **options: both.prod(x, **options).astype(x.dtype)),
    "ReduceMax": _named_reduction("max"),
    "ReduceMin": _named_reduction("min"),
    "ReduceL1": _reduction(lambda both, x, **options: both.abs(x).sum(**options)),
    "ReduceL2": _reduction(lambda both, x, **options: both.sqrt((x * x).sum(**options))),
    "ReduceSumSquare": _reduction(lambda both, x, **options: (x * x).sum(**options)),
    "ReduceLogSum": _reduction(lambda both, x, **options: both.log(x.sum(**options))),
    "ReduceLogSumExp": _reduction(lambda both, x, **options: jax.nn.logsumexp(jnp.asarray(x), **options)),
}


def _arg(name: str) -> Operator:
    """Return ArgMax or ArgMin."""

    def compute(attributes: Attributes, x: Any) -> Any:
        axis, both = attributes.get("axis", 0) % x.ndim, library(x)
        keepdims = bool(attributes.get("keepdims", 1))
        if not attributes.get("select_last_index"):
            return getattr(both, name)(x, axis=axis, keepdims=keepdims)
        return x.shape[axis] - 1 - getattr(both, name)(both.flip(x, axis), axis=axis, keepdims=keepdims)

    return compute


def _cumulative_sum(attributes: Attributes, x: Any, axis: Any) -> Any:
    [place], both = integers(axis, "axis"), library(x)
    x = both.flip(x, place) if attributes.get("reverse") else x
    total = both.cumsum(x, axis=place).astype(x.dtype)
    total = total - x if attributes.get("exclusive") else total
    return both.flip(total, place) if attributes.get("reverse") else total


def _top_k(attributes: Attributes, x: Any, k: Any) -> tuple[Any, Any]:
    [count], axis = integers(k, "number of elements"), attributes.get("axis", -1)
    x = jnp.moveaxis(jnp.asarray(x), axis, -1)
    sign = 1 if attributes.get("largest", 1) else -1
    values, indices = jax.lax.top_k(sign * x, count)
    return jnp.moveaxis(sign * values, -1, axis), jnp.moveaxis(indices, -1, axis)


def _shape(attributes: Attributes, x: Any) -> np.ndarray:
    return np.array(x.shape[attributes.get("start", 0) : attributes.get("end")], np.int64)


def _size(attributes: Attributes, x: Any) -> np.ndarray:
    return np.array(x.size, np.int64)


def _reshape(attributes: Attributes, x: Any, shape: Any) -> Any:
    sizes = integers(shape, "sizes")
    if not attributes.get("allowzero"):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(attributes: Attributes, x: Any) -> Any:
    axis = attributes.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _transpose(attributes: Attributes, x: Any) -> Any:
    return x.transpose(attributes.get("perm", range(x.ndim)[::-1]))


def _squeeze(attributes: Attributes, x: Any, axes: Any = None) -> Any:
    return x.squeeze(None if axes is None else tuple(integers(axes, "axes")))


def _unsqueeze(attributes: Attributes, x: Any, axes: Any) -> Any:
    return library(x).expand_dims(x, tuple(integers(axes, "axes")))


def _expand(attributes: Attributes, x: Any, shape: Any) -> Any:
    sizes = np.broadcast_shapes(x.shape, tuple(integers(shape, "sizes")))
    return library(x).broadcast_to(x.reshape((1,) * (len(sizes) - x.ndim) + x.shape), sizes)


def _concatenate(attributes: Attributes, *inputs: Any) -> Any:
    both = library(*inputs)
    return both.concatenate([both.asarray(array) for array in inputs], axis=attributes["axis"])


def _split(attributes: Attributes, x: Any, sizes: Any = None) -> tuple[Any, ...]:
    axis = attributes.get("axis", 0)
    if sizes is None:
        step = -(-x.shape[axis] // attributes["num_outputs"])
        borders = [step * part for part in range(1, attributes["num_outputs"])]
    else:
        borders = [int(border) for border in np.cumsum(integers(sizes, "sizes"))[:-1]]
    return tuple(library(x).split(x, borders, axis=axis))


def _slice(
    attributes: Attributes, x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None
) -> Any:
    first, last = integers(starts, "starts"), integers(ends, "ends")
    places = range(len(first)) if axes is None else integers(axes, "axes")
    strides = [1] * len(first) if steps is None else integers(steps, "steps")
    cuts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(places, first, last, strides, strict=True):
        n = x.shape[axis]
        at = range(n)[slice(start, end, step)]
        cuts[axis] = slice(at.start, at.stop if at.stop >= 0 else None, step) if at else slice(0, 0)
    return x[tuple(cuts)]


def _gather(attributes: Attributes, x: Any, indices: Any) -> Any:
    axis = attributes.get("axis", 0) % x.ndim
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return x[(slice(None),) * axis + (int(indices),)]
    if isinstance(x, np.ndarray) and isinstance(indices, np.ndarray):
        return np.take(x, indices, axis)
    return jnp.take(jnp.asarray(x), _from_start(indices, x.shape[axis]), axis, mode="clip")


def _gather_elements(attributes: Attributes, x: Any, indices: Any) -> Any:
    axis = attributes.get("axis", 0) % x.ndim
    at = _from_start(indices, x.shape[axis])
    if any(size > at.shape[place] for place, size in enumerate(x.shape) if place != axis):
        x = x[tuple(slice(None) if place == axis else slice(size) for place, size in enumerate(at.shape))]
    return jnp.take_along_axis(jnp.asarray(x), at, axis, mode="clip")


def _gather_nd(attributes: Attributes, x: Any, indices: Any) -> Any:
    if attributes.get("batch_dims"):
        raise InvalidInput("batch_dims are not among what is known")
    both = library(x, indices)
    return both.asarray(x)[tuple(both.moveaxis(both.asarray(indices), -1, 0))]


def _scatter_nd(attributes: Attributes, x: Any, indices: Any, updates: Any) -> Any:
    place = jnp.asarray(x).at[tuple(jnp.moveaxis(jnp.asarray(indices), -1, 0))]
    changes = {"none": "set", "add": "add", "mul": "multiply", "max": "max", "min": "min"}
    return getattr(place, changes[attributes.get("reduction", "none")])(jnp.asarray(updates))


def _from_start(indices: Any, size: int) -> jax.Array:
    """Return indices that count from the start of an axis, where negative ones counted from its end."""
    indices = jnp.asarray(indices)
    return jnp.where(indices < 0, indices + size, indices)


def _pad(attributes: Attributes, x: Any, pads: Any, value: Any = None, axes: Any = None) -> Any:
    amounts = integers(pads, "pads")
    places = range(x.ndim) if axes is None else integers(axes, "axes")
    around = [(0, 0)] * x.ndim
    for axis, before, behind in zip(places, amounts[: len(places)], amounts[len(places) :], strict=True):
        around[axis] = (before, behind)
    cuts = (slice(max(-b, 0), n - max(-e, 0)) for n, (b, e) in zip(x.shape, around, strict=True))
    x, around = x[tuple(cuts)], [(max(b, 0), max(e, 0)) for b, e in around]
    mode = attributes.get("mode", "constant")
    if mode != "constant":
        return library(x).pad(x, around, mode=mode)
    fill = 0 if value is None else value.reshape(())
    return library(x).pad(x, around, constant_values=fill)


def _tile(attributes: Attributes, x: Any, repeats: Any) -> Any:
    return library(x).tile(x, integers(repeats, "repeats"))


def _filled(attributes: Attributes, shape: Any) -> np.ndarray:
    value = attributes.get("value")
    filling = np.zeros(1, np.float32) if value is None else numpy_helper.to_array(value)
    return np.full(integers(shape, "sizes"), filling.item(), filling.dtype)


def _range(attributes: Attributes, start: Any, limit: Any, delta: Any) -> np.ndarray:
    ends = [known(value, "ends") for value in (start, limit, delta)]
    return np.arange(*(value.item() for value in ends), dtype=ends[0].dtype)


def _constant(attributes: Attributes) -> np.ndarray:
    types = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    [(name, value)] = attributes.items()
    if name == "value":
        return numpy_helper.to_array(value)
    if name not in types:
        raise InvalidInput(f"{name} is not among what is known")
    return np.array(value, types[name])


def _one_hot(attributes: Attributes, indices: Any, depth: Any, values: Any) -> Any:
    [count], axis, both = integers(depth, "depth"), attributes.get("axis", -1), library(indices)
    at = both.where(indices < 0, indices + indices.dtype.type(count), indices)
    places = both.arange(count, dtype=indices.dtype).reshape((1,) * at.ndim + (-1,))
    hot = both.moveaxis(both.expand_dims(at, -1) == places, -1, axis)
    off, on = known(values, "values")
    return both.where(hot, on, off)


def _triangle(attributes: Attributes, x: Any, k: Any = None) -> Any:
    [diagonal], both = [0] if k is None else integers(k, "diagonal"), library(x)
    return (both.triu if attributes.get("upper", 1) else both.tril)(x, diagonal)


def _depth_to_space(attributes: Attributes, x: Any) -> Any:
    n, channels, height, width = x.shape
    b = attributes["blocksize"]
    if attributes.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, b, b, -1, height, width).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, -1, b, b, height, width).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, channels // b**2, height * b, width * b)


def _space_to_depth(attributes: Attributes, x: Any) -> Any:
    n, channels, height, width = x.shape
    b = attributes["blocksize"]
    parts = x.reshape(n, channels, height // b, b, width // b, b).transpose(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, channels * b**2, height // b, width // b)


def _dropout(attributes: Attributes, x: Any, ratio: Any = None, training: Any = None) -> tuple[Any, Any]:
    if training is not None and known(training, "mode").item():
        raise InvalidInput("it drops values as in training: export the graph for inference")
    return x, np.ones(x.shape, bool)


def _matmul(attributes: Attributes, a: Any, b: Any) -> jax.Array:
    return jnp.matmul(jnp.asarray(a), jnp.asarray(b), precision="highest")


def _gemm(attributes: Attributes, a: Any, b: Any, c: Any = None) -> jax.Array:
    a, b = (
        jnp.asarray(array).T if attributes.get(name) else jnp.asarray(array)
        for array, name in ((a, "transA"), (b, "transB"))
    )
    y = attributes.get("alpha", 1.0) * jnp.matmul(a, b, precision="highest")
    return y if c is None else y + attributes.get("beta", 1.0) * aligned(y, c)[1]


def _einsum(attributes: Attributes, *inputs: Any) -> jax.Array:
    return jnp.einsum(attributes["equation"], *map(jnp.asarray, inputs), precision="highest")


def _global(name: str) -> Operator:
    """Return a pool over all spatial axes."""
    return lambda attributes, x: getattr(jnp.asarray(x), name)(range(2, x.ndim), keepdims=True)


_LOWER_CASE = (
    *("Abs", "Ceil", "Floor", "Sqrt", "Exp", "Log", "Sign", "Reciprocal", "IsNaN", "IsInf", "Where"),
    *("Sin", "Cos", "Tan", "Sinh", "Cosh", "Tanh", "Equal", "Greater", "Less"),
)
_SAME_NAME = {
    **{operator: operator.lower() for operator in _LOWER_CASE},
    **{f"A{name}": f"arc{name}" for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{"Neg": "negative", "Round": "rint", "Not": "logical_not", "And": "logical_and", "Or": "logical_or"},
    **{"Xor": "logical_xor", "Add": "add", "Sub": "subtract", "Mul": "multiply"},
    **{"GreaterOrEqual": "greater_equal", "LessOrEqual": "less_equal"},
}
"""Operator -> the function of numpy and JAX that computes it."""

OPERATORS: Mapping[str, Operator] = {
    **{operator: _elementwise(name) for operator, name in _SAME_NAME.items()},
    **{"Max": _variadic("maximum"), "Min": _variadic("minimum"), "Sum": _variadic("add"), "Mean": _mean},
    **{"Div": _divide, "Pow": _power, "Mod": _modulo, "Clip": _clip, "Cast": _cast},
    "CastLike": lambda attributes, x, like: _as_type(x, like.dtype),
    "Identity": lambda attributes, x: x,
    "Relu": _in_jax(jax.nn.relu),
    "LeakyRelu": _in_jax(lambda x, *, alpha: jnp.where(x < 0, alpha * x, x), alpha=0.01),
    "PRelu": _in_jax(lambda x, slope: jnp.where(x < 0, slope * x, x)),
    "ThresholdedRelu": _in_jax(lambda x, *, alpha: jnp.where(x > alpha, x, 0), alpha=1.0),
    "Elu": _in_jax(jax.nn.elu, alpha=1.0),
    "Selu": _in_jax(_selu, alpha=1.6732632423543772, gamma=1.0507009873554805),
    "Celu": _in_jax(_celu, alpha=1.0),
    "Erf": _in_jax(jax.lax.erf),
    "Gelu": _in_jax(_gelu, approximate="none"),
    "Sigmoid": _in_jax(jax.nn.sigmoid),
    "HardSigmoid": _in_jax(_hard_sigmoid, alpha=0.2, beta=0.5),
    "HardSwish": _in_jax(lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1)),
    "Swish": _in_jax(lambda x, *, alpha: x * jax.nn.sigmoid(alpha * x), alpha=1.0),
    "Mish": _in_jax(lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    "Softplus": _in_jax(jax.nn.softplus),
    "Softsign": _in_jax(jax.nn.soft_sign),
    **{"Softmax": _softmax(jax.nn.softmax), "LogSoftmax": _softmax(jax.nn.log_softmax)},
    **REDUCTIONS,
    **{"ArgMax": _arg("argmax"), "ArgMin": _arg("argmin"), "CumSum": _cumulative_sum, "TopK": _top_k},
    **{"Shape": _shape, "Size": _size, "Reshape": _reshape, "Flatten": _flatten, "Transpose": _transpose},
    **{"Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Expand": _expand, "Concat": _concatenate},
    **{"Split": _split, "Slice": _slice, "Gather": _gather, "GatherElements": _gather_elements},
    **{"GatherND": _gather_nd, "ScatterND": _scatter_nd, "Pad": _pad, "Tile": _tile, "Dropout": _dropout},
    **{"ConstantOfShape": _filled, "Range": _range, "Constant": _constant, "OneHot": _one_hot},
    **{"Trilu": _triangle, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth},
    **{"MatMul": _matmul, "Gemm": _gemm, "Einsum": _einsum},
    **{"Conv": windows.convolution, "ConvTranspose": windows.transposed_convolution},
    **{"MaxPool": windows.max_pool, "AveragePool": windows.average_pool, "Resize": windows.resize},
    **{"GlobalAveragePool": _global("mean"), "GlobalMaxPool": _global("max")},
    "BatchNormalization": normalizations.batch_norm,
    "GroupNormalization": normalizations.group_norm,
    "InstanceNormalization": normalizations.instance_norm,
    "LayerNormalization": normalizations.layer_norm,
    "LpNormalization": normalizations.lp_norm,
    "LRN": normalizations.local_response_norm,
    "RMSNormalization": normalizations.rms_norm,
}
"""Operator of ai.onnx, opset 13 and later -> the function that computes it."""
