"""Compare a graph with the JAX forward on a few numbers of its own, and find the module where they part.

`check_numbers` is what `to_onnx` calls before it returns. `verification.verify` does more: it takes real
inputs and other batches, and checks the form too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.ad_checkpoint import checkpoint_name
from onnx import helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.emission import OPSET, emit
from qt_jax.export.layout import as_graph
from qt_jax.export.lowering import Inputs, input_specs, lower, output_paths
from qt_jax.export.patterns import simplify
from qt_jax.export.program import Expression, leaves_of, read
from qt_jax.export.sessions import open_session

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
) -> None:
    """Compare the outputs of a graph in onnxruntime with those of the forward, on inputs drawn at random.

    A number may differ by `TOLERANCE` of itself and of the output's usual size. Where the network itself
    amplifies rounding, which a second run on inputs changed by `NUDGE` tells, it may differ by `AMPLIFIED`
    times as much as that run does. Where a number differs by more, the forward is run in float64, and the
    graph may differ from that by as much as JAX in float32 does. Equal infinities and NaNs do not differ.

    Args:
      model: Graph from `to_onnx`.
      apply_fn, variables, input_shape, layout, dynamic_batch, output_names: As given to `to_onnx`.
      passes: The passes that made the graph, up to the folding of batch norm.

    Raises:
      InvalidInput: An output differs. The message names the first module whose output does, or the pass of
        the exporter that changes it.
    """
    specs = input_specs(input_shape, BATCH if dynamic_batch else 1)
    inputs = _drawn(specs)
    forward = jax.jit(apply_fn, compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_matmul_precision("highest"):
        returned = forward(variables, *inputs)
        nudged = jax.tree.leaves(forward(variables, *map(_nudged, inputs)))
    paths, keyed = output_paths(returned)
    wanted = [np.asarray(y) for y in jax.tree.leaves(returned)]
    named = [entry.name for entry in model.graph.output]
    by_key = keyed and not isinstance(output_names, Mapping)
    order = [paths.index(name) for name in named] if by_key else range(len(paths))
    found = _run(model, [as_graph(x, layout) for x in inputs])
    exact: list[np.ndarray] | None = None
    for name, place, array in zip(named, order, found, strict=True):
        expected = as_graph(wanted[place], layout)
        noise = _apart(as_graph(nudged[place], layout), expected)
        beyond = _beyond(array, expected, noise)
        if beyond.any() and np.issubdtype(expected.dtype, np.floating):
            exact = _in_double(apply_fn, variables, inputs) if exact is None else exact
            if exact:
                right = as_graph(exact[place], layout)
                beyond = _beyond(array, right, noise + 2.0 * _apart(expected, right) / AMPLIFIED)
        if beyond.any():
            difference = (
                float(np.max(_apart(array, expected)[beyond])) if array.shape == expected.shape else np.inf
            )
            where = _where(apply_fn, variables, inputs, specs, passes)
            raise InvalidInput(
                f"the graph's output {name!r} differs from the JAX forward by {difference:.3g} on random "
                f"inputs, beyond rounding. {where} Please report this network; check=False returns the graph "
                "without this comparison."
            )


def _drawn(specs: Inputs) -> list[np.ndarray]:
    """Draw normal numbers, 0 or 1 for whole numbers such as tokens, and any of the 256 for bytes."""
    rng = np.random.default_rng(0)

    def draw(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        if jnp.issubdtype(spec.dtype, jnp.floating):
            return rng.normal(size=spec.shape).astype(spec.dtype)
        return rng.integers(0, 256 if spec.dtype == np.uint8 else 2, spec.shape).astype(spec.dtype)

    return [draw(spec) for spec in specs]


def _nudged(x: np.ndarray) -> np.ndarray:
    """Change an input by as little as float32 tells; leave whole numbers as they are."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    signs = np.where(np.arange(x.size).reshape(x.shape) % 2, 1.0, -1.0)
    return (x * (1.0 + NUDGE * signs)).astype(x.dtype)


def _run(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a graph as it is written.

    Raises:
      InvalidInput: onnxruntime refuses the graph or the inputs.
    """
    names = [entry.name for entry in model.graph.input]
    try:
        session = open_session(model, optimize=False)
        read_ = {entry.name for entry in session.get_inputs()}
        return session.run(None, {name: x for name, x in zip(names, inputs, strict=True) if name in read_})
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
    before = _run(model, inputs)
    for each in passes:
        model = each(model)
        after = _run(model, inputs)
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
        traced = jax.make_jaxpr(apply_fn)(variables, *specs)
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
    return dict(zip(chosen, _run(graph.rebuild(skeleton, nodes, emitter.values), inputs), strict=True))


def _element(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
