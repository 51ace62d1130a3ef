"""Make the neutral form of a float ONNX graph: the same function, with channels that round better."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import onnx

from qt_jax.backends.arrays import first
from qt_jax.backends.inputs import load, prepare, real_inputs
from qt_jax.backends.protocol import Batch
from qt_jax.backends.samples import samples_of
from qt_jax.equalization.channels import find_freedom
from qt_jax.equalization.learned import KINDS, learned_factors, only
from qt_jax.equalization.rescaling import feeds, range_factors, rescale, tensors_of, with_own_constants
from qt_jax.equalization.walk import Freedom
from qt_jax.errors import InvalidInput
from qt_jax.export.sessions import open_session

Method = Literal["learned", "ranges"]
"""How factors are chosen: by the error of simulated grids on calibration samples, or in closed form."""

TOLERANCE = 1e-5
"""Largest difference of an output from the float graph's, relative to its largest value."""

CHOICES = 1e-3
"""Share of the elements of an output of integers that may differ."""

VERIFIED = 64
"""Number of calibration samples on which the outputs are compared."""


class Neutral(NamedTuple):
    """Hold a rescaled graph and what was done.

    Attributes:
      model: The float graph, rescaled. Inputs, outputs, names of nodes and opset are those of the original.
      freedom: The factors that were free, and why other tensors keep their values.
      factors: The factors f, float64 `(freedom.count + 1,)`, f[0] = 1.
      difference: Largest difference of any output on `VERIFIED` samples, relative to that output's largest
        value.
      powers_of_two: Whether the factors were rounded to powers of two, because the network makes more than
        `TOLERANCE` of the rounding of float32. Powers of two change no bit of any output.
      errors: Grid -> error of the outputs in dB (10 log10 of sum |y_g - y|^2 / sum |y|^2), before and after,
        on samples kept apart. Empty for the closed form.
      seconds: Wall time.
    """

    model: onnx.ModelProto
    freedom: Freedom
    factors: np.ndarray
    difference: float
    powers_of_two: bool
    errors: Mapping[str, tuple[float, float]]
    seconds: float


def equalize(
    model: onnx.ModelProto | bytes | str | Path,
    calibration: Batch,
    *,
    method: Method = "learned",
    grids: Sequence[str] | None = None,
    steps: int = 400,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> Neutral:
    """Rescale the channels of a float graph without changing its function, so that it rounds better.

    Channels of activations are multiplied by factors f > 0, and the constants around them absorb this
    (`channels`). "learned" chooses f by gradient descent on the error that low-bit grids of many vendors make
    (`learned`). It takes minutes. "ranges" equalizes the ranges of weights layer by layer in closed form
    (`rescaling.range_factors`), in seconds. The outputs of both graphs are compared before anything is
    returned.

    Args:
      model: A float ONNX model, or its path.
      calibration: Samples `(n, ...)`: the array of the only input, or arrays by input; a few hundred of the
        training split.
      method: How factors are chosen.
      grids: The learned way: only these grids, with equal shares, for who knows the compiler's. Names are
        those of `learned.GRIDS`, such as "int4w-full-pt". None: all of them, those of 4 bits before others.
      steps: Steps of the learned way, of 32 samples each.
      seed: Of the draws of the learned way.
      progress: Is called with a line after each step.

    Raises:
      InvalidInput: The model, the samples or a grid is wrong, no channel is free, or the learned way cannot
        run the graph.

    >>> kernels = np.float32([[1, 100], [2, 100]]), np.float32([[50, 50], [1, 0]])
    >>> tensors = [onnx.numpy_helper.from_array(kernel, name) for kernel, name in zip(kernels, "ab")]
    >>> nodes = [
    ...     onnx.helper.make_node("MatMul", ["x", "a"], ["h"], name="first"),
    ...     onnx.helper.make_node("Relu", ["h"], ["r"], name="relu"),
    ...     onnx.helper.make_node("MatMul", ["r", "b"], ["y"], name="second"),
    ... ]
    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
    >>> model = onnx.helper.make_model(
    ...     onnx.helper.make_graph(nodes, "g", [x], [y], tensors),
    ...     opset_imports=[onnx.helper.make_opsetid("", 17)],
    ... )
    >>> found = equalize(model, np.ones((4, 2), np.float32), method="ranges")
    >>> [onnx.numpy_helper.to_array(tensor).astype(int).tolist() for tensor in found.model.graph.initializer]
    [[[7, 14], [14, 14]], [[7, 7], [7, 0]]]
    """
    began = time.perf_counter()
    if method not in ("learned", "ranges"):
        raise InvalidInput(f'there is no method {method!r}: choose "learned" or "ranges"')
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, got {steps}")
    if grids is not None and method == "ranges":
        raise InvalidInput('the closed form looks at no grid: give grids with method="learned"')
    kinds = KINDS if grids is None else only(grids)
    original = load(model)
    samples = samples_of(real_inputs(original), calibration, "calibration")
    prepare(original, samples, samples)
    base = with_own_constants(original)
    freedom = find_freedom(base, tensors_of(base, samples))
    if not freedom.count:
        raise InvalidInput(_nothing_free(freedom))
    factors, errors = range_factors(base, freedom), {}
    if method == "learned":
        learned = learned_factors(
            base, freedom, samples, start=factors, kinds=kinds, steps=steps, seed=seed, progress=progress
        )
        factors = learned.factors
        errors = {
            grid: (_decibels(learned.before[grid]), _decibels(error)) for grid, error in learned.after.items()
        }
    used, rescaled, difference = _verified(original, base, freedom, factors, first(samples, VERIFIED))
    rounded = used is not factors
    return Neutral(rescaled, freedom, used, difference, rounded, errors, time.perf_counter() - began)


def _nothing_free(freedom: Freedom) -> str:
    """Say why no channel of a graph can be rescaled."""
    if not freedom.pinned:
        return "No channel of this graph can be rescaled: it has no two layers in a row."
    name, reason = next(iter(freedom.pinned.items()))
    others = len(freedom.pinned) - 1
    more = f" The same holds for {others} other tensors." if others else ""
    return f"No channel of this graph can be rescaled: {name!r} keeps its values, because {reason}.{more}"


def _decibels(error: float) -> float:
    return 10 * error / float(np.log(10))


def _verified(
    original: onnx.ModelProto,
    base: onnx.ModelProto,
    freedom: Freedom,
    factors: np.ndarray,
    samples: Mapping[str, np.ndarray],
) -> tuple[np.ndarray, onnx.ModelProto, float]:
    """Rescale a graph, and compare its outputs with those of the original.

    Returns:
      The factors, or if need be these rounded to powers of two; the rescaled graph; the largest relative
      difference.

    Raises:
      InvalidInput: The outputs differ even so.
    """
    expected = list(_outputs(original, samples))
    for chosen in (factors, np.exp2(np.round(np.log2(factors)))):
        rescaled = rescale(base, freedom, chosen)
        difference = _difference(expected, _outputs(rescaled, samples))
        if difference <= TOLERANCE:
            return chosen, rescaled, difference
    raise InvalidInput(
        f"The rescaled graph differs from the original by {difference:.1e} of its largest output, so it is "
        "not returned. Please report this graph: its function should be the same."
    )


def _outputs(model: onnx.ModelProto, samples: Mapping[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield all outputs for one batch of samples after another."""
    session = open_session(model, optimize=True)
    for batch in feeds(model, samples):
        yield [np.asarray(value) for value in session.run(None, batch)]


def _difference(expected: list[list[np.ndarray]], found: Iterator[list[np.ndarray]]) -> float:
    """Return the largest difference of any output, relative to the largest value of that output.

    It is infinite where shapes differ, or values that are not finite. Of an output of integers or truth
    values it is the share of elements that differ, if that is above `CHOICES`: a choice between two that are
    as good may fall the other way.
    """
    largest: dict[int, float] = {}
    differences: dict[int, float] = {}
    for one, two in zip(expected, found, strict=True):
        for place, (a, b) in enumerate(zip(one, two, strict=True)):
            if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
                return float("inf")
            if a.dtype.kind != "f":
                changed = float(np.mean(a != b)) if a.size else 0.0
                a, b = np.ones(1), np.ones(1) * (1.0 if changed <= CHOICES else 1.0 + changed)
            a, b = (np.where(np.isfinite(value), value, 0).astype(np.float64) for value in (a, b))
            largest[place] = max(largest.get(place, 0.0), float(np.abs(a).max(initial=0)))
            differences[place] = max(differences.get(place, 0.0), float(np.abs(a - b).max(initial=0)))
    return max(difference / (largest[place] or 1.0) for place, difference in differences.items())
