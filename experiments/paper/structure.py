"""Describe what training has done to a network: weights, scales, activation ranges, SQNR of layers, lambda.

Kernels are described twice: raw, as they were trained, and folded, as a vendor quantizes them, with the batch
norm that follows multiplied in. Some numbers of a layer are relative to its root mean square, where stated.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from flax.traverse_util import flatten_dict

from experiments.configs.training import Config, lambda_schedule
from experiments.paper.rows import GRAPH
from qt_jax.diagnosis.simulation import compare
from qt_jax.diagnosis.toolchains import LAYER_SCHEMES, quantized
from qt_jax.export import graph
from qt_jax.export.layout import as_graph
from qt_jax.export.network import Deployable, load
from qt_jax.export.operators import channel_axis, weighted_nodes
from qt_jax.export.sessions import named_inputs, run_tensors
from qt_jax.interception import COLLECTION, INPUT

BINS = np.arange(0.0, 15.5, 0.25)
"""Edges of the histograms of |w| over the root mean square of its layer. The last bin has all beyond."""

QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
"""Quantiles of |w| over its root mean square, and of the channels' largest |w| over the tensor's."""

OBSERVED = 64
"""Calibration images with which activations are observed."""

POINTS = 61
"""Points in training at which lambda is recorded."""


def network_structure(folder: Path, images: np.ndarray) -> dict[str, Any]:
    """Return the `structure` of the network in a row's folder."""
    return structure(load(folder), onnx.load(folder / GRAPH), images)


def structure(network: Deployable, model: onnx.ModelProto, images: np.ndarray) -> dict[str, Any]:
    """Describe weights and activations of an exported network, layer by layer.

    Args:
      network: A network from `qt_jax.export.network.load`, with samples.
      model: Its FP32 graph.
      images: Images as the graph takes them, held out from training and test.

    Returns:
      `layers` has an entry for each convolution and matmul that has a kernel. Its keys are `layer` (the Flax
      path); `raw` and `folded`, see `kernel_tails`; `input`, the range of its input as observed (0.1 % and
      99.9 % quantile between minimum and maximum); `learned`, the range as training has it (low, high) or
      None; `sqnr_db`, the SQNR of its output on `images` in each of `LAYER_SCHEMES` of onnxruntime, in dB, or
      None. `histograms` has the numbers of raw and of folded weights in `BINS`, over all layers.
    """
    values = graph.constants(model)
    raw = flatten_dict(dict(network.variables["params"]), sep="/")
    ranges = flatten_dict(dict(network.variables.get(COLLECTION, {})), sep="/")
    nodes = weighted_nodes(model)
    calibration = as_graph(network.samples.calibration, "nchw")
    observed = _observed(model, calibration[:OBSERVED], sorted({node.input[0] for node in nodes.values()}))
    deployed = {name: quantized(model, calibration, scheme) for name, scheme in LAYER_SCHEMES.items()}
    _, _, sqnr = compare(model, deployed, images)
    layers = []
    histograms = {"raw": np.zeros(len(BINS), np.int64), "folded": np.zeros(len(BINS), np.int64)}
    for node in nodes.values():
        name = node.input[1]
        path = name.rpartition("/")[0] or name
        folded = np.moveaxis(values[name], channel_axis(node, values[name].ndim), -1)
        kernels = {"folded": folded} | ({"raw": np.asarray(raw[name])} if name in raw else {})
        for kind, kernel in kernels.items():
            histograms[kind] += _histogram(kernel)
        learned = [ranges.get(f"{path}/{INPUT}/{end}") for end in ("low", "high")]
        layers.append(
            {
                "layer": path,
                **{kind: kernel_tails(kernel) for kind, kernel in kernels.items()},
                "input": observed[node.input[0]],
                "learned": None if None in learned else [float(end) for end in learned],
                "sqnr_db": {name: _decibels(sqnr[name].get(node.name)) for name in LAYER_SCHEMES},
            }
        )
    return {"layers": layers, "histograms": {kind: h.tolist() for kind, h in histograms.items()}}


def kernel_tails(kernel: np.ndarray) -> dict[str, Any]:
    """Describe how heavy the tails of a kernel are, and how unequal its output channels.

    Args:
      kernel: Weights `(..., channels)`.

    Returns:
      `largest` is max |w|. `tails` are the `QUANTILES` of |w| over the root mean square. `channels` are the
      `QUANTILES` of the channels' max |w| over the tensor's, which is the channels' scale over the tensor's.

    >>> kernel_tails(np.array([[3.0, 4.0], [-3.0, 4.0]]))["channels"]
    [0.875, 0.975, 0.9975, 0.99975, 1.0]
    """
    size = np.abs(np.asarray(kernel, np.float64))
    largest = size.max()
    channels = size.reshape(-1, size.shape[-1]).max(axis=0) / max(largest, np.finfo(np.float32).tiny)
    return {
        "largest": _short(largest),
        "tails": [_short(q) for q in np.quantile(size / _rms(size), QUANTILES)],
        "channels": [_short(q) for q in np.quantile(channels, QUANTILES)],
    }


def schedule_points(config: Config, steps: int) -> dict[str, list[float]]:
    """Return lambda at `POINTS` points of training: `epoch` and `lambda`.

    >>> schedule_points(Config(sched="constant", epochs=2), 100)["lambda"][:2]
    [1.0, 1.0]
    """
    at = np.linspace(0, steps, POINTS).round().astype(np.int32)
    lam = lambda_schedule(config, steps)
    return {
        "epoch": [_short(config.epochs * step / steps) for step in at],
        "lambda": [_short(lam(np.int32(step))) for step in at],
    }


def _observed(model: onnx.ModelProto, images: np.ndarray, names: list[str]) -> dict[str, list[float]]:
    """Return minimum, 0.1 % quantile, 99.9 % quantile and maximum of tensors over images."""
    inputs = named_inputs(model, images)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names if name not in inputs}
    for batch in run_tensors(model, names, inputs):
        for name, value in batch.items():
            parts[name].append(value.ravel())
    tensors = {name: np.concatenate(values) for name, values in parts.items()} | inputs
    return {name: [_short(q) for q in np.quantile(tensors[name], (0.0, 0.001, 0.999, 1.0))] for name in names}


def _rms(size: np.ndarray) -> float:
    """Return the root mean square, or the smallest normal number for a tensor of zeros."""
    return max(float(np.sqrt(np.mean(size**2))), float(np.finfo(np.float32).tiny))


def _histogram(kernel: np.ndarray) -> np.ndarray:
    """Count the weights of a kernel in `BINS`."""
    size = np.abs(np.asarray(kernel, np.float64)).ravel()
    counts, _ = np.histogram(np.minimum(size / _rms(size), BINS[-1]), [*BINS, np.inf])
    return counts


def _decibels(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 2)


def _short(value: Any) -> float:
    """Round to six significant digits, which is more than a figure shows."""
    return float(f"{float(value):.6g}")
