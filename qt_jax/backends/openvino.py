"""Run Intel OpenVINO: NNCF's post-training quantizer, executed by OpenVINO's CPU plugin.

Numerics
    Kernels are symmetric, with one scale per output channel ("pc") or one per kernel ("pt"). int8 is on
    [-127, 127] with scale max|w| / 127. The first convolution is limited to [-63, 63], NNCF's protection
    against the saturating u8 x s8 sums of x86 CPUs without VNNI. NNCF applies it on every CPU. int4 has 16
    levels, [-8, 7], but its scale is max|w| / 7, so that -8 never occurs: the grid is [-7, 7]. A channel
    whose max|w| is below 1 % of the largest channel's gets the scale of that 1 %. Activations have one grid
    per tensor, of 2^bits levels:

    ====  ================================================================================================
    sym   NNCF's preset PERFORMANCE. Unsigned on [0, a] where calibration saw no negative value, else signed
          on [-a 2^(b-1) / (2^(b-1) - 1), a]; a is the largest |x|
    asym  NNCF's preset MIXED: affine between both extremes where there are negative values, else as above
    ====  ================================================================================================

    Behind a ReLU the two are the same. "mean" is NNCF's default: the mean, over images, of each image's
    extremes, so that values beyond it saturate. "minmax" takes the extremes of all images. "histogram"
    minimizes the error of quantization on a histogram. Biases are then corrected for the shift of the mean in
    one of three ways: "fast", the default; "accurate", NNCF's slower algorithm
    (`fast_bias_correction=False`); or "uncorrected", not at all.

    For int4w and int16act NNCF targets the NPU, the only target that allows 4-bit kernels. (For
    INT8 the targets ANY, CPU, GPU and NPU gave the same model.) `operators` tells what the CPU computes on
    integers and what on dequantized values. `products` tells what NNCF put on the scheme's grid, however it
    is computed. The numbers of these schemes are NNCF's, but their speed is not an NPU's. Weight-only schemes
    (int8w, int4w-matmul) store integers and compute in float32. NNCF's 4-bit compression only reaches
    matmuls: convolutions then have asymmetric uint8 kernels.

Surprises
    NNCF corrects a bias only where it is a constant beside its convolution. `Core.read_model` leaves shape
    arithmetic of ONNX between the bias and the convolution, and bias correction then silently does nothing.
    `convert_model`, used here, folds it. The correction named fast may cost many decibels of SQNR, so schemes
    without it are offered too. The fast correction skips a layer if the shift of any channel is twice its
    bias or more, or if any bias is 0. With 4-bit kernels that is often every layer, and the correction then
    changes nothing.
    NNCF's static schemes also quantize the weights of a recurrent cell, and the CPU plugin then refuses a
    GRU: leave it in float. An LSTM runs, but a small one gave 2 dB. NNCF puts neither a cell nor the table of
    an embedding (Gather) on 4 bits, and refuses the graph.
    Importing openvino sends usage telemetry over the network unless CI is "true", which this environment
    sets.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import (
    ONNX_PRODUCTS,
    Batch,
    Compiled,
    Environment,
    Refused,
    Runtime,
    Scheme,
    Session,
)

MODEL = "model.xml"
BATCH = 100

_MOVES = {"Const", "Input", "Output", "Reorder", "Reshape", "Transpose"}
"""Layers of the compiled graph that move or hold data and compute nothing."""
_INTEGERS = {"u8", "i8", "u4", "i4"}
_CONVOLUTIONS = (
    "Convolution",
    "GroupConvolution",
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
)
_OPERANDS: dict[str, tuple[int, ...]] = dict.fromkeys((*_CONVOLUTIONS, "MatMul"), (0, 1)) | {
    "GRUSequence": (0, 3, 4),
    "RNNSequence": (0, 3, 4),
    "LSTMSequence": (0, 4, 5),
}
"""Operations that multiply -> their inputs that do: activations, then weights."""
_PASSES = {
    *("Convert", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool"),
    *("StridedSlice", "Slice", "Split", "VariadicSplit"),
}
"""Operations behind which a tensor is still on the grid of their first input."""


class _Static(NamedTuple):
    """Choose the arguments of `nncf.quantize`, in the words of a scheme's name."""

    preset: str
    ranges: str
    bias: str = "fast"
    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True


_PRESETS = {"sym": "PERFORMANCE", "asym": "MIXED"}
_RANGES = {"mean": "MEAN_MINMAX", "minmax": "MINMAX", "histogram": "HISTOGRAM"}
"""Words of a scheme's name -> NNCF's own."""
_CALIBRATIONS = {"mean": "mean of each image's extremes", "minmax": "minmax", "histogram": "histogram"}
_BIASES = {
    "fast": "fast bias correction",
    "accurate": "accurate bias correction",
    "uncorrected": "no bias correction",
}
"""Words of a scheme's name -> how a record calls the calibration."""

_STATIC = {
    "int8-pc-sym-mean": _Static("sym", "mean"),
    "int8-pc-asym-mean": _Static("asym", "mean"),
    "int8-pc-sym-mean-accurate": _Static("sym", "mean", "accurate"),
    "int8-pc-sym-minmax": _Static("sym", "minmax"),
    "int8-pc-asym-minmax": _Static("asym", "minmax"),
    "int8-pc-sym-minmax-accurate": _Static("sym", "minmax", "accurate"),
    "int8-pc-asym-minmax-accurate": _Static("asym", "minmax", "accurate"),
    "int8-pc-sym-minmax-uncorrected": _Static("sym", "minmax", "uncorrected"),
    "int8-pc-asym-histogram": _Static("asym", "histogram"),
    "int4w-pc-sym-mean": _Static("sym", "mean", weight_bits=4),
    "int4w-pc-sym-minmax": _Static("sym", "minmax", weight_bits=4),
    "int4w-pc-sym-minmax-accurate": _Static("sym", "minmax", "accurate", weight_bits=4),
    "int4w-pt-sym-mean": _Static("sym", "mean", weight_bits=4, per_channel=False),
    "int4w-pt-sym-minmax": _Static("sym", "minmax", weight_bits=4, per_channel=False),
    "int4w-pt-sym-minmax-accurate": _Static("sym", "minmax", "accurate", weight_bits=4, per_channel=False),
    "int4w-int16act-pc-sym-minmax-accurate": _Static("sym", "minmax", "accurate", 4, 16),
    "int16act-pc-sym-minmax-accurate": _Static("sym", "minmax", "accurate", activation_bits=16),
}
_WEIGHT_ONLY: dict[str, dict[str, Any]] = {
    "int8w-pc-sym": {"mode": "INT8_SYM"},
    "int8w-pc-asym": {"mode": "INT8_ASYM"},
    "int4w-matmul-pc-sym": {"mode": "INT4_SYM", "ratio": 1.0, "group_size": -1, "all_layers": True},
    "int4w-matmul-pc-asym": {"mode": "INT4_ASYM", "ratio": 1.0, "group_size": -1, "all_layers": True},
}
"""Scheme -> arguments of `nncf.compress_weights`."""


def _schemes() -> tuple[Scheme, ...]:
    """Return the schemes of `_STATIC` and `_WEIGHT_ONLY`, the float one first."""
    static = (
        Scheme(
            name,
            s.weight_bits,
            s.activation_bits,
            s.per_channel,
            f"{_CALIBRATIONS[s.ranges]}, {_BIASES[s.bias]}",
        )
        for name, s in _STATIC.items()
    )
    stored = (
        Scheme(name, int(name[3]), 32, True, layers="matmul" if "matmul" in name else "all")
        for name in _WEIGHT_ONLY
    )
    return (Scheme("fp32", 32, 32, number_format="float"), *static, *stored)


class OpenVINO:
    """Run OpenVINO's CPU plugin. Float layers stay float32, and results do not depend on the batch.

    >>> [scheme.name for scheme in BACKEND.schemes][:3]
    ['fp32', 'int8-pc-sym-mean', 'int8-pc-asym-mean']
    >>> BACKEND.schemes[1].calibration
    "mean of each image's extremes, fast bias correction"
    """

    name = "openvino"
    vendor = "Intel"
    stands_for = "Intel CPUs, and NNCF's models for Intel GPUs and NPUs"
    kind = "CPU runtime"
    environment = Environment(
        name="openvino",
        python="3.11",
        requirements=("openvino==2026.4.1", "nncf==3.4.0", "onnx==1.21.0", "numpy==2.1.3"),
        megabytes=485,
        licence="Apache-2.0 (openvino, nncf)",
        variables={"CI": "true", "NNCF_CI": "1"},  # no telemetry from either
    )
    packages = ("openvino", "nncf", "onnx", "numpy")
    leaves_float = True
    schemes = _schemes()
    runtimes = (Runtime("cpu", f"OpenVINO's CPU plugin, float32, batch {BATCH}", batch=BATCH, timed=True),)

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
        """Quantize with NNCF and save `model.xml` with its `model.bin`, which OpenVINO deploys."""
        import openvino

        model = _read(source)
        ignored = _ignored(model, source, float_layers)
        products = None
        if scheme.name in _STATIC:
            model = _quantize(model, calibration, _STATIC[scheme.name], ignored)
            products = _products(model, weights_only=False)
        elif scheme.name in _WEIGHT_ONLY:
            model = _compress(model, ignored, **_WEIGHT_ONLY[scheme.name])
            products = _products(model, weights_only=True)
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        size = sum(file.stat().st_size for file in (folder / MODEL, (folder / MODEL).with_suffix(".bin")))
        try:
            executed = _compile_for_cpu(folder).get_runtime_model()
        except RuntimeError as error:
            raise Refused(f"OpenVINO's CPU plugin: {brief(str(error))}") from error
        return Compiled(size, _operators(executed), products=products)

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        compiled = _compile_for_cpu(folder)

        def session(batch: Batch) -> list[np.ndarray]:
            results = compiled(dict(batch) if isinstance(batch, Mapping) else batch)
            return [results[i].copy() for i in range(len(compiled.outputs))]  # the next call overwrites them

        return session


BACKEND = OpenVINO()


def _read(source: Path) -> Any:
    """Read an ONNX file. Raises Refused if OpenVINO does not take it."""
    import openvino

    try:
        return openvino.convert_model(source)
    except Exception as error:
        raise Refused(brief(str(error))) from error


def brief(message: str) -> str:
    """Return the lines of an OpenVINO error that say something, without places in its sources and separators.

    >>> brief("Check 'x' failed at src/onnx.cpp:10:\\nFrontEnd API failed:\\nNo conversion for: Foo\\n")
    'FrontEnd API failed: No conversion for: Foo'
    """
    lines = (line.strip() for line in message.splitlines())
    kept = [line for line in lines if line and ".cpp:" not in line and line != "[ ERROR ]"]
    return " ".join(" ".join(kept or [message]).split())[:300]


def _ignored(model: Any, source: Path, float_layers: Sequence[str]) -> list[str]:
    """Return the names of the operations that OpenVINO made of the ONNX nodes `float_layers`.

    An operation has the name of its ONNX node. Of a convolution or matmul with a bias, the addition has that
    name, and the product has a suffix. What writes an output of the graph has the name of the output. Other
    nodes than products may be gone, because OpenVINO has fused or folded them.
    """
    import onnx

    if not float_layers:
        return []
    graph = onnx.load(source).graph
    nodes = {node.name: node for node in graph.node}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    ignored: list[str] = []
    for layer in float_layers:
        node = nodes.get(layer)
        found = [
            operation.get_friendly_name()
            for operation in model.get_ordered_ops()
            if operation.get_type_name() not in ("Constant", "Result")
            and (
                operation.get_friendly_name() in (layer, f"{layer}/WithoutBiases")
                or (node is not None and _computes(operation, node, weights))
            )
        ]
        if not found and (node is None or node.op_type in ONNX_PRODUCTS):
            raise Refused(f"OpenVINO has no operation under the name of the node {layer!r}")
        ignored += found
    return list(dict.fromkeys(ignored))


def _computes(operation: Any, node: Any, weights: Mapping[str, Any]) -> bool:
    """Tell whether an operation writes a tensor of an ONNX node, or is the recurrent cell with its weights.

    OpenVINO gives a cell a name of its own, and orders its gates in its own way.
    """
    from onnx import numpy_helper

    if any(set(node.output) & output.get_names() for output in operation.outputs()):
        return True
    if operation.get_type_name() != f"{node.op_type}Sequence" or node.input[2] not in weights:
        return False
    constant = operation.input(_OPERANDS[operation.get_type_name()][-1]).get_source_output().get_node()
    recurrent = numpy_helper.to_array(weights[node.input[2]])
    return constant.get_type_name() == "Constant" and np.array_equal(
        np.sort(constant.data, axis=None), np.sort(recurrent, axis=None)
    )


def _quantize(model: Any, calibration: Batch, settings: _Static, ignored: list[str]) -> Any:
    """Quantize weights and activations with NNCF, except those of the operations `ignored`."""
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    plain = settings.weight_bits == settings.activation_bits == 8
    bits = (
        {}
        if plain
        else {
            "weights_quantization_params": QuantizationParameters(
                num_bits=settings.weight_bits, per_channel=settings.per_channel
            ),
            "activations_quantization_params": QuantizationParameters(num_bits=settings.activation_bits),
        }
    )
    count = len(next(iter(calibration.values())) if isinstance(calibration, Mapping) else calibration)
    try:
        return nncf.quantize(
            model,
            nncf.Dataset(range(count), lambda i: _sample(calibration, i)),
            subset_size=count,
            preset=nncf.QuantizationPreset[_PRESETS[settings.preset]],
            target_device=nncf.TargetDevice.ANY if plain else nncf.TargetDevice.NPU,
            fast_bias_correction=settings.bias == "fast",
            ignored_scope=_scope(ignored),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=getattr(
                    RangeEstimatorParametersSet, _RANGES[settings.ranges]
                ),
                disable_bias_correction=settings.bias == "uncorrected",
                **bits,
            ),
        )
    except (ValueError, nncf.ValidationError) as error:
        raise Refused(f"NNCF: {brief(str(error))}") from error


def _sample(calibration: Batch, i: int) -> Any:
    """Return sample i as a batch of one, by input name if there are several inputs."""
    if isinstance(calibration, Mapping):
        return {name: np.array(values[i : i + 1]) for name, values in calibration.items()}
    return np.array(calibration[i : i + 1])


def _scope(ignored: list[str]) -> Any:
    """Return NNCF's scope of operations that stay in float; None if all may be quantized."""
    import nncf

    return nncf.IgnoredScope(names=ignored) if ignored else None


def _compress(model: Any, ignored: list[str], mode: str, **settings: Any) -> Any:
    """Quantize only the weights with NNCF, except those of the operations `ignored`."""
    import nncf

    scope = _scope(ignored)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], ignored_scope=scope, **settings)


def _products(model: Any, weights_only: bool) -> tuple[int, int]:
    """Count the convolutions, matmuls and recurrent cells of a quantized model that are on the grid, and all.

    One is on the grid if each of its operands comes from a FakeQuantize or is a compressed constant. With
    `weights_only` that is asked of its weights, and products of two activations are not counted.
    """
    quantized = total = 0
    for operation in model.get_ordered_ops():
        operands = [operation.input(i) for i in _OPERANDS.get(operation.get_type_name(), ())]
        if weights_only:
            operands = [operand for operand in operands if _origin(operand).get_type_name() == "Constant"]
        if operands:
            total += 1
            quantized += all(map(_on_grid, operands))
    return quantized, total


def _on_grid(operand: Any) -> bool:
    """Tell whether a tensor comes from FakeQuantize only, or is a constant stored as integers."""
    origin = _origin(operand)
    if origin.get_type_name() == "Concat":
        return all(map(_on_grid, origin.inputs()))
    return origin.get_type_name() == "FakeQuantize" or _is_stored(origin)


def _origin(operand: Any) -> Any:
    """Return the operation that made a tensor, before it was moved, or unpacked from a stored constant."""
    operation = operand.get_source_output().get_node()
    if operation.get_type_name() in _PASSES:
        return _origin(operation.input(0))
    if operation.get_type_name() in ("Multiply", "Subtract"):  # (q - z) s
        behind = _origin(operation.input(0))
        return behind if _is_stored(behind) else operation
    return operation


def _is_stored(operation: Any) -> bool:
    """Tell whether an operation is a constant of integers."""
    return operation.get_type_name() == "Constant" and (operation.get_element_type().to_string() in _INTEGERS)


def _compile_for_cpu(folder: Path) -> Any:
    """Load what was compiled into the CPU plugin, in float32 where it is not quantized."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    return openvino.Core().compile_model(folder / MODEL, "CPU", settings)


def _operators(runtime_model: Any) -> dict[str, dict[str, int]]:
    """Count the layers that compute, by the type they read.

    For compressed weights the plugin reports their precision as that of the layer, although it computes in
    float.
    """
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"integer": 0, "float": 0})
    for layer in runtime_model.get_ordered_ops():
        kind = layer.get_rt_info()["layerType"].astype(str)
        if kind not in _MOVES:
            integer = layer.input(0).get_element_type().to_string() in _INTEGERS
            counts[kind]["integer" if integer else "float"] += 1
    return {kind: dict(count) for kind, count in counts.items()}
