"""Run ONNX Runtime on the CPU: the float reference, and static, dynamic and weight-only quantization.

Numerics
    Scheme names: "int8" has asymmetric uint8 activations and symmetric int8 kernels (U8S8). "int8-s8s8" has
    symmetric int8 for both, which is what TensorRT expects. "pt" and "pc" mean one scale per kernel and one
    per output channel. ONNX Runtime builds its symmetric grids itself: int8 is [-127, 127] with scale max|w|
    / 127; int4 is [-8, 7] with scale 2 max|w| / 15, so that +max|w| saturates to 7. "int4w-narrow" has the
    grid of NNCF and tpu-mlir, [-7, 7] with scale max|w| / 7: ONNX Runtime's quantizer is given these scales
    as its `TensorQuantOverrides`, and rounds and writes the graph itself. The range of a kernel is always its
    maximum. "minmax", "entropy" and "percentile" name the method that finds the ranges of ACTIVATIONS.
    "percentile" keeps the central `PERCENTILE` percent of the calibration values and cuts half of the rest on
    either side.

    "qop" writes QLinearConv and its like (QOperator) where the other schemes write QuantizeLinear and
    DequantizeLinear pairs (QDQ). "int4w-blocks" stores only the kernels of matmuls on 4 bits, with one scale
    for each 32 weights (MatMulNBits). Convolutions stay float.

    A graph and what executes it are two things, so there are two runtimes. "reference" has graph
    optimizations off. It executes the graph as it is written (dequantize, compute in float, requantize), the
    same on every CPU. "optimized" is what ships: ONNX Runtime fuses and swaps in integer kernels, whose
    results differ, and which saturate on x86 CPUs without VNNI.

    Dynamic quantization finds the range of an activation over the whole batch. It is therefore run at batch
    1, as on a device. Its kernels are asymmetric uint8, which ONNX Runtime's ConvInteger takes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from qt_jax.backends.protocol import (
    ONNX_PRODUCTS,
    Batch,
    Compiled,
    Refused,
    Runtime,
    Scheme,
    Session,
    by_name,
)

PERCENTILE = 99.99
MODEL = "model.onnx"
BLOCK = 32
"""Weights that share one scale in "int4w-blocks"."""

FP32 = Scheme("fp32", weight_bits=32, activation_bits=32, number_format="float")
REFERENCE = Runtime("reference", "graph optimizations off", batch=100)
OPTIMIZED = Runtime("optimized", "all graph optimizations", batch=100, timed=True)
BLOCKS = Scheme("int4w-blocks", 4, 32, per_channel=True, layers="matmul")
DYNAMIC = Scheme("int8-dynamic", 8, 8, per_channel=False, dynamic=True)

_KERNEL_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}
"""The axis of a kernel's output channels as ONNX Runtime takes it; 0 for a Gemm with transB."""
_PRODUCTS = ONNX_PRODUCTS | {"Einsum"}
"""Operators of a float graph that multiply their first two inputs."""
_INTEGER_PRODUCTS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulNBits"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"),
)
"""Operators of a quantized graph that multiply by quantized kernels."""
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_CALIBRATIONS = {"minmax": "minmax", "percentile": f"percentile {PERCENTILE}", "entropy": "entropy"}


def _static_schemes() -> Iterator[Scheme]:
    """Yield the schemes that calibrate, in the order of tables."""
    granularities = (("pt", False), ("pc", True))
    methods_of = {
        "int8": _CALIBRATIONS,
        "int8-s8s8": _CALIBRATIONS,
        "int4w": ("minmax", "percentile"),
        "int4w-narrow": ("minmax",),
    }
    for prefix, methods in methods_of.items():
        for method, (granularity, per_channel) in product(methods, granularities):
            weight_bits = 4 if prefix.startswith("int4w") else 8
            name = f"{prefix}-{granularity}-{method}"
            yield Scheme(name, weight_bits, 8, per_channel, _CALIBRATIONS[method])
    yield Scheme("int8-qop-pc-minmax", 8, 8, True, "minmax")
    yield Scheme("int8-qop-s8s8-pc-minmax", 8, 8, True, "minmax")
    yield Scheme("int16act-pc-minmax", 8, 16, True, "minmax")


class OnnxRuntime:
    """Run ONNX Runtime's CPU provider.

    >>> [scheme.name for scheme in BACKEND.schemes][:3]
    ['fp32', 'int8-pt-minmax', 'int8-pc-minmax']
    """

    name = "onnxruntime"
    vendor = "Microsoft"
    stands_for = "CPUs from phones to servers; int8-s8s8-pc is the grid TensorRT takes"
    kind = "CPU runtime"
    environment = None
    packages = ("onnxruntime", "onnx", "numpy")
    leaves_float = True
    schemes = (FP32, *_static_schemes(), DYNAMIC, BLOCKS)
    runtimes = (REFERENCE, OPTIMIZED)

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
        """Quantize with ONNX Runtime's own quantizer. Static schemes need calibration images."""
        import onnx

        from qt_jax.export.storage import save, stored_size

        target = folder / MODEL
        if scheme == FP32:
            save(onnx.load(source), target)
        elif scheme == BLOCKS:
            _quantize_blocks(source, target, float_layers)
        else:
            _quantize(source, target, calibration, scheme, float_layers)
        return Compiled(stored_size(target), _operators(target), products=count_products(target))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        session = _session(folder / MODEL, optimize=runtime == OPTIMIZED)
        names = [entry.name for entry in session.get_inputs()]

        def run(batch: Batch) -> np.ndarray | list[np.ndarray]:
            found = session.run(None, by_name(batch, names))
            return found[0] if len(found) == 1 else found

        return run


BACKEND = OnnxRuntime()


def _session(path: Path, optimize: bool, optimized_path: str = "") -> Any:
    """Open a graph, with all graph optimizations or none, and write the optimized graph if asked."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = 3  # errors
    # On x86 ONNX Runtime leaves int8 activations in float unless it is told that they may stay.
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    if optimized_path:
        options.optimized_model_filepath = optimized_path
        weights = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(weights, f"{optimized_path}.data")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _quantize(
    source: Path, target: Path, calibration: Batch, scheme: Scheme, float_layers: Sequence[str]
) -> None:
    """Write the graph of a static or dynamic scheme."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from qt_jax.export.storage import data_path

    prepared = Path("prepared.onnx")
    large = data_path(source).exists()
    # It fuses what is left to fuse and infers shapes. A tensor of unknown shape would not be quantized.
    quant_pre_process(
        source,
        prepared,
        skip_symbolic_shape=True,
        save_as_external_data=large,
        all_tensors_to_one_file=True,
        external_data_location=data_path(prepared).name,
    )
    _flatten_biases(prepared)
    check_names(prepared, float_layers)
    if scheme.dynamic:
        quantize_dynamic(
            prepared,
            target,
            nodes_to_exclude=list(float_layers),
            per_channel=scheme.per_channel,
            weight_type=QuantType.QUInt8,
            use_external_data_format=large,
        )
        return
    names, batch = _inputs(prepared)
    arrays = by_name(calibration, names)
    if not len(arrays[names[0]]):
        raise Refused("static quantization needs calibration images, got none: give a few hundred")
    method, options = _method(scheme)
    symmetric = "s8s8" in scheme.name or scheme.activation_bits == 16
    signed = {8: QuantType.QInt8, 16: QuantType.QInt16}[scheme.activation_bits]
    extra = {
        "ActivationSymmetric": symmetric,
        "UseQDQContribOps": scheme.activation_bits == 16,
        "CalibStridedMinMax": 1,
        "TensorQuantOverrides": _narrow(prepared, bool(scheme.per_channel))
        if "narrow" in scheme.name
        else {},
        **options,
    }
    quantize_static(
        prepared,
        target,
        _reader(arrays, batch),
        nodes_to_exclude=list(float_layers),
        use_external_data_format=large,
        quant_format=QuantFormat.QOperator if "qop" in scheme.name else QuantFormat.QDQ,
        per_channel=scheme.per_channel,
        activation_type=signed if symmetric else QuantType.QUInt8,
        weight_type={8: QuantType.QInt8, 4: QuantType.QInt4}[scheme.weight_bits],
        calibrate_method=method,
        extra_options=extra,
    )


def _flatten_biases(path: Path) -> None:
    """Write the bias of each Gemm at `path` as one axis.

    The fusion of MatMul and Add leaves (1, channels), which ONNX Runtime's quantizer takes for one channel.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    biases = {node.input[2] for node in model.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    wide = [
        it for it in model.graph.initializer if it.name in biases and len(it.dims) == 2 and it.dims[0] == 1
    ]
    for tensor in wide:
        del tensor.dims[0]
    if wide:
        onnx.save(model, path)


def _narrow(source: Path, per_channel: bool) -> dict[str, list[dict]]:
    """Return `TensorQuantOverrides` that give every kernel of the graph the scale max|w| / 7.

    With `per_channel` each channel has its own scale, along the axis that ONNX Runtime takes by itself.
    """
    import onnx

    graph = onnx.load(source).graph
    kernels = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    overrides = {}
    for node in graph.node:
        if node.op_type not in _KERNEL_AXIS or node.input[1] not in kernels:
            continue
        transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
        axis = 0 if transposed else _KERNEL_AXIS[node.op_type]
        kernel = np.abs(kernels[node.input[1]])
        channels = np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis] if per_channel else 1, -1)
        largest = channels.max(axis=1)
        scales = np.where(largest > 0, largest / 7, 1).astype(kernel.dtype)
        entries = [{"scale": scale, "zero_point": 0} for scale in scales]
        if per_channel:
            entries[0]["axis"] = axis
        overrides[node.input[1]] = entries
    return overrides


def _method(scheme: Scheme) -> tuple[Any, dict[str, Any]]:
    """Return ONNX Runtime's calibration method and its options."""
    from onnxruntime.quantization import CalibrationMethod

    name = (scheme.calibration or "").partition(" ")[0]
    if name == "percentile":
        # The default is symmetric, which would waste half of the uint8 grid behind a ReLU.
        symmetric = "s8s8" in scheme.name
        options = {"CalibPercentile": PERCENTILE, "CalibTensorRangeSymmetric": symmetric}
        return CalibrationMethod.Percentile, options
    return {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}[name], {}


def check_names(path: Path, names: Sequence[str]) -> None:
    """Raise Refused if the graph at `path` has no node of one of these names."""
    import onnx

    present = {node.name for node in onnx.load(path, load_external_data=False).graph.node} if names else set()
    if lost := [name for name in names if name not in present]:
        raise Refused(f"the nodes {', '.join(lost)} are not there any more once the graph is prepared")


def _inputs(path: Path) -> tuple[list[str], int]:
    """Return the names of the graph's inputs, and how many images to give it at once."""
    import onnx

    inputs = onnx.load(path, load_external_data=False).graph.input
    return [entry.name for entry in inputs], inputs[0].type.tensor_type.shape.dim[0].dim_value or 64


def _reader(arrays: Mapping[str, np.ndarray], batch: int) -> Any:
    """Return a reader that feeds calibration images batch by batch.

    With `CalibStridedMinMax` 1 the quantizer asks for one batch at a time and reduces it to ranges or
    histograms before the next. This holds for every method, whatever the option's name says. The memory is
    that of one batch.
    """
    from onnxruntime.quantization import CalibrationDataReader

    n = len(next(iter(arrays.values())))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.set_range(0, len(self))

        def __len__(self) -> int:
            return -(-n // batch)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._pending = iter(range(start_index * batch, min(end_index * batch, n), batch))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self._pending, None)
            if start is None:
                return None
            return {name: array[start : start + batch] for name, array in arrays.items()}

    return Reader()


def _quantize_blocks(source: Path, target: Path, float_layers: Sequence[str]) -> None:
    """Write the graph with the kernels of matmuls in 4-bit blocks.

    MatMulNBits only takes MatMul, so a Gemm first becomes MatMul and Add.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    from qt_jax.export.storage import save

    model = onnx.load(source)
    check_names(source, float_layers)
    nodes = [
        part
        for node in model.graph.node
        for part in ([node] if node.name in float_layers else _without_gemm(node, model.graph))
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    quantizer = MatMulNBitsQuantizer(
        model, bits=4, block_size=BLOCK, is_symmetric=True, nodes_to_exclude=list(float_layers)
    )
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        raise Refused("the graph has no matmul with a constant kernel, and 4-bit blocks reach nothing else")
    save(quantizer.model.model, target)


def _without_gemm(node: Any, graph: Any) -> list[Any]:
    """Return `node`, or the MatMul and the Add that replace a plain Gemm with a constant kernel."""
    from onnx import helper, numpy_helper

    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    kernels = [
        tensor for tensor in graph.initializer if node.op_type == "Gemm" and tensor.name == node.input[1]
    ]
    scaled = attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0
    if not kernels or scaled or attributes.get("transA"):
        return [node]
    kernel = numpy_helper.to_array(kernels[0])
    name = f"{kernels[0].name}/columns"
    columns = np.ascontiguousarray(kernel.T if attributes.get("transB") else kernel)
    graph.initializer.append(numpy_helper.from_array(columns, name))
    biased = len(node.input) == 3
    middle = f"{node.output[0]}/product" if biased else node.output[0]
    parts = [helper.make_node("MatMul", [node.input[0], name], [middle], name=f"{node.name}/MatMul")]
    if biased:
        parts.append(
            helper.make_node("Add", [middle, node.input[2]], [node.output[0]], name=f"{node.name}/Add")
        )
    return parts


def count_products(path: Path) -> tuple[int, int]:
    """Return how many products of a graph multiply by quantized kernels, and how many products there are.

    A product in float counts as quantized if both factors come from a DequantizeLinear. Those in subgraphs,
    of an If or a Loop, stay in float. What ONNX Runtime executes on integers is told by `operators`.
    """
    import onnx

    quantized = total = 0
    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}

    def on_grid(name: str) -> bool:
        node = makers.get(name)
        while node is not None and node.op_type in _MOVES:
            node = makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    for node in graph.node:
        integer = node.op_type in _INTEGER_PRODUCTS
        if integer or node.op_type in _PRODUCTS:
            total += 1
            quantized += integer or all(on_grid(name) for name in node.input[:2])
        total += sum(inner.op_type in _PRODUCTS for inner in _nested(node))
    return quantized, total


def _nested(node: Any) -> Iterator[Any]:
    """Yield the nodes of a node's subgraphs."""
    for item in node.attribute:
        for graph in (item.g, *item.graphs):
            for inner in graph.node:
                yield inner
                yield from _nested(inner)


def _operators(path: Path) -> Mapping[str, Mapping[str, int]]:
    """Count the operators of the optimized graph. Those that take quantized tensors count as integer."""
    import onnx

    optimized = "optimized.onnx"
    with contextlib.suppress(FileNotFoundError):
        Path(optimized).unlink()
    _session(path, optimize=True, optimized_path=optimized)
    quantized: set[str] = set()
    counts: dict[str, dict[str, int]] = {}
    for node in onnx.load(optimized, load_external_data=False).graph.node:
        if node.op_type == "DequantizeLinear":
            continue
        native = node.op_type.startswith(("QLinear", "QGemm", "QAttention")) or "Integer" in node.op_type
        reads_integers = bool(node.input) and node.input[0] in quantized
        if node.op_type == "QuantizeLinear" or reads_integers or node.op_type.startswith("QLinear"):
            quantized.update(node.output)
        if node.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
            kinds = counts.setdefault(node.op_type, {"integer": 0, "float": 0})
            kinds["integer" if native or reads_integers else "float"] += 1
    return counts
