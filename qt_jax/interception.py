"""One quantization point: its range in `batch_stats`, what it observes, its tensor on the grid.

All points of a forward pass share the pass: quantiles are taken together when it ends, and in training a
tensor that enters several layers, as that of an attention's queries, keys and values does, is put on one grid
once, as a vendor's compiler puts it.

Quant-Trim as a context around a Linen forward pass: the model's code and parameters stay as they are.

Every kernel-bearing Linen layer hands its input and its kernel to the field `promote_dtype` just before it
multiplies them. Inside the context that field is shadowed, for the length of one call, by a function that
fake-quantizes both. The ranges live in the mutable collection `batch_stats`, under the layer's own path.
"""

import flax.linen as nn

COLLECTION = "batch_stats"

KERNEL, INPUT, OUTPUT = "quant_kernel", "quant_input", "quant_output"
"""Names of the ranges beside a layer's other statistics, each {"low", "high", "count"}."""

GAIN = "quant_gain"
"""Name of the gains with which folding will multiply a layer's kernel: float32 `(channels,)`, or
`(channels, 1)` where the features are the kernel's last axis but one."""

LAYERS = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
"""Layers that are reached; the projections of Linen's attention are `DenseGeneral`."""


def is_range(path: tuple[str, ...]) -> bool:
    """Whether a leaf of `batch_stats` at this path belongs to Quant-Trim: a range or a gain.

    >>> is_range(("head", "quant_input", "low")), is_range(("norm", "mean"))
    (True, False)
    """
    return not {KERNEL, INPUT, OUTPUT, GAIN}.isdisjoint(path)
