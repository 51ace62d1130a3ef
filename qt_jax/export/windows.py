"""Window attributes written out: compilers disagree on defaults, and some read `kernel_shape` unasked."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, helper

from qt_jax.errors import InvalidInput
from qt_jax.export import graph

WINDOWED = frozenset({"AveragePool", "Conv", "MaxPool"})


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


def _explicit(node: NodeProto, values: dict[str, np.ndarray], shape: Sequence[int]) -> NodeProto:
    stated = graph.attributes(node)
    if node.op_type == "Conv" and node.input[1] not in values:
        raise InvalidInput(f'the kernel "{node.input[1]}" is computed from the images: it must be a constant')
    kernel = stated.get("kernel_shape") or values[node.input[1]].shape[2:]
    strides = stated.get("strides", [1] * len(kernel))
    dilations = stated.get("dilations", [1] * len(kernel))
    window = {"kernel_shape": list(kernel), "strides": strides}
    if node.op_type != "AveragePool":  # it has no dilations before opset 19
        window["dilations"] = dilations
    if node.op_type == "Conv":
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
        window["pads"] = stated.get("pads", [0] * 2 * len(kernel))
    return helper.make_node(node.op_type, node.input, node.output, **(stated | window))


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
