"""Learn the factors of a graph's channels from the error that simulated grids of vendors make.

The function of a graph is the same for any positive factors f, but not what low-bit grids make of it. With
theta = log f, kernels W' = W exp(theta[up] - theta[down]), y the outputs of the float graph and y_g those
with what products multiply on the grid g, this minimises over a batch

    L(theta) = mean over g, by the shares of KINDS, of log(sum |y_g - y|^2 / sum |y|^2 + FLOOR)

by Adam. Rounding has the gradient of the identity (the straight-through estimator), and scales keep theirs:
a factor that raises the largest weight of a tensor makes the steps of all its weights larger. A scale that
is rounded to a power of two has, in its logarithm, the gradient of the scale itself.

Grids
    Those of `qt_jax.backends.grids`: kernels by max/127, max/7, max/7.5, max/8 and powers of two, per
    tensor and per channel. What a product reads is on 8 bits, from the least to the largest value of the
    batch. At each step one grid of each kind is drawn: L of a step is a fair draw of L.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import optax

from qt_jax.backends.grids import CONVENTIONS, SMALLEST
from qt_jax.equalization.evaluator import run_graph
from qt_jax.equalization.walk import Freedom
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.sessions import named_inputs, open_unoptimized, run_batches
from qt_jax.grid import power_of_two

KINDS = (
    (0.4, ("int4w-narrow-pt", "int4w-full-pt", "int4w-wide-pt")),
    (0.3, ("int4w-narrow-pc", "int4w-full-pc", "int4w-wide-pc")),
    (0.2, ("int4w-po2-up-pt", "int4w-po2-near-pt", "int4w-po2-up-pc", "int4w-po2-near-pc")),
    (0.1, ("int8-pt", "int8-pc", "int8-po2-up-pt", "int8-po2-near-pt", "int8-po2-up-pc", "int8-po2-near-pc")),
)
"""Share in the objective, and grids, of each kind. A step draws one grid of each. With equal shares of all
grids the gradients of those that lose little hide those of 4-bit kernels, and these do not improve."""

Kinds = Sequence[tuple[float, Sequence[str]]]
"""Share in the objective, and names of grids, of each kind."""

GRIDS = tuple(grid for _, kind in KINDS for grid in kind)

BATCH = 32
"""Images of a step."""

HELD = 4 * BATCH
"""Largest number of calibration images that are kept apart to judge factors."""

JUDGED_EVERY = 50
"""Steps between two judgements on the images that are kept apart."""

AGREEMENT = 1e-4
"""Largest difference from onnxruntime, relative to the largest output, with which a graph counts as run."""

FLOOR = 1e-3
"""Is added to relative errors. Noise that lies 30 dB below the outputs is small enough, so that less of it
is hardly worth more."""

GROUP = "group"
"""Name of the axis along which batches of the size that a graph fixes are mapped."""

Arrays = Mapping[str, Any]


class Grid(NamedTuple):
    """Hold a grid in numbers, so that one compiled program serves all.

    Attributes:
      steps, q_min, q_max: As in `grids.Convention`, float32.
      border: Largest fraction in [1/2, 1) of a scale that is rounded down to a power of two; 0 where the
        scale is not rounded.
      per_channel: Whether each output channel has its own scale.
    """

    steps: jax.Array
    q_min: jax.Array
    q_max: jax.Array
    border: jax.Array
    per_channel: jax.Array


@dataclass(frozen=True)
class LearnedFactors:
    """Hold learned factors and what they do on the images kept apart.

    Attributes:
      factors: float64 `(count + 1,)`, f[0] = 1.
      before, after: Grid -> log of the relative error of the outputs, with factors of 1 and with `factors`.
      steps: Number of steps taken.
      best_step: The step after which `factors` were found; 0 for a start.
      seconds: Wall time.
    """

    factors: np.ndarray
    before: Mapping[str, float]
    after: Mapping[str, float]
    steps: int
    best_step: int
    seconds: float


def learned_factors(
    model: onnx.ModelProto,
    freedom: Freedom,
    calibration: np.ndarray | Arrays,
    *,
    start: np.ndarray | None = None,
    kinds: Kinds = KINDS,
    steps: int = 400,
    learning_rate: float = 0.015,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> LearnedFactors:
    """Choose the factors with which simulated grids do least harm to the outputs.

    A quarter of the samples is kept apart. Every `JUDGED_EVERY` steps the factors are judged there on all
    grids, and the best ones are returned. Factors of 1 and `start` are judged first, and the better of the
    two is where the descent begins.

    Args:
      model: The float graph in which `freedom` was found.
      freedom: Its free factors.
      calibration: Samples `(n, ...)` by input, or of the only input.
      start: Factors that may be a better start than 1, `(count + 1,)`, such as those of the closed form.
      kinds: What the objective is made of. All grids are reported.
      steps: Steps of Adam.
      learning_rate: Rate of the first step, on log f; it falls to 0 as a cosine.
      seed: Of the draws of images and grids.
      progress: Is called with a line after each step.

    Raises:
      InvalidInput: The graph cannot be run in JAX, or its outputs differ from onnxruntime's.
    """
    began = time.perf_counter()
    samples = named_inputs(model, calibration)
    rows = np.random.default_rng(seed).permutation(len(next(iter(samples.values()))))
    held = rows[: min(len(rows) // 4, HELD)] if len(rows) >= 4 else rows
    trained = rows[len(held) :] if len(rows) >= 4 else rows
    simulation = _Simulation(model, freedom, samples, min(BATCH, len(trained)))
    simulation.verify(rows)
    judged = simulation.chunks(held)
    thetas = [np.zeros(freedom.count, np.float32)]
    if start is not None:
        thetas.append(np.log(start[1:]).astype(np.float32))
    scores = [simulation.judge(theta, judged) for theta in thetas]
    best = min(range(len(thetas)), key=lambda place: objective(scores[place], kinds))
    chosen, after, best_step = thetas[best], scores[best], 0
    for step, theta, loss in simulation.descend(chosen, trained, kinds, steps, learning_rate, seed):
        progress(f"step {step} of {steps}: error {10 * loss / math.log(10):.1f} dB")
        if step % JUDGED_EVERY == 0 or step == steps:
            score = simulation.judge(theta, judged)
            if objective(score, kinds) < objective(after, kinds):
                chosen, after, best_step = np.asarray(theta), score, step
    factors = np.exp(np.concatenate([[0.0], chosen.astype(np.float64)]))
    return LearnedFactors(factors, scores[0], after, steps, best_step, time.perf_counter() - began)


def objective(scores: Mapping[str, float], kinds: Kinds = KINDS) -> float:
    """Return the mean of the objective over kinds of grids, by their shares."""
    return sum(share * float(np.mean([scores[grid] for grid in kind])) for share, kind in kinds)


def only(grids: Sequence[str]) -> Kinds:
    """Return kinds of one grid each, with equal shares.

    Raises:
      InvalidInput: There is no such grid, one is given twice, or none is given.

    >>> only(["int8-pt", "int4w-full-pc"])
    ((0.5, ('int8-pt',)), (0.5, ('int4w-full-pc',)))
    """
    unknown = [name for name in grids if name not in GRIDS]
    if unknown or not grids:
        named = f"there is no grid {unknown[0]!r}" if unknown else "no grid is named"
        raise InvalidInput(f"{named}: choose among {', '.join(GRIDS)}")
    if len(set(grids)) < len(grids):
        raise InvalidInput(f"a grid is named twice: {', '.join(grids)}")
    return tuple((1 / len(grids), (name,)) for name in grids)


class _Simulation:
    """Run a graph with given factors, on grids and in float, on rows of samples."""

    def __init__(
        self, model: onnx.ModelProto, freedom: Freedom, samples: Mapping[str, np.ndarray], batch: int
    ) -> None:
        self.model, self.freedom, self.samples = model, freedom, samples
        first = model.graph.input[0].type.tensor_type.shape.dim
        fixed = first[0].dim_value if len(first) else 0
        self.group = fixed or batch  # samples that the graph takes at once
        self.batch = max(batch // self.group, 1) * self.group
        scaled = {entry.initializer for entry in freedom.scaled}
        self.weights = {
            name: jnp.asarray(value)
            for name, value in graph.constants(model).items()
            if value.dtype == np.float32 and (value.ndim > 1 or name in scaled)
        }
        self.outputs = jax.jit(self._outputs)
        self.error = jax.jit(self._error)
        self.gradient = jax.jit(jax.value_and_grad(self._error))

    def verify(self, rows: np.ndarray) -> None:
        """Raise InvalidInput unless JAX and onnxruntime agree on the outputs of one batch."""
        chosen = np.sort(np.resize(rows, self.batch))
        batch = {name: array[chosen] for name, array in self.samples.items()}
        try:
            found = self.outputs(self.weights, self._grouped(chosen))
            if not found:
                raise InvalidInput("none of its outputs is float32")
        except InvalidInput as error:
            raise InvalidInput(
                f"the learned way cannot run this graph: {error}; use the closed form"
            ) from None
        parts = list(run_batches(open_unoptimized(self.model), batch, list(found)))
        for name, value in found.items():
            expected = np.concatenate([np.atleast_1d(part[name]) for part in parts])
            value = np.asarray(value).reshape(expected.shape)
            difference = float(np.max(np.abs(value - expected), initial=0))
            if not difference <= AGREEMENT * float(np.max(np.abs(expected), initial=0)):
                raise InvalidInput(
                    f"the learned way cannot run this graph: its output {name} differs by {difference:.2g} "
                    "from onnxruntime's; use the closed form"
                )

    def chunks(self, rows: np.ndarray) -> list[tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
        """Return batches of the rows, filled up with their first ones, and the float graph's outputs."""
        count = -(-len(rows) // self.batch)
        batches = [self._grouped(part) for part in np.resize(rows, count * self.batch).reshape(count, -1)]
        return [(batch, self.outputs(self.weights, batch)) for batch in batches]

    def judge(self, theta: Any, chunks: Sequence[tuple[Any, Any]]) -> dict[str, float]:
        """Return the objective on each grid."""
        return {
            name: float(np.mean([self.error(theta, self.weights, *chunk, grid(name)) for chunk in chunks]))
            for name in GRIDS
        }

    def descend(
        self, theta: Any, rows: np.ndarray, kinds: Kinds, steps: int, learning_rate: float, seed: int
    ) -> Iterator[tuple[int, jax.Array, float]]:
        """Yield the number of the step, theta and the step's objective, step by step."""
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, max(steps, 1)))
        update = jax.jit(functools.partial(_updated, optimizer))
        theta = jnp.asarray(theta)
        state, generator = optimizer.init(theta), np.random.default_rng(seed)
        for step in range(1, steps + 1):
            chosen = generator.choice(rows, self.batch, replace=len(rows) < self.batch)
            batch = self._grouped(np.sort(chosen))
            expected = self.outputs(self.weights, batch)
            drawn = [kind[generator.integers(len(kind))] for _, kind in kinds]
            found = [self.gradient(theta, self.weights, batch, expected, grid(name)) for name in drawn]
            shares = [share for share, _ in kinds]
            loss = sum(share * float(value) for share, (value, _) in zip(shares, found, strict=True))
            slope = sum(share * change for share, (_, change) in zip(shares, found, strict=True))
            theta, state = update(theta, state, slope)
            yield step, theta, loss

    def _grouped(self, rows: np.ndarray) -> dict[str, jax.Array]:
        """Return rows of the samples as `(groups, samples that the graph takes at once, ...)`."""
        return {
            name: jnp.asarray(array[rows].reshape(-1, self.group, *array.shape[1:]))
            for name, array in self.samples.items()
        }

    def _outputs(self, weights: Arrays, batch: Arrays, chosen: Grid | None = None) -> dict[str, jax.Array]:
        """Return the float32 outputs of all groups; on a grid where one is given."""
        operand = None if chosen is None else functools.partial(_on_grid, chosen)

        def run(one: Arrays) -> dict[str, Any]:
            found = run_graph(self.model, one, weights, operand)
            return {name: value for name, value in found.items() if value.dtype == jnp.float32}

        return jax.vmap(run, axis_name=GROUP)(batch)

    def _error(
        self, theta: jax.Array, weights: Arrays, batch: Arrays, expected: Arrays, chosen: Grid
    ) -> jax.Array:
        """Return the mean over outputs of log(sum |y_g - y|^2 / sum |y|^2 + FLOOR)."""
        found = self._outputs(rescaled(weights, self.freedom, theta), batch, chosen)
        ratios = [
            jnp.sum((found[name] - y) ** 2) / jnp.maximum(jnp.sum(y**2), SMALLEST)
            for name, y in expected.items()
        ]
        return jnp.mean(jnp.log(jnp.stack(ratios) + FLOOR))


def _updated(optimizer: Any, theta: jax.Array, state: Any, slope: jax.Array) -> tuple[jax.Array, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        change, state = optimizer.update(slope, state, theta)
    return optax.apply_updates(theta, change), state


def rescaled(weights: Arrays, freedom: Freedom, theta: jax.Array) -> dict[str, jax.Array]:
    """Return the weights with the factors exp(theta), where theta has no entry for the factor 0."""
    logs = jnp.concatenate([jnp.zeros(1, theta.dtype), theta])
    return dict(weights) | {
        entry.initializer: weights[entry.initializer] * jnp.exp(logs[entry.up] - logs[entry.down])
        for entry in freedom.scaled
    }


def grid(name: str) -> Grid:
    """Return the numbers of a grid.

    >>> found = grid("int4w-po2-near-pc")
    >>> found.steps.item(), found.q_min.item(), round(found.border.item(), 4), found.per_channel.item()
    (7.0, -8.0, 0.7071, True)
    """
    convention, _, granularity = name.rpartition("-")
    found = CONVENTIONS[convention]
    border = {"": 0.0, "up": 0.5, "near": math.sqrt(0.5)}[found.power_of_two]
    steps, q_min, q_max = map(jnp.float32, (found.steps, found.q_min, found.q_max))
    return Grid(steps, q_min, q_max, jnp.float32(border), jnp.asarray(granularity == "pc"))


def _on_grid(chosen: Grid, node: onnx.NodeProto, position: int, x: jax.Array, constant: bool) -> jax.Array:
    """Round what a product multiplies."""
    if x.dtype != jnp.float32:
        return x
    if not constant:
        return rounded_activation(x, chosen)
    per_tensor = jnp.max(jnp.abs(x), keepdims=True)
    largest = jnp.where(chosen.per_channel, _largest_of_channels(x, node, position), per_tensor)
    return rounded_kernel(x, largest, chosen)


def rounded_kernel(kernel: jax.Array, largest: jax.Array, chosen: Grid) -> jax.Array:
    """Round a kernel to its grid; `largest` holds the largest magnitude on each scale, and broadcasts.

    >>> rounded_kernel(jnp.float32([-8, -3, 1, 8]), jnp.float32([8]), grid("int4w-wide-pt")).tolist()
    [-8.0, -3.0, 1.0, 7.0]
    """
    scale = _scale(largest, chosen.steps, chosen.border)
    # The largest weight has the quotient `steps` itself, which is the border of two integers for max/7.5.
    exact = kernel / jnp.where(largest > 0, largest, 1) * chosen.steps
    quotient = jnp.where(chosen.border > 0, kernel / scale, exact)
    return scale * _clipped(_rounded(quotient), chosen.q_min, chosen.q_max)


def rounded_activation(x: jax.Array, chosen: Grid) -> jax.Array:
    """Round what a product reads to the 8-bit grid that goes with a grid of kernels.

    The range is that of all samples, also of those in other groups under `jax.vmap`. It is taken while the
    layers before are rounded, where the backend takes it from the float graph: one run serves both.
    """
    low, high = (reduce(jax.lax.all_gather(reduce(x), GROUP)) for reduce in (jnp.min, jnp.max))
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    symmetric = chosen.border > 0
    even = _scale(jnp.maximum(-low, high), jnp.float32(127), chosen.border)
    scale = jnp.maximum(jnp.where(symmetric, even, jnp.where(high > low, high - low, 255) / 255), SMALLEST)
    zero_point = jnp.where(symmetric, 128, _clipped(_rounded(-low / scale), 0, 255))
    return scale * (_clipped(_rounded(x / scale) + zero_point, 0, 255) - zero_point)


def _scale(largest: jax.Array, steps: jax.Array, border: jax.Array) -> jax.Array:
    """Return largest / steps, rounded to a power of two where `border` is not 0; 1 where largest is 0."""
    scale = jnp.where(largest > 0, largest, steps) / steps
    fixed = jax.lax.stop_gradient(scale)
    return jnp.where(border > 0, power_of_two(fixed, border) * (scale / fixed), scale)


def _rounded(x: jax.Array) -> jax.Array:
    """Round half to even; the gradient is that of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _clipped(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """Clip; unlike jnp.clip, the ends themselves have the whole gradient."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def _largest_of_channels(kernel: jax.Array, node: onnx.NodeProto, position: int) -> jax.Array:
    """Return the largest magnitude of each output channel, in a shape that broadcasts to the kernel's."""
    attributes, magnitudes = graph.attributes(node), jnp.abs(kernel)
    if node.op_type == "ConvTranspose":  # (inputs, outputs of a group, ...)
        groups = attributes.get("group", 1)
        parts = magnitudes.reshape(groups, -1, *kernel.shape[1:])
        largest = parts.max((1, *range(3, parts.ndim)), keepdims=True)
        spread = jnp.broadcast_to(largest, (*parts.shape[:2], *largest.shape[2:]))
        return spread.reshape(len(kernel), *largest.shape[2:])
    if kernel.ndim < 2:
        return magnitudes.max(keepdims=True)
    if node.op_type == "Conv":
        axis = 0
    else:
        transposed = attributes.get("transB" if position else "transA", 0)
        axis = kernel.ndim - (2 if transposed == position else 1)
    return magnitudes.max([other for other in range(kernel.ndim) if other != axis], keepdims=True)
