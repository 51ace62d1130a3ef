"""The output of every layer of a low-bit graph beside that of the float graph, in onnxruntime."""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx

from qt_jax.diagnosis.layers import layer_outputs
from qt_jax.export.sessions import named_inputs, run_tensors

Ratios = dict[str, float | None]
"""Layer -> the SQNR of its output in dB, None where nothing differs."""


def compare(
    model: onnx.ModelProto, deployed: Mapping[str, onnx.ModelProto], images: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, Ratios]]:
    """The float graph's logits, the logits of each deployment, and the SQNR in dB of each layer's output.

    10 log10(sum x^2 / sum (x - x_hat)^2) over all images, x the float graph's tensor and x_hat what the next
    layer of the deployment reads; None where the two are equal. A layer whose output the quantizer has made
    disappear is left out.

    Args:
      model: a float graph of one input.
      deployed: name -> low-bit graph with the same names of tensors, or onnxruntime's for dequantized ones.
      images: float32 `(n, ...)`, as the graphs take them.
    """
    own = layer_outputs(model)
    outputs = {scheme: _found(own, other) for scheme, other in deployed.items()}
    ours = _run(model, own.values(), images, optimize=True)
    theirs = (_run(deployed[scheme], outputs[scheme].values(), images) for scheme in deployed)
    sums = {scheme: {layer: np.zeros(2) for layer in outputs[scheme]} for scheme in deployed}
    reference: list[np.ndarray] = []
    logits: dict[str, list[np.ndarray]] = {scheme: [] for scheme in deployed}
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
    model: onnx.ModelProto, tensors: Iterable[str], images: np.ndarray, *, optimize: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Logits and those tensors, batch by batch."""
    logits = model.graph.output[0].name
    for batch in run_tensors(model, [logits, *tensors], named_inputs(model, images), optimize=optimize):
        yield batch[logits], batch
