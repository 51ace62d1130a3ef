"""The integers of training, found again in a graph whose batch norms are folded.

Folding multiplies output channel c of a kernel by gain_c. On the scale s * |gain_c| the folded kernel has the
integers that round(w / s) had in training, negated where gain_c < 0: only the scale has changed.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from qt_jax.export import graph
from qt_jax.export.encodings import Encoding, Source
from qt_jax.export.operators import WEIGHTED
from qt_jax.grid import SCALE_FLOOR, QuantSpec

FIT = 1e-5
"""Largest relative residual of a channel that is called a multiple of another: float32 rounding only."""

BIAS_LIMIT = 2**31 - 2**10
"""A bias stays below 2^31 by more than the rounding of its float32 scale."""


def weighted_nodes(model: onnx.ModelProto) -> dict[str, NodeProto]:
    """The nodes that multiply by a kernel held in the graph, by name."""
    held = {tensor.name for tensor in model.graph.initializer}
    return {
        node.name: node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in held
    }


def channel_axis(node: NodeProto, rank: int) -> int:
    """The axis of the output channels in a kernel of that rank, as ONNX lays it out.

    >>> channel_axis(onnx.helper.make_node("ConvTranspose", ["x", "w"], ["y"]), 4)
    1
    """
    if node.op_type in ("Conv", "ConvTranspose"):
        return 0 if node.op_type == "Conv" else 1
    return 0 if graph.attributes(node).get("transB") else rank - 1


def output_gains(node: NodeProto, folded: np.ndarray, raw: np.ndarray) -> np.ndarray | None:
    """gain_c = <folded_c, raw_c> / <raw_c, raw_c> for each output channel, in float64.

    Args:
      node: the weighted node that reads the kernel.
      folded: float32, in the node's layout.
      raw: float32, the leaf of `params`, in Flax's layout.

    Returns:
      float64 `(channels,)`, 0 for a channel that is zero throughout. None where the folded kernel is not
      the raw one times a number for each channel.

    >>> node = onnx.helper.make_node("Gemm", ["x", "w"], ["y"])
    >>> raw = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> output_gains(node, raw * np.float32([2.0, -0.5]), raw).tolist()
    [2.0, -0.5]
    """
    axis = channel_axis(node, folded.ndim)
    rows = _rows(folded, axis)
    for layout in _layouts(node, raw, folded):
        original = _rows(layout, axis)
        energy = np.sum(original**2, axis=1)
        gains = np.sum(rows * original, axis=1) / np.where(energy > 0, energy, 1.0)
        residual = np.linalg.norm(rows - gains[:, None] * original, axis=1)
        if np.all(residual <= FIT * np.linalg.norm(rows, axis=1)):
            return gains
    return None


def _rows(kernel: np.ndarray, axis: int) -> np.ndarray:
    """float64 `(channels, weights of one channel)`."""
    return np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1).astype(np.float64)


def _layouts(node: NodeProto, raw: np.ndarray, folded: np.ndarray) -> list[np.ndarray]:
    """`raw` in each layout of the shape of `folded` in which the node may hold it."""
    shape = folded.shape
    if raw.size != math.prod(shape):
        return []
    if node.op_type in ("Gemm", "MatMul"):  # several input or feature axes (DenseGeneral) became one
        transposed = graph.attributes(node).get("transB")
        kernel = raw.reshape(shape[::-1]).T if transposed else raw.reshape(shape)
        return [kernel, *_channels_first_rows(kernel, folded)]
    if raw.ndim == 2:  # a dense layer on images, made a 1x1 convolution
        return [raw.T.reshape(shape)]
    spatial = tuple(range(raw.ndim - 2))
    kernels = [raw.transpose(-1, -2, *spatial)]
    if node.op_type == "ConvTranspose":  # ONNX mirrors the kernel; JAX with transpose_kernel
        both = [raw.transpose(-2, -1, *spatial), *kernels]
        kernels = [np.flip(kernel, range(2, kernel.ndim)) for kernel in both] + both
    return [kernel for kernel in kernels if kernel.shape == shape]


def _channels_first_rows(kernel: np.ndarray, folded: np.ndarray) -> list[np.ndarray]:
    """A kernel on flattened images, its rows from (height, width, channel) to (channel, height, width).

    The number of channels is the one with which a column of `kernel` is a multiple of that of `folded`.
    """
    rows = len(kernel)
    column = int(np.argmax(np.sum(np.square(folded, dtype=np.float64), axis=0)))
    wanted, original = (array[:, column].astype(np.float64) for array in (folded, kernel))
    length = np.linalg.norm(wanted) * np.linalg.norm(original)
    for channels in (number for number in range(2, rows) if rows % number == 0):
        moved = original.reshape(-1, channels).T.ravel()
        if abs(moved @ wanted) >= (1.0 - FIT) * length > 0.0:
            return [kernel.reshape(-1, channels, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)]
    return []


def least_scale(bias: np.ndarray, input_scale: float) -> np.ndarray:
    """The least kernel scales, float64 `(channels,)`, at which a bias fits int32 on input * kernel scale.

    Only a channel whose kernel is next to nothing beside its bias (a dead one) is held up by it.

    >>> float(least_scale(np.float32([1.0]), input_scale=0.01)[0]) < 1e-7
    True
    """
    return np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)


def learned_kernel(
    scale: np.ndarray, gains: np.ndarray, spec: QuantSpec, axis: int, least: np.ndarray | float = 0.0
) -> Encoding:
    """The grid of a folded kernel on which it has the integers of the raw one.

    On a full symmetric range (`narrow_range=False`) the lowest integer of a negated channel becomes the
    highest, which is one less in magnitude.

    Args:
      scale: float32, `()` or one for each channel of the last Flax axis; repeated where several feature axes
        became one.
      gains: float64 `(channels,)`, from `output_gains`.
      spec: of the weights.
      axis: of the output channels in the graph.
      least: from `least_scale`.
    """
    repeated = np.tile(scale.reshape(-1).astype(np.float64), len(gains) // scale.size)
    return _symmetric(np.maximum(repeated * np.abs(gains), least), spec, axis, "learned")


def folded_kernel(
    kernel: np.ndarray, spec: QuantSpec, axis: int, least: np.ndarray | float = 0.0
) -> Encoding:
    """The grid of a kernel by the largest magnitude of each channel."""
    peak = np.max(np.abs(_rows(kernel, axis)), axis=1)
    return _symmetric(np.maximum(peak / spec.integer_range[1], least), spec, axis, "folded kernel")


def _symmetric(scale: np.ndarray, spec: QuantSpec, axis: int, source: Source) -> Encoding:
    q_min, q_max = spec.integer_range
    stored = np.maximum(scale, SCALE_FLOOR).astype(np.float32)
    high = stored.astype(np.float64) * q_max
    return Encoding(
        scale=tuple(stored.tolist()),
        zero_point=(0,) * len(stored),
        low=tuple((-high).tolist()),
        high=tuple(high.tolist()),
        bits=spec.bits,
        symmetric=True,
        axis=axis,
        q_min=q_min,
        q_max=q_max,
        source=source,
    )


def per_tensor(encoding: Encoding) -> Encoding:
    """The encoding with one scale, the largest of its channels'.

    Where a batch norm was folded the channels' scales differ: the integers are no longer the trained ones.
    """
    largest = int(np.argmax(encoding.scale))
    one: dict[str, Any] = {
        name: (getattr(encoding, name)[largest],) for name in ("scale", "zero_point", "low", "high")
    }
    return dataclasses.replace(encoding, axis=None, **one)
