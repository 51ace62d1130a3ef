"""Compare an exported graph with the JAX forward.

`verify` and `save_verified` check an FP32 graph: its form, and its outputs within a tolerance. `parity`
measures how closely a QDQ graph follows the JAX fake-quant forward, in steps of the output's grid.
`integer_kernels` tells which layers onnxruntime computes on integers.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import onnx
import onnxruntime
from flax.traverse_util import flatten_dict
from onnx import shape_inference

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import Encoding, Ranges
from qt_jax.export.graph import without_weights
from qt_jax.export.layout import as_graph
from qt_jax.export.lowering import output_paths
from qt_jax.export.naming import leaf_of, output_places
from qt_jax.export.operators import WEIGHTED, summarize
from qt_jax.export.sessions import named_inputs, open_session, run_batches
from qt_jax.export.storage import readable, staged_model, stored_size
from qt_jax.export.tracing import compiled
from qt_jax.metrics import agreement, sqnr_db
from qt_jax.trim import quant_trim

ROUNDING = 1e-6
"""Fraction of the largest output that float32, of seven digits, leaves open however right both sides are."""

INTEGER_KERNELS = frozenset({"MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"})
"""Operators of onnxruntime that compute on integers."""


def verify(
    model: onnx.ModelProto,
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 7),
    tolerance: float = 1e-4,
    layout: Literal["nchw", "nhwc"] = "nchw",
) -> dict[str, Any]:
    """Check the graph's form, and its outputs in onnxruntime (CPU) against the JAX forward.

    The form is right where all operators are of ai.onnx, every node has a name, every weight is named by its
    Flax path, and the full check of onnx.checker passes. The numbers are compared by the largest absolute
    difference of any output, for each batch size, on the first inputs given. JAX computes the largest batch,
    in full float32 whatever the platform's default precision.

    Args:
      model: Graph from `to_onnx`.
      apply_fn: The forward, as given to `to_onnx`.
      variables: Variables as given to `to_onnx`.
      inputs: What `apply_fn` takes: images float32 `(n, height, width, channels)`, normalized as for the
        model, with n at least the largest batch size. A sequence of arrays where the model has several
        inputs. Give real images, because random ones reach other activations.
      batch_sizes: Batch sizes, each of which is run once.
      tolerance: Largest absolute difference, in units of the output. For an output beyond 100, where float32
        itself cannot keep 1e-4, a millionth of its largest value is allowed instead, if that is more.
      layout: Layout as given to `to_onnx`.

    Returns:
      The keys of `operators.summarize`, and `max_difference` (batch size -> largest difference).

    Raises:
      InvalidInput: A check failed. The message names the first one.
    """
    with readable(model) as stored:
        _check_form(model, variables, stored)
        differences = _differences(model, stored, apply_fn, variables, inputs, batch_sizes, layout, tolerance)
        size = len(stored) if isinstance(stored, bytes) else stored_size(Path(stored))
    return summarize(model, size) | {"max_difference": differences}


def save_verified(
    model: onnx.ModelProto,
    path: str | os.PathLike,
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: Any,
    *,
    batch_sizes: Sequence[int] = (1, 7),
    tolerance: float = 1e-4,
    layout: Literal["nchw", "nhwc"] = "nchw",
) -> dict[str, Any]:
    """Write `model`, `verify` it with onnxruntime reading the file, and only then give the file its name.

    Arguments, result and errors are those of `verify`. On an error nothing at `path` has changed.
    """
    with staged_model(model, path) as scratch:
        _check_form(model, variables, str(scratch))
        differences = _differences(
            model, str(scratch), apply_fn, variables, inputs, batch_sizes, layout, tolerance
        )
        size = stored_size(scratch)
    return summarize(model, size) | {"max_difference": differences}


def _check_form(model: onnx.ModelProto, variables: Mapping[str, Any], stored: bytes | str) -> None:
    """Check domains and names, the bytes or the file by onnx.checker, and the shapes by strict inference."""
    _check_domains(model)
    _check_names(model, variables)
    try:
        onnx.checker.check_model(stored)
        onnx.checker.check_model(without_weights(model), full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise _failure("onnx.checker", str(error)) from error


def _failure(check: str, finding: str) -> InvalidInput:
    """Make the error of a check that failed."""
    return InvalidInput(f"ONNX verification failed, {check}: {finding}")


def _check_domains(model: onnx.ModelProto) -> None:
    """Check that the graph holds only operators of ai.onnx."""
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise _failure("domain", f'node "{node.name}" is {node.domain}.{node.op_type}, not ai.onnx')
    domains = {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}
    if domains or model.functions:
        raise _failure("domain", f"the model imports {sorted(domains)} or defines functions of its own")


def _check_names(model: onnx.ModelProto, variables: Mapping[str, Any]) -> None:
    """Check that node names are unique, and that every weight is named after its leaf of `params`."""
    names = [node.name for node in model.graph.node]
    if not all(names) or len(set(names)) < len(names):
        raise _failure("names", "a node has no name, or two nodes have the same")
    leaves = flatten_dict(variables.get("params", {}), sep="/").keys()
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        weight = node.input[1] if node.op_type in WEIGHTED else ""
        candidates = (weight, leaf_of(weight, leaves))
        own = weight.startswith(f"{node.name}/")  # a constant of the model's code
        if weight in constant and not own and not any(_stems(name, leaves) for name in candidates):
            finding = f'the weight "{weight}" of node "{node.name}" is not a leaf of the params'
            raise _failure("names", finding)


def _stems(name: str, leaves: Iterable[str]) -> bool:
    """Tell whether `name` is a leaf, or joins leaves of that name in the modules below."""
    module, _, leaf = name.rpartition("/")
    below = f"{module}/" if module else ""
    return name in leaves or any(path.startswith(below) and path.endswith(f"/{leaf}") for path in leaves)


def _differences(
    model: onnx.ModelProto,
    stored: bytes | str,
    apply_fn: Callable,
    variables: Mapping[str, Any],
    given: Any,
    batch_sizes: Sequence[int],
    layout: str,
    tolerance: float,
) -> dict[int, float]:
    """Measure the largest absolute difference of any output by batch size, and check it.

    JAX computes the largest batch, once.

    Raises:
      InvalidInput: There are too few inputs, outputs differ in number or shape, or a difference is beyond the
        tolerance.
    """
    inputs = _arrays(given)
    largest = max(batch_sizes)
    if min(map(len, inputs)) < largest:
        given = min(map(len, inputs))
        raise InvalidInput(f"verification at batch sizes {tuple(batch_sizes)} got {given} inputs only")
    inputs = [x[:largest] for x in inputs]
    with jax.default_matmul_precision("highest"):
        forward = compiled(apply_fn, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
        returned = forward(variables, *inputs)
    outputs = _in_order(model, returned)
    session = _session(stored)
    names = [entry.name for entry in session.get_outputs()]
    if len(names) != len(outputs):
        raise _failure("parity", f"{len(names)} outputs, the JAX forward has {len(outputs)}")
    expected, fed = ([as_graph(x, layout) for x in tensors] for tensors in (outputs, inputs))
    differences = {}
    for size in batch_sizes:
        found = _run(session, [x[:size] for x in fed])
        for output, wanted in zip(found, expected, strict=True):
            if output.shape != wanted[:size].shape:
                shapes = f"{output.shape}, the JAX forward's {wanted[:size].shape}"
                raise _failure("parity", f"an output's shape at batch size {size} is {shapes}")
        pairs = [(output, wanted[:size]) for output, wanted in zip(found, expected, strict=True)]
        largest_of = [_difference(*pair) for pair in pairs]
        differences[size] = float(np.max(largest_of))  # NaN, if any is
        for difference, (_, wanted) in zip(largest_of, pairs, strict=True):
            allowed = max(tolerance, ROUNDING * _magnitude(wanted))
            if not difference <= allowed:
                raise _failure(
                    "parity",
                    f"the outputs differ from the JAX forward by {difference:.3g} at batch size {size}, "
                    f"tolerance {allowed:.3g}. Was the model exported from these variables, for inference?",
                )
    return differences


def _arrays(inputs: Any) -> list[np.ndarray]:
    """Return the inputs of a forward as arrays, in the order in which it takes them."""
    if isinstance(inputs, Mapping):
        raise InvalidInput(
            f"inputs are a mapping of {', '.join(map(repr, inputs))}: give a sequence of arrays, in the "
            "order in which the forward takes them"
        )
    return [np.asarray(x) for x in (inputs if isinstance(inputs, list | tuple) else [inputs])]


def _in_order(model: onnx.ModelProto, returned: Any) -> list[Any]:
    """Return the arrays that the forward has returned in the order of the graph's outputs.

    A graph that does not tell that order has the one of `jax.tree.leaves`, or names entries by their keys.
    """
    leaves, (paths, keyed) = jax.tree.leaves(returned), output_paths(returned)
    names = [entry.name for entry in model.graph.output]
    places = output_places(model, paths)
    if places is None and keyed and sorted(names) == sorted(paths):
        places = [paths.index(name) for name in names]
    return leaves if places is None else [leaves[place] for place in places]


def _difference(output: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest absolute difference; equal infinities do not differ."""
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(output == wanted, 0.0, np.abs(output - wanted))))


def _magnitude(wanted: np.ndarray) -> float:
    """Return the largest finite magnitude."""
    return float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0))


def _session(stored: bytes | str) -> onnxruntime.InferenceSession:
    """Load a graph, serialized or in a file, in onnxruntime on the CPU."""
    try:
        return onnxruntime.InferenceSession(stored, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _failure("onnxruntime", f"the model does not load: {error}") from error


def _run(session: onnxruntime.InferenceSession, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run a batch; return the outputs."""
    names = [entry.name for entry in session.get_inputs()]
    try:
        return session.run(None, dict(zip(names, inputs, strict=True)))
    except Exception as error:
        raise _failure("onnxruntime", f"batch size {len(inputs[0])}: {error}") from error


def fake_quant_forward(apply_fn: Callable[..., Any], config: QuantConfig) -> Callable[..., Any]:
    """Return `apply_fn` at lambda = 1 with its ranges frozen, which is what a QDQ graph computes."""

    def forward(variables: Any, *inputs: Any) -> Any:
        with quant_trim(config, 1.0, train=False):
            return apply_fn(variables, *inputs)

    return forward


def parity(
    qdq_model: onnx.ModelProto,
    apply_fake_quant: Callable[..., Any],
    variables: Mapping[str, Any],
    inputs: np.ndarray | Sequence[np.ndarray],
    ranges: Ranges,
    *,
    layout: str = "nchw",
) -> dict[str, dict[str, float | int | None]]:
    """Compare a QDQ graph in onnxruntime, optimized, with the JAX forward at lambda = 1 in full float32.

    Args:
      qdq_model: Graph from `insert_qdq`.
      apply_fake_quant: `(variables, *inputs) -> array or tuple of arrays`, from `fake_quant_forward` with the
        config that `ranges` was made with.
      variables: Variables as given to `tensor_ranges`.
      inputs: Real inputs, `(n, ...)` as JAX takes them (images NHWC), one array for each graph input.
      ranges: Ranges of the graph. Differences are counted in steps of the output's grid.
      layout: Layout of the graph's tensors of rank 4, as given to `to_onnx`.

    Returns:
      For each graph output by name:
      `n`, the number of inputs;
      `top1_agreement`, the fraction of rows of `(n, classes)` outputs with the same class, None for other
      shapes and for a single column;
      `margins`, JAX's lead of the first class over the second in steps of the output's grid (`median`, and
      `largest_lost` among rows of another class), None likewise;
      `equal_integers`, the fraction of numbers on the same integer of the output's grid;
      `largest_difference`, in steps of that grid;
      `sqnr_db` of the graph's output against JAX's, None where they are equal.

    Raises:
      InvalidInput: The outputs differ in number or shape from those of JAX.
    """
    arrays = _arrays(inputs)
    names = [entry.name for entry in qdq_model.graph.input]
    placed = [as_graph(array, layout) for array in arrays]
    feeds = named_inputs(qdq_model, dict(zip(names, placed, strict=False)))
    outputs = [entry.name for entry in qdq_model.graph.output]
    session = open_session(qdq_model, optimize=True)
    parts = list(run_batches(session, feeds, outputs))
    found = [np.concatenate([part[name] for part in parts]) for name in outputs]
    returned = _forward(apply_fake_quant, variables, arrays, [len(part[outputs[0]]) for part in parts])
    expected = [as_graph(array, layout) for array in _in_order(qdq_model, returned)]
    if [array.shape for array in expected] != [array.shape for array in found]:
        shapes = [array.shape for array in found], [array.shape for array in expected]
        raise InvalidInput(f"the graph's outputs have shapes {shapes[0]}, those of JAX {shapes[1]}")
    return {
        name: _compare(ours, theirs, ranges.tensors[name])
        for name, ours, theirs in zip(outputs, expected, found, strict=True)
    }


def _forward(
    apply_fn: Callable[..., Any],
    variables: Mapping[str, Any],
    arrays: Sequence[np.ndarray],
    sizes: Sequence[int],
) -> Any:
    """Compute what the forward returns, in batches of those sizes."""
    forward = compiled(apply_fn)
    ends = np.cumsum(sizes)
    with jax.default_matmul_precision("highest"):
        results = [
            forward(variables, *(array[end - size : end] for array in arrays))
            for size, end in zip(sizes, ends, strict=True)
        ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _compare(expected: np.ndarray, found: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    """Compare one output with that of JAX, as `parity` reports it."""
    step = encoding.scale[0]
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    ratio = sqnr_db(expected, found)
    classes = expected.ndim == 2 and expected.shape[1] > 1
    return {
        "n": len(expected),
        "top1_agreement": agreement(expected, found) if classes else None,
        "margins": _margins(expected, found, step) if classes else None,
        "equal_integers": float(np.mean(encoding.integers(expected) == encoding.integers(found))),
        "largest_difference": float(difference.max() / step),
        "sqnr_db": ratio if math.isfinite(ratio) else None,
    }


def _margins(expected: np.ndarray, found: np.ndarray, step: float) -> dict[str, float | None]:
    """Measure JAX's lead of the first class over the second, in steps: the median, and the largest lost."""
    second, first = np.sort(expected.astype(np.float64), axis=1)[:, -2:].T
    lead = (first - second) / step
    lost = lead[expected.argmax(axis=1) != found.argmax(axis=1)]
    return {"median": float(np.median(lead)), "largest_lost": float(lost.max()) if lost.size else None}


def integer_kernels(model: onnx.ModelProto) -> dict[str, bool]:
    """Tell for each convolution and matrix product, by name, whether onnxruntime computes it on integers.

    Its optimizer decides, on this CPU, with INT8 activations allowed. It has no integer kernel for
    ConvTranspose, for INT4 kernels and for INT16 activations: those dequantize and compute in float.

    Args:
      model: Graph from `insert_qdq`.
    """
    with tempfile.TemporaryDirectory(prefix="qt_jax-") as folder:
        path = Path(folder, "optimized.onnx")
        open_session(model, optimize=True, save_optimized=path)
        optimized = onnx.load(path)
    integer = {node.name for node in optimized.graph.node if node.op_type in INTEGER_KERNELS}
    return {node.name: node.name in integer for node in model.graph.node if node.op_type in WEIGHTED}
