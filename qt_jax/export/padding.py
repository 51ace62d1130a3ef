"""Write out the padding and strides of convolutions and pools, and the scales of resizes.

Compilers disagree on defaults, and some read `kernel_shape` without checking that it is there.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.graph import Constants
from qt_jax.export.operators import WEIGHTED

STRIDED = frozenset({"AveragePool", "Conv", "ConvTranspose", "MaxPool"})
"""Operators with a kernel shape, strides and pads."""

RESIZE: dict[str, dict[str, Any]] = {
    "cubic": {"cubic_coeff_a": -0.5, "exclude_outside": 1},
    "nearest": {"nearest_mode": "round_prefer_ceil"},
}
"""Maps a mode of Resize to the attributes with which it computes what `jax.image.resize` does."""


def explicit_padding(model: onnx.ModelProto) -> onnx.ModelProto:
    """State kernel_shape, strides, dilations, pads and group in numbers, and no auto_pad.

    Raises:
      InvalidInput: A node has "SAME" padding where height or width is not known.
    """
    values, shapes = graph.constants(model), graph.shapes(model)
    nodes = [
        _explicit(node, values, shapes.get(node.input[0], ())) if node.op_type in STRIDED else node
        for node in model.graph.node
    ]
    return graph.rebuild(model, nodes, values)


def _explicit(node: NodeProto, values: Constants, shape: Sequence[int]) -> NodeProto:
    """State every attribute of one node that reads a tensor of that shape."""
    stated = graph.attributes(node)
    if node.op_type in WEIGHTED and node.input[1] not in values:
        raise InvalidInput(f'the kernel "{node.input[1]}" is computed from the images: it must be a constant')
    kernel = stated.get("kernel_shape") or values[node.input[1]].shape[2:]
    strides = stated.get("strides", [1] * len(kernel))
    dilations = stated.get("dilations", [1] * len(kernel))
    explicit = {"kernel_shape": list(kernel), "strides": strides}
    if node.op_type != "AveragePool":  # it has no dilations before opset 19
        explicit["dilations"] = dilations
    if node.op_type in WEIGHTED:
        explicit["group"] = stated.get("group", 1)
    padding = stated.pop("auto_pad", b"NOTSET").decode()
    if padding.startswith("SAME"):
        if len(shape) != len(kernel) + 2 or not all(shape[2:]):
            raise InvalidInput(
                f'{node.op_type} on "{node.input[0]}" has "SAME" padding and unknown height or width: '
                "state the padding in numbers"
            )
        explicit["pads"] = _same_pads(padding, shape[2:], kernel, strides, dilations)
    else:
        explicit["pads"] = list(stated.get("pads", [0] * 2 * len(kernel)))
    if node.op_type == "ConvTranspose" and min(explicit["pads"]) < 0:
        explicit["output_padding"] = _output_padding(node, values, explicit["pads"], strides)
        explicit["pads"] = [max(pad, 0) for pad in explicit["pads"]]
    return helper.make_node(node.op_type, node.input, node.output, **(stated | explicit))


def _same_pads(
    padding: str,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Return the pads that give the output `ceil(size / stride)` positions: low ends, then high ends."""
    low, high = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        low.append(less if padding == "SAME_UPPER" else more)
        high.append(more if padding == "SAME_UPPER" else less)
    return low + high


def _output_padding(
    node: NodeProto, values: Constants, pads: Sequence[int], strides: Sequence[int]
) -> list[int]:
    """Return the output padding that negative pads at the high ends stand for.

    They are positions that the kernel does not reach.
    """
    beyond = [max(-pad, 0) for pad in pads[len(strides) :]]
    if min(pads[: len(strides)]) < 0 or any(
        size >= stride for size, stride in zip(beyond, strides, strict=True)
    ):
        kernel = values.flax_path(node.input[1])
        raise InvalidInput(
            f'the transposed convolution of "{node.input[0]}" by "{kernel}" pads its input '
            "beyond the kernel's reach, which ONNX does not: pad less, and use jnp.pad on the output"
        )
    return beyond


def fold_pad(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constant padding of height and width into the convolution or pool that follows.

    This folds zeros before a convolution or a mean that counts its pads, and -inf before a maximum.
    """
    values = graph.constants(model)

    def padded(layer: NodeProto, pad: NodeProto) -> NodeProto | None:
        stated = graph.attributes(layer)
        if pad.op_type != "Pad" or graph.attributes(pad).get("mode", b"constant") != b"constant":
            return None
        value = values[pad.input[2]].item() if len(pad.input) > 2 and pad.input[2] else 0.0
        low, high = values[pad.input[1]].reshape(2, -1).tolist()
        counted = layer.op_type != "AveragePool" or stated.get("count_include_pad", 0) == 1
        wanted = -np.inf if layer.op_type == "MaxPool" else 0.0
        if value != wanted or any(low[:2] + high[:2]) or min(low + high) < 0 or not counted:
            return None
        both = np.array(stated["pads"]) + np.array(low[2:] + high[2:])
        if layer.op_type != "Conv" and np.any(both >= np.tile(stated["kernel_shape"], 2)):
            return None  # ONNX wants each pad of a pool to be smaller than its kernel
        stated["pads"] = both.tolist()
        return helper.make_node(layer.op_type, [pad.input[0], *layer.input[1:]], layer.output, **stated)

    return graph.fuse(model, values, STRIDED - {"ConvTranspose"}, padded)


def resize_by_scale(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let each Resize compute what `jax.image.resize` does, from scales, because sizes would hold the batch.

    Pixels lie at half coordinates. The nearest pixel is rounded half up. The cubic kernel is Keys' with
    a = -1/2, cut at the border, where ONNX's default is -3/4 with the border repeated. A scale is moved up by
    the least step where its product with the size before would fall short of the whole number after, because
    runtimes multiply in float32 or float64.
    """
    values, shapes = graph.constants(model), graph.shapes(model)

    def scaled(node: NodeProto) -> NodeProto:
        if node.op_type != "Resize":
            return node
        before, after = (np.array(shapes[name]) for name in (node.input[0], node.output[0]))
        scales = (after / before).astype(np.float32)
        short = before * scales.astype(np.float64) < after
        name = f"{node.output[0]}#scales"
        values[name] = np.where(short, np.nextafter(scales, np.float32(np.inf)), scales)
        mode = graph.attributes(node)["mode"].decode()
        stated = {"mode": mode, "coordinate_transformation_mode": "half_pixel"} | RESIZE.get(mode, {})
        return helper.make_node("Resize", [node.input[0], "", name], node.output, **stated)

    return graph.rebuild(model, [scaled(node) for node in model.graph.node], values)
