"""Checks that an exported graph is standard and computes what the JAX forward computes, and saves it."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import onnxruntime
from flax.traverse_util import flatten_dict
from onnx import shape_inference

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.naming import WEIGHTED
from qt_jax.export.operators import MAX_TRANSPOSES, count_operators


def verify(
    model: onnx.ModelProto,
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Mapping[str, Any],
    images_nhwc: Any,
    *,
    batch_sizes: Sequence[int] = (1, 7),
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Check the graph's form, and its logits in onnxruntime (CPU) against the JAX forward.

    Form: ai.onnx operators alone, no BatchNormalization, at most one Transpose, every node named and every
    weight named by its Flax path, onnx.checker's full check. Numbers: for each batch size the largest
    absolute difference of the logits on the first images given. JAX computes the largest batch, in full
    float32 whatever the platform's default precision.

    Args:
      model: from `to_onnx`.
      apply_fn: as given to `to_onnx`.
      variables: as given to `to_onnx`.
      images_nhwc: float32 `(n, height, width, channels)`, normalised as for the model, n at least the
        largest batch size. Real images: random ones reach other activations.
      batch_sizes: each is run once.
      tolerance: absolute, in logits.

    Returns:
      `operators` (name -> count), `parameters`, `macs` (of convolutions and Gemm, one image), `bytes`,
      `opset`, `max_difference` (batch size -> logits).

    Raises:
      InvalidInput: naming the first check that failed.
    """
    _check_domains(model)
    _check_operators(model)
    _check_names(model, variables)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise _failure("onnx.checker", str(error)) from error
    differences = _differences(model, apply_fn, variables, np.asarray(images_nhwc, np.float32), batch_sizes)
    for size, difference in differences.items():
        if not difference <= tolerance:  # catches NaN too
            raise _failure(
                "parity",
                f"logits differ from the JAX forward by {difference:.3g} at batch size {size}, tolerance "
                f"{tolerance:.3g}. Was the model exported from these variables, for inference?",
            )
    return {
        "operators": count_operators(model),
        "parameters": sum(value.size for value in graph.constants(model).values()),
        "macs": _multiply_accumulates(model),
        "bytes": model.ByteSize(),
        "opset": model.opset_import[0].version,
        "max_difference": differences,
    }


def save(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Write `model` to `path`, whole or not at all; a file already there is replaced at the end."""
    with _staged(Path(path)) as temporary:
        onnx.save(model, temporary)


def save_verified(
    model: onnx.ModelProto,
    path: str | os.PathLike,
    apply_fn: Callable[[Any, jax.Array], jax.Array],
    variables: Mapping[str, Any],
    images_nhwc: Any,
    *,
    batch_sizes: Sequence[int] = (1, 7),
    tolerance: float = 1e-4,
) -> dict[str, Any]:
    """Write `model`, `verify` what the file holds, and only then give the file its name.

    Arguments, result and errors are those of `verify`. On an error nothing at `path` has changed.
    """
    with _staged(Path(path)) as temporary:
        onnx.save(model, temporary)
        written = onnx.load(temporary)
        options = {"batch_sizes": batch_sizes, "tolerance": tolerance}
        return verify(written, apply_fn, variables, images_nhwc, **options)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _failure(check: str, finding: str) -> InvalidInput:
    return InvalidInput(f"ONNX verification failed, {check}: {finding}")


def _check_domains(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise _failure("domain", f'node "{node.name}" is {node.domain}.{node.op_type}, not ai.onnx')
    domains = {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}
    if domains or model.functions:
        raise _failure("domain", f"the model imports {sorted(domains)} or defines functions of its own")


def _check_operators(model: onnx.ModelProto) -> None:
    counts = count_operators(model)
    if counts.get("BatchNormalization"):
        raise _failure("operators", f"{counts['BatchNormalization']} BatchNormalization left unfolded")
    if counts.get("Transpose", 0) > MAX_TRANSPOSES:
        raise _failure("operators", f"{counts['Transpose']} Transpose, at most {MAX_TRANSPOSES} allowed")


def _check_names(model: onnx.ModelProto, variables: Mapping[str, Any]) -> None:
    """Every node has a name of its own; every weight is called after the leaf of `params` it comes from."""
    names = [node.name for node in model.graph.node]
    if not all(names) or len(set(names)) < len(names):
        raise _failure("names", "a node has no name, or two nodes have the same")
    leaves = flatten_dict(variables.get("params", {}), sep="/")
    for node in model.graph.node:
        weight = node.input[1] if node.op_type in WEIGHTED else None
        if weight is not None and re.sub(r"_\d+$", "", weight) not in leaves and weight not in leaves:
            raise _failure("names", f'the weight "{weight}" of node "{node.name}" is no leaf of the params')


def _differences(
    model: onnx.ModelProto,
    apply_fn: Callable,
    variables: Mapping[str, Any],
    images: np.ndarray,
    batch_sizes: Sequence[int],
) -> dict[int, float]:
    """Largest absolute difference of the logits by batch size; JAX computes the largest batch, once."""
    if len(images) < max(batch_sizes):
        raise InvalidInput(f"verification at batch sizes {tuple(batch_sizes)} got {len(images)} images only")
    images = images[: max(batch_sizes)]
    with jax.default_matmul_precision("highest"):
        expected = np.asarray(jax.jit(apply_fn)(variables, images))
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    differences = {}
    for size in batch_sizes:
        logits = _run(model, channels_first[:size])
        if logits.shape != expected[:size].shape:
            shapes = f"{logits.shape}, the JAX forward's {expected[:size].shape}"
            raise _failure("parity", f"the logits' shape at batch size {size} is {shapes}")
        differences[size] = float(np.max(np.abs(logits - expected[:size])))
    return differences


def _run(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """The logits by onnxruntime on the CPU."""
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {model.graph.input[0].name: images})
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise _failure("onnxruntime", f"batch size {len(images)}: {error}") from error
    return logits


def _multiply_accumulates(model: onnx.ModelProto) -> int:
    """Multiplications of convolutions and matrix products for one image."""
    values = graph.constants(model)
    shapes = graph.shapes(model)
    return sum(
        values[node.input[1]].size * int(np.prod(shapes[node.output[0]][2:]))
        for node in model.graph.node
        if node.op_type in WEIGHTED
    )
