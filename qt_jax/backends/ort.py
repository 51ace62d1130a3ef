"""ONNX Runtime on the CPU: the float reference, static QDQ quantization, and dynamic quantization.

Numerics
    Activations are asymmetric uint8, static kernels symmetric int8 or int4. ONNX Runtime builds its
    symmetric grids itself: int8 is [-127, 127] with scale max|w| / 127, int4 is [-8, 7] with scale
    2 max|w| / 15, so that +max|w| saturates to 7. Kernels are always ranged by their maximum; "minmax"
    and "percentile" name how ACTIVATIONS are ranged. "percentile" keeps the central
    `PERCENTILE` percent of the calibration values, half of the rest cut on either side.

    Every session runs with graph optimizations off. The quantized graph is then executed as it is
    written (dequantize, compute in float, requantize), the same on every CPU. With optimizations on, ONNX
    Runtime swaps in integer kernels whose results differ, and saturate on x86 CPUs without VNNI.

    Dynamic quantization ranges each activation over the whole batch it sits in, so that it is run at
    batch 1, as on a device. Its kernels are asymmetric uint8: what ONNX Runtime's ConvInteger takes.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from qt_jax.backends.protocol import Artifact, Scheme
from qt_jax.errors import InvalidInput

PERCENTILE = 99.99
BATCH = 100

FP32 = Scheme("fp32", weight_bits=32, activation_bits=32)

_CALIBRATION = {
    "minmax": (CalibrationMethod.MinMax, {}),
    f"percentile {PERCENTILE}": (
        # ONNX Runtime's default is symmetric: behind a ReLU half of the uint8 grid would stand for nothing.
        CalibrationMethod.Percentile,
        {"CalibPercentile": PERCENTILE, "CalibTensorRangeSymmetric": False},
    ),
}
_WEIGHT_TYPE = {8: QuantType.QInt8, 4: QuantType.QInt4}


def _static_schemes() -> Iterator[Scheme]:
    bits = (("int8", 8), ("int4w", 4))
    for (prefix, weight_bits), method, (granularity, per_channel) in product(
        bits, _CALIBRATION, (("pt", False), ("pc", True))
    ):
        yield Scheme(f"{prefix}-{granularity}-{method.split()[0]}", weight_bits, 8, per_channel, method)


class OnnxRuntime:
    """The `Backend` for ONNX Runtime's CPU provider.

    >>> [scheme.name for scheme in OnnxRuntime().schemes][:3]
    ['fp32', 'int8-pt-minmax', 'int8-pc-minmax']
    """

    name = "onnxruntime"
    vendor = "Microsoft"
    kind = "CPU runtime"
    packages = ("onnxruntime", "onnx", "numpy")
    schemes = (FP32, *_static_schemes(), Scheme("int8-dynamic", 8, 8, per_channel=False, dynamic=True))

    def available(self) -> str | None:
        return None

    def compile(self, model: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> Artifact:
        """As `Backend.compile`. Raises InvalidInput if `model` has not exactly one input, or a static
        scheme is given no calibration images."""
        input_name = single_input(model)
        if scheme == FP32:
            payload = model.SerializeToString()
        else:
            payload = _quantize(model, input_name, calibration, scheme)
        batch = 1 if scheme.dynamic else BATCH
        runtime = f"onnxruntime {onnxruntime.__version__}, CPU, graph optimizations off, batch {batch}"
        return Artifact((payload, batch), len(payload), runtime)

    def run(self, artifact: Artifact, inputs: np.ndarray) -> np.ndarray:
        payload, batch = artifact.payload
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        batches = (inputs[start : start + batch] for start in range(0, len(inputs), batch))
        return np.concatenate([session.run(None, {name: images})[0] for images in batches])


def single_input(model: onnx.ModelProto) -> str:
    """The name of the graph's one input; weights listed among the inputs do not count.

    Raises InvalidInput if there is none, or more than one.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in weights]
    if len(names) != 1:
        raise InvalidInput(
            f"The ONNX model must have exactly one input, found {names}: export the forward alone."
        )
    return names[0]


def _quantize(model: onnx.ModelProto, input_name: str, calibration: np.ndarray, scheme: Scheme) -> bytes:
    """The quantized model, serialised. ONNX Runtime's quantizer works on files: all in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="qt_jax-") as folder, _quiet():
        source, prepared, quantized = (
            Path(folder, f"{stage}.onnx") for stage in ("source", "prepared", "quantized")
        )
        onnx.save(model, source)  # given a ModelProto, the quantizer would move its weights out of it
        # Fuses what is left to fuse and infers shapes: a tensor of unknown shape is not quantized.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        if scheme.dynamic:
            quantize_dynamic(
                prepared, quantized, per_channel=scheme.per_channel, weight_type=QuantType.QUInt8
            )
        else:
            method, options = _CALIBRATION[scheme.calibration]
            quantize_static(
                prepared,
                quantized,
                _CalibrationBatches(input_name, calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=scheme.per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=_WEIGHT_TYPE[scheme.weight_bits],
                calibrate_method=method,
                extra_options={"CalibStridedMinMax": 1, **options},
            )
        return quantized.read_bytes()


class _CalibrationBatches(CalibrationDataReader):
    """Feeds calibration images batch by batch.

    With `CalibStridedMinMax` 1 the quantizer asks for one batch at a time and reduces it to ranges or
    histograms (of either method, whatever the name says) before the next: memory is that of one batch.
    """

    def __init__(self, input_name: str, images: np.ndarray, batch: int = 64):
        if not len(images):
            raise InvalidInput("Static quantization needs calibration images, got none: give a few hundred.")
        self._batches = [{input_name: images[i : i + batch]} for i in range(0, len(images), batch)]
        self.set_range(0, len(self._batches))

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._pending = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._pending, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the quantizer prints, and what it says below ERROR through the root logger."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or "onnxruntime" not in record.pathname

    root = logging.getLogger()
    handler = logging.NullHandler()  # without a handler, logging.warning() would install one for good
    root.addHandler(handler)
    root.addFilter(keep)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(keep)
        root.removeHandler(handler)
