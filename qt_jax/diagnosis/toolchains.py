"""Measure what vendors' toolchains do to each layer, although they show only the network's output.

The graph is cut behind each layer, and the part up to there is deployed as a separate network. So `sqnr_db`
of its records is the noise that the toolchain has added up to that layer. The layers at which the SQNR falls
most cost most.

For onnxruntime there is a shorter way: its quantizer keeps the names of tensors, so `quantized` makes a graph
that `simulation.compare` compares with the float graph layer by layer.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from qt_jax.backends import evaluate, ort
from qt_jax.backends.protocol import Backend, Scheme
from qt_jax.diagnosis.advice import Progress
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.running import count
from qt_jax.diagnosis.simulation import Precision
from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.storage import save
from qt_jax.records import Record

LAYER_SCHEMES = {
    offer.name: offer
    for offer in ort.BACKEND.schemes
    if offer.name in ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")
}
"""Schemes of onnxruntime in which `experiments.layer_sqnr` and `experiments.paper` compare layers."""


def prefix(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """Return the part of `model` that makes `tensor`, with the inputs that it reads; its output is `tensor`.

    >>> nodes = [
    ...     helper.make_node("Relu", ["x"], ["y"], name="one"),
    ...     helper.make_node("Neg", ["y"], ["z"], name="two"),
    ... ]
    >>> entries = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3]) for n in ("x", "z")]
    >>> whole = helper.make_model(helper.make_graph(nodes, "g", entries[:1], entries[1:]))
    >>> [node.op_type for node in prefix(whole, "y").graph.node]
    ['Relu']
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.output[:]
    cut.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    cut = graph.rebuild(cut, model.graph.node, graph.constants(model))
    read = {name for node in cut.graph.node for name in node.input}
    inputs = [entry for entry in cut.graph.input if entry.name in read]
    del cut.graph.input[:]
    cut.graph.input.extend(inputs)
    return graph.with_shapes(cut)


def matching(backend: Backend, precision: Precision) -> Scheme | None:
    """Return the scheme of a toolchain that is most like `precision` in all layers; None if there is none.

    The scheme is static, on an integer grid, with the same bits of weights and inputs. Of several, one with
    the same granularity of scales is preferred, then one that calibrates by minimum and maximum.

    >>> from qt_jax.backends.registry import BACKENDS
    >>> matching(BACKENDS["onnxruntime"], Precision(4, 8)).name
    'int4w-pt-minmax'
    """
    offers = [
        scheme
        for scheme in backend.schemes
        if scheme.number_format == "integer"
        and (scheme.weight_bits, scheme.activation_bits) == (precision.weights, precision.inputs)
        and scheme.layers == "all"
        and not scheme.dynamic
    ]
    likeness = {
        scheme: (scheme.per_channel == precision.per_channel, scheme.calibration == "minmax")
        for scheme in offers
    }
    return max(offers, key=likeness.__getitem__, default=None)


def by_backend(
    model: onnx.ModelProto,
    calibration: Mapping[str, np.ndarray],
    samples: Mapping[str, np.ndarray],
    backend: Backend,
    scheme: Scheme,
    *,
    folder: Path,
    progress: Progress,
) -> list[Record]:
    """Deploy the network up to each layer in one toolchain, on the first of the backend's runtimes.

    Args:
      model: Float graph.
      calibration, samples: Arrays `(n, ...)` by input. A few dozen samples suffice to measure noise.
      backend, scheme: Toolchain, and the scheme of it to use.
      folder: Keeps finished records. A second call resumes from them.
      progress: Is called with the name of each layer as it begins.

    Returns:
      One record per layer, with the name of the layer under the key `layer`. Where the graph up to a layer
      cannot be judged, the record has the status "refused" and the reason.
    """
    found = []
    for name, layer in layers_of(model).items():
        progress(f"{backend.name}, {name}")
        cut = prefix(model, layer.output)
        inputs = [entry.name for entry in cut.graph.input]
        try:
            [_, row] = evaluate(
                cut,
                {name: calibration[name] for name in inputs},
                {name: samples[name] for name in inputs},
                backends=[backend.name],
                schemes=[scheme.name],
                runtimes=[backend.runtimes[0].name],
                simulated_limit=count(samples),
                folder=folder,
            )
        except InvalidInput as error:
            row = {"status": "refused", "reason": str(error), "sqnr_db": None}
        found.append({"layer": name} | row)
    return found


def producers(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return, for each layer, the layers whose outputs reach its input with no layer between them."""
    layers = layers_of(model)
    made = {name: node for node in model.graph.node for name in node.output}

    def behind(tensor: str, seen: set[str]) -> list[str]:
        if tensor not in made or tensor in seen:
            return []
        seen.add(tensor)
        node = made[tensor]
        if node.name in layers:
            return [node.name]
        return [layer for name in node.input for layer in behind(name, seen)]

    return {name: behind(layer.source, set()) for name, layer in layers.items()}


def costliest(model: onnx.ModelProto, ratios: Mapping[str, float | None], count: int = 3) -> list[str]:
    """Return the layers at which most relative noise comes in, the worst first.

    The noise of a layer is 10^(-SQNR / 10) behind it, less the largest such value behind the layers before
    it.

    Args:
      model: Float graph.
      ratios: SQNR behind each layer in dB; None where nothing differs.
      count: Number of layers to return.
    """
    noise = {name: 0.0 if ratio is None else 10 ** (-ratio / 10) for name, ratio in ratios.items()}
    added = {
        name: noise[name] - max((noise.get(before, 0.0) for before in befores), default=0.0)
        for name, befores in producers(model).items()
        if name in noise
    }
    return [name for name in sorted(added, key=lambda name: -added[name]) if added[name] > 0][:count]


def quantized(graph: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """Quantize a float graph with onnxruntime's quantizer.

    `experiments.layer_sqnr` and `experiments.paper` compare the result with the float graph layer by layer.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, target = Path("float.onnx"), Path("quantized")
        target.mkdir()
        save(graph, source)
        ort.BACKEND.compile(source, calibration, scheme, target)
        return onnx.load(target / ort.MODEL)
