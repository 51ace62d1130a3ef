"""What a graph has on integers and what it has not, layer by layer, with the reason."""

from collections.abc import Mapping
from typing import Any

import onnx

from qt_jax.export.encodings import Encoding, Ranges
from qt_jax.export.integer_weights import weighted_nodes
from qt_jax.export.qdq import storage_bits
from qt_jax.rules import QuantConfig


def layer_rows(
    model: onnx.ModelProto,
    config: QuantConfig,
    ranges: Ranges,
    kernels: Mapping[str, bool] | None = None,
) -> list[dict[str, Any]]:
    """What is quantized and what is not, one row for each convolution and matrix product.

    Args:
      model: the FP32 graph.
      config: that `ranges` was made with.
      ranges: from `tensor_ranges`.
      kernels: from `integer_kernels`, for a QDQ graph.

    Returns:
      `layer`, `operator`; `weights` and `input`, the grid in words or None for floating point;
      `integer_kernel`, whether onnxruntime computes on integers (None if not asked); `reason`, why
      something is in floating point, where it is known.
    """
    weighted = weighted_nodes(model)
    names = list(weighted) if kernels is None else list(kernels)
    makers = {node.name: node for node in model.graph.node}
    rows = []
    for name in names:
        node = makers[name]
        kernel, fed = ranges.kernels.get(name), ranges.inputs.get(name)
        row = {
            "layer": name,
            "operator": node.op_type,
            "weights": None if kernel is None else _grid(ranges.tensors[kernel]),
            "input": None if fed is None else _grid(fed),
            "integer_kernel": None if kernels is None else kernels[name],
        }
        reason = _why_float(row, node.input[1].rpartition("/")[0], name in weighted, config)
        if row["weights"] is None and row["integer_kernel"]:
            reason = f"{reason}; onnxruntime rounds them to INT8 by itself"
        if reason is None and row["integer_kernel"] is False:
            reason = "its output is read in floating point"
            if kernel is not None and fed is not None:
                found = _why_no_integer_kernel(node.op_type, ranges.tensors[kernel].bits, fed.bits)
                reason = found or reason
        rows.append(row | {"reason": reason})
    return rows


def _grid(encoding: Encoding) -> str:
    kind = "symmetric" if encoding.symmetric else "asymmetric"
    return f"int{encoding.bits} {kind} per-{'tensor' if encoding.axis is None else 'channel'}"


def _why_float(row: Mapping[str, Any], path: str, weighted: bool, config: QuantConfig) -> str | None:
    """Why the layer at `path` has a site in floating point, None if it has none."""
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
    if operator == "ConvTranspose":
        return "no integer kernel for ConvTranspose"
    if storage_bits(weight_bits) != 8:
        return f"no integer kernel for INT{storage_bits(weight_bits)} weights"
    if storage_bits(activation_bits) != 8:
        return f"no integer kernel for INT{storage_bits(activation_bits)} activations"
    return None
