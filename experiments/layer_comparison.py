"""The output of every layer of an integer deployment beside that of the float graph, in onnxruntime."""

import contextlib
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from qt_jax.backends import ort
from qt_jax.backends.protocol import Scheme
from qt_jax.export.operators import WEIGHTED
from qt_jax.export.placement import ABSORBED, tensor_readers
from qt_jax.export.sessions import named_inputs, run_tensors

SCHEMES = {
    offer.name: offer
    for offer in ort.BACKEND.schemes
    if offer.name in ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")
}
"""Those in which layers are compared."""


def layer_outputs(graph: onnx.ModelProto) -> dict[str, str]:
    """Layer -> the tensor it hands on: that of the Relu or Clip which alone reads its output, if one does."""
    readers = tensor_readers(graph)
    constant = {tensor.name for tensor in graph.graph.initializer}
    found = {}
    for node in graph.graph.node:
        if node.op_type in WEIGHTED and node.input[1] in constant:
            name = node.output[0]
            while len(readers[name]) == 1 and readers[name][0].op_type in ABSORBED:
                name = readers[name][0].output[0]
            found[node.name] = name
    return found


def quantized(graph: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """What onnxruntime's quantizer makes of a float graph."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, target = Path("float.onnx"), Path("quantized")
        target.mkdir()
        onnx.save(graph, source)
        ort.BACKEND.compile(source, calibration, scheme, target)
        return onnx.load(target / ort.MODEL)


def compare(
    graph: onnx.ModelProto, deployed: Mapping[str, onnx.ModelProto], images: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, dict[str, float | None]]]:
    """The float graph's logits, the logits of each deployment, and the SQNR in dB of each layer's output.

    10 log10(sum x^2 / sum (x - x_hat)^2) over all images, x the float graph's tensor and x_hat what the next
    layer of the deployment reads; None where the two are equal. A layer whose output the quantizer has made
    disappear is left out.
    """
    own = layer_outputs(graph)
    outputs = {scheme: _found(own, other) for scheme, other in deployed.items()}
    ours = _run(graph, own.values(), images, optimize=True)
    theirs = (_run(deployed[scheme], outputs[scheme].values(), images) for scheme in deployed)
    sums = {scheme: {layer: np.zeros(2) for layer in outputs[scheme]} for scheme in deployed}
    reference, logits = [], {scheme: [] for scheme in deployed}
    for (float_logits, mine), *others in zip(ours, *theirs, strict=True):
        reference.append(float_logits)
        for scheme, (integer_logits, other) in zip(deployed, others, strict=True):
            logits[scheme].append(integer_logits)
            for layer, name in outputs[scheme].items():
                x = mine[own[layer]].ravel()
                error = x - other[name].ravel()
                sums[scheme][layer] += np.vdot(x, x), np.vdot(error, error)
    ratios = {
        scheme: {
            layer: 10.0 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
            for layer, (signal, noise) in found.items()
        }
        for scheme, found in sums.items()
    }
    return np.concatenate(reference), {name: np.concatenate(parts) for name, parts in logits.items()}, ratios


def _found(outputs: Mapping[str, str], deployed: onnx.ModelProto) -> dict[str, str]:
    """Layer -> the tensor of a deployed graph that stands for its output in `outputs`."""
    made = {name for node in deployed.graph.node for name in node.output}
    found = {}
    for layer, name in outputs.items():
        dequantized = f"{name}_DequantizeLinear_Output"
        if dequantized in made or name in made:
            found[layer] = dequantized if dequantized in made else name
    return found


def _run(
    graph: onnx.ModelProto, tensors: Iterable[str], images: np.ndarray, *, optimize: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Logits and those tensors, batch by batch."""
    [logits] = [entry.name for entry in graph.graph.output]
    for batch in run_tensors(graph, [logits, *tensors], named_inputs(graph, images), optimize=optimize):
        yield batch[logits], batch
