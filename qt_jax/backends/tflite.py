"""Read a TFLite file and feed it: its grids, the layout of its tensors, and what its operators compute on.

LiteRT runs such a file and Ethos-U compiles it. onnx2tf, which makes it, gives every input of three or more
axes channels-last: (b, c, ...) becomes (b, ..., c). Outputs have orders of axes and names of their own, which
the file `LAYOUT` beside it tells.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import Batch, Scheme, by_name

MODEL, LAYOUT = "model.tflite", "layout.json"

KERNELS = {"xnnpack": "AUTO", "reference": "BUILTIN_REF"}
"""Runtime -> LiteRT's name for its kernels."""

PRODUCTS = {
    "CONV_2D": (0, 1),
    "CONV_3D": (0, 1),
    "DEPTHWISE_CONV_2D": (0, 1),
    "TRANSPOSE_CONV": (2, 1),
    "FULLY_CONNECTED": (0, 1),
    "BATCH_MATMUL": (0, 1),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": (0, 1),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (0, 1),
}
"""Operators that multiply -> where their inputs hold the activations, and where the weights."""

_INTEGERS = {"INT4", "INT8", "UINT8", "INT16"}


def open_interpreter(model: Path, runtime: str) -> Any:
    """Open a TFLite file with the kernels of a runtime."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType[KERNELS[runtime]]
    interpreter = Interpreter(str(model), num_threads=1, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    return interpreter


class Output(NamedTuple):
    """Describe how an output of the ONNX graph is read from a tensor of the TFLite file."""

    details: dict
    """LiteRT's description of the tensor."""
    axes: list[int]
    """The tensor's axes in the order of the ONNX output."""
    shape: list[int]
    """Shape of the ONNX output at batch 1."""
    dtype: str

    def read(self, q: np.ndarray) -> np.ndarray:
        """Return the ONNX output, dequantized.

        >>> details = {"dtype": np.float32, "quantization": (0.0, 0), "shape": (1, 4, 5, 3)}
        >>> Output(details, [0, 3, 1, 2], [1, 3, 4, 5], "float32").read(np.zeros((1, 4, 5, 3))).shape
        (1, 3, 4, 5)
        """
        values = dequantize(q, self.details).reshape(self.details["shape"])
        return values.transpose(self.axes).reshape(self.shape).astype(self.dtype, copy=False)


def bind(interpreter: Any, folder: Path) -> tuple[dict[str, dict], list[Output]]:
    """Return the tensor of each ONNX input, by name, and how to read each ONNX output, in order."""
    layout = json.loads((folder / LAYOUT).read_text())
    tensors, results = signature(interpreter)
    inputs = {name: tensors[tensor] for name, tensor in layout["inputs"].items()}
    return inputs, [
        Output(results[tensor], axes, shape, dtype) for tensor, axes, shape, dtype in layout["outputs"]
    ]


def signature(interpreter: Any) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return LiteRT's descriptions of the inputs and of the outputs, by their names in the SavedModel.

    The runner must not outlive this call, because an interpreter that is shared refuses to run.
    """
    runner = interpreter.get_signature_runner()
    return runner.get_input_details(), runner.get_output_details()


def feeds(batch: Batch, inputs: Mapping[str, dict]) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield the description of each input with the array that it takes."""
    arrays = by_name(batch, list(inputs))
    for name, details in inputs.items():
        yield details, np.ascontiguousarray(quantize(channels_last(arrays[name]), details))


def channels_last(images: np.ndarray) -> np.ndarray:
    """Move the channels of `(b, c, ...)` last, as onnx2tf does for every input. `(b, k)` stays as it is.

    >>> channels_last(np.zeros((1, 3, 8, 6))).shape, channels_last(np.zeros((1, 7))).shape
    ((1, 8, 6, 3), (1, 7))
    """
    return np.moveaxis(images, 1, -1) if images.ndim > 2 else images


def quantize(x: np.ndarray, details: dict) -> np.ndarray:
    """Quantize as TFLite's QUANTIZE does: x / s in float32, rounded half away from zero, plus z, saturated.

    Args:
      x: Values, float32.
      details: LiteRT's description of the tensor that takes them. One without a grid takes x as it is.

    >>> quantize(np.float32([-0.5, 0.5, 1.5, 900]), {"dtype": np.int8, "quantization": (1.0, 2)})
    array([  1,   3,   4, 127], dtype=int8)
    """
    scale, zero_point = details["quantization"]
    if not scale:
        return x.astype(details["dtype"], copy=False)
    steps = np.asarray(x / np.float32(scale), np.float64)
    limits = np.iinfo(details["dtype"])
    rounded = np.copysign(np.floor(np.abs(steps) + 0.5), steps) + zero_point
    return np.clip(rounded, limits.min, limits.max).astype(details["dtype"])


def dequantize(q: np.ndarray, details: dict) -> np.ndarray:
    """Return s (q - z) in float32. The values of a tensor without a grid stay as they are.

    >>> dequantize(np.int8([-128, 2, 3]), {"dtype": np.int8, "quantization": (0.5, 2)})
    array([-65. ,   0. ,   0.5], dtype=float32)
    """
    scale, zero_point = details["quantization"]
    if not scale:
        return q
    return np.float32(scale) * (q.astype(np.float32) - np.float32(zero_point))


class Subgraph(NamedTuple):
    """Describe the main graph of a TFLite file, or the inside of a loop."""

    operators: list[tuple[str, list[int], list[int]]]
    """Name, inputs and outputs of each operator."""
    types: list[str]
    """The type of each tensor, such as "INT8"."""
    constant: list[bool]
    """Whether each tensor is stored in the file."""


def subgraphs(model: Path) -> Iterator[Subgraph]:
    """Yield the graphs of a TFLite file."""
    from ai_edge_litert.tools import flatbuffer_utils

    content = flatbuffer_utils.read_model(str(model))
    names = [flatbuffer_utils.opcode_to_name(content, i) or "" for i in range(len(content.operatorCodes))]
    for graph in content.subgraphs:
        yield Subgraph(
            [(names[node.opcodeIndex], list(node.inputs), list(node.outputs)) for node in graph.operators],
            [flatbuffer_utils.type_to_name(tensor.type) for tensor in graph.tensors],
            [content.buffers[tensor.buffer].data is not None for tensor in graph.tensors],
        )


def products(model: Path, scheme: Scheme) -> tuple[int, int] | None:
    """Count the convolutions, matmuls and recurrent cells on the scheme's grid, and all, those in loops too.

    One is on the grid if its weights are stored as integers and, in a calibrated scheme, its activations are
    integers as well. Where only weights are quantized, products of two activations are not counted.
    """
    if scheme.number_format == "float":
        return None
    quantized = total = 0
    for graph in subgraphs(model):
        unpacked = {
            outputs[0]: inputs[0] for name, inputs, outputs in graph.operators if name == "DEQUANTIZE"
        }
        for name, inputs, _ in graph.operators:
            if name not in PRODUCTS:
                continue
            activations, weights = (inputs[i] for i in PRODUCTS[name])
            if graph.constant[unpacked.get(weights, weights)]:
                weights = unpacked.get(weights, weights)
            elif scheme.activation_bits == 32:
                continue
            total += 1
            read = [weights, activations] if scheme.calibration else [weights]
            quantized += all(graph.types[tensor] in _INTEGERS for tensor in read)
    return quantized, total


def operators(interpreter: Any) -> dict[str, dict[str, int]]:
    """Count the operators of a TFLite graph, by whether they compute on integers or in floating point.

    An operator without any float tensor counts as integer. So does one with float inputs and int8 weights,
    which quantizes its input as it runs. QUANTIZE and DEQUANTIZE compute in floating point.
    """
    types = {tensor["index"]: np.dtype(tensor["dtype"]).name for tensor in interpreter.get_tensor_details()}
    counts: dict[str, Counter] = {}
    for operator in interpreter._get_ops_details():
        name = operator["op_name"]
        inputs = [types[index] for index in operator["inputs"] if index >= 0]
        outputs = [types[index] for index in operator["outputs"] if index >= 0]
        hybrid = "int8" in inputs[1:] and name not in ("QUANTIZE", "DEQUANTIZE")
        kind = "float" if "float32" in inputs + outputs and not hybrid else "integer"
        counts.setdefault(name, Counter())[kind] += 1
    return {name: dict(kinds) for name, kinds in counts.items()}
