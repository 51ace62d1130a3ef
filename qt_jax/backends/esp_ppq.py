"""Run Espressif's esp-ppq: the quantizer of ESP-DL, and PPQ's models of other vendors' grids.

Numerics
    PPQ runs its graph in torch, in float32: each tensor is divided by its scale, rounded, clamped and
    multiplied again, and sums are not integers. Espressif's platforms (esp32...) are the vendor's own
    quantizer. Everything else is what PPQ's authors take another vendor's grid to be; no such vendor wrote or
    checked it. Grids of kernels and activations are per tensor and symmetric unless the table says otherwise.

    ==========  ==========================================================================================
    esp32s3     int8 on [-128, 127], scales are powers of two, halves rounded up. Biases are on 20 bits at
                the scale of the accumulator. Kernels keep 99.99 % of their values, others saturate
    esp32       The same with biases on 32 bits: chips without vector instructions (ESP32, C3, C6, ...)
    esp32p4     Like esp32s3, with a scale for each output channel of Conv, ConvTranspose and Gemm, kernels'
                minmax, halves to even, biases on 32 bits
    rknn        Rockchip: affine uint8 kernels and activations, halves to even, biases on 30 bits
    tensorrt    NVIDIA: int8 on [-128, 127]; kernels per channel; halves to even; float biases
    openvino    Intel: the same grid as tensorrt in this model
    ncnn        Tencent: int8 on [-127, 127]; only the inputs and kernels of Conv and Gemm, results stay
                float; kernels per channel, those of 3x3 convolutions of stride 1 on 6 bits, [-31, 31], for
                ncnn's Winograd kernels; halves away from zero; float biases
    mnn         Alibaba: int8 on [-127, 127]; Conv, Gemm and Add only; kernels of Conv per channel; halves
                away from zero; biases of Conv float, those of Gemm int8
    ascend      Huawei: affine uint8 activations; int8 kernels on [-128, 127], those of Conv per channel;
                Conv and AveragePool only, Gemm stays float; halves away from zero; float biases
    snpe        Qualcomm's DSP: affine uint8 kernels and activations, halves to even, biases on 30 bits.
                (QNN_DSP_INT8 and PPL_DSP_INT8 are the same quantizer.)
    ti          Texas Instruments' DSP: int8 on [-128, 127]; kernels per channel; halves to even; float
                biases
    nxp         NXP: int8 on [-128, 127], scales are powers of two; kernels per channel and rounded half
                away from zero, activations half up; biases on 31 bits
    fpga        AMD's (Xilinx') FPGA: int8 on [-128, 127], scales are powers of two, halves to even, biases
                on 30 bits
    tengine     OPEN AI LAB: affine uint8 kernels and activations, halves to even, biases on 30 bits
    metax-pt,   MetaX: affine uint8 per tensor with float biases; or int8 on [-127, 127] with kernels of
    metax-pc    Conv per channel, biases on 30 bits. Halves to even
    openppl     OpenPPL on NVIDIA's GPUs: int8 on [-128, 127]; kernels per channel; halves to even; biases
                on 32 bits
    ==========  ==========================================================================================

    A symmetric scale is 2 max|x| / (number of levels - 1), on [-128, 127] therefore max|x| / 127.5: the
    largest value itself saturates at 127. A power of two is the next one above that scale; "kl" takes the
    nearest instead. Relu and Clip are fused with the layer before them. snpe, ti, fpga and metax-pt equalize
    neighbouring layers first, as PPQ's settings for them do.

    minmax      The extremes of all calibration images
    percentile  The mean, over calibration batches of at most 32 images, of the percentiles 0.01 and 99.99
    kl          The range of least Kullback-Leibler divergence on a histogram; ESP-DL's default
    mse         The range of least squared error on a histogram

    int16act has 16-bit activations with 8-bit kernels, int16 has both on 16 bits (Espressif). Kernels of
    depthwise convolutions stay on 16 bits with int16act.

    A layer that is left in float is dispatched to PPQ's platform FP32.

Surprises
    esp-ppq simplifies the ONNX file that it is given and overwrites it; it gets a copy here. ESP-DL's
    exporter writes the file whose size is reported. A graph that it does not export is refused. kl is refused
    for affine grids, so rknn has no kl. PPL_CUDA_INT4 has no quantizer. The FP8 platforms (TRT_FP8,
    GRAPHCORE_FP8) are left out. Espressif's kernels are cut at a percentile on the S3, not on the P4.

    PPQ's default dispatcher leaves a Gemm in float that follows a Flatten which a platform does not quantize.
    The one that Espressif's own function uses, "allin", is used for all platforms here. Other vendors'
    platforms look for a Gemm's output channels on axis 0 whatever transB says, so its kernel is stored that
    way first. The kernel of a MatMul has a scale per input channel with tensorrt and openvino. PPQ's check
    of a Gemm for ascend asks for an attribute that ONNX lacks; Gemm stays in float there.

    Espressif's fusion of attention fixes the batch, and the graph is then calibrated and run one sample at a
    time. Such calibration costs "percentile" many decibels, because it averages over batches. Recurrent cells
    are refused where PPQ's or ESP-DL's operator has other inputs. Sums in torch may differ in the last
    bit between batches of different size, and a value then may fall on the other side of a rounding.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import Batch, Compiled, Environment, Refused, Runtime, Scheme, Session, by_name

MODEL, DEPLOYED, SINGLE = "model.native", "model.espdl", "one_by_one"
"""What `compile` leaves: PPQ's graph, for Espressif the file that a chip runs, and a mark if the graph takes
one sample at a time."""
BATCH = 100
CALIBRATION_BATCH, FEWEST_STEPS, MOST_STEPS = 32, 8, 5000
"""Images per calibration step, and the numbers of steps that PPQ takes."""

THIRD_PARTY = "third party's model of a grid"

PRODUCTS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2, "MatMul": 2, "PPQBiasFusedMatMul": 2} | {
    "Attention": 3,
    "GRU": 3,
    "LSTM": 3,
}
"""Operator that multiplies -> how many of its first inputs are operands or kernels."""
_QUANTIZED = {"ACTIVATED", "PASSIVE", "BAKED", "PASSIVE_BAKED", "OVERLAPPED"}
"""PPQ's states of a tensor that is on a grid: by itself, at rest, or by the operator before it."""


class _Platform(NamedTuple):
    """Describe one of PPQ's platforms, which are no Espressif chips."""

    name: str
    vendor: str
    per_channel: bool
    ranges: tuple[str, ...]
    setting: str = "default_setting"
    float_operators: tuple[str, ...] = ()
    """Operators that PPQ fails to quantize for this platform."""


_CHIPS = {
    "esp32s3": (False, ("int8-kl", "int8-minmax", "int8-percentile", "int8-mse")),
    "esp32p4": (
        True,
        ("int8-kl", "int8-minmax", "int8-percentile", "int8-mse", "int16act-minmax", "int16-minmax"),
    ),
    "esp32": (False, ("int8-kl",)),
}
"""Espressif's chip -> whether kernels have a scale per channel, and the words of its schemes."""
_TARGETS = {"esp32s3": "esp32s3", "esp32p4": "esp32p4", "esp32": "c"}
"""Espressif's chip -> esp-ppq's word for it, or for all chips without vector instructions."""
_TYPES = {"int8": ("w8a8", 8, 8), "int16act": ("w8a16", 8, 16), "int16": ("w16a16", 16, 16)}
"""Word of a scheme's name -> esp-ppq's word, bits of kernels, bits of activations."""
_PLATFORMS = {
    "rknn": _Platform("RKNN_INT8", "Rockchip", False, ("percentile", "minmax", "mse")),
    "tensorrt": _Platform("TRT_INT8", "NVIDIA", True, ("percentile", "kl"), "trt_setting"),
    "openvino": _Platform("OPENVINO_INT8", "Intel", True, ("minmax",)),
    "ncnn": _Platform("NCNN_INT8", "Tencent", True, ("kl", "minmax"), "ncnn_setting"),
    "mnn": _Platform("MNN_INT8", "Alibaba", True, ("kl", "minmax"), "mnn_setting"),
    "ascend": _Platform("ASC_INT8", "Huawei", True, ("minmax",), "ascend_setting", ("Gemm",)),
    "snpe": _Platform("SNPE_INT8", "Qualcomm", False, ("percentile", "minmax"), "dsp_setting"),
    "ti": _Platform("PPL_DSP_TI_INT8", "Texas Instruments", True, ("percentile",), "dsp_setting"),
    "nxp": _Platform("NXP_INT8", "NXP", True, ("percentile", "kl"), "nxp_setting"),
    "fpga": _Platform("FPGA_INT8", "AMD", False, ("percentile", "kl"), "fpga_setting"),
    "tengine": _Platform("TENGINE_INT8", "OPEN AI LAB", False, ("minmax",)),
    "metax-pt": _Platform("METAX_INT8_T", "MetaX", False, ("percentile",), "metax_pertensor_setting"),
    "metax-pc": _Platform("METAX_INT8_C", "MetaX", True, ("percentile",)),
    "openppl": _Platform("PPL_CUDA_INT8", "OpenPPL", True, ("percentile",), "pplcuda_setting"),
}
_CALIBRATIONS = {
    "kl": "Kullback-Leibler divergence",
    "minmax": "minmax",
    "percentile": "percentile 99.99",
    "mse": "least squared error",
}


def _schemes() -> tuple[Scheme, ...]:
    """Return the schemes of Espressif's chips, then those of the other platforms."""
    own = (
        Scheme(
            f"{chip}-{words}",
            *_TYPES[words.split("-")[0]][1:],
            per_channel,
            _CALIBRATIONS[words.split("-")[1]],
        )
        for chip, (per_channel, offered) in _CHIPS.items()
        for words in offered
    )
    others = (
        Scheme(
            f"{name}-int8-{ranges}",
            8,
            8,
            platform.per_channel,
            _CALIBRATIONS[ranges],
            vendor=platform.vendor,
            kind=THIRD_PARTY,
        )
        for name, platform in _PLATFORMS.items()
        for ranges in platform.ranges
    )
    return (*own, *others)


class EspPpq:
    """Run Espressif's quantizer, and PPQ's models of other vendors' grids.

    >>> [scheme.name for scheme in BACKEND.schemes if scheme.kind is None][:2]
    ['esp32s3-int8-kl', 'esp32s3-int8-minmax']
    >>> {scheme.vendor for scheme in BACKEND.schemes if scheme.name.startswith("rknn")}
    {'Rockchip'}
    """

    name = "esp-ppq"
    vendor = "Espressif"
    stands_for = "ESP32, ESP32-S3 and ESP32-P4 with ESP-DL; PPQ's models of a dozen other vendors' grids"
    kind = "vendor quantizer on CPU"
    environment = Environment(
        name="esp-ppq",
        python="3.11",
        requirements=(
            "torch==2.13.0",
            "esp-ppq==1.3.12",
            "onnx==1.19.1",
            "onnxsim==0.7.3",
            "onnxruntime==1.32.0",
            "numpy==2.4.6",
        ),
        megabytes=1000,
        licence="Apache-2.0 (esp-ppq, onnxsim), BSD-3-Clause (torch)",
    )
    packages = ("esp-ppq", "torch", "onnx", "onnxsim", "numpy")
    schemes = _schemes()
    runtimes = (Runtime("ppq", f"PPQ's TorchExecutor, one thread, batch {BATCH}", BATCH, simulated=True),)
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
        """Quantize with esp-ppq, and save its graph; for Espressif also the file that ESP-DL runs."""
        import onnx
        from esp_ppq.core import TargetPlatform
        from esp_ppq.lib import Exporter

        _use_one_thread()
        model = onnx.load(source)
        original = model.graph
        arrays = by_name(calibration, [value.name for value in original.input])
        words, ranges = scheme.name.rsplit("-", 1)
        name, bits = words.rsplit("-", 1)
        fixed = any(value.type.tensor_type.shape.dim[0].dim_value for value in original.input)
        quantize = _quantize_for_chip if name in _CHIPS else _quantize_for_platform
        for batch in (1,) if fixed else (CALIBRATION_BATCH, 1):
            copy = Path("source.onnx").absolute()  # esp-ppq overwrites it
            onnx.save(model, copy)
            steps = list(_calibration_steps(arrays, batch))
            try:
                graph = quantize(copy, steps, name, bits, ranges, float_layers)
                break
            except RuntimeError as error:  # such as a batch that PPQ has fixed
                if batch == 1:
                    raise Refused(f"{error}: {error.__cause__ or 'no cause given'}") from error
        _check(graph, [value.name for value in original.output], float_layers)
        if not _takes_two(graph, arrays):
            (folder / SINGLE).touch()
        Exporter(TargetPlatform.NATIVE).export(str(folder / MODEL), graph)
        size = None
        counts = count_operators(graph)
        if name in _CHIPS:
            Exporter(_platform_of(name, bits)).export(str(folder / DEPLOYED), graph)
            size = (folder / DEPLOYED).stat().st_size
        products = [kinds for operator, kinds in counts.items() if operator in PRODUCTS]
        quantized = sum(kinds.get("integer", 0) for kinds in products)
        return Compiled(size, counts, products=(quantized, sum(sum(kinds.values()) for kinds in products)))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        import torch
        from esp_ppq.api import load_native_graph
        from esp_ppq.executor import TorchExecutor

        _use_one_thread()
        graph = load_native_graph(str(folder / MODEL))
        executor = TorchExecutor(graph, device="cpu")

        def run(batch: Batch) -> list[np.ndarray]:
            arrays = by_name(batch, list(graph.inputs))
            feeds = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
            kept = {name: tensor for name, tensor in feeds.items() if name in graph.inputs}
            return [output.numpy().copy() for output in executor.forward(kept)]

        def run_one_by_one(batch: Batch) -> list[np.ndarray]:
            arrays = by_name(batch, list(graph.inputs))
            size = len(next(iter(arrays.values())))
            found = [run({name: array[i : i + 1] for name, array in arrays.items()}) for i in range(size)]
            return [np.concatenate(outputs) for outputs in zip(*found, strict=True)]

        return run_one_by_one if (folder / SINGLE).exists() else run


BACKEND = EspPpq()


def _use_one_thread() -> None:
    """Let torch compute on one thread, whatever else runs on this machine."""
    import torch

    torch.set_num_threads(1)


def _calibration_steps(arrays: Mapping[str, np.ndarray], batch: int) -> Iterable[dict[str, np.ndarray]]:
    """Cut calibration data into steps of at most `batch` samples, into the fewest
    steps if there are enough.

    >>> [len(step["x"]) for step in _calibration_steps({"x": np.zeros(20)}, 32)]
    [3, 3, 3, 3, 3, 3, 2]
    """
    size = len(next(iter(arrays.values())))
    step = min(batch, -(-size // FEWEST_STEPS))
    for start in range(0, size, step):
        yield {name: np.array(array[start : start + step]) for name, array in arrays.items()}


def _platform_of(chip: str, bits: str) -> Any:
    """Return PPQ's platform of an Espressif chip."""
    from esp_ppq.api import get_target_platform

    return get_target_platform(_TARGETS[chip], _TYPES[bits][0])


def _quantize_for_chip(
    copy: Path,
    steps: Sequence[Mapping[str, np.ndarray]],
    chip: str,
    bits: str,
    ranges: str,
    float_layers: Sequence[str],
) -> Any:
    """Return the graph that Espressif's function quantizes for one of its chips."""
    from esp_ppq.api import QuantizationSettingFactory, espdl_quantize_onnx

    batches = _tensors(steps)
    quant_type, _, activation_bits = _TYPES[bits]
    setting = QuantizationSettingFactory.espdl_setting(num_of_bits=activation_bits)
    _choose(setting, ranges, float_layers)
    return espdl_quantize_onnx(
        onnx_import_file=str(copy),
        espdl_export_file=str(copy.with_name(DEPLOYED)),
        calib_dataloader=batches,
        calib_steps=_number_of_steps(batches),
        input_shape=None,
        inputs=_first_sample(batches),
        target=_TARGETS[chip],
        quant_type=quant_type,
        collate_fn=_unchanged,
        setting=setting,
        error_report=False,
        skip_export=True,
    )


def _quantize_for_platform(
    copy: Path,
    steps: Sequence[Mapping[str, np.ndarray]],
    name: str,
    bits: str,
    ranges: str,
    float_layers: Sequence[str],
) -> Any:
    """Return the graph that PPQ quantizes for a platform of another vendor."""
    import onnx
    from esp_ppq.api import QuantizationSettingFactory, quantize_onnx_model
    from esp_ppq.core import TargetPlatform

    model = onnx.load(copy)
    _spell_out(model.graph)
    onnx.save(model, copy)
    batches = _tensors(steps)
    platform = _PLATFORMS[name]
    skipped = [node.name for node in model.graph.node if node.op_type in platform.float_operators]
    setting = getattr(QuantizationSettingFactory, platform.setting)()
    setting.dispatcher = "allin"  # PPQ's default leaves a layer behind an operator in float in float as well
    _choose(setting, ranges, [*float_layers, *skipped])
    return quantize_onnx_model(
        onnx_import_file=str(copy),
        calib_dataloader=batches,
        calib_steps=_number_of_steps(batches),
        input_shape=None,
        platform=TargetPlatform[platform.name],
        inputs=_first_sample(batches),
        collate_fn=_unchanged,
        setting=setting,
        device="cpu",
    )


def _spell_out(graph: Any) -> None:
    """Write Conv and Gemm as PPQ's platforms read them.

    A Conv gets the attribute `kernel_shape`. The kernel of a Gemm is stored with its output channels on axis
    0, where these platforms look for them whatever `transB` says.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in constants:
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        kernel = numpy_helper.to_array(constants[node.input[1]])
        if node.op_type == "Conv" and "kernel_shape" not in attributes:
            node.attribute.append(helper.make_attribute("kernel_shape", kernel.shape[2:]))
        elif node.op_type == "Gemm" and ("transB" not in attributes or attributes["transB"].i == 0):
            name = f"{node.input[1]}/{node.name}/transposed"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(kernel.T), name))
            node.input[1] = name
            if "transB" in attributes:
                node.attribute.remove(attributes["transB"])
            node.attribute.append(helper.make_attribute("transB", 1))


def _choose(setting: Any, ranges: str, float_layers: Sequence[str]) -> None:
    """Choose how activation ranges are found, and the layers that PPQ keeps in float."""
    from esp_ppq.core import TargetPlatform

    setting.quantize_activation_setting.calib_algorithm = ranges
    for layer in float_layers:
        setting.dispatching_table.append(layer, TargetPlatform.FP32)


def _tensors(steps: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Return calibration steps as torch tensors."""
    import torch

    return [{name: torch.from_numpy(array) for name, array in step.items()} for step in steps]


def _number_of_steps(batches: Sequence[Any]) -> int:
    """Return how many steps PPQ takes: each batch once, or twice where there is one batch only."""
    return min(max(len(batches), FEWEST_STEPS), MOST_STEPS)


def _first_sample(batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sample that PPQ traces the graph with."""
    return {name: tensor[:1] for name, tensor in batches[0].items()}


def _unchanged(batch: Any) -> Any:
    return batch


def _check(graph: Any, outputs: Sequence[str], float_layers: Sequence[str]) -> None:
    """Raise Refused if PPQ's graph has lost an output, or a layer that should stay in float."""
    if list(graph.outputs) != list(outputs):
        raise Refused(f"PPQ's graph puts out {', '.join(graph.outputs)} instead of {', '.join(outputs)}")
    for layer in float_layers:
        if layer not in graph.operations:
            raise Refused(f"PPQ has fused the node {layer!r} into another one, so it cannot stay in float")


def _takes_two(graph: Any, arrays: Mapping[str, np.ndarray]) -> bool:
    """Tell whether PPQ's graph computes two samples at once. Its passes may fix the batch that they saw."""
    import torch
    from esp_ppq.executor import TorchExecutor

    feeds = {name: torch.from_numpy(np.array(array[:2])) for name, array in arrays.items()}
    size = len(next(iter(feeds.values())))
    try:
        found = TorchExecutor(graph, device="cpu").forward(feeds)
    except RuntimeError:
        return False
    return all(output.ndim and len(output) == size for output in found)


def count_operators(graph: Any) -> dict[str, dict[str, int]]:
    """Count the operators of a quantized graph, by whether their operands and kernels are quantized.

    Operators on shapes and indices are left out.

    Args:
      graph: PPQ's graph.
    """
    counts: dict[str, dict[str, int]] = {}
    for operation in graph.operations.values():
        if operation.platform.name == "SOI":
            continue
        configs = getattr(getattr(operation, "config", None), "input_quantization_config", [])
        read = configs[: PRODUCTS.get(operation.type, 1)]
        integer = bool(read) and all(config.state.name in _QUANTIZED for config in read)
        kinds = counts.setdefault(operation.type, {})
        kind = "integer" if integer else "float"
        kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(counts.items()))
