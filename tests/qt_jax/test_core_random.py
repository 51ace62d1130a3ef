"""Check the whole training core on random programs, against a reference in float64 numpy.

The reference runs the program's twin, which has no lifted transformation, one operation at a time. It puts
the tensors that really flow on grids of its own, and keeps ranges of its own. The seed in a test's name draws
the program (`random_programs.draw_program`).

Float32 arithmetic that is compiled differs from the reference's in the last bits. Where a number lies that
close to the middle between two integers, it may be rounded to either, and all that comes after it moves by a
part of a step. The reference counts such ties. Without one, outputs agree within 1e-4 and ranges within 1e-5,
which a missed or a wrong grid of eight bits exceeds by far. After one, and in bfloat16, they agree within
four steps of the coarsest grid, and half of all ranges ten times as close.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import qt_jax as qt
from qt_jax.interception import PASSES
from qt_jax.ranges import subsample
from tests.qt_jax.random_programs import Program, draw_program, draw_rules, lifted_path, twin_tree

OUTPUTS, RANGES = 1e-4, 1e-5
"""Relative tolerances without a tie: of outputs in their L2 norm, of ranges to their larger end."""

TIE = 1e-6
"""Distance from the middle between two integers, in units of all steps of the grid, that counts as a tie."""

COMPILED = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}
"""Options of the compiler: round to bfloat16 where the program says so, and compile fast."""

UNFUSED = COMPILED | {
    "xla_disable_hlo_passes": "fusion,cpu-instruction-fusion,fusion_wrapper,multi_output_fusion,"
    "cpu-multi-output-fusion"
}
"""Options that keep each operation as it is: fused with another, a sum may be taken in another order."""

KEY = jax.random.key(5)


# --- the reference ---


@dataclasses.dataclass
class Range:
    """Hold one range of the reference: float64 scalars, or `(channels,)`."""

    low: Any = 0.0
    high: Any = 0.0
    count: int = 0


@functools.cache
def drawn(shape: tuple[int, ...], sample_size: int, axis: int | None) -> np.ndarray:
    """Return the places in the flattened tensor of the elements that are observed."""
    places = jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)
    return np.asarray(subsample(places, sample_size, axis))


def robust_range(x: np.ndarray, spec: qt.QuantSpec, sample_size: int) -> tuple[Any, Any]:
    """Return the quantiles of a sample, or the extremes of the whole tensor."""
    size = sample_size if spec.quantile < 1.0 else 2**30
    seen = x.reshape(-1)[drawn(x.shape, size, spec.axis)]
    if spec.symmetric:
        high = np.quantile(np.abs(seen), spec.quantile, axis=-1)
        return -high, high
    low, high = np.quantile(seen, (1.0 - spec.quantile, spec.quantile), axis=-1)
    return low, high


class Reference:
    """Run a twin on grids, and keep its ranges.

    Attributes:
      ranges: By path in the twin. A range is never changed, only replaced.
      gains: The gains of folding, by path of the layer in the twin.
      ties: How many numbers were too close to a tie to say what they are rounded to.
    """

    def __init__(self, config: qt.QuantConfig):
        self.config = config
        self.ranges: dict[str, Range] = {}
        self.gains: dict[str, np.ndarray] = {}
        self.ties = 0
        self._begun: dict[str, Range] = {}
        self._seen: dict[str, list[tuple[Any, Any]]] = {}

    def __call__(
        self, network: nn.Module, variables: Any, x: Any, flag: Any, lam: float, *, train: bool
    ) -> Any:
        """Return output and updated statistics of one pass."""

        def intercepted(method: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            if context.method_name != "__call__":
                return method(*args, **kwargs)
            return self._called(context.module, method, args, kwargs, lam)

        with self._pass(train), nn.intercept_methods(intercepted), np.errstate(all="ignore"):
            return network.apply(variables, x, flag, mutable=["batch_stats"], rngs={"dropout": KEY})

    @contextmanager
    def _pass(self, train: bool) -> Iterator[None]:
        """Round with the ranges of now, and move them at the end."""
        self._begun, self._seen = dict(self.ranges), {}
        yield
        for point, bounds in self._seen.items():
            lows, highs = zip(*bounds, strict=True)
            low, high = np.min(lows, axis=0), np.max(highs, axis=0)
            if train and np.all(np.isfinite(low) & np.isfinite(high)):
                old = self.ranges.get(point, Range())
                keep = self.config.momentum if old.count else 0.0
                low, high = (keep * a + (1.0 - keep) * b for a, b in ((old.low, low), (old.high, high)))
                self.ranges[point] = Range(low, high, old.count + 1)

    def _called(self, module: nn.Module, method: Callable, args: tuple, kwargs: dict, lam: float) -> Any:
        path = "/".join(module.path)
        is_layer = isinstance(module, nn.Conv | nn.ConvTranspose | nn.Dense | nn.DenseGeneral | nn.Einsum)
        specs = self._specs(lifted_path(path), is_layer)
        if not is_layer:
            return self._on_grid(f"{path}/quant_output", method(*args, **kwargs), specs["outputs"], lam)
        promote, weights = module.promote_dtype, specs["weights"]
        if weights and weights.axis == -1 and getattr(module, "transpose_kernel", False):
            weights = dataclasses.replace(weights, axis=-2)

        def promote_rounded(inputs: Any, kernel: Any, *rest: Any, **options: Any) -> Any:
            gain = self.gains.get(path) if self.config.folded else None
            kernel = self._on_grid(f"{path}/quant_kernel", kernel, weights, lam, gain)
            return promote(
                self._on_grid(f"{path}/quant_input", inputs, specs["inputs"], lam), kernel, *rest, **options
            )

        object.__setattr__(module, "promote_dtype", promote_rounded)
        try:
            outputs = method(*args, **kwargs)
        finally:
            object.__setattr__(module, "promote_dtype", promote)
        return self._on_grid(f"{path}/quant_output", outputs, specs["outputs"], lam)

    def _specs(self, path: str, is_layer: bool) -> dict[str, qt.QuantSpec | None]:
        """Return the specs of a module by site. Modules that are no layers have outputs alone."""
        config = self.config
        specs = {"weights": config.weights, "inputs": config.activations, "outputs": config.outputs}
        rule = next((rule for rule in config.rules if re.fullmatch(rule.path, path)), None)
        if rule is not None and rule.skip:
            return dict.fromkeys(specs)
        if rule is not None:
            specs |= {site: getattr(rule, site) for site in specs if getattr(rule, site) != "inherit"}
        if not is_layer:
            specs["outputs"] = None
        if path in config.fused_outputs:
            specs["outputs"] = specs["outputs"] or config.activations
        return specs

    def _on_grid(
        self, point: str, tensor: jax.Array, spec: qt.QuantSpec | None, lam: float, gain: Any = None
    ) -> Any:
        """Return the blend of a tensor with its image, in its own type, and observe it."""
        if spec is None:
            return tensor
        x = np.asarray(tensor).astype(np.float64)
        deployed = x if gain is None else gain * x
        self._seen.setdefault(point, []).append(robust_range(deployed, spec, self.config.sample_size))
        range_ = self._begun.get(point, Range())
        if range_.count == 0 or lam == 0.0:
            return tensor
        blended = (1.0 - lam) * deployed + lam * self._image(deployed, range_, spec)
        if gain is not None:
            blended = x + np.where(gain == 0.0, 0.0, (blended - deployed) / np.where(gain == 0.0, 1.0, gain))
        return jnp.asarray(blended.astype(np.float32)).astype(tensor.dtype)

    def _image(self, x: np.ndarray, range_: Range, spec: qt.QuantSpec) -> np.ndarray:
        steps = 2**spec.bits - 1
        narrow = spec.symmetric if spec.narrow_range is None else spec.narrow_range
        least = (-(2 ** (spec.bits - 1)) if spec.symmetric else 0) + int(narrow)
        most, steps = least + steps - int(narrow), steps - int(narrow)
        low, high = np.minimum(range_.low, 0.0), np.maximum(range_.high, 0.0)
        if spec.symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale = np.maximum((high - low) / steps, 1e-8)
        zero = np.zeros_like(scale)
        if not spec.symmetric:
            zero = np.clip(np.rint(least - low / scale), least, most)
            self._count_ties(low / scale, steps)
        if spec.axis is not None:
            shape = [1] * x.ndim
            shape[spec.axis] = -1
            scale, zero = scale.reshape(shape), zero.reshape(shape)
        inside = (x / scale + zero > least - 1) & (x / scale + zero < most + 1)
        self._count_ties((x / scale)[inside], steps)
        return scale * (np.clip(np.rint(x / scale) + zero, least, most) - zero)

    def _count_ties(self, quotients: Any, steps: int) -> None:
        self.ties += int(np.sum(np.abs(quotients - np.floor(quotients) - 0.5) < TIE * steps))


# --- the program under test ---


@dataclasses.dataclass
class Case:
    """Hold a program with its variables, ready to be trained.

    Attributes:
      program: What was drawn.
      config: Its config, with rules and fused outputs.
      fusion: What refreshes the gains, if the config is folded.
      variables: The variables of the first pass.
      traces: How often the training step was traced.
    """

    program: Program
    config: qt.QuantConfig
    fusion: qt.Fusion | None
    variables: dict[str, Any]
    traces: int = 0

    def step(
        self, variables: Any, x: jax.Array, flag: jax.Array, lam: jax.Array, trim: bool = True
    ) -> tuple[Any, Any]:
        """Return outputs and new variables, plain ones without `trim`."""
        self.traces += 1
        network = self.program.network(train=True)
        with qt.quant_trim(self.config, lam, train=True) if trim else nullcontext():
            y, updated = network.apply(variables, x, flag, mutable=["batch_stats"], rngs={"dropout": KEY})
        assert set(updated) == {"batch_stats"}
        return y, self.refreshed({**variables, **updated})

    def gradients(self, variables: Any, x: jax.Array, *rest: Any) -> tuple[Any, tuple[Any, Any]]:
        """Return the outputs of `step`, and the gradients of params and input."""

        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            y, _ = self.step({**variables, "params": params}, x, *rest)
            return jnp.sum(jnp.square(y.astype(jnp.float32))), y

        gradients, y = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return y, gradients

    def refreshed(self, variables: Any) -> Any:
        """Return the variables with the gains that belong to them, if the config is folded."""
        return variables if self.fusion is None else self.fusion.refresh(variables)

    def evaluate(
        self, variables: Any, x: jax.Array, flag: jax.Array, lam: jax.Array, trim: bool = True
    ) -> tuple[Any, Any]:
        """Return outputs and variables of a pass that moves nothing."""
        with qt.quant_trim(self.config, lam, train=False) if trim else nullcontext():
            y, updated = self.program.network(train=False).apply(variables, x, flag, mutable=["batch_stats"])
        return y, {**variables, **updated}

    def passes(self) -> list[tuple[Any, Any, Any]]:
        """Return (x, flag, lambda) of each pass."""
        return [
            (*batch, jnp.float32(lam))
            for batch, lam in zip(self.program.batches, self.program.lambdas, strict=True)
        ]


def prepare(seed: int) -> Case:
    """Draw a program, and attach its statistics."""
    program = draw_program(seed)
    x, flag = program.batches[0]
    network, config = program.network(train=False), program.config
    variables = program.draw_variables()
    paths = ["/".join(path[:-1]) for path in flatten_dict(variables["params"]) if path[-1] == "kernel"]
    finds = program.fuses or config.folded
    fusion = qt.find_fusion(network, variables, x, flag) if finds else None
    outputs = fusion.outputs if program.fuses else ()
    config = dataclasses.replace(config, rules=draw_rules(seed, paths), fused_outputs=outputs)
    options = {"rngs": {"dropout": KEY}}
    attached = qt.attach_statistics(program.network(train=True), variables, config, x, flag, **options)
    case = Case(program, config, fusion if config.folded else None, attached)
    return dataclasses.replace(case, variables=case.refreshed(attached))


def slack(case: Case, reference: Reference) -> float:
    """Return how far numbers may differ, relative to their size, after a tie or in bfloat16, and else 0."""
    if not reference.ties and case.program.dtype is None:
        return 0.0
    config = case.config
    specs = [config.weights, config.activations, config.outputs]
    specs += [site for rule in config.rules for site in (rule.weights, rule.inputs, rule.outputs)]
    return 4.0 / (2 ** min(spec.bits for spec in specs if isinstance(spec, qt.QuantSpec)) - 1)


def check_outputs(found: Any, expected: Any, tolerance: float, where: str) -> None:
    found, expected = (np.asarray(y).astype(np.float64) for y in (found, expected))
    assert np.array_equal(np.isfinite(found), np.isfinite(expected)), where
    found, expected = np.nan_to_num(found), np.nan_to_num(expected)
    error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 0.1)
    assert error <= tolerance, f"{where}: outputs differ by {error:.2g}, more than {tolerance:.2g}"


def check_ranges(variables: Any, reference: Reference, slack: float, where: str) -> None:
    """Check that counts are equal and ranges close; with slack, that half of them are ten times as close."""
    leaves = flatten_dict(twin_tree(variables["batch_stats"]))
    points = {"/".join(path[:-1]) for path in leaves if path[-1] == "count" and PASSES not in path}
    assert set(reference.ranges) <= points, f"{where}: no range for {set(reference.ranges) - points}"
    errors = {}
    for point in points:
        expected = reference.ranges.get(point, Range())
        count, low, high = (leaves[(*point.split("/"), leaf)] for leaf in ("count", "low", "high"))
        assert count == expected.count, f"{where}: {point} has count {count}, expected {expected.count}"
        size = max(np.max(np.abs([expected.low, expected.high])), 1e-6)
        errors[point] = max(np.max(np.abs(low - expected.low)), np.max(np.abs(high - expected.high))) / size
    worst = max(errors, key=errors.get)
    assert errors[worst] <= max(RANGES, slack), f"{where}: {worst} is off by {errors[worst]:.2g}"
    assert np.median(list(errors.values())) <= max(RANGES, slack / 10), f"{where}: {errors}"


def check_equal(found: Any, expected: Any, where: str) -> None:
    """Check that two trees are equal to the bit, not-a-number included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected), where
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype, f"{where}: {jax.tree_util.keystr(path)}"
        np.testing.assert_array_equal(
            one.astype(np.float64), other.astype(np.float64), err_msg=f"{where}: {jax.tree_util.keystr(path)}"
        )


FAST, SLOW = 30, 330
SEEDS = [*range(FAST), *(pytest.param(s, marks=pytest.mark.slow) for s in range(FAST, SLOW))]


@pytest.mark.parametrize("seed", SEEDS)
@jax.numpy_dtype_promotion("standard")  # networks of bfloat16 take float32 inputs
def test_a_random_program(seed):
    """Run all checks that cost little, and one of those that compile another function."""
    case = prepare(seed)
    step = jax.jit(case.step, compiler_options=COMPILED)
    states = check_training(case, step)
    check_resuming(case, step, states)
    assert case.traces == 1, "a moving lambda retraces the step"
    COSTLY[seed % len(COSTLY)](case, states)


def check_training(case: Case, step: Callable) -> list[Any]:
    """Compare passes of training, and then evaluations, with the reference. Return the variables of each."""
    reference, twin, states = Reference(case.config), twin_variables(case.variables), [case.variables]
    for number, (x, flag, lam) in enumerate(case.passes(), 1):
        where, network = f"pass {number}", case.program.network(train=True, twin=True)
        reference.gains = gains(states[-1])
        y, variables = step(states[-1], x, flag, lam)
        expected, updated = reference(network, twin, x, flag, float(lam), train=True)
        twin = {**twin, **updated}
        check_outputs(y, expected, max(OUTPUTS, slack(case, reference)), where)
        check_ranges(variables, reference, slack(case, reference), where)
        assert shapes(variables) == shapes(case.variables), where
        states.append(variables)
    evaluate = jax.jit(case.evaluate, compiler_options=COMPILED)
    reference.gains = gains(states[-1])
    for lam in (1.0, 0.3):
        y, after = evaluate(states[-1], x, flag, jnp.float32(lam))
        check_equal(after, states[-1], "evaluation")
        expected, _ = reference(case.program.network(train=False, twin=True), twin, x, flag, lam, train=False)
        check_outputs(y, expected, max(OUTPUTS, slack(case, reference)), f"evaluation at {lam}")
    return states


def check_evaluation_at_zero(case: Case, states: list[Any]) -> None:
    """Check that lambda 0 is the plain network to the bit, where nothing is fused."""
    evaluate = jax.jit(case.evaluate, static_argnums=4, compiler_options=UNFUSED)
    x, flag, _ = case.passes()[0]
    found, expected = (evaluate(states[-1], x, flag, jnp.float32(0.0), trim)[0] for trim in (True, False))
    check_equal(found, expected, "evaluation at 0")


def check_gradient_at_zero(case: Case, states: list[Any]) -> None:
    """Compare with plain training. Where XLA fuses operations and adds up gradients, the last bits differ."""
    gradients = jax.jit(case.gradients, static_argnums=4, compiler_options=COMPILED)
    x, flag, _ = case.passes()[0]
    found, expected = (gradients(states[-1], x, flag, jnp.float32(0.0), trim) for trim in (True, False))
    precision = 1e-5 if case.program.dtype is None else 0.05
    check_outputs(found[0], expected[0], precision, "lambda 0")
    assert shapes(found[1]) == shapes(expected[1])
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for _, g in (found, expected)]
    check_outputs(*flat, 10 * precision, "gradient at lambda 0")


def check_again(case: Case, states: list[Any]) -> None:
    """Check that another trace of the step gives the same to the bit."""
    step = jax.jit(lambda *inputs: case.step(*inputs), compiler_options=COMPILED)
    variables = states[0]
    for batch, expected in zip(case.passes(), states[1:], strict=True):
        _, variables = step(variables, *batch)
        check_equal(variables, expected, "jitted again")


def check_resuming(case: Case, step: Callable, states: list[Any]) -> None:
    """Check that passes from a checkpoint of the first one are the same to the bit."""
    data = serialization.to_bytes(states[1])
    variables = serialization.from_bytes(jax.tree.map(jnp.zeros_like, states[1]), data)
    for (x, flag, lam), expected in zip(case.passes()[1:], states[2:], strict=True):
        _, variables = step(variables, x, flag, lam)
        check_equal(variables, expected, "resumed")


def check_eager(case: Case, states: list[Any]) -> None:
    """Check that the first pass, which rounds nothing, moves the ranges alike without jit."""
    x, flag, lam = case.passes()[0]
    with qt.quant_trim(case.config, lam, train=True):
        network = case.program.network(train=True)
        _, updated = network.apply(states[0], x, flag, mutable=["batch_stats"], rngs={"dropout": KEY})
    for (path, found), (_, expected) in zip(
        jax.tree.leaves_with_path(updated),
        jax.tree.leaves_with_path({"batch_stats": states[1]["batch_stats"]}),
        strict=True,
    ):
        if path[-1].key != "quant_gain":
            precision = 1e-5 if case.program.dtype is None else 0.02
            check_outputs(found, expected, precision, f"without jit: {jax.tree_util.keystr(path)}")


COSTLY = (
    *(check_evaluation_at_zero, check_gradient_at_zero, check_again),
    *(check_eager, check_gradient_at_zero, check_again),
)
"""The checks that compile another function, of which each program gets one."""


def twin_variables(variables: Any) -> Any:
    """Return parameters and the model's own statistics as the twin names them."""
    flat = flatten_dict(variables["batch_stats"])
    own = {path: leaf for path, leaf in flat.items() if not any(part.startswith("quant_") for part in path)}
    return {"params": twin_tree(variables["params"]), "batch_stats": twin_tree(unflatten_dict(own))}


def gains(variables: Any) -> dict[str, np.ndarray]:
    """Return the gains of folding by path of the layer in the twin."""
    flat = flatten_dict(twin_tree(variables["batch_stats"]))
    return {
        "/".join(p[:-1]): np.asarray(leaf, np.float64) for p, leaf in flat.items() if p[-1] == "quant_gain"
    }


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
