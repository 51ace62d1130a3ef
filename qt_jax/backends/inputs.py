"""Check a float network and its data, and prepare them as all toolchains and the diagnosis get them.

`prepare` is the one door: what it refuses is refused everywhere, in the same words. Each input of a prepared
graph has a batch axis in front, so that a toolchain needs to know nothing else. An input without one, such as
a scalar or a recurrent state `(2, batch, 64)`, takes an array with one more axis, `(n, 2, 1, 64)`, and gets
its batch axis from a Squeeze.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    inliner,
    numpy_helper,
    version_converter,
)
from onnxruntime import RunOptions

from qt_jax.backends.arrays import LABELS, Arrays, Scan, scan
from qt_jax.backends.branches import remove_unread, take_branches
from qt_jax.backends.protocol import Batch
from qt_jax.backends.samples import check_alike, check_finite, samples_of, stated_sizes
from qt_jax.errors import InvalidInput
from qt_jax.export.graph import names_read
from qt_jax.export.sessions import open_unoptimized
from qt_jax.export.storage import is_large

OLDEST_OPSET = 13
"""The first opset with a per-channel QuantizeLinear. Older graphs are converted to it."""

OLDEST_IR = 4
"""The first version of ONNX's format in which weights need not be listed among the inputs."""

IR = 8
"""The version of ONNX's format of a graph that had to be changed, if its own is older."""

LARGEST_BATCH = 64
"""How many samples a graph with an open batch is given at once."""

QUANTIZED = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "ConvInteger", "QGemm", "QAttention", "QMoE"),
        *("QEmbedLayerNormalization", "MatMulNBits", "MatMulBnb4", "MatMulFpQ4", "GatherBlockQuantized"),
    }
)
"""Operators of quantized graphs, besides those that begin with one of `QUANTIZED_BEGINNINGS`."""

QUANTIZED_BEGINNINGS = ("QLinear", "QOrdered", "DynamicQuantize", "MatMulInteger", "Extended", "BFP", "MXQ")
"""Beginnings of the names of operators of quantized graphs, those of ONNX Runtime and of AMD Quark."""


class Prepared(NamedTuple):
    """Hold a graph and its data as every toolchain gets them.

    Attributes:
      model: The float graph.
      calibration, samples: Arrays `(n, ...)` by the names of the graph's inputs.
      scans: What was found in each array: "calibration" or "samples", then the input's name.
      outputs: The outputs of the graph, and whether each has a batch axis in front; None where the graph does
        not tell and the first sample's output has one element there.
      left_out: Names of outputs that the graph no longer has: not chosen, or not tensors of numbers.
      batch: How many samples the graph takes at once: 1, or `LARGEST_BATCH` where the batch is open.
      notes: Sentences about what was changed in the graph.
    """

    model: ModelProto
    calibration: Arrays
    samples: Arrays
    scans: Mapping[str, Mapping[str, Scan]]
    outputs: Mapping[str, bool | None]
    left_out: tuple[str, ...]
    batch: int
    notes: tuple[str, ...] = ()


def load(model: ModelProto | bytes | str | Path) -> ModelProto:
    """Return a model, read from its file or its bytes if need be.

    Raises:
      InvalidInput: It cannot be read, holds no graph, or has inputs that `real_inputs` refuses.
    """
    if isinstance(model, ModelProto):
        loaded, name = model, "The model"
    else:
        name = "The model's bytes" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes | str | Path):
            raise InvalidInput(
                f"{type(model).__name__} is no model: give an ONNX model or the path of its file."
            )
        try:
            loaded = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        except Exception as error:
            raise InvalidInput(
                f"{name} cannot be read as an ONNX model: {error}. Check the path, or export it again."
            ) from error
    if not loaded.graph.node or not loaded.graph.output:
        raise InvalidInput(f"{name} holds no ONNX graph (it is empty): export it again.")
    real_inputs(loaded)
    return loaded


def prepare(
    model: ModelProto,
    calibration: Batch,
    samples: Batch,
    *,
    outputs: Sequence[str] = (),
) -> Prepared:
    """Check that the data fit the model, and return both as all toolchains get them.

    Open sizes, except the batch, become those of the data. Weights are no longer listed among the inputs.
    Functions are inlined, an If that takes the same branch for all samples is replaced by that branch, and
    nodes get names of their own. An opset before `OLDEST_OPSET` is converted to
    it. A graph that does not compute several samples as it computes each of them gets a batch of 1.

    Args:
      model: A float ONNX model.
      calibration: Samples `(n, ...)`: the array of the only input, or arrays by input. They may be none.
      samples: Samples to judge by, at least one, as `calibration`.
      outputs: Names of the outputs to keep; all for none.

    Returns:
      The model, which is `model` itself if it needs no change, the data, and what was found out about both.

    Raises:
      InvalidInput: The model is quantized, takes or puts out something else than tensors of numbers, is not
        run by ONNX Runtime, or its batch is fixed above 1. Or the arrays do not fit it.
    """
    _refuse_quantized(model)
    wanted = real_inputs(model)
    given = {
        "calibration": samples_of(wanted, calibration, "calibration"),
        "samples": samples_of(wanted, samples, "test images"),
    }
    check_alike(given["calibration"], given["samples"])
    prepared = _standard(model, [entry.name for entry in wanted])
    given = _with_batch_axes(prepared, given)
    _fix_sizes(prepared, given["samples"])
    left_out = _choose_outputs(prepared, outputs)
    notes: list[str] = []
    if any(node.op_type == "If" for node in prepared.graph.node):
        notes = _branch_notes(take_branches(prepared, given.values()))
        name_nodes(prepared.graph)
        given = _without_unread(prepared, given)
    scans = {what: {name: scan(array) for name, array in arrays.items()} for what, arrays in given.items()}
    check_finite(scans)
    batch, axes = _try_out(prepared, given["samples"])
    same = prepared == model
    return Prepared(
        model=model if same else prepared,
        calibration=given["calibration"],
        samples=given["samples"],
        scans=scans,
        outputs=axes,
        left_out=left_out,
        batch=batch,
        notes=tuple(notes),
    )


def real_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """Return the graph's inputs without the weights that old exporters list among them.

    Raises:
      InvalidInput: There is no input, or one is not a tensor of numbers or has the name of the labels.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    found = [value for value in model.graph.input if value.name not in weights]
    if not found:
        raise InvalidInput("The ONNX model must have an input, found none: there is nothing to give it.")
    for entry in found:
        if not entry.type.HasField("tensor_type") or entry.type.tensor_type.elem_type == TensorProto.STRING:
            kind = "strings" if entry.type.HasField("tensor_type") else "something that is not a tensor"
            raise InvalidInput(
                f"The model's input {entry.name!r} takes {kind}: only tensors of numbers can be given."
            )
        if entry.name == LABELS:
            raise InvalidInput(
                f"The model has an input called {LABELS!r}, the name of the array that outputs are compared "
                "with: rename this input, in the graph and in the data."
            )
    return found


def _refuse_quantized(model: ModelProto) -> None:
    """Raise InvalidInput if the graph holds operators of a quantized graph."""
    counts = Counter(node.op_type for node in all_nodes(model))
    quantized = {
        kind: n for kind, n in counts.items() if kind in QUANTIZED or kind.startswith(QUANTIZED_BEGINNINGS)
    }
    if quantized:
        listed = ", ".join(f"{n} {kind}" for kind, n in sorted(quantized.items()))
        raise InvalidInput(
            f"The model is already quantized (it holds {listed}): give the float graph that it was made from."
        )


def all_nodes(model: ModelProto) -> Iterable[NodeProto]:
    """Yield the nodes of a model, those of its functions and of subgraphs too."""
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _nodes(nodes: Iterable[NodeProto]) -> Iterable[NodeProto]:
    for node in nodes:
        yield node
        for item in node.attribute:
            for graph in [*item.graphs, *([item.g] if item.HasField("g") else [])]:
                yield from _nodes(graph.node)


def _standard(model: ModelProto, inputs: Sequence[str]) -> ModelProto:
    """Return a copy of opset 13 or later, without listed weights and functions, with a name for each node."""
    copy = ModelProto()
    copy.CopyFrom(model)
    listed = [value for value in copy.graph.input if value.name in inputs]
    if len(listed) < len(copy.graph.input):
        del copy.graph.input[:]
        copy.graph.input.extend(listed)
    if copy.ir_version < OLDEST_IR:
        copy.ir_version = IR
    if copy.functions:
        copy = inliner.inline_local_functions(copy)
    opset = next(
        (entry.version for entry in copy.opset_import if entry.domain in ("", "ai.onnx")), OLDEST_OPSET
    )
    if opset < OLDEST_OPSET:
        _open_batches(copy.graph)
        copy = _converted(copy, opset)
    names = Counter(node.name for node in copy.graph.node)
    if names[""] or max(names.values()) > 1:
        name_nodes(copy.graph)
    return copy


def _converted(model: ModelProto, opset: int) -> ModelProto:
    """Convert a model to `OLDEST_OPSET`."""
    try:
        if is_large(model):
            raise ValueError("it has weights of 2 GB or more")
        converted = version_converter.convert_version(model, OLDEST_OPSET)
    except Exception as error:
        raise InvalidInput(
            f"The model is of opset {opset} and onnx cannot convert it to {OLDEST_OPSET}: {error}. Export it "
            "again with a newer opset."
        ) from error
    converted.ir_version = max(converted.ir_version, IR)
    return converted


def name_nodes(graph: GraphProto) -> None:
    """Give each node a name of its own, in place: its name if it is unique, else that of its first output."""
    count = Counter(node.name for node in graph.node)
    taken = {name for name, number in count.items() if number == 1 and name}
    for place, node in enumerate(graph.node):
        if node.name in taken:
            continue
        first = next(filter(None, node.output), "")
        candidates = (first, f"{first}/{node.op_type}", f"#{place}")
        node.name = next(name for name in candidates if name and name not in taken)
        taken.add(node.name)


def _open_batches(graph: GraphProto) -> None:
    """Write a first size of 0 or less as an open one."""
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[0].HasField("dim_value") and dims[0].dim_value < 1:
            dims[0].dim_param = "batch"


def _with_batch_axes(model: ModelProto, given: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Give each input that takes a whole array per sample a batch axis in front, and rename its arrays."""
    renamed = {}
    for entry in model.graph.input:
        array = given["samples"][entry.name]
        sizes = stated_sizes(entry)
        if sizes is None or array.ndim != len(sizes) + 1:
            continue
        inner, outer = entry.name, f"{entry.name}/sample"
        renamed[inner] = outer
        axes = f"{inner}/axes"
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), axes))
        squeeze = helper.make_node("Squeeze", [outer, axes], [inner], name=f"{inner}/squeeze")
        model.graph.node.insert(0, squeeze)
        dtype = entry.type.tensor_type.elem_type
        entry.CopyFrom(helper.make_tensor_value_info(outer, dtype, [1, *array.shape[1:]]))
    return {
        what: {renamed.get(name, name): array for name, array in arrays.items()}
        for what, arrays in given.items()
    }


def _fix_sizes(model: ModelProto, samples: Arrays) -> None:
    """Set the open sizes of all inputs, except the batch, to those of the samples.

    The batch is fixed to 1 at all inputs if it is at one.
    """
    graph = model.graph
    changed = False
    for entry in graph.input:
        shape = samples[entry.name].shape
        if stated_sizes(entry) is None:
            for size in ("batch", *shape[1:]):
                dim = entry.type.tensor_type.shape.dim.add()
                setattr(dim, "dim_param" if isinstance(size, str) else "dim_value", size)
        batch, *others = entry.type.tensor_type.shape.dim
        if batch.dim_value < 1:
            changed = changed or batch.HasField("dim_value")
            batch.dim_param = batch.dim_param or "batch"
        for dim, size in zip(others, shape[1:], strict=True):
            dim.dim_value = size
    if changed:
        _open_batches(graph)
        del graph.value_info[:]
    fixed = [entry.type.tensor_type.shape.dim[0].dim_value == 1 for entry in graph.input]
    if any(fixed) and not all(fixed):
        _fix_batch(graph)


def _fix_batch(graph: GraphProto) -> None:
    """Set the batch of all inputs to 1, and that of outputs that name the same size."""
    names = {entry.type.tensor_type.shape.dim[0].dim_param for entry in graph.input} - {""}
    for entry in (*graph.input, *graph.output):
        dims = entry.type.tensor_type.shape.dim
        if dims and dims[0].dim_param in names:
            dims[0].dim_value = 1
    del graph.value_info[:]


def _choose_outputs(model: ModelProto, wanted: Sequence[str]) -> tuple[str, ...]:
    """Drop the outputs that are not wanted or not tensors of numbers, and the nodes that only they need.

    Returns:
      The names of the dropped outputs.
    """
    graph = model.graph
    names = [value.name for value in graph.output]
    if len(set(names)) < len(names):
        raise InvalidInput(f"The model has several outputs of one name ({', '.join(names)}): rename them.")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise InvalidInput(f"The model has no output {unknown[0]!r}: choose among {', '.join(names)}.")
    numbers = [value for value in graph.output if _is_numeric(value)]
    kept = [value for value in numbers if not wanted or value.name in wanted]
    if not kept:
        raise InvalidInput(
            f"None of the model's outputs {', '.join(wanted or names)} is a tensor of numbers: there is "
            "nothing to judge."
        )
    left_out = tuple(name for name in names if name not in {value.name for value in kept})
    if left_out:
        del graph.output[:]
        graph.output.extend(kept)
        remove_unread(graph)
    return left_out


def _is_numeric(value: ValueInfoProto) -> bool:
    """Tell whether an output is a tensor of numbers, or does not say what it is."""
    if value.type.WhichOneof("value") not in (None, "tensor_type"):
        return False
    return value.type.tensor_type.elem_type != TensorProto.STRING


def _branch_notes(taken: Mapping[str, str]) -> list[str]:
    """Say which branches of a graph were left out.

    >>> _branch_notes({"pick": "then"})
    ["All samples take the same branch of 1 If ('pick' then). The other branches are left out."]
    """
    if not taken:
        return []
    listed = ", ".join(f"{name!r} {branch}" for name, branch in list(taken.items())[:3])
    more = ", ..." if len(taken) > 3 else ""
    plural = "s" if len(taken) > 1 else ""
    return [
        f"All samples take the same branch of {len(taken)} If{plural} ({listed}{more}). The other branches "
        "are left out."
    ]


def _without_unread(model: ModelProto, given: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Drop the inputs that no node reads any more from the graph, and their arrays."""
    graph = model.graph
    read = {name for node in graph.node for name in names_read(node)}
    read |= {value.name for value in graph.output}
    kept = [entry for entry in graph.input if entry.name in read] or list(graph.input)
    names = {entry.name for entry in kept}
    del graph.input[:]
    graph.input.extend(kept)
    return {
        what: {name: array for name, array in arrays.items() if name in names}
        for what, arrays in given.items()
    }


def _try_out(model: ModelProto, samples: Arrays) -> tuple[int, dict[str, bool | None]]:
    """Run the first samples, one by one and together, and fix the batch to 1 where that is not the same.

    Returns:
      How many samples the graph takes at once, and whether each output has a batch axis in front.

    Raises:
      InvalidInput: ONNX Runtime does not run the graph.
    """
    graph = model.graph
    names = [value.name for value in graph.output]
    try:
        session = open_unoptimized(model)
        alone = session.run(names, {name: array[:1] for name, array in samples.items()}, _silent())
    except Exception as error:
        raise InvalidInput(
            f"ONNX Runtime cannot run the float model to compare with: {brief(error)}"
        ) from error
    open_batch = all(entry.type.tensor_type.shape.dim[0].dim_value < 1 for entry in graph.input)
    if open_batch and _takes_two(session, names, samples, alone):
        return LARGEST_BATCH, dict.fromkeys(names, True)
    batches = {entry.type.tensor_type.shape.dim[0].dim_param for entry in graph.input}
    axes = {value.name: _leads(value, batches, one) for value, one in zip(graph.output, alone, strict=True)}
    if open_batch:
        _fix_batch(graph)
    return 1, axes


def _takes_two(session: Any, names: list[str], samples: Arrays, alone: list[np.ndarray]) -> bool:
    """Tell whether two samples at once give what each gives alone."""
    two = {
        name: array[:2] if len(array) > 1 else np.repeat(array, 2, axis=0) for name, array in samples.items()
    }
    try:
        together = session.run(names, two, _silent())
    except Exception:  # the graph holds a batch of 1
        return False
    second = session.run(names, {name: array[1:] for name, array in two.items()})
    return all(
        both.shape == (2, *first.shape[1:])
        and first.shape == other.shape
        and first.shape[:1] == (1,)
        and _near(both[:1], first)
        and _near(both[1:], other)
        for both, first, other in zip(together, alone, second, strict=True)
    )


def _silent() -> RunOptions:
    """Return options with which ONNX Runtime does not print the errors that it raises."""
    options = RunOptions()
    options.log_severity_level = 4  # fatal errors
    return options


def _near(found: np.ndarray, expected: np.ndarray) -> bool:
    if found.dtype.kind != "f":
        return np.count_nonzero(found != expected) <= 0.01 * expected.size
    largest = float(np.abs(expected.astype(np.float64)).max(initial=0.0))
    return np.allclose(found, expected, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)


def _leads(value: ValueInfoProto, batches: set[str], found: np.ndarray) -> bool | None:
    """Tell whether the first axis of an output is the batch, which is 1; None if that is not certain."""
    if not found.ndim or len(found) != 1:
        return False
    dims = value.type.tensor_type.shape.dim
    certain = bool(dims) and (dims[0].dim_value == 1 or dims[0].dim_param in batches - {""})
    return True if certain else None


def brief(error: Exception) -> str:
    """Return the message of an exception in one line of at most 300 characters.

    >>> brief(ValueError("two\\n lines"))
    'two lines'
    """
    return " ".join(str(error).split())[:300]
