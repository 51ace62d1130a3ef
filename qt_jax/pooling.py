"""Follow the channels of a layer's output through pools, means and reshapes in a traced program.

A factor of each channel commutes with these: gain * mean(x) = mean(gain * x), and gain * max(x) =
max(gain * x) if gain > 0. The exporter moves batch norm past them, into the layer
(`qt_jax.export.commuting`). `passed` tells training where it will.
"""

import math
from collections.abc import Sequence

from jax.extend.core import Literal

from qt_jax.dataflow import TRANSPARENT, Equation, TracedProgram

MAXIMA = frozenset({"reduce_max", "reduce_window_max"})
"""Primitives that take a maximum."""

SUMS = frozenset({"reduce_sum", "reduce_window_sum"})
"""Primitives that take a sum, which is a mean where the next operation divides it by the number of terms."""


def passed(program: TracedProgram, equation: Equation, axis: int) -> tuple[Equation, int] | None:
    """Return the last equation of an operation that keeps channels apart, and the axis of the channels then.

    Args:
      program: The program.
      equation: Takes the value whose channels are followed, and no other that is not static.
      axis: Axis of the channels in that value.

    Returns:
      (equation, axis): the division of a mean, otherwise the equation itself. None where the channels do not
      pass: the operation is none of a pool, mean or change of shape, or mixes channels or entries of the
      batch, or is a mean that counts zeros beside the image.
    """
    found = _moved(program, equation, axis)
    if found is None or equation.primitive.name not in SUMS:
        return None if found is None else (equation, found)
    terms = _terms(program, equation)
    while (following := _only_user(program, equation.outputs[0])) is not None:
        equation = following
        if equation.primitive.name == "div":
            return (equation, found) if _divides(program, equation, found, terms) else None
        if equation.primitive.name != "broadcast_in_dim":
            return None
        found = _moved(program, equation, found)
        if found is None:
            return None
    return None


def _only_user(program: TracedProgram, value: int) -> Equation | None:
    users = program.users.get(value, ())
    return users[0] if len(users) == 1 and value not in program.ends else None


def _moved(program: TracedProgram, equation: Equation, axis: int) -> int | None:
    """Return the axis of the channels behind one equation; None where they do not pass."""
    name, params = equation.primitive.name, equation.params
    [source, *others], [result] = equation.inputs, equation.outputs
    if others or isinstance(source, Literal):
        return None
    before, after = program.values[source].shape, program.values[result].shape
    if name in TRANSPARENT:
        return axis
    if name in ("reduce_max", "reduce_sum"):
        return _without(params["axes"], axis)
    if name in ("reduce_window_max", "reduce_window_sum"):
        window = params["window_dimensions"]
        return axis if window[axis] == window[0] == 1 and before[axis] == after[axis] else None
    if name == "squeeze":
        return _without(params["dimensions"], axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis] if math.prod(before) == math.prod(after) else None
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "reshape" and params["dimensions"] is None and before[axis] > 1:
        lead = math.prod(before[:axis])
        places = [at for at, size in enumerate(after) if size == before[axis]]
        return next((at for at in places if math.prod(after[:at]) == lead), None)
    return None


def _without(axes: Sequence[int], axis: int) -> int | None:
    """Return the place of an axis among those that are left, where the batch and the axis itself are."""
    return None if {0, axis} & {*axes} else axis - sum(other < axis for other in axes)


def _terms(program: TracedProgram, equation: Equation) -> int:
    """Return the number of terms of each sum; 0 where zeros beside the image may be among them."""
    [source] = (x for x in equation.inputs if not isinstance(x, Literal))
    shape, params = program.values[source].shape, equation.params
    if equation.primitive.name == "reduce_sum":
        return math.prod(shape[axis] for axis in params["axes"])
    return 0 if any(map(any, params["padding"])) else math.prod(params["window_dimensions"])


def _divides(program: TracedProgram, division: Equation, axis: int, terms: int) -> bool:
    """Tell whether a sum is divided by its number of terms: a number, or an array that counts them."""
    _, by = division.inputs
    if isinstance(by, Literal):
        return float(by.val) == terms
    shape = program.values[by].shape
    return program.is_static(by) and len(shape) > axis and shape[axis] == 1
