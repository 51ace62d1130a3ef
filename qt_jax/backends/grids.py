"""Emulate in floating point what the conventions of integer grids do to a network.

Toolchains agree on the bits and differ in the grid. Whether a network survives INT4 depends on that as much
as on the bits. Nothing has to be installed to see it, and a scheme takes seconds.

Numerics
    With a = max|w| of a kernel ("pt") or of one of its output channels ("pc"), a weight becomes
    s * clip(round(w / s), q_min, q_max). Rounding is half to even. In a channel of zeros all stay zero.

    name            scale s                         integers        what it does to +a
    int8            a / 127                         [-127, 127]     keeps it
    int4w-narrow    a / 7                           [-7, 7]         keeps it
    int4w-full      a / 7.5                         [-8, 7]         14/15 of it
    int4w-wide      a / 8                           [-8, 7]         7/8 of it
    int4w-po2-up    a / 7, rounded up to 2^k        [-8, 7]         rounds it
    int4w-po2-near  a / 7, rounded to nearest 2^k   [-8, 7]         rounds it, or clips it at 7s > 0.7a
    int8-po2-up     a / 127, rounded up to 2^k      [-128, 127]     rounds it
    int8-po2-near   a / 127, to nearest 2^k         [-128, 127]     rounds it, or clips it at 127s > 0.7a

    The nearest power of two is the nearest exponent. Quotients are taken in float64 from the kernel as it is
    in the graph once batch norms are folded. A weight on the border of two integers is thus found exactly,
    which no float32 scale of a tool ensures.

    What such chips read is on 8 bits too, one grid for each tensor. Its range comes from calibration samples
    (min-max) and is widened to hold zero. Next to power-of-two kernels this grid is symmetric, [-128, 127],
    with its scale max|x| / 127 rounded to a power of two in the same way. Otherwise it is asymmetric, [0,
    255]. A scheme that ends in "-weights" rounds the kernels alone. It tells what the kernels' grid costs,
    and nothing else.

    Rounded are both operands of every Conv, ConvTranspose, Gemm and MatMul, and the input and both kernels of
    every GRU, LSTM and RNN, each direction by itself. Everything else stays in float32: sums, biases,
    pooling, activation functions, the state of a recurrent cell, and layers inside the branches of an If or
    the body of a Loop. Products that stay in float, because they are not float32 or stand in such a branch,
    count as not quantized. "Integer" among the operators means that the operands lie on their grids. The
    arithmetic is always that of float32. A real tool adds its own choices to its grid's, so these rows
    predict no product.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qt_jax.backends.protocol import Batch, Compiled, Refused, Runtime, Scheme, Session, by_name

MODEL = "model.onnx"
RUNTIME = Runtime("onnxruntime", "float arithmetic on rounded operands, all graph optimizations", batch=64)

SMALLEST = float(np.finfo(np.float32).tiny)
"""Least scale of a tensor, so that none becomes zero in float32."""

_OPERANDS = {
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (0, 1)),
    **dict.fromkeys(("GRU", "LSTM", "RNN"), (0, 1, 2)),
}
"""Operator -> positions of the inputs that it multiplies. The first of a recurrent cell is what it reads."""


@dataclass(frozen=True)
class Convention:
    """Describe how a symmetric grid is laid over numbers of which `a` is the largest magnitude.

    Attributes:
      steps: Steps from zero to `a`. The scale is a / steps.
      q_min, q_max: Least and largest integer.
      power_of_two: What the scale is rounded to: "up" for the next power of two, "near" for the nearest, ""
        for no rounding.
    """

    steps: float
    q_min: int
    q_max: int
    power_of_two: str = ""


CONVENTIONS = {
    "int8": Convention(127, -127, 127),
    "int8-po2-up": Convention(127, -128, 127, "up"),
    "int8-po2-near": Convention(127, -128, 127, "near"),
    "int4w-narrow": Convention(7, -7, 7),
    "int4w-full": Convention(7.5, -8, 7),
    "int4w-wide": Convention(8, -8, 7),
    "int4w-po2-up": Convention(7, -8, 7, "up"),
    "int4w-po2-near": Convention(7, -8, 7, "near"),
}
"""Grids of kernels by name. A scheme adds the granularity, "-pt" or "-pc"."""


def _schemes() -> Iterator[Scheme]:
    """Yield the schemes in the order of tables."""
    granularities = (("pt", False), ("pc", True))
    for convention in CONVENTIONS:
        bits = 4 if convention.startswith("int4w") else 8
        for granularity, per_channel in granularities:
            yield Scheme(f"{convention}-{granularity}", bits, 8, per_channel, "minmax")
        for granularity, per_channel in granularities if bits == 4 else ():
            yield Scheme(f"{convention}-{granularity}-weights", bits, 32, per_channel)


class Grids:
    """Round kernels and the inputs of layers to a convention's grid, and run the float graph.

    >>> [scheme.name for scheme in BACKEND.schemes if "wide" in scheme.name]
    ['int4w-wide-pt', 'int4w-wide-pc', 'int4w-wide-pt-weights', 'int4w-wide-pc-weights']
    """

    name = "grids"
    vendor = "conventions"
    stands_for = (
        "what a grid's convention does to a network (max/7, max/7.5, max/8, powers of two); no product"
    )
    kind = "emulated convention"
    environment = None
    packages = ("onnxruntime", "onnx", "numpy")
    schemes = tuple(_schemes())
    runtimes = (RUNTIME,)
    leaves_float = True

    def available(self) -> str | None:
        return None

    def compile(
        self,
        source: Path,
        calibration: Batch,
        scheme: Scheme,
        folder: Path,
        float_layers: Sequence[str] = (),
    ) -> Compiled:
        """Write the float graph with its operands rounded. It keeps its size, so none is told."""
        from qt_jax.export.storage import save

        model = _folded(source)
        _refuse_unknown(model, float_layers)
        weights_only = scheme.activation_bits == 32
        constants = {tensor.name for tensor in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type in _OPERANDS]
        if weights_only:
            products = [node for node in products if not constants.isdisjoint(_operands(node))]
        reached = [node for node in _float32(products, model) if node.name not in float_layers]
        counts = _operators(model, reached)
        convention = CONVENTIONS[scheme.name.removesuffix("-weights").rpartition("-")[0]]
        read = {name: None for node in reached for name in _operands(node) if name not in constants}
        grids = {}
        if read and not weights_only:
            ranges = _ranges(model, list(read), calibration)
            grids = {name: activation_grid(*ends, convention) for name, ends in ranges.items()}
        _round(model, {_key(node) for node in reached}, convention, bool(scheme.per_channel), grids)
        save(model, folder / MODEL)
        total = len(products) + sum(node.op_type in _OPERANDS for node in _nested(model.graph.node))
        return Compiled(None, counts, products=(len(reached), total))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        import onnx

        from qt_jax.export.sessions import open_session

        session = open_session(onnx.load(folder / MODEL), optimize=True)
        names = [entry.name for entry in session.get_inputs()]

        def run(batch: Batch) -> np.ndarray | Sequence[np.ndarray]:
            outputs = session.run(None, by_name(batch, names))
            return outputs[0] if len(outputs) == 1 else outputs

        return run


BACKEND = Grids()


def scale_of(largest: Any, convention: Convention) -> Any:
    """Return the scale of numbers whose largest magnitude is `largest`; 1 where that is 0. All are float64.

    >>> [float(scale_of(7.5, CONVENTIONS[f"int4w-{name}"])) for name in ("full", "po2-up", "po2-near")]
    [1.0, 2.0, 1.0]
    """
    scale = np.where(largest > 0, largest, convention.steps) / convention.steps
    if not convention.power_of_two:
        return scale
    fraction, exponent = np.frexp(scale)  # fraction in [1/2, 1): log2(scale) = exponent + log2(fraction)
    border = 0.5 if convention.power_of_two == "up" else math.sqrt(0.5)
    return np.ldexp(1.0, exponent - (fraction <= border))


def rounded_kernel(kernel: np.ndarray, largest: np.ndarray, convention: Convention) -> np.ndarray:
    """Round a kernel to its grid.

    Args:
      kernel: float32, any shape.
      largest: float64, the largest magnitude on each grid, in a shape that broadcasts to the kernel's.
      convention: The grid.

    Returns:
      float32 in the kernel's shape.

    >>> kernel = np.float32([-8, -3, 1, 8])
    >>> rounded_kernel(kernel, np.float64(8), CONVENTIONS["int4w-wide"]).tolist()
    [-8.0, -3.0, 1.0, 7.0]
    """
    scale = scale_of(largest, convention)
    if convention.power_of_two:
        quotient = kernel / scale
    else:  # One rounding instead of two, so that halves are met exactly.
        quotient = kernel.astype(np.float64) * convention.steps / np.where(largest > 0, largest, 1)
    return (np.clip(np.rint(quotient), convention.q_min, convention.q_max) * scale).astype(np.float32)


def activation_grid(low: float, high: float, convention: Convention) -> tuple[float, float, float]:
    """Return the scale, the lowest and the highest value of an 8-bit grid for numbers from `low` to `high`.

    >>> activation_grid(-1.0, 254.0, CONVENTIONS["int4w-wide"])
    (1.0, -1.0, 254.0)
    >>> activation_grid(0.0, 127.0, CONVENTIONS["int4w-po2-up"])
    (1.0, -128.0, 127.0)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if convention.power_of_two:
        bytewise = replace(convention, steps=127)
        scale = max(float(scale_of(max(-low, high), bytewise)), SMALLEST)
        return scale, -128 * scale, 127 * scale
    scale = max(float(np.float32((high - low) / 255)), SMALLEST) if high > low else 1.0
    zero_point = float(np.clip(np.rint(-low / scale), 0, 255))
    return scale, -zero_point * scale, (255 - zero_point) * scale


def _operands(node: Any) -> list[str]:
    """Return the names of what a product multiplies."""
    return [node.input[position] for position in _OPERANDS[node.op_type]]


def _folded(source: Path) -> Any:
    """Return the graph as vendors' quantizers see it: constants computed, batch norms folded into kernels.

    ONNX Runtime's basic optimizations do it. They leave products their names, but for the one that would
    make a new Gemm of a MatMul and its Add.
    """
    import onnx
    import onnxruntime

    from qt_jax.export.storage import data_path

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # errors
    options.optimized_model_filepath = "folded.onnx"
    if data_path(source).exists():
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, "folded.onnx.data")
    onnxruntime.InferenceSession(
        source, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return onnx.load("folded.onnx")


def _refuse_unknown(model: Any, float_layers: Sequence[str]) -> None:
    """Raise Refused for a layer that is to stay in float and is not in the graph."""
    names = {node.name for node in model.graph.node}
    unknown = [name for name in float_layers if name not in names]
    if unknown:
        raise Refused(
            f"no node is called {', '.join(unknown)} once constants and batch norms are folded: name a "
            "convolution, a matrix product or a recurrent cell of the graph"
        )


def _float32(products: list[Any], model: Any) -> list[Any]:
    """Return the products that multiply float32 tensors."""
    from onnx import TensorProto

    from qt_jax.export import graph

    types = graph.element_types(model)
    return [
        node
        for node in products
        if {types.get(name) for name in _operands(node)} - {None} == {TensorProto.FLOAT}
    ]


def _ranges(model: Any, tensors: list[str], calibration: Batch) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value of each tensor on the calibration samples.

    The graph itself reduces each tensor to two numbers, so that a batch of all tensors is never held.
    """
    import onnx

    from qt_jax.export.sessions import named_inputs, run_tensors

    arrays = calibration.values() if isinstance(calibration, Mapping) else [calibration]
    if not all(map(len, arrays)):
        raise Refused("activations get their ranges from calibration samples, and there are none: give some")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    ends = {name: (f"{name}/least", f"{name}/largest") for name in tensors}
    for name, outputs in ends.items():
        for operator, output in zip(("ReduceMin", "ReduceMax"), outputs, strict=True):
            watched.graph.node.append(onnx.helper.make_node(operator, [name], [output], keepdims=0))
    names = [name for outputs in ends.values() for name in outputs]
    batches = list(run_tensors(watched, names, named_inputs(watched, calibration), optimize=True))
    ranges = {}
    for name, (least, largest) in ends.items():
        low = min(float(batch[least]) for batch in batches)
        high = max(float(batch[largest]) for batch in batches)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise Refused(
                f"tensor {name} goes from {low} to {high} on the calibration samples: no grid holds that"
            )
        ranges[name] = low, high
    return ranges


def _round(
    model: Any,
    reached: set[str],
    convention: Convention,
    per_channel: bool,
    grids: Mapping[str, tuple[float, float, float]],
) -> None:
    """Put what products multiply on grids, in place.

    Args:
      model: The float graph.
      reached: The products, by `_key`.
      convention: The grid of their kernels.
      per_channel: Whether each output channel has its own scale.
      grids: Scale, lowest and highest value of the tensors that are rounded while the graph runs.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, done, replaced = [], set(), set()
    for node in list(model.graph.node):
        for position in _OPERANDS[node.op_type] if _key(node) in reached else ():
            name = node.input[position]
            if name in tensors:
                kernel = numpy_helper.to_array(tensors[name])
                largest = _largest(kernel, node, position, per_channel)
                value = rounded_kernel(kernel, largest, convention)
                node.input[position] = f"{_key(node)}/operand {position}"
                model.graph.initializer.append(numpy_helper.from_array(value, node.input[position]))
                replaced.add(name)
            elif name in grids:
                node.input[position] = f"{name}/rounded"
                if name not in done:
                    done.add(name)
                    nodes += _rounding(name, grids[name], model.graph)
        nodes.append(node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    everything = (*model.graph.node, *_nested(model.graph.node))
    unread = replaced.difference(name for node in everything for name in node.input)
    for name in unread:
        model.graph.initializer.remove(tensors[name])


def _rounding(name: str, grid: tuple[float, float, float], graph: Any) -> list[Any]:
    """Return nodes that clip a tensor to its grid's ends and round it to the grid's steps.

    Their constants are added to `graph`.
    """
    from onnx import helper, numpy_helper

    scale, low, high = parts = [f"{name}/{part}" for part in ("scale", "low", "high")]
    for part, value in zip(parts, grid, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), part))
    clipped, steps, integers = (f"{name}/{part}" for part in ("clipped", "steps", "integers"))
    chain = (
        ("Clip", [name, low, high], clipped),
        ("Div", [clipped, scale], steps),
        ("Round", [steps], integers),
        ("Mul", [integers, scale], f"{name}/rounded"),
    )
    return [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in chain]


def _largest(kernel: np.ndarray, node: Any, position: int, per_channel: bool) -> np.ndarray:
    """Return the largest magnitude on each of a kernel's grids, in a shape that broadcasts to the kernel's.

    A vector has one grid. So has each direction of a recurrent cell where there is one for each kernel.
    """
    magnitudes = np.abs(kernel).astype(np.float64)
    attributes = {entry.name: entry.i for entry in node.attribute}
    if node.op_type == "ConvTranspose" and per_channel:  # (inputs, outputs of a group, ...)
        groups = attributes.get("group", 1)
        parts = magnitudes.reshape(groups, -1, *kernel.shape[1:])
        largest = parts.max(axis=(1, *range(3, parts.ndim)), keepdims=True, initial=0)
        shape = (*parts.shape[:3], *largest.shape[3:])
        return np.broadcast_to(largest, shape).reshape(len(kernel), *shape[2:])
    kept: set[int] = set()
    if node.op_type in ("GRU", "LSTM", "RNN"):
        kept = {0, 1} if per_channel else {0}
    elif per_channel and kernel.ndim > 1:
        kept = {_channel_axis(node.op_type, position, attributes) % kernel.ndim}
    others = tuple(axis for axis in range(kernel.ndim) if axis not in kept)
    return magnitudes.max(axis=others, keepdims=True, initial=0)


def _channel_axis(operator: str, position: int, attributes: Mapping[str, int]) -> int:
    """Return the axis of the output channels in the kernel at a position of a Conv, Gemm or MatMul.

    >>> _channel_axis("Gemm", 1, {"transB": 1}), _channel_axis("MatMul", 0, {})
    (-2, -2)
    """
    if operator == "Conv":
        return 0
    transposed = attributes.get("transB" if position else "transA", 0)
    return -2 if transposed == position else -1


def _operators(model: Any, reached: list[Any]) -> dict[str, dict[str, int]]:
    """Count the operators, with the products in `reached` as integer."""
    keys = {_key(node) for node in reached}
    counts: dict[str, dict[str, int]] = {}
    for node in (*model.graph.node, *_nested(model.graph.node)):
        kinds = counts.setdefault(node.op_type, {"integer": 0, "float": 0})
        kinds["integer" if _key(node) in keys else "float"] += 1
    return counts


def _key(node: Any) -> str:
    """Return what tells a node apart: the name of its first output that has one."""
    return next(filter(None, node.output), "")


def _nested(nodes: Any) -> Iterator[Any]:
    """Yield the nodes of branches and loop bodies, however deep."""
    for node in nodes:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.ByteSize() else ():
                yield from body.node
                yield from _nested(body.node)
