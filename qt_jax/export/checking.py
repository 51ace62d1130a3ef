"""Compare a graph with the JAX forward on a few numbers of its own, and find the module where they part.

`check_numbers` is what `to_onnx` calls before it returns. `verification.verify` does more: it takes real
inputs and other batches, and checks the form too.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify
from onnx import helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.emission import OPSET, emit
from qt_jax.export.layout import as_graph
from qt_jax.export.lowering import Inputs, input_specs, lower, output_paths
from qt_jax.export.patterns import simplify
from qt_jax.export.program import Expression, leaves_of, read
from qt_jax.export.sessions import open_unoptimized
from qt_jax.export.tracing import compiled, trace

BATCH = 2
"""Number of inputs that are drawn."""

TOLERANCE = 1e-4
"""Largest difference, as a part of the number itself and of the usual size of the output."""

USUAL = 10.0
"""How many times the number that a tenth of an output does not exceed is the output's usual size.
Masks such as -1e9 are larger by far."""

FLIPPED = 0.01
"""Largest share of whole numbers, such as classes, that may differ."""

NUDGE = 2.0**-22
"""Relative size of a change of the inputs that float32 hardly tells from none."""

AMPLIFIED = 32.0
"""How much more than such a change moves the outputs the graph may differ, where that is more."""

Passes = Sequence[Callable[[onnx.ModelProto], onnx.ModelProto]]
Modules = dict[tuple[str, int], np.ndarray]


DRAWS: tuple[Callable[[np.random.Generator, Sequence[int]], np.ndarray], ...] = (
    lambda rng, shape: rng.normal(size=shape),
    lambda rng, shape: rng.normal(scale=8.0, size=shape),
    lambda rng, shape: rng.uniform(0.1, 1.0, shape),
)
"""Distributions of the inputs. The first suits nearly all networks. One whose outputs are the same for all of
these inputs is given the larger ones, and one whose outputs are NaN, as a logarithm's, positive ones."""


def check_numbers(
    model: onnx.ModelProto,
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    input_shape: Any,
    *,
    layout: str,
    dynamic_batch: bool,
    output_names: Any,
    passes: Passes,
    convert: Callable[[Mapping[str, Any]], onnx.ModelProto],
) -> None:
    """Compare the outputs of a graph in onnxruntime with those of the forward, on inputs drawn at random.

    A number may differ by `TOLERANCE` of itself and of the output's usual size. Where the network itself
    amplifies rounding, which a second run on inputs changed by `NUDGE` tells, it may differ by `AMPLIFIED`
    times as much as that run does. Where a number differs by more, the forward is run in float64, and the
    graph may differ from that by as much as JAX in float32 does. Equal infinities and NaNs do not differ.

    An output that does not depend on the inputs tells nothing of the layers before it. It is compared on
    inputs of other distributions; then, as a layer of zeros is the usual reason, in a second graph, whose
    parameters are random where those given are zero. Where that changes nothing either, a warning names it.

    Args:
      model: Graph from `to_onnx`.
      apply_fn, variables, input_shape, layout, dynamic_batch, output_names: As given to `to_onnx`.
      passes: The passes that made the graph, up to the folding of batch norm.
      convert: Makes the graph of other variables.

    Raises:
      InvalidInput: An output differs. The message names the first module whose output does, or the pass of
        the exporter that changes it.
    """
    specs = input_specs(input_shape, BATCH if dynamic_batch else 1)
    forward = compiled(apply_fn, compiler_options={"xla_backend_optimization_level": 0})
    silent = partial(
        _silent,
        apply_fn=apply_fn,
        forward=forward,
        specs=specs,
        layout=layout,
        output_names=output_names,
        passes=passes,
    )
    names = silent(model, variables)
    others = _without_zeros(variables) if names else None
    if others is not None and _is_finite(forward, others, specs):
        try:
            still = silent(convert(others), others)
        except InvalidInput as error:
            raise InvalidInput(
                f"{error} (Parameters that are zero were random in this comparison.)"
            ) from error
        names = [name for name in names if name in still]
    if names:
        warnings.warn(
            f"the graph's output {' and '.join(map(repr, names))} is the same, or NaN, for all random "
            "inputs, so its comparison with the JAX forward says little: call verify on real inputs",
            stacklevel=3,
        )


def _silent(
    model: onnx.ModelProto,
    variables: Mapping[str, Any],
    *,
    apply_fn: Callable[..., Any],
    forward: Callable[..., Any],
    specs: Inputs,
    layout: str,
    output_names: Any,
    passes: Passes,
) -> list[str]:
    """Compare a graph with the forward, and return the names of the outputs of which that tells nothing."""
    run = None
    silent = [entry.name for entry in model.graph.output]
    earlier: dict[str, np.ndarray] = {}
    for seed, draw in enumerate(DRAWS):
        runs = _Runs(apply_fn, forward, variables, _drawn(specs, draw, seed))
        order = _places(model, runs.returned, output_names)
        run = run or _runner(model)
        try:
            outputs = run([as_graph(x, layout) for x in runs.inputs])
        except InvalidInput:
            if seed or not any(spec.dtype == np.uint8 for spec in specs):
                raise
            continue  # bytes may be tokens, of which there may be fewer than 256
        found = dict(zip(order, outputs, strict=True))
        for name in silent.copy():
            array, place = found[name], order[name]
            beyond = _beyond_rounding(array, place, runs, layout)
            expected = as_graph(runs.wanted[place], layout)
            if beyond.any():
                if not np.issubdtype(expected.dtype, np.floating) and runs.makes_nan:
                    continue  # the whole number of a NaN is whatever the platform makes of it
                where = _where(apply_fn, variables, runs.inputs, specs, passes)
                raise _difference(name, array, expected, beyond, where)
            pair = expected if len(expected) == BATCH else (expected, earlier.setdefault(name, expected))
            if _differ(*pair):
                silent.remove(name)
        if not silent:
            break
    return silent


class _Runs:
    """Run the forward on some inputs: as it is, on inputs slightly changed, and in float64, where asked."""

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        forward: Callable[..., Any],
        variables: Mapping[str, Any],
        inputs: list[np.ndarray],
    ):
        self.apply_fn, self.forward, self.variables, self.inputs = apply_fn, forward, variables, inputs

    @cached_property
    def returned(self) -> Any:
        with jax.default_matmul_precision("highest"):
            return self.forward(self.variables, *self.inputs)

    @cached_property
    def wanted(self) -> list[np.ndarray]:
        return [np.asarray(y) for y in jax.tree.leaves(self.returned)]

    @cached_property
    def nudged(self) -> list[np.ndarray]:
        with jax.default_matmul_precision("highest"):
            returned = self.forward(self.variables, *map(_nudged, self.inputs))
        return [np.asarray(y) for y in jax.tree.leaves(returned)]

    @cached_property
    def exact(self) -> list[np.ndarray] | None:
        return _in_double(self.apply_fn, self.variables, self.inputs)

    @cached_property
    def makes_nan(self) -> bool:
        """Tell whether any step of the forward makes a NaN."""
        try:
            checked = jax.jit(checkify.checkify(self.apply_fn, errors=checkify.nan_checks))
            return checked(self.variables, *self.inputs)[0].get() is not None
        except Exception:  # checkify does not know every primitive
            return False


def _places(model: onnx.ModelProto, returned: Any, output_names: Any) -> dict[str, int]:
    """Return for each output of the graph, in its order, the place among the arrays of the forward."""
    paths, keyed = output_paths(returned)
    names = [entry.name for entry in model.graph.output]
    by_key = keyed and not isinstance(output_names, Mapping)
    return {name: paths.index(name) if by_key else place for place, name in enumerate(names)}


def _beyond_rounding(array: np.ndarray, place: int, runs: _Runs, layout: str) -> np.ndarray:
    """Tell which numbers of an output differ by more than they may."""
    expected = as_graph(runs.wanted[place], layout)
    beyond = _beyond(array, expected, np.zeros(expected.shape))
    if not beyond.any() or array.shape != expected.shape:
        return beyond
    noise = _apart(as_graph(runs.nudged[place], layout), expected)
    beyond = _beyond(array, expected, noise)
    if beyond.any() and np.issubdtype(expected.dtype, np.floating) and runs.exact:
        right = as_graph(runs.exact[place], layout)
        return _beyond(array, right, noise + 2.0 * _apart(expected, right) / AMPLIFIED)
    return beyond


def _difference(
    name: str, found: np.ndarray, wanted: np.ndarray, beyond: np.ndarray, where: str
) -> InvalidInput:
    """Make the error for an output that differs."""
    difference = float(np.max(_apart(found, wanted)[beyond])) if found.shape == wanted.shape else np.inf
    return InvalidInput(
        f"the graph's output {name!r} differs from the JAX forward by {difference:.3g} on random inputs, "
        f"beyond rounding. {where} Please report this network; check=False returns the graph without this "
        "comparison."
    )


def _differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Tell whether an output has other numbers for the second input."""
    return bool(np.any((first != second) & np.isfinite(first) & np.isfinite(second)))


def _is_finite(forward: Callable[..., Any], variables: Mapping[str, Any], specs: Inputs) -> bool:
    """Tell whether a forward neither overflows nor makes a NaN of some inputs."""
    returned = forward(variables, *_drawn(specs, DRAWS[0], 0))
    return all(bool(jnp.all(jnp.isfinite(y))) for y in jax.tree.leaves(returned))


def _without_zeros(variables: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the variables with random numbers in place of parameters that are zero; None without such."""
    leaves, structure = jax.tree.flatten(variables.get("params", {}))
    zeros = [jnp.issubdtype(jnp.result_type(x), jnp.floating) and not np.any(x) for x in leaves]
    if not any(zeros):
        return None
    rng = np.random.default_rng(0)

    def drawn(leaf: Any) -> np.ndarray:
        features = np.shape(leaf)[-1] if np.shape(leaf) else 1
        fan_in = max(1.0, np.size(leaf) / max(1, features))
        return rng.normal(0.0, fan_in**-0.5, np.shape(leaf)).astype(jnp.result_type(leaf))

    pairs = zip(leaves, zeros, strict=True)
    params = jax.tree.unflatten(structure, [drawn(x) if zero else x for x, zero in pairs])
    return {**variables, "params": params}


def _drawn(
    specs: Inputs, draw: Callable[[np.random.Generator, Sequence[int]], np.ndarray], seed: int
) -> list[np.ndarray]:
    """Draw numbers, 0 or 1 for whole numbers such as tokens, and any of the 256 for bytes at first."""
    rng = np.random.default_rng(seed)

    def drawn(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(spec.dtype, jnp.floating):
            return draw(rng, spec.shape).astype(spec.dtype)
        most = 256 if spec.dtype == np.uint8 and seed == 0 else 2
        return rng.integers(0, most, spec.shape).astype(spec.dtype)

    return [drawn(spec) for spec in specs]


def _nudged(x: np.ndarray) -> np.ndarray:
    """Change an input by as little as float32 tells; leave whole numbers as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    signs = np.where(np.arange(x.size).reshape(x.shape) % 2, 1.0, -1.0)
    return (x * (1.0 + NUDGE * signs)).astype(x.dtype)


def _runner(model: onnx.ModelProto) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Return what runs a graph as it is written.

    It raises `InvalidInput` where onnxruntime refuses the graph or the inputs.
    """
    names = [entry.name for entry in model.graph.input]
    with _refusals():
        session = open_unoptimized(model)
    read_ = {entry.name for entry in session.get_inputs()}

    def run(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with _refusals():
            return session.run(
                None, {name: x for name, x in zip(names, inputs, strict=True) if name in read_}
            )

    return run


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise InvalidInput(
            f"onnxruntime does not run the graph on random inputs: {' '.join(str(error).split())[:300]}. "
            "Where whole numbers must be others than 0 and 1, pass check=False and call verify on real inputs"
        ) from error


def _in_double(
    apply_fn: Callable[..., Any], variables: Mapping[str, Any], inputs: Sequence[np.ndarray]
) -> list[np.ndarray] | None:
    """Run the forward on parameters and inputs in float64; None where it does not take them."""

    def widened(x: Any) -> Any:
        return np.asarray(x, np.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

    try:
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            outputs = apply_fn(jax.tree.map(widened, variables), *map(widened, inputs))
            return [np.asarray(y, np.float64) for y in jax.tree.leaves(outputs)]
    except Exception:  # the model's own code, which may allow float32 alone
        return None


def _apart(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the absolute differences, inf where one side alone is NaN; all inf for other shapes."""
    if found.shape != wanted.shape:
        return np.full(wanted.shape, np.inf)
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    with np.errstate(invalid="ignore"):
        apart = np.where(
            (found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0.0, np.abs(found - wanted)
        )
    return np.nan_to_num(apart, nan=np.inf, posinf=np.inf)


def _beyond(found: np.ndarray, wanted: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Tell which numbers differ by more than they may."""
    apart = _apart(found, wanted)
    if found.shape != wanted.shape:
        return np.ones(wanted.shape, bool)
    noise = np.where(np.isfinite(noise), noise, 0.0)
    if not np.issubdtype(wanted.dtype, np.floating):
        beyond = apart > AMPLIFIED * noise
        return beyond & (np.mean(beyond) > FLIPPED)
    sizes = np.abs(wanted.astype(np.float64))
    finite = sizes[np.isfinite(sizes) & (sizes > 0)]
    usual = min(USUAL * np.quantile(finite, 0.1), finite.max()) if finite.size else 0.0
    noisy = AMPLIFIED * (noise + np.quantile(noise, 0.75)) if noise.size else noise
    return apart > TOLERANCE * (np.where(np.isfinite(sizes), sizes, 0.0) + usual) + noisy + 1e-7


def _where(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: Sequence[np.ndarray],
    specs: Inputs,
    passes: Passes,
) -> str:
    """Say, as a sentence, in which module or pass a graph and the forward part."""
    wanted = _module_outputs(apply_fn, variables, inputs)
    found = _lowered_outputs(apply_fn, variables, inputs, specs, wanted)
    for (path, call), expected in wanted.items():
        if (path, call) in found and _differs(found[path, call], expected):
            difference = np.max(_apart(found[path, call], expected), initial=0.0)
            return f"The first module whose output differs is {path!r}, by {difference:.3g}."
    shapes = [jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype) for spec in specs]
    options: dict[str, Any] = {"channels_first": False, "input_names": None, "output_names": None}
    model = lower(apply_fn, variables, shapes, batch=specs[0].shape[0], **options)
    before = _runner(model)(inputs)
    for each in passes:
        model = each(model)
        after = _runner(model)(inputs)
        if any(_differs(y, x) for y, x in zip(after, before, strict=True)):
            return f"Every module is right, and the exporter's pass {each.__name__} changes the numbers."
    return "The outputs of all its modules are right."


def _differs(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(_beyond(found, wanted, np.zeros(wanted.shape)).any())


def _called(record: Callable[[str, int, Any], Any]) -> Callable[..., Any]:
    """Return an interceptor that hands the path, the number and the output of each call of a module on."""
    calls: dict[str, int] = {}

    def interceptor(
        run: Callable[..., Any], arguments: Any, options: Any, context: nn.module.InterceptorContext
    ) -> Any:
        output = run(*arguments, **options)
        if context.method_name != "__call__" or not isinstance(output, jax.Array):
            return output
        path = "/".join(context.module.path) or type(context.module).__name__
        calls[path] = calls.get(path, -1) + 1
        return record(path, calls[path], output)

    return interceptor


def _module_outputs(
    apply_fn: Callable[..., Any], variables: Mapping[str, Any], inputs: Sequence[np.ndarray]
) -> Modules:
    """Run the forward step by step, and return the output of each call of a module."""
    seen: Modules = {}

    def record(path: str, call: int, output: Any) -> Any:
        if not isinstance(output, jax.core.Tracer):
            seen[path, call] = np.asarray(output)
        return output

    with jax.default_matmul_precision("highest"), nn.intercept_methods(_called(record)):
        apply_fn(variables, *map(jnp.asarray, inputs))
    return seen


def _lowered_outputs(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: Sequence[np.ndarray],
    specs: Inputs,
    wanted: Iterable[tuple[str, int]],
) -> Modules:
    """Lower the forward without passes, and return what the graph computes for each call of a module."""
    leaves = leaves_of(variables)
    marks: dict[str, Expression] = {}

    def named(path: str, call: int, output: Any) -> Any:
        return checkpoint_name(output, f"{path}#{call}")

    with nn.intercept_methods(_called(named)):
        traced, _ = trace(apply_fn, variables, *specs)
    heads, _ = read(traced, leaves, simplify, marks)
    chosen: dict[tuple[str, int], Expression] = {
        key: marks[f"{key[0]}#{key[1]}"] for key in wanted if f"{key[0]}#{key[1]}" in marks
    }
    if not chosen:
        return {}
    names = {id(x): f"input_{index}" for index, x in enumerate(heads)}
    emitter, made = emit(list(chosen.values()), names)
    outputs = [f"module_{index}" for index in range(len(chosen))]
    nodes = [
        *emitter.nodes,
        *(helper.make_node("Identity", [x], [name]) for x, name in zip(made, outputs, strict=True)),
    ]
    body = helper.make_graph(
        [],
        "modules",
        [helper.make_tensor_value_info(names[id(x)], _element(x.dtype), x.shape) for x in heads],
        [
            helper.make_tensor_value_info(n, _element(x.dtype), x.shape)
            for n, x in zip(outputs, chosen.values(), strict=True)
        ],
    )
    skeleton = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)])
    return dict(zip(chosen, _runner(graph.rebuild(skeleton, nodes, emitter.values))(inputs), strict=True))


def _element(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
