"""Window attributes written out: compilers disagree on defaults, and some read `kernel_shape` unasked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph
from qt_jax.export.operators import WEIGHTED

WINDOWED = frozenset({"AveragePool", "Conv", "ConvTranspose", "MaxPool"})

RESIZE: dict[str, dict[str, Any]] = {
    "cubic": {"cubic_coeff_a": -0.5, "exclude_outside": 1},
    "nearest": {"nearest_mode": "round_prefer_ceil"},
}


def explicit_windows(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with kernel_shape, strides, dilations, pads and group stated, and no auto_pad.

    Raises:
      InvalidInput: "SAME" padding where height or width is not known.
    """
    values = graph.constants(model)
    shapes = graph.shapes(model)
    nodes = [
        _explicit(node, values, shapes.get(node.input[0], ())) if node.op_type in WINDOWED else node
        for node in model.graph.node
    ]
    return graph.rebuild(model, nodes, values)


def fold_pad(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with constant padding of height and width joined to the window that follows.

    Zeros before a convolution or a mean that counts its pads, -inf before a maximum.
    """
    values = graph.constants(model)

    def padded(window: NodeProto, pad: NodeProto) -> NodeProto | None:
        stated = graph.attributes(window)
        if pad.op_type != "Pad" or graph.attributes(pad).get("mode", b"constant") != b"constant":
            return None
        value = values[pad.input[2]].item() if len(pad.input) > 2 and pad.input[2] else 0.0
        low, high = values[pad.input[1]].reshape(2, -1).tolist()
        counted = window.op_type != "AveragePool" or stated.get("count_include_pad", 0) == 1
        wanted = -np.inf if window.op_type == "MaxPool" else 0.0
        if value != wanted or any(low[:2] + high[:2]) or min(low + high) < 0 or not counted:
            return None
        both = np.array(stated["pads"]) + np.array(low[2:] + high[2:])
        if window.op_type != "Conv" and np.any(both >= np.tile(stated["kernel_shape"], 2)):
            return None  # ONNX wants each pad of a pool to be smaller than its kernel
        return helper.make_node(
            window.op_type,
            [pad.input[0], *window.input[1:]],
            window.output,
            **(stated | {"pads": both.tolist()}),
        )

    return graph.fuse(model, values, WINDOWED - {"ConvTranspose"}, padded)


def resize_by_scale(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with each Resize as `jax.image.resize` computes it, told its scales: sizes would hold the
    batch.

    Pixels lie at half coordinates; the nearest one is rounded half up, the cubic kernel is Keys' with
    a = -1/2, cut at the border (ONNX's default is -3/4, the border repeated). A scale is moved up by the
    least step where, times the size before, it would fall short of the whole number after: runtimes multiply
    in float32 or float64.
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


def _explicit(node: NodeProto, values: dict[str, np.ndarray], shape: Sequence[int]) -> NodeProto:
    stated = graph.attributes(node)
    if node.op_type in WEIGHTED and node.input[1] not in values:
        raise InvalidInput(f'the kernel "{node.input[1]}" is computed from the images: it must be a constant')
    kernel = stated.get("kernel_shape") or values[node.input[1]].shape[2:]
    strides = stated.get("strides", [1] * len(kernel))
    dilations = stated.get("dilations", [1] * len(kernel))
    window = {"kernel_shape": list(kernel), "strides": strides}
    if node.op_type != "AveragePool":  # it has no dilations before opset 19
        window["dilations"] = dilations
    if node.op_type in WEIGHTED:
        window["group"] = stated.get("group", 1)
    padding = stated.pop("auto_pad", b"NOTSET").decode()
    if padding.startswith("SAME"):
        if len(shape) != len(kernel) + 2 or not all(shape[2:]):
            raise InvalidInput(
                f'{node.op_type} on "{node.input[0]}" has "SAME" padding and unknown height or width: '
                "state the padding in numbers"
            )
        window["pads"] = _same_pads(padding, shape[2:], kernel, strides, dilations)
    else:
        window["pads"] = list(stated.get("pads", [0] * 2 * len(kernel)))
    if node.op_type == "ConvTranspose" and min(window["pads"]) < 0:
        window["output_padding"] = _output_padding(node, window["pads"], strides)
        window["pads"] = [max(pad, 0) for pad in window["pads"]]
    return helper.make_node(node.op_type, node.input, node.output, **(stated | window))


def _output_padding(node: NodeProto, pads: Sequence[int], strides: Sequence[int]) -> list[int]:
    """What negative pads at the high ends stand for: positions that the window does not reach."""
    beyond = [max(-pad, 0) for pad in pads[len(strides) :]]
    if min(pads[: len(strides)]) < 0 or any(
        size >= stride for size, stride in zip(beyond, strides, strict=True)
    ):
        raise InvalidInput(
            f'the transposed convolution of "{node.input[0]}" by "{graph.flax_path(node.input[1])}" pads its '
            "input beyond the kernel's reach, which ONNX does not: pad less, and use jnp.pad on the output"
        )
    return beyond


def _same_pads(
    padding: str,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """All low ends, then all high ends, so that the output has `ceil(size / stride)` positions."""
    low, high = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        low.append(less if padding == "SAME_UPPER" else more)
        high.append(more if padding == "SAME_UPPER" else less)
    return low + high
