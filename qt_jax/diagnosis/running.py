"""Run graphs on samples in onnxruntime, batch by batch, and hand out any of their tensors.

Samples are arrays `(n, ...)` by the names of the graph's inputs, or the array of the only input. They may be
memory-mapped files larger than memory. A batch is as large as its tensors allow, so that a detector on large
images needs no more memory than a classifier on small ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx

from qt_jax.backends.arrays import release
from qt_jax.backends.protocol import Batch
from qt_jax.export import graph
from qt_jax.export.sessions import BATCH, input_batches, named_inputs, open_session, run_batches, watched

BATCH_BYTES = 2**28
"""Bytes of tensors that a batch may take, but for a single sample that needs more."""

ALIVE = 8
"""Number of tensors as large as the largest that a graph is taken to hold at once while it runs."""


def tensors(
    model: onnx.ModelProto,
    names: Iterable[str],
    samples: Batch,
    *,
    optimize: bool = False,
    size: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield tensors of a graph by name, for one batch of the samples after another.

    Args:
      model: Graph to run.
      names: Inputs, outputs, or float32 tensors inside the graph.
      samples: Arrays `(n, ...)` by input, or the array of the only input.
      optimize: Whether onnxruntime optimizes the graph, or runs it as it is written.
      size: Number of samples of a batch where the graph leaves it open; None for `batch_size`.
    """
    wanted = list(dict.fromkeys(names))
    inputs = named_inputs(model, samples)
    made = [name for name in wanted if name not in inputs]
    session = open_session(watched(model, made), optimize=optimize)
    for batch in input_batches(session, inputs, size or batch_size(model, made)):
        [found] = run_batches(session, batch, made) if made else [{}]
        yield found | {name: batch[name] for name in wanted if name in batch}
        for array in inputs.values():
            release(array)


def batch_size(model: onnx.ModelProto, kept: Iterable[str]) -> int:
    """Return the number of samples to run at once, so that memory is bounded by `BATCH_BYTES`.

    Args:
      model: Graph to run. A tensor of a size that cannot be inferred does not count.
      kept: Tensors that are handed out, so that all are in memory at once.

    >>> x, y = (onnx.helper.make_tensor_value_info(name, 1, ["n", 2**22]) for name in "xy")
    >>> node = onnx.helper.make_node("Relu", ["x"], ["y"])
    >>> batch_size(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), ["y"])
    2
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    sizes = {
        name: 4 * math.prod(size or 1 for size in shape)
        for name, shape in graph.shapes(model).items()
        if name not in weights
    }
    running = ALIVE * max(sizes.values(), default=1)
    handed_out = sum(sizes.get(name, 0) for name in kept)
    return min(BATCH, max(1, BATCH_BYTES // max(running, handed_out, 1)))


def outputs_of(
    model: onnx.ModelProto, samples: Batch, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Run a graph and return its outputs `(n, ...)` by name.

    Args:
      model: Graph to run.
      samples: Arrays `(n, ...)` by input, or the array of the only input.
      names: Outputs to return; None for all.
    """
    wanted = [entry.name for entry in model.graph.output] if names is None else list(names)
    batches = list(tensors(model, wanted, samples, optimize=True))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in wanted}


def logits_of(model: onnx.ModelProto, samples: Batch) -> np.ndarray:
    """Run a graph and return its first output, `(n, ...)`."""
    name = model.graph.output[0].name
    return outputs_of(model, samples, [name])[name]


def count(samples: Batch) -> int:
    """Return the number of samples.

    >>> count(np.zeros((3, 2)))
    3
    """
    return len(next(iter(samples.values())) if isinstance(samples, Mapping) else samples)
