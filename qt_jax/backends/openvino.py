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
    integers and what on dequantized values. The numbers of these schemes are NNCF's, but their speed is not
    an NPU's. Weight-only schemes (int8w, int4w-matmul) store integers and compute in float32. NNCF's 4-bit
    compression only reaches matmuls: convolutions then have asymmetric uint8 kernels.

Surprises
    NNCF corrects a bias only where it is a constant beside its convolution. `Core.read_model` leaves shape
    arithmetic of ONNX between the bias and the convolution, and bias correction then silently does nothing.
    `convert_model`, used here, folds it. The correction named fast may cost many decibels of SQNR, so schemes
    without it are offered too. The fast correction skips a layer if the shift of any channel is twice its
    bias or more, or if any bias is 0. With 4-bit kernels that is often every layer, and the correction then
    changes nothing.
    Importing openvino sends usage telemetry over the network unless CI is "true", which this environment
    sets.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import Compiled, Environment, Refused, Runtime, Scheme, Session

MODEL = "model.xml"
BATCH = 100

_MOVES = {"Const", "Input", "Output", "Reorder", "Reshape", "Transpose"}
"""Layers of the compiled graph that move or hold data and compute nothing."""
_INTEGERS = {"u8", "i8", "u4", "i4"}


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
    schemes = _schemes()
    runtimes = (Runtime("cpu", f"OpenVINO's CPU plugin, float32, batch {BATCH}", batch=BATCH, timed=True),)

    def available(self) -> str | None:
        return None

    def compile(self, source: Path, calibration: np.ndarray, scheme: Scheme, folder: Path) -> Compiled:
        """Quantize with NNCF and save `model.xml` with its `model.bin`, which OpenVINO deploys."""
        import openvino

        model = _read(source)
        if scheme.name in _STATIC:
            model = _quantize(model, calibration, _STATIC[scheme.name])
        elif scheme.name in _WEIGHT_ONLY:
            model = _compress(model, **_WEIGHT_ONLY[scheme.name])
        openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        size = sum(file.stat().st_size for file in (folder / MODEL, (folder / MODEL).with_suffix(".bin")))
        return Compiled(size, _operators(_compile_for_cpu(folder).get_runtime_model()))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        compiled = _compile_for_cpu(folder)

        def session(images: np.ndarray) -> np.ndarray:
            return compiled(images)[0].copy()  # the next call overwrites it

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
    return " ".join(kept or message.split())[:300]


def _quantize(model: Any, calibration: np.ndarray, settings: _Static) -> Any:
    """Quantize weights and activations with NNCF."""
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
    return nncf.quantize(
        model,
        nncf.Dataset(range(len(calibration)), lambda i: np.array(calibration[i : i + 1])),
        subset_size=len(calibration),
        preset=nncf.QuantizationPreset[_PRESETS[settings.preset]],
        target_device=nncf.TargetDevice.ANY if plain else nncf.TargetDevice.NPU,
        fast_bias_correction=settings.bias == "fast",
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=getattr(RangeEstimatorParametersSet, _RANGES[settings.ranges]),
            disable_bias_correction=settings.bias == "uncorrected",
            **bits,
        ),
    )


def _compress(model: Any, mode: str, **settings: Any) -> Any:
    """Quantize only the weights with NNCF."""
    import nncf

    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **settings)


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
