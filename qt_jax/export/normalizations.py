"""Recognize batch norm, layer norm, group norm and instance norm in the arithmetic that computes them.

A norm is (x - mean) * rsqrt(variance + epsilon), where the statistics are known, or are those of x over some
axes. `normalized` recognizes that; `scaled` and `shifted` take the scale and the bias behind it in.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qt_jax.export.program import Expression, constant, derived

ADDITIONS = ("add", "add_any")
"""Primitives that add two arrays."""


def unexpanded(value: Expression) -> tuple[Expression, tuple[int, ...]] | None:
    """Return what a value broadcasts, and the axis of the value for each of its axes.

    None where a reshape does more than to put in or leave out axes of size 1.
    """
    if value.primitive == "broadcast_in_dim":
        return value.operands[0], tuple(value.params["broadcast_dimensions"])
    if value.primitive == "reshape":
        source = value.operands[0]
        kept = [axis for axis, size in enumerate(value.shape) if size != 1]
        if [value.shape[axis] for axis in kept] == list(source.shape):
            return source, tuple(kept)
    return None


def kept(value: Expression, primitive: str, axes: Sequence[int], of: Expression) -> Expression | None:
    """Return the value of a primitive that reduces `of` over `axes`, where `value` is that with axes kept."""
    axes = tuple(axes)
    if value.primitive == primitive and value.params.get("keepdims") and value.params["axes"] == axes:
        return value if value.operands[0] is of else None
    found = unexpanded(value)
    if found is None:
        return None
    source, places = found
    left = tuple(axis for axis in range(of.ndim) if axis not in axes)
    whole = source.primitive == primitive and not source.params.get("keepdims") and source.operands[0] is of
    return source if whole and source.params["axes"] == axes and places == left else None


def _is_square(value: Expression, of: Expression) -> bool:
    """Tell whether a value is the square of another."""
    if value.primitive == "square" or (value.primitive == "integer_pow" and value.params["y"] == 2):
        return value.operands[0] is of
    return value.primitive == "mul" and value.operands[0] is of and value.operands[1] is of


def _is_mean(value: Expression, of: Expression, axes: tuple[int, ...]) -> bool:
    return value.primitive == "mean" and value.operands[0] is of and value.params["axes"] == axes


def _variance_axes(value: Expression, x: Expression) -> tuple[int, ...] | None:
    """Return the axes over which a value is the variance of x, with the axes kept or not; None for others.

    It is max(0, mean(x^2) - mean(x)^2), or mean((x - mean(x))^2).
    """
    if value.primitive == "max":
        sides = [side for side in value.operands if side.number() != 0.0]
        return _variance_axes(sides[0], x) if len(sides) == 1 else None
    if value.primitive == "sub":
        squares, square = value.operands
        if squares.primitive != "mean" or not _is_square(squares.operands[0], x):
            return None
        axes = squares.params["axes"]
        mean = square.operands[0] if square.operands else square
        return axes if _is_mean(mean, x, axes) and _is_square(square, mean) else None
    if value.primitive == "mean":
        squared, axes = value.operands[0], value.params["axes"]
        centred = squared.operands[0] if squared.operands else squared
        if centred.primitive != "sub" or not _is_square(squared, centred) or centred.operands[0] is not x:
            return None
        mean = centred.operands[1]
        whole = _is_mean(mean, x, axes) and mean.params["keepdims"]
        return axes if whole or kept(mean, "mean", axes, x) is not None else None
    return None


def _spread(value: Expression) -> tuple[Expression, float, Expression | None] | None:
    """Return (v, epsilon, scale) of rsqrt(v + epsilon), or of that times a known scale."""
    if value.primitive == "mul":
        for side in (0, 1):
            inner = _spread(value.operands[side])
            scale = value.operands[1 - side]
            if inner is not None and inner[2] is None and scale.known is not None:
                return inner[0], inner[1], scale
        return None
    if value.primitive in ("reshape", "broadcast_in_dim") and value.known is not None and value.operands:
        inner = _spread(value.operands[0])
        return None if inner is None else _reshaped(inner, value.shape)
    if value.primitive != "rsqrt" or value.operands[0].primitive not in ADDITIONS:
        return None
    for side in (0, 1):
        epsilon = value.operands[0].operands[1 - side].number()
        if epsilon is not None:
            return value.operands[0].operands[side], epsilon, None
    return None


def _reshaped(
    spread: tuple[Expression, float, Expression | None], shape: tuple[int, ...]
) -> tuple[Expression, float, Expression | None] | None:
    """Return known parts of a spread in the shape to which it was reshaped; None if it was repeated."""
    variance, epsilon, scale = spread
    parts = [variance] if scale is None else [variance, scale]
    if any(x.known is None or x.known.size not in (1, math.prod(shape)) for x in parts):
        return None
    placed = [
        constant(x.known.reshape(shape if x.known.size > 1 else ()), x.origin, x.path, x.moved) for x in parts
    ]
    return placed[0], epsilon, None if scale is None else placed[1]


def normalized(value: Expression) -> Expression | None:
    """Recognize (x - mean) * rsqrt(variance + epsilon) [* scale], and the same divided by a root."""
    if value.primitive == "div":
        centred, root = value.operands
        if centred.primitive != "sub" or root.primitive != "sqrt" or not root.operands:
            return None
        inner = root.operands[0]
        if inner.known is not None or inner.primitive not in ADDITIONS:
            return None
        numbers = [side.number() for side in inner.operands]
        if (numbers[0] is None) == (numbers[1] is None):
            return None
        side = 0 if numbers[0] is None else 1
        return _norm(value, centred, inner.operands[side], numbers[1 - side], None)
    for side in (0, 1):
        centred, factor = value.operands[side], value.operands[1 - side]
        spread = _spread(factor) if centred.primitive == "sub" else None
        if spread is not None:
            return _norm(value, centred, *spread)
    return None


def _norm(
    value: Expression, centred: Expression, variance: Expression, epsilon: Any, scale: Expression | None
) -> Expression | None:
    """Make the value of a norm from its parts; None where these do not fit together."""
    x, mean = centred.operands
    if mean.known is not None and variance.known is not None and x.known is None:
        return _batch_norm(value, x, mean, variance, epsilon, scale)
    if mean.known is not None or variance.known is not None:
        return None
    found = _whole_norm(value, x, mean, variance, epsilon) or _group_norm(value, x, mean, variance, epsilon)
    if found is None or scale is None:
        return found
    product = derived("mul", [found, scale], value, value.path)
    return scaled(product) or product


def _feature_axis(arrays: Sequence[Expression], rank: int) -> int | None:
    """Return the one axis along which known values vary; the last where none does."""
    axes = set()
    for x in arrays:
        packed = (1,) * (rank - x.ndim) + x.shape
        axes |= {axis for axis, size in enumerate(packed) if size != 1}
    if len(axes) > 1:
        return None
    return axes.pop() if axes else rank - 1


def _by_feature(x: Expression | None, features: int, default: float) -> Expression:
    """Return a known value as one number for each feature."""
    if x is None:
        return constant(np.full(features, default, np.float32))
    flat = np.broadcast_to(np.ravel(x.known), (features,))
    return constant(flat, x.origin, x.path, x.moved and x.known.size == features)


def _batch_norm(
    value: Expression,
    x: Expression,
    mean: Expression,
    variance: Expression,
    epsilon: float,
    scale: Expression | None,
) -> Expression | None:
    """Make the value of a batch norm that is applied with known statistics."""
    parts = [mean, variance, *([] if scale is None else [scale])]
    axis = _feature_axis(parts, x.ndim)
    if axis is None or x.ndim < 2 or axis == 0 or x.shape != value.shape:
        return None
    features = x.shape[axis]
    operands = [
        x,
        _by_feature(scale, features, 1.0),
        constant(np.zeros(features, np.float32)),
        _by_feature(mean, features, 0.0),
        _by_feature(variance, features, 1.0),
    ]
    return derived("batch_norm", operands, value, value.path, axis=axis, epsilon=epsilon, shifted=False)


def _whole_norm(
    value: Expression, x: Expression, mean: Expression, variance: Expression, epsilon: float
) -> Expression | None:
    """Recognize a norm over the last axes, or over all axes but the first and the last."""
    inner = variance
    if inner.primitive in ("broadcast_in_dim", "reshape"):
        found = unexpanded(inner)
        if found is None:
            return None
        inner, places = found
    axes = _variance_axes(inner, x)
    if not axes:
        return None
    if inner is not variance and places != tuple(axis for axis in range(x.ndim) if axis not in axes):
        return None
    if not ((_is_mean(mean, x, axes) and mean.params["keepdims"]) or kept(mean, "mean", axes, x)):
        return None
    if axes == tuple(range(axes[0], x.ndim)) and axes[0] > 0:
        kind = {"kind": "layer_norm", "axis": axes[0]}
    elif x.ndim > 2 and axes == tuple(range(1, x.ndim - 1)):
        kind = {"kind": "instance_norm", "axis": x.ndim - 1}
    elif x.ndim > 2 and axes == tuple(range(2, x.ndim)):
        kind = {"kind": "instance_norm", "axis": 1}
    else:
        return None
    return derived(
        "norm", [x], value, value.path, epsilon=epsilon, groups=0, scaled=False, shifted=False, **kind
    )


def _group_norm(
    value: Expression, x: Expression, mean: Expression, variance: Expression, epsilon: float
) -> Expression | None:
    """Recognize a norm whose statistics are of groups of channels, of which the last axis holds them all."""
    means, variances = _of_groups(mean, x), _of_groups(variance, x)
    if means is None or variances is None or means.primitive != "mean":
        return None
    grouped = means.operands[0]
    if grouped.primitive != "reshape" or grouped.operands[0] is not x:
        return None
    groups = grouped.shape[-2]
    axes = (*range(1, grouped.ndim - 2), grouped.ndim - 1)
    if grouped.shape != (*x.shape[:-1], groups, x.shape[-1] // groups) or means.params["axes"] != axes:
        return None
    if _variance_axes(variances, grouped) != axes or x.ndim < 3:
        return None
    params = {"epsilon": epsilon, "groups": groups, "scaled": False, "shifted": False}
    return derived("norm", [x], value, value.path, kind="group_norm", axis=x.ndim - 1, **params)


def _of_groups(value: Expression, x: Expression) -> Expression | None:
    """Return the numbers by group that a value repeats for the channels of each group."""
    found = unexpanded(value)
    if found is None:
        return None
    by_channel, places = found
    if places != (0, x.ndim - 1) or by_channel.shape != (x.shape[0], x.shape[-1]):
        return None
    if by_channel.primitive != "reshape":
        return None
    repeated = by_channel.operands[0]
    by_group = repeated.primitive == "broadcast_in_dim" and repeated.ndim == 3
    if by_group and tuple(repeated.params["broadcast_dimensions"]) == (0, 1):
        return repeated.operands[0]
    if repeated.ndim == 2 and repeated.primitive in ("mean", "max", "sub"):
        return repeated if repeated.shape == by_channel.shape else None
    return None


def _fits(norm: Expression, x: Expression) -> np.ndarray | None:
    """Return a known value as a norm's scale or bias, of the axes that ONNX has it for."""
    known = x.known
    if not isinstance(known, np.ndarray) or known.dtype != np.float32:
        return None
    full = np.asarray(known).reshape((1,) * (norm.ndim - known.ndim) + known.shape)
    axis = norm.params["axis"]
    axes = range(axis, norm.ndim) if norm.params.get("kind") == "layer_norm" else (axis,)
    sizes = [size for other, size in enumerate(full.shape) if other not in axes]
    if any(size != 1 for size in sizes):
        return None
    shape = [norm.shape[other] for other in axes]
    return np.broadcast_to(full.reshape([full.shape[other] for other in axes]), shape)


def scaled(value: Expression) -> Expression | None:
    """Recognize the scale behind a norm."""
    for side in (0, 1):
        norm, scale = value.operands[side], value.operands[1 - side]
        if norm.primitive != "norm" or scale.known is None or norm.shape != value.shape:
            continue
        fitting = _fits(norm, scale)
        if norm.params["scaled"] or norm.params["shifted"] or fitting is None:
            return None
        own = constant(fitting, scale.origin, scale.path, scale.moved and scale.known.size == fitting.size)
        operands = [norm.operands[0], own]
        return derived("norm", operands, value, value.path, **{**norm.params, "scaled": True})
    return None


def shifted(value: Expression) -> Expression | None:
    """Recognize the bias behind a norm."""
    for side in (0, 1):
        norm, bias = value.operands[side], value.operands[1 - side]
        if norm.primitive not in ("norm", "batch_norm") or bias.known is None or norm.shape != value.shape:
            continue
        fitting = _fits(norm, bias)
        if norm.params["shifted"] or fitting is None:
            return None
        own = constant(fitting, bias.origin, bias.path, bias.moved and bias.known.size == fitting.size)
        if norm.primitive == "batch_norm":
            operands = [*norm.operands[:2], own, *norm.operands[3:]]
        else:
            ones = constant(np.ones(fitting.shape, np.float32))
            operands = [norm.operands[0], norm.operands[1] if norm.params["scaled"] else ones, own]
        params = {**norm.params, "shifted": True} | (
            {} if norm.primitive == "batch_norm" else {"scaled": True}
        )
        return derived(norm.primitive, operands, value, value.path, **params)
    return None


def by_root(value: Expression) -> Expression | None:
    """Write x * rsqrt(v) as x / sqrt(v), and a known factor between the two last, on fewer numbers."""
    for side in (0, 1):
        x, factor = value.operands[side], value.operands[1 - side]
        if x.known is not None or factor.known is not None:
            continue
        scale = None
        if factor.primitive == "mul":
            known = [operand for operand in factor.operands if operand.known is not None]
            others = [operand for operand in factor.operands if operand.known is None]
            if len(known) != 1 or len(others) != 1:
                continue
            (scale,), factor = known, others[0]
        if factor.primitive != "rsqrt" or x.shape != value.shape:
            continue
        root = derived("sqrt", factor.operands, factor, factor.path)
        quotient = derived("div", [x, root], value, value.path)
        return quotient if scale is None else derived("mul", [quotient, scale], value, value.path)
    return None
