"""Export a trained network to a verified file: the FP32 graph with its ranges, or a QDQ graph.

`deploy` does it all. `layer_rows` lists what a graph has on integers and what it has not, with reasons.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx

from qt_jax.config import QuantConfig
from qt_jax.errors import InvalidInput
from qt_jax.export import save_verified, to_onnx
from qt_jax.export.clips import Bounds, clipped_forward, insert_clips, learned_clips
from qt_jax.export.encodings import Encoding, Ranges, ranges_path, write_ranges
from qt_jax.export.inputs import graph_inputs, random_inputs
from qt_jax.export.integers import deployed_config, opset_for, quantize
from qt_jax.export.lowering import input_specs
from qt_jax.export.network import Deployable, Samples
from qt_jax.export.operators import summarize, weighted_nodes
from qt_jax.export.qdq import storage_bits
from qt_jax.export.ranges import tensor_ranges
from qt_jax.export.verification import fake_quant_forward, integer_kernels, parity

RANDOM = 8
"""Number of random inputs that replace real ones when a network brings none."""


def deploy(
    network: Deployable,
    out: str | os.PathLike,
    *,
    qdq: str | None = None,
    clips: bool = False,
    opset: int | None = None,
    per_channel: bool = True,
    signed: bool = False,
    layout: Literal["nchw", "nhwc"] = "nchw",
    fold_batch_norm: bool = True,
    dynamic_batch: bool = True,
) -> dict[str, Any]:
    """Export `network` to the file `out`, which gets its name only after it has been verified.

    Where a network has learned ranges, its FP32 graph has them in `<out less .onnx>.ranges.json` beside it.

    Args:
      network: Network from `qt_jax.export.network.load`.
      out: ONNX file to write. A file that is there is replaced at the end.
      qdq: None for FP32, else a name of `qt_jax.export.integers.QDQ_BITS`.
      clips: Whether the FP32 graph has the learned activation ranges as Clip nodes, see
        `qt_jax.export.clips`. It is then compared with the JAX forward clipped in the same places.
      opset: Opset of ai.onnx; None for 17, or for 21 where the integers need it.
      per_channel: Whether each output channel of a kernel has its own scale, in QDQ and in the ranges.
      signed: As `insert_qdq` takes it.
      layout, fold_batch_norm, dynamic_batch: As `qt_jax.to_onnx` takes them.

    Returns:
      The keys of `operators.summarize`, `parameters` and `macs` being those of the FP32 graph, and: `file`,
      `qdq`, `inputs` (on what parity was measured), `max_difference` (FP32: by batch size), `parity` (QDQ:
      by output, against JAX at lambda = 1), `layers` (a row for each weighted layer), `clips` (activation ->
      [low, high], of those that were clipped), `ranges` (the file, or None) and `ranges_reason` (why there is
      none).

    Raises:
      InvalidInput: The network cannot be exported; the message says why. QDQ lacks learned ranges or real
        inputs, or Clip nodes lack learned ranges or are asked for beside QDQ. Nothing at `out` has changed
        then.
    """
    out = Path(out)
    opset = opset_for(qdq, opset)
    learned = None if qdq is None else _learned(network, qdq)
    clippable = _clippable(network, qdq) if clips else None
    if out.is_dir():
        raise InvalidInput(f"{out} is a folder: name the file to write, such as {out / 'model.onnx'}")
    model = to_onnx(
        network.apply_fn,
        network.variables,
        network.input_shape,
        opset=opset,
        layout=layout,
        fold_batch_norm=fold_batch_norm,
        dynamic_batch=dynamic_batch,
        input_names=network.input_names,
        output_names=network.output_names,
        check=False,  # the file is verified on more inputs
    )
    bounds: dict[str, Bounds] = {}
    if clippable is not None:
        bounds = learned_clips(model, network.variables, clippable)
        network = dataclasses.replace(network, apply_fn=clipped_forward(network.apply_fn, model, bounds))
        model = insert_clips(model, bounds)
    options = {"layout": layout, "batch_sizes": (1, 7) if dynamic_batch else (1,)}
    path, ranges = ranges_path(out), None
    try:
        if qdq is None or learned is None:
            summary, ranges = _float(network, model, out, per_channel, options)
        else:
            summary = _quantized(network, model, out, qdq, *learned, per_channel, signed, options)
        if ranges is None:
            path.unlink(missing_ok=True)  # the ranges of the graph that was there before
        else:
            write_ranges(ranges, path)
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from error
    return summary | {
        "file": str(out),
        "qdq": qdq,
        "inputs": _inputs(network)[1],
        "clips": {name: list(ends) for name, ends in bounds.items()},
        "ranges": None if ranges is None else str(path),
    }


def _learned(network: Deployable, qdq: str) -> tuple[QuantConfig, Samples]:
    """Return the config and the samples that QDQ needs, or refuse a network that lacks them."""
    if network.config is None:
        raise InvalidInput(
            f"QDQ mode {qdq} needs learned ranges, and these variables hold none: train with qt.quant_trim, "
            "or export FP32 and let the vendor's toolchain calibrate"
        )
    if network.samples is None:
        raise InvalidInput(
            f"QDQ mode {qdq} needs real inputs, for what the learned ranges do not cover and to measure "
            'parity: give samples, an .npz with the arrays "calibration" and "parity"'
        )
    return network.config, network.samples


def _clippable(network: Deployable, qdq: str | None) -> QuantConfig:
    """Return the config that Clip nodes need, or refuse a network that lacks it."""
    if qdq is not None:
        raise InvalidInput(
            f"QDQ mode {qdq} clips at the ends of its integers: Clip nodes are for FP32 graphs"
        )
    if network.config is None:
        raise InvalidInput(
            "Clip nodes need learned ranges, and these variables hold none: train with qt.quant_trim, or "
            "export without them"
        )
    return network.config


def _inputs(network: Deployable) -> tuple[Any, str]:
    """Return the inputs that parity is measured on, and what they are."""
    if network.samples is not None:
        return network.samples.parity, "real"
    return random_inputs(input_specs(network.input_shape, RANDOM))


def _float(
    network: Deployable,
    model: onnx.ModelProto,
    out: Path,
    per_channel: bool,
    options: dict[str, Any],
) -> tuple[dict[str, Any], Ranges | None]:
    """Save the FP32 graph; return its summary, and its ranges if there are any."""
    ranges, reason = learned_ranges(network, model, per_channel=per_channel, layout=options["layout"])
    summary = save_verified(model, out, network.apply_fn, network.variables, _inputs(network)[0], **options)
    config = network.config
    layers = [] if ranges is None or config is None else layer_rows(model, config, ranges)
    return summary | {"layers": layers, "ranges_reason": reason}, ranges


def learned_ranges(
    network: Deployable, model: onnx.ModelProto, *, per_channel: bool = True, layout: str = "nchw"
) -> tuple[Ranges | None, str | None]:
    """Compute the ranges of an FP32 graph.

    Args:
      network: Network that the graph was made from.
      model: The graph.
      per_channel: As `deploy` takes it.
      layout: Layout of the graph.

    Returns:
      (ranges, None), or (None, reason) where there are none. The graph is valid without them.
    """
    if network.config is None:
        return None, "the network was not trained with Quant-Trim: no learned ranges"
    if network.samples is None:
        return None, "no samples to range what the statistics do not cover"
    try:
        calibration = graph_inputs(model, network.samples.calibration, layout)
        found = tensor_ranges(model, network.variables, network.config, calibration, per_channel=per_channel)
    except InvalidInput as error:
        return None, str(error)
    return found, None


def _quantized(
    network: Deployable,
    model: onnx.ModelProto,
    out: Path,
    qdq: str,
    trained: QuantConfig,
    samples: Samples,
    per_channel: bool,
    signed: bool,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Save the QDQ graph and return its summary. The graph contains its ranges, so it needs no other file."""
    config = deployed_config(trained, qdq)
    quantized, ranges = quantize(
        model,
        network.variables,
        trained,
        samples.calibration,
        qdq,
        layout=options["layout"],
        per_channel=per_channel,
        signed=signed,
    )
    inputs = samples.parity

    fake_quantized = fake_quant_forward(network.apply_fn, config)
    found = parity(quantized, fake_quantized, network.variables, inputs, ranges, layout=options["layout"])
    kernels = integer_kernels(quantized)
    # `parity` measures the numbers. This checks form, loading and shapes, and that all numbers are finite.
    summary = save_verified(
        quantized, out, fake_quantized, network.variables, inputs, tolerance=math.inf, **options
    )
    del summary["max_difference"]
    summary |= {key: value for key, value in summarize(model).items() if key in ("parameters", "macs")}
    layers = layer_rows(model, config, ranges, kernels)
    return summary | {
        "parity": found,
        "layers": layers,
        "ranges_reason": "the graph holds its ranges itself",
    }


def layer_rows(
    model: onnx.ModelProto,
    config: QuantConfig,
    ranges: Ranges,
    kernels: Mapping[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """List what is quantized and what is not, one row per convolution and matrix product.

    Args:
      model: The FP32 graph.
      config: Config that `ranges` was made with.
      ranges: Ranges from `tensor_ranges`.
      kernels: Result of `integer_kernels`, for a QDQ graph.

    Returns:
      `layer`, `operator`; `weights` and `input`, the grid in words or None for floating point;
      `integer_kernel`, whether onnxruntime computes on integers (None if not asked); `reason`, why
      something is in floating point, where it is known.
    """
    weighted = weighted_nodes(model)
    names = list(weighted) if kernels is None else list(kernels)
    nodes = {node.name: node for node in model.graph.node}
    rows = []
    for name in names:
        node = nodes[name]
        kernel, inputs = ranges.kernels.get(name), ranges.inputs.get(name)
        row = {
            "layer": name,
            "operator": node.op_type,
            "weights": None if kernel is None else _grid(ranges.tensors[kernel]),
            "input": None if inputs is None else _grid(inputs),
            "integer_kernel": None if kernels is None else kernels[name],
        }
        reason = _why_float(row, node.input[1].rpartition("/")[0], name in weighted, config)
        if row["weights"] is None and row["integer_kernel"]:
            reason = f"{reason}; onnxruntime rounds them to INT8 by itself"
        if reason is None and row["integer_kernel"] is False:
            reason = "its output is read in floating point"
            if kernel is not None and inputs is not None:
                found = _why_no_integer_kernel(node.op_type, ranges.tensors[kernel].bits, inputs.bits)
                reason = found or reason
        rows.append(row | {"reason": reason})
    return rows


def _grid(encoding: Encoding) -> str:
    """Put a grid in words."""
    kind = "symmetric" if encoding.symmetric else "asymmetric"
    return f"int{encoding.bits} {kind} per-{'tensor' if encoding.axis is None else 'channel'}"


def _why_float(row: Mapping[str, Any], path: str, weighted: bool, config: QuantConfig) -> str | None:
    """Say why the layer at `path` has a site in floating point; None if it has none."""
    if row["weights"] is not None and row["input"] is not None:
        return None
    if not weighted:
        return "a product of two activations, of which Quant-Trim learns no range"
    sites = config.sites(path)
    site, wanted = ("weights", sites.weights) if row["weights"] is None else ("input", sites.inputs)
    if wanted is not None:
        return "no statistics: quant_trim does not reach it"
    if sites.rule is not None:
        return f"{site} in floating point by rule {config.rules[sites.rule].path!r}"
    return f"{site} in floating point by the config's default"


def _why_no_integer_kernel(operator: str, weight_bits: int, activation_bits: int) -> str | None:
    """Say why onnxruntime has no integer kernel for a layer; None where it has one."""
    if operator == "ConvTranspose":
        return "no integer kernel for ConvTranspose"
    if storage_bits(weight_bits) != 8:
        return f"no integer kernel for INT{storage_bits(weight_bits)} weights"
    if storage_bits(activation_bits) != 8:
        return f"no integer kernel for INT{storage_bits(activation_bits)} activations"
    return None
