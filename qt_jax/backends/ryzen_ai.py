"""Run AMD's Quark, the ONNX quantizer of Ryzen AI, in its default configurations, emulated by ONNX Runtime.

Numerics
    Quark quantizes for the NPUs of Ryzen AI (XDNA). Its graph runs here on the CPU as it is written:
    quantize, dequantize, compute in float32, with ONNX Runtime's optimizations off. The arithmetic of an NPU
    may differ. Schemes have the names of Quark's configurations.

    =================  ===================================================================================
    xint8              int8 kernels AND biases, uint8 activations with zero point 128 (symmetric). Scales
                       are powers of two, chosen for the least squared error, one per tensor. Average
                       pooling is rescaled as the NPU does it
    a8w8, a16w8        symmetric int8 kernels, symmetric int8 or int16 activations, one float scale per
                       tensor, minmax. Outputs of a ReLU use only half of the grid
    s8s8-aaws,         affine int8 or uint8 activations (AA), symmetric int8 kernels (WS). A percentile of
    u8s8-aaws          the calibration values sets the ranges
    u8u8-aawa          like u8s8-aaws, but kernels are affine uint8 (WA)
    s16s8-asws,        like u8s8-aaws, but activations are symmetric int16 (AS) or affine uint16
    u16s8-aaws
    int8-cnn-default   like u8s8-aaws, but minmax sets the ranges
    bf16, fp16         every tensor is rounded to bfloat16 or to IEEE half, without a scale
    bfp16              8 bits per value (sign and 7), one 8-bit exponent shared by 8 neighbouring values:
                       9 bits per value in all
    mx9, mx6, mx4      8, 5 or 3 bits per value, one 8-bit exponent shared by 16 values, one more bit shared
                       by each pair (Rouhani et al., ISCA 2023): 9, 6 or 4 bits per value in all
    mxint8, mxfp*      OCP Microscaling 1.0: one 8-bit exponent shared by 32 values of int8, fp8, fp6 or fp4
    bf16-bfp16,        bfloat16 activations with kernels in bfp16 or mxint8
    bf16-mxint8
    mx9-int8           mx9 activations with int8 kernels and biases
    =================  ===================================================================================

    Blocks lie along axis 1 (channels), and values in them are rounded half to even. Exponents are computed
    from each input, so no calibration is needed. `weight_bits` is the number of bits per value, including
    its share of the exponents, rounded. Integer kernels have one scale per tensor. Blocks are finer than
    channels, so these schemes are recorded as per channel.

    A layer that is left in float keeps its float kernel. What it writes is still rounded to the grid of the
    layer that reads it. `products` counts what multiplies values of the grid, blocks included.

Surprises
    The weights of a recurrent cell stay float: only what it reads and writes is quantized. Every
    configuration first equalizes the ranges of neighbouring layers (CLE), bf16 too. The first use compiles
    Quark's operators with a C++ compiler. The compiled operators stay in the environment. These
    configurations are left out: those that fine-tune (AdaRound, AdaQuant), the automatic mixtures, VINT8,
    which asks for random calibration data, and MATMUL_NBITS, which leaves Conv and Gemm in float. There are
    no 4-bit integers for Conv: given ONNX Runtime's QInt4, Quark answers that it supports only INT8, UINT8,
    INT16 and UINT16.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    by_name,
)

MODEL = "model.onnx"
EXTENSIONS = "TORCH_EXTENSIONS_DIR"
"""The environment variable that names the folder of Quark's compiled operators."""

_MOVES = ("Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice")
"""Operators that put out values of the grid of their first input."""
_PERCENTILE = "percentile 99.999"
_CONFIGURATIONS = (
    ("XINT8", 8, 8, False, "power-of-two MinMSE"),
    ("A8W8", 8, 8, False, "minmax"),
    ("A16W8", 8, 16, False, "minmax"),
    ("S8S8_AAWS", 8, 8, False, "percentile 99.9999"),
    ("U8S8_AAWS", 8, 8, False, _PERCENTILE),
    ("U8U8_AAWA", 8, 8, False, _PERCENTILE),
    ("S16S8_ASWS", 8, 16, False, _PERCENTILE),
    ("U16S8_AAWS", 8, 16, False, _PERCENTILE),
    ("INT8_CNN_DEFAULT", 8, 8, False, "minmax"),
    ("BF16", 16, 16, None, None),
    ("FP16", 16, 16, None, None),
    ("BFP16", 9, 9, True, None),
    ("MX9", 9, 9, True, None),
    ("MX6", 6, 6, True, None),
    ("MX4", 4, 4, True, None),
    ("MXINT8", 8, 8, True, None),
    ("MXFP8E4M3", 8, 8, True, None),
    ("MXFP8E5M2", 8, 8, True, None),
    ("MXFP6E2M3", 6, 6, True, None),
    ("MXFP6E3M2", 6, 6, True, None),
    ("MXFP4E2M1", 4, 4, True, None),
    ("BF16_BFP16", 9, 16, True, None),
    ("BF16_MXINT8", 8, 16, True, None),
    ("MX9_INT8", 8, 9, False, None),
)
"""Quark's configuration, bits of kernels and activations, scales per channel or finer, calibration."""
_BY_SCHEME = {name.lower().replace("_", "-"): name for name, *_ in _CONFIGURATIONS}
_INTEGER_KERNELS = {name for name, _, _, per_channel, _ in _CONFIGURATIONS if per_channel is False}


def _number_format(name: str, per_channel: bool | None) -> str:
    """Return the `number_format` of a configuration."""
    if per_channel is None or name.startswith("MXFP"):
        return "float"
    return "block" if per_channel else "integer"


class RyzenAI:
    """Run AMD's quantizer for Ryzen AI.

    >>> [scheme.name for scheme in BACKEND.schemes][:3]
    ['xint8', 'a8w8', 'a16w8']
    >>> {scheme.name for scheme in BACKEND.schemes if scheme.weight_bits == 4} == {"mx4", "mxfp4e2m1"}
    True
    """

    name = "ryzen-ai"
    vendor = "AMD"
    stands_for = "Ryzen AI laptops' XDNA NPUs, whose integer and block formats Quark writes"
    kind = "vendor quantizer on CPU"
    environment = Environment(
        name="ryzen-ai",
        python="3.11",
        requirements=(
            "torch==2.13.0",
            "amd-quark==0.13",
            "onnxruntime==1.28.0",
            "onnxruntime-extensions==0.15.2",
            "onnx==1.22.0",
            "numpy==2.4.6",
        ),
        megabytes=1400,
        licence="MIT (amd-quark, onnxruntime), BSD-3-Clause (torch)",
        variables={EXTENSIONS: "{site}/torch_extensions"},
    )
    packages = ("amd-quark", "onnxruntime", "torch", "onnx", "numpy")
    leaves_float = True
    schemes = tuple(
        Scheme(
            name.lower().replace("_", "-"),
            weight_bits,
            activation_bits,
            per_channel,
            calibration,
            number_format=_number_format(name, per_channel),
        )
        for name, weight_bits, activation_bits, per_channel, calibration in _CONFIGURATIONS
    )
    runtimes = (Runtime("onnxruntime", "CPU emulation, graph optimizations off", 100, simulated=True),)

    def available(self) -> str | None:
        """Check for the C++ compiler that Quark needs for its operators."""
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            return (
                f"Quark builds its operators with a C++ compiler, and {compiler!r} is not there: install g++"
            )
        return None

    def compile(
        self,
        source: Path,
        calibration: Batch,
        scheme: Scheme,
        folder: Path,
        float_layers: Sequence[str] = (),
    ) -> Compiled:
        """Quantize with Quark. It gets the samples one by one, regardless of the graph's batch size."""
        import onnx

        with _one_builder():
            from quark.onnx import ModelQuantizer
            from quark.onnx.quantization.config import Config, get_default_config

        model = onnx.load(source, load_external_data=False)
        weights = {initializer.name for initializer in model.graph.initializer}
        names = [value.name for value in model.graph.input if value.name not in weights]
        configuration = _BY_SCHEME[scheme.name]
        settings = get_default_config(configuration)
        settings.nodes_to_exclude = [*settings.nodes_to_exclude, *float_layers]
        quantizer = ModelQuantizer(Config(global_quant_config=settings))
        target = folder / MODEL
        quantizer.quantize_model(str(source), str(target), _reader(by_name(calibration, names)))
        # Formats that ONNX lacks are stored as float32, and the size of the file then says nothing.
        size = target.stat().st_size if configuration in _INTEGER_KERNELS else None
        graph = onnx.load(target, load_external_data=False).graph
        lost = sorted(set(float_layers) - {node.name for node in graph.node})
        if lost:
            raise Refused(
                f"Quark has no node {lost[0]!r} any more: it has fused it with another, or renamed it"
            )
        nodes = [(node.op_type, list(node.input), list(node.output)) for node in graph.node]
        products = None if scheme.number_format == "float" else count_products(nodes)
        return Compiled(size, count_operators(nodes), products=products)

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        import onnxruntime

        with _one_builder():
            from quark.onnx import get_library_path

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3  # errors
        options.register_custom_ops_library(get_library_path())
        path = folder / MODEL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(batch: Batch) -> list[np.ndarray]:
            return session.run(None, by_name(batch, names))

        return run


BACKEND = RyzenAI()


def count_operators(nodes: Iterable[tuple[str, list[str], list[str]]]) -> dict[str, dict[str, int]]:
    """Count the operators of Quark's graph, by what they compute on.

    An operator counts as integer if it reads dequantized integers and its result is quantized to integers,
    directly or behind other such operators that an NPU fuses with it (Conv and its Relu). All others count as
    float, block formats too.

    Args:
      nodes: (operator, inputs, outputs) of each node, in order.

    >>> count_operators([("DequantizeLinear", ["q"], ["x"]), ("Relu", ["x"], ["y"]),
    ...                  ("QuantizeLinear", ["y"], ["z"])])
    {'Relu': {'integer': 1}}
    """
    nodes = list(nodes)
    fed: set[str] = set()
    for operator, inputs, outputs in nodes:
        if operator == "DequantizeLinear" or (_computes(operator) and any(name in fed for name in inputs)):
            fed.update(outputs)
    produced = {name for operator, _, outputs in nodes if operator != "Constant" for name in outputs}
    kept: set[str] = set()
    counts: dict[str, dict[str, int]] = {}
    for operator, inputs, outputs in reversed(nodes):
        integer = any(name in kept for name in outputs) and all(
            name in fed for name in inputs if name in produced
        )
        if operator in ONNX_PRODUCTS and inputs[1] not in fed:
            integer = False  # its kernel is a float constant
        if operator == "QuantizeLinear" or (_computes(operator) and integer):
            kept.update(inputs)
        if _computes(operator):
            kinds = counts.setdefault(operator, {})
            kind = "integer" if integer else "float"
            kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def count_products(nodes: Iterable[tuple[str, list[str], list[str]]]) -> tuple[int, int]:
    """Count the convolutions, matmuls and recurrent cells that multiply values of the grid, and all of them.

    Both operands must have been rounded to the grid, of integers or of blocks, or lie behind operators that
    only move values or clip them.

    Args:
      nodes: (operator, inputs, outputs) of each node, in order.

    >>> count_products([("DequantizeLinear", ["q"], ["x"]), ("DequantizeLinear", ["r"], ["w"]),
    ...                 ("Relu", ["x"], ["y"]), ("Conv", ["y", "w"], ["z"]), ("Gemm", ["z", "w"], ["v"])])
    (1, 2)
    """
    rounded: set[str] = set()
    quantized = total = 0
    for operator, inputs, outputs in nodes:
        if not _computes(operator) or (operator in _MOVES and inputs[0] in rounded):
            rounded.update(outputs if operator != "Constant" else ())
        if operator in ONNX_PRODUCTS:
            total += 1
            quantized += rounded.issuperset(inputs[:2])
    return quantized, total


def _computes(operator: str) -> bool:
    """Tell whether an operator is neither a constant nor a conversion."""
    return operator != "Constant" and not operator.endswith(
        ("QuantizeLinear", "DequantizeLinear", "Dequantize")
    )


def _reader(arrays: Mapping[str, np.ndarray]) -> Any:
    """Return a reader that feeds one sample at a time, by the inputs' names."""
    from onnxruntime.quantization import CalibrationDataReader

    count = len(next(iter(arrays.values())))

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def __len__(self) -> int:
            return count

        def rewind(self) -> None:
            self._pending = iter(range(count))

        def get_next(self) -> dict[str, np.ndarray] | None:
            i = next(self._pending, None)
            if i is None:
                return None
            return {name: np.ascontiguousarray(values[i : i + 1]) for name, values in arrays.items()}

    return Samples()


@contextlib.contextmanager
def _one_builder() -> Iterator[None]:
    """Let one process at a time import Quark, which compiles operators that are not in `EXTENSIONS` yet.

    torch marks a build by a file. A killed builder leaves the file behind, and torch then waits for it for
    ever. The holder of the lock here is the only builder, so any such file is stale.
    """
    extensions = Path(os.environ[EXTENSIONS])
    extensions.mkdir(parents=True, exist_ok=True)
    with open(extensions / "builder.lock", "w") as own:
        fcntl.flock(own, fcntl.LOCK_EX)
        for stale in extensions.glob("*/lock"):
            stale.unlink()
        yield
