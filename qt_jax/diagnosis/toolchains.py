"""The deployments in which layers are compared, as onnxruntime's quantizer makes them.

What vendors' toolchains do to each layer, whatever they hide: the graph is cut behind it and deployed.

The harness takes the part of the graph up to a layer as a network of its own, its output flattened to
logits; `sqnr_db` of its records is then the noise that the toolchain has added up to there. Where it falls
most, a layer costs most.
"""

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from qt_jax.backends import evaluate, ort
from qt_jax.backends.protocol import Backend, Scheme
from qt_jax.diagnosis.layers import layers_of
from qt_jax.diagnosis.simulation import Precision
from qt_jax.export import graph
from qt_jax.records import Record


def prefix(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    """The part of `model` that makes `tensor`, its only output, flattened to `(n, values)`.

    >>> nodes = [
    ...     helper.make_node("Relu", ["x"], ["y"], name="one"),
    ...     helper.make_node("Neg", ["y"], ["z"], name="two"),
    ... ]
    >>> entries = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3]) for n in ("x", "z")]
    >>> whole = helper.make_model(helper.make_graph(nodes, "g", entries[:1], entries[1:]))
    >>> [node.op_type for node in prefix(whole, "y").graph.node]
    ['Relu', 'Flatten']
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    flat = f"{tensor}/flat"
    del cut.graph.output[:]
    cut.graph.output.append(helper.make_tensor_value_info(flat, TensorProto.FLOAT, None))
    nodes = [*model.graph.node, helper.make_node("Flatten", [tensor], [flat], name=flat)]
    return graph.with_shapes(graph.rebuild(cut, nodes, graph.constants(model)))


def matching(backend: Backend, precision: Precision) -> Scheme | None:
    """The scheme of a toolchain that is most like `precision` in all layers: static, on an integer grid.

    One of the same width of weights; of several the one with as many scales, then by minimum and maximum.

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
    calibration: np.ndarray,
    images: np.ndarray,
    backend: Backend,
    scheme: Scheme,
    *,
    folder: Path,
    tell: Callable[[str], object],
) -> list[Record]:
    """A record for each layer, which stands under the key `layer`: the network up to it, in one toolchain.

    Args:
      model: a float graph of one input.
      calibration, images: float32 `(n, ...)`; some dozens of images say enough of noise.
      backend, scheme: on the first of the backend's runtimes.
      folder: keeps what is done; a second call goes on.
      tell: hears of each layer as it begins.
    """
    labels = np.zeros(len(images), np.int64)
    found = []
    for name, layer in layers_of(model).items():
        tell(f"{backend.name}, {name}")
        [_, row] = evaluate(
            prefix(model, layer.output),
            calibration,
            (images, labels),
            backends=[backend.name],
            schemes=[scheme.name],
            runtimes=[backend.runtimes[0].name],
            simulated_limit=len(images),
            folder=folder,
        )
        found.append({"layer": name} | row)
    return found


def producers(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Layer -> the layers whose outputs reach its input with no layer between them."""
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


def costliest(model: onnx.ModelProto, ratios: Mapping[str, float | None], most: int = 3) -> list[str]:
    """The layers at which most relative noise comes in: 10^(-SQNR / 10) behind, less the most before.

    Args:
      model: a float graph.
      ratios: SQNR behind each layer in dB; None where nothing differs.
      most: layers to name.
    """
    noise = {name: 0.0 if ratio is None else 10 ** (-ratio / 10) for name, ratio in ratios.items()}
    added = {
        name: noise[name] - max((noise.get(before, 0.0) for before in befores), default=0.0)
        for name, befores in producers(model).items()
        if name in noise
    }
    return [name for name in sorted(added, key=lambda name: -added[name]) if added[name] > 0][:most]


LAYER_SCHEMES = {
    offer.name: offer
    for offer in ort.BACKEND.schemes
    if offer.name in ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")
}
"""Those in which layers are compared."""


def quantized(graph: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """What onnxruntime's quantizer makes of a float graph."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, target = Path("float.onnx"), Path("quantized")
        target.mkdir()
        onnx.save(graph, source)
        ort.BACKEND.compile(source, calibration, scheme, target)
        return onnx.load(target / ort.MODEL)
