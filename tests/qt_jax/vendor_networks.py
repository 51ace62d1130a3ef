"""Build small networks with several inputs and outputs, whose layouts a toolchain may mistake."""

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper


def filled(text: str, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Parse a graph of opset 17, give it random weights of these shapes, and name its nodes."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]>\n{text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = (0.3 * rng.normal(size=shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    for node in model.graph.node:
        node.name = f"node_{node.output[0] or node.output[-1]}"
    onnx.checker.check_model(model)
    return model


CUBE = filled(
    """net (float[batch, 3, 8, 8] image) => (float[batch, 8, 8, 8] map, float[batch, 5] logits) {
        stem = Conv<pads = [1, 1, 1, 1]>(image, k, b)
        active = Relu(stem)
        map = Conv<pads = [1, 1, 1, 1]>(active, l, c)
        mean = GlobalAveragePool(active)
        flat = Flatten(mean)
        logits = Gemm<transB = 1>(flat, w, d)
    }""",
    {"k": (16, 3, 3, 3), "b": (16,), "l": (8, 16, 3, 3), "c": (8,), "w": (5, 16), "d": (5,)},
)
"""An output whose three axes are of one size, before a vector."""

SOUND_AND_IMAGE = filled(
    """net (float[batch, 4, 12] sound, float[batch, 3, 8, 8] image)
        => (float[batch, 6, 12] frames, float[batch, 5] logits) {
        heard = Conv<pads = [1, 1]>(sound, k, b)
        loud = Relu(heard)
        frames = Conv<pads = [1, 1]>(loud, l, c)
        average = ReduceMean<axes = [2], keepdims = 0>(loud)
        stem = Conv<pads = [1, 1, 1, 1]>(image, m, d)
        active = Relu(stem)
        mean = GlobalAveragePool(active)
        flat = Flatten(mean)
        both = Concat<axis = 1>(average, flat)
        logits = Gemm<transB = 1>(both, w, e)
    }""",
    {
        "k": (16, 4, 3), "b": (16,), "l": (6, 16, 3), "c": (6,),
        "m": (16, 3, 3, 3), "d": (16,), "w": (5, 32), "e": (5,),
    },
)  # fmt: skip
"""Two inputs, one of them with three axes, and outputs of three and of two axes."""

TWO_IMAGES = filled(
    """net (float[batch, 3, 8, 8] second, float[batch, 3, 8, 8] first)
        => (float[batch, 4, 8, 8] map, float[batch, 5] logits) {
        stem = Conv<pads = [1, 1, 1, 1]>(second, k, b)
        active = Relu(stem)
        other = Conv<pads = [1, 1, 1, 1]>(first, l, c)
        awake = Relu(other)
        both = Concat<axis = 1>(active, awake)
        map = Conv(both, m, d)
        mean = GlobalAveragePool(both)
        flat = Flatten(mean)
        logits = Gemm<transB = 1>(flat, w, e)
    }""",
    {
        "k": (16, 3, 3, 3), "b": (16,), "l": (8, 3, 3, 3), "c": (8,),
        "m": (4, 24, 1, 1), "d": (4,), "w": (5, 24), "e": (5,),
    },
)  # fmt: skip
"""Two inputs of one shape, in an order that is not that of their names."""

RECURRENT = filled(
    """net (float[batch, 12, 6] input) => (float[batch, 5] logits) <int64[1] zero = {0}> {
        steps = Transpose<perm = [1, 0, 2]>(input)
        all, last = GRU<hidden_size = 8>(steps, w, r, b)
        state = Squeeze(last, zero)
        logits = Gemm<transB = 1>(state, v, c)
    }""",
    {"w": (1, 24, 6), "r": (1, 24, 8), "b": (1, 48), "v": (5, 8), "c": (5,)},
)


def samples(model: onnx.ModelProto, n: int, seed: int) -> np.ndarray | dict[str, np.ndarray]:
    """Draw normal inputs for a model: an array, or arrays by name if it has several inputs."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        arrays[value.name] = rng.normal(size=(n, *shape)).astype(np.float32)
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))
