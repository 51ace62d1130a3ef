"""Run graphs in onnxruntime on the CPU, batch by batch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, numpy_helper

from qt_jax.errors import InvalidInput
from qt_jax.export.storage import readable, with_initializers

BATCH = 64
"""Number of inputs that are run at once where the graph leaves the batch open."""

SHARED = 1024
"""Number of elements from which on `open_unoptimized` shares a weight with onnxruntime."""

LEVEL = onnxruntime.GraphOptimizationLevel


def open_session(
    model: onnx.ModelProto, *, optimize: bool, save_optimized: Path | None = None
) -> onnxruntime.InferenceSession:
    """Open a session that runs `model` as it is written, or optimized with every integer kernel there is.

    Two defaults of onnxruntime are changed. On x86 it turns INT8 activations into UINT8 first, and gives up
    on those with two readers. It also rounds the float input of a product with an integer kernel to 8 bits.

    Args:
      model: Any graph.
      optimize: Whether to apply all optimizations, or none.
      save_optimized: File to write the optimized graph to. Its operators bear the names of their nodes, and
        the optimizations for this very machine are left out.
    """
    options = _options(LEVEL.ORT_ENABLE_ALL if optimize else LEVEL.ORT_DISABLE_ALL)
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if save_optimized is not None:
        options.graph_optimization_level = LEVEL.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(save_optimized)
    with readable(model) as stored:
        return onnxruntime.InferenceSession(stored, options, providers=["CPUExecutionProvider"])


def open_unoptimized(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Open a session that runs `model` as it is written and takes its larger weights from memory.

    `open_session` serializes the weights for onnxruntime, which parses and copies them. Here it is handed
    arrays, so the peak of memory is lower by the size of the weights, and the session opens in half the time.
    """
    options = _options(LEVEL.ORT_DISABLE_ALL)
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies weights once more
    shared: dict[str, onnxruntime.OrtValue] = {}

    def referred(tensor: TensorProto) -> TensorProto:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < SHARED:
            return tensor
        shared[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor))
        held = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        held.data_location = TensorProto.EXTERNAL
        held.external_data.add(key="location", value="memory")
        return held

    light = with_initializers(model, [referred(tensor) for tensor in model.graph.initializer])
    options.add_external_initializers(list(shared), list(shared.values()))
    return onnxruntime.InferenceSession(
        light.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _options(level: onnxruntime.GraphOptimizationLevel) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3  # errors
    return options


def named_inputs(
    model: onnx.ModelProto, inputs: np.ndarray | Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the inputs by the graph's names, in its types.

    Args:
      model: Any graph.
      inputs: Arrays by name, or the array of the only input.

    Raises:
      InvalidInput: The names are not the graph's, there are no examples, or not as many of each.
    """
    names = [entry.name for entry in model.graph.input]
    given = dict(inputs) if isinstance(inputs, Mapping) else {names[0]: inputs}
    sizes = {len(array) for array in given.values()}
    if given.keys() != set(names) or len(sizes) != 1 or sizes == {0}:
        raise InvalidInput(
            f"the graph reads {', '.join(names)}; got {sorted(sizes)} examples for {', '.join(given)}: give "
            "as many of each, and at least one"
        )
    types = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}
    dtypes = {name: onnx.helper.tensor_dtype_to_np_dtype(types[name]) for name in given}
    return {name: np.asarray(array, dtypes[name]) for name, array in given.items()}


def input_batches(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray], size: int = BATCH
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the inputs by name, one batch after another.

    Args:
      session: Session that is to run them. Where its graph fixes the batch, that is the size.
      inputs: Arrays `(n, ...)` by name. They may be memory-mapped: only the rows of a batch are read.
      size: Number of examples of a batch where the graph leaves it open.
    """
    size = _fixed_batch(session) or size
    for start in range(0, len(next(iter(inputs.values()))), size):
        yield {name: array[start : start + size] for name, array in inputs.items()}


def run_batches(
    session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray], outputs: list[str]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the tensors `outputs` by name, for one batch of the inputs after another.

    Where the graph fixes the batch, the last batch is filled up with its last example, and its outputs are
    cut.
    """
    fixed = _fixed_batch(session)
    size = fixed or BATCH
    for batch in input_batches(session, inputs):
        n = len(next(iter(batch.values())))
        if fixed is not None and n < size:
            batch = {
                name: np.concatenate([array, array[-1:].repeat(size - n, 0)]) for name, array in batch.items()
            }
        found = session.run(outputs, batch)
        yield {
            name: array[:n] if np.ndim(array) and len(array) == size else array
            for name, array in zip(outputs, found, strict=True)
        }


def _fixed_batch(session: onnxruntime.InferenceSession) -> int | None:
    """Return the batch that the graph of a session fixes; None where it is open."""
    first = session.get_inputs()[0].shape[0]
    return first if isinstance(first, int) else None


def run_tensors(
    model: onnx.ModelProto, names: Iterable[str], inputs: Mapping[str, np.ndarray], *, optimize: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Yield float32 tensors inside a graph by name, for one batch of the inputs after another.

    Args:
      model: Any graph.
      names: Tensors that nodes write. Inputs among them are skipped.
      inputs: Inputs from `named_inputs`.
      optimize: As `open_session` takes it.
    """
    made = [name for name in dict.fromkeys(names) if name not in inputs]
    yield from run_batches(open_session(watched(model, made), optimize=optimize), inputs, made)


def watched(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of `model` that puts out the float32 tensors `names` too."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {entry.name for entry in model.graph.output}
    copy.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in dict.fromkeys(names)
        if name not in present
    )
    return copy
