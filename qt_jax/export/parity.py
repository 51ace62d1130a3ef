"""How closely a QDQ graph in onnxruntime follows the JAX fake-quant forward, and what runs on integers."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx

from qt_jax.errors import InvalidInput
from qt_jax.export.encodings import Encoding, Ranges
from qt_jax.export.operators import WEIGHTED
from qt_jax.export.sessions import named_inputs, open_session, run_batches
from qt_jax.export.views import as_graph
from qt_jax.interceptor import quant_trim
from qt_jax.metrics import agreement, sqnr_db
from qt_jax.rules import QuantConfig

INTEGER_KERNELS = frozenset({"MatMulIntegerToFloat", "QGemm", "QLinearConv", "QLinearMatMul"})


def fake_quant_forward(apply_fn: Callable[..., Any], config: QuantConfig) -> Callable[..., Any]:
    """`apply_fn` at lambda = 1 with its ranges frozen: what a QDQ graph stands for."""

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
    """The QDQ graph in onnxruntime, optimised, against the JAX forward at lambda = 1 in full float32.

    Args:
      qdq_model: from `insert_qdq`.
      apply_fake_quant: `(variables, *inputs) -> array or tuple of arrays`, from `fake_quant_forward` with the
        config that `ranges` was made with.
      variables: as given to `tensor_ranges`.
      inputs: `(n, ...)` as JAX takes them (images NHWC), one array for each graph input. Real ones.
      ranges: gives the steps in which an output is counted.
      layout: of the graph's tensors of rank 4, as given to `to_onnx`.

    Returns:
      For each graph output by name: `n`; `top1_agreement`, the fraction of rows of `(n, classes)` outputs
      with the same class, and `margins`, JAX's lead of the first class over the second in steps of the
      output's grid (`median`, and `largest_lost` among rows of another class), None for other shapes;
      `equal_integers`, the fraction of numbers on the same
      integer of the output's grid; `largest_difference`, in steps of that grid; `sqnr_db` of the graph's
      output against JAX's, None where they are equal.

    Raises:
      InvalidInput: the outputs differ in number or shape from those of JAX.
    """
    several = inputs if isinstance(inputs, Sequence) else [inputs]
    arrays = [np.asarray(array) for array in several]
    names = [entry.name for entry in qdq_model.graph.input]
    placed = [as_graph(array, layout) for array in arrays]
    feeds = named_inputs(qdq_model, dict(zip(names, placed, strict=False)))
    outputs = [entry.name for entry in qdq_model.graph.output]
    session = open_session(qdq_model, optimize=True)
    parts = list(run_batches(session, feeds, outputs))
    found = [np.concatenate([part[name] for part in parts]) for name in outputs]
    expected = _forward(apply_fake_quant, variables, arrays, [len(part[outputs[0]]) for part in parts])
    expected = [as_graph(array, layout) for array in expected]
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
) -> list[np.ndarray]:
    """The outputs of JAX, in batches of those sizes."""
    compiled = jax.jit(apply_fn)
    ends = np.cumsum(sizes)
    with jax.default_matmul_precision("highest"):
        results = [
            compiled(variables, *(array[end - size : end] for array in arrays))
            for size, end in zip(sizes, ends, strict=True)
        ]
    return [np.concatenate(parts) for parts in zip(*map(jax.tree.leaves, results), strict=True)]


def _compare(expected: np.ndarray, found: np.ndarray, encoding: Encoding) -> dict[str, Any]:
    step = encoding.scale[0]
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    ratio = sqnr_db(expected, found)
    return {
        "n": len(expected),
        "top1_agreement": agreement(expected, found) if expected.ndim == 2 else None,
        "margins": _margins(expected, found, step) if expected.ndim == 2 else None,
        "equal_integers": float(np.mean(encoding.integers(expected) == encoding.integers(found))),
        "largest_difference": float(difference.max() / step),
        "sqnr_db": ratio if math.isfinite(ratio) else None,
    }


def _margins(expected: np.ndarray, found: np.ndarray, step: float) -> dict[str, float | None]:
    """JAX's lead of the first class over the second, in steps: the median, and the largest that was lost."""
    second, first = np.sort(expected.astype(np.float64), axis=1)[:, -2:].T
    lead = (first - second) / step
    lost = lead[expected.argmax(axis=1) != found.argmax(axis=1)]
    return {"median": float(np.median(lead)), "largest_lost": float(lost.max()) if lost.size else None}


def integer_kernels(model: onnx.ModelProto) -> dict[str, bool]:
    """Whether onnxruntime computes each convolution and matrix product on integers, by the node's name.

    As its optimiser decides on this CPU with INT8 activations allowed. It has no integer kernel for
    ConvTranspose, for INT4 kernels and for INT16 activations: those dequantize and compute in float.

    Args:
      model: from `insert_qdq`.
    """
    with tempfile.TemporaryDirectory(prefix="qt_jax-") as folder:
        path = Path(folder, "optimized.onnx")
        open_session(model, optimize=True, save_optimized=path)
        optimized = onnx.load(path)
    integer = {node.name for node in optimized.graph.node if node.op_type in INTEGER_KERNELS}
    return {node.name: node.name in integer for node in model.graph.node if node.op_type in WEIGHTED}
