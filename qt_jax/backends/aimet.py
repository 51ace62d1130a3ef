"""Run Qualcomm's AIMET for ONNX: the quantizer of Hexagon HTP and eNPU, simulated on ONNX Runtime.

Numerics
    AIMET puts a quantizer on tensors and computes in float32 between them: the sums of a convolution are not
    integers. Rounding is to the nearest, halves upwards. Biases stay float32.

    Kernels are symmetric, on [-128, 127] or [-8, 7] with scale max(max(w) / 127, -min(w) / 128), and with 7
    and 8 for 4 bits. The extreme level is therefore used where negative weights dominate, other than on the
    usual grid of max|w| / 127. Which tensors have which grid is what the configuration says:

    =========  ===========================================================================================
    htp-v66    Kernels per tensor; activations affine. The result of a convolution is quantized before its
               Relu as well, on the Relu's own grid, which changes nothing
    htp-v73    Kernels of Conv, ConvTranspose, Gemm and MatMul per output channel; activations affine. A Relu
               is fused with the Conv, Gemm or Add before it. AIMET's v75, v79, v81 and v85 have the same
               rules. Its v69 does not fuse a Conv with its Relu, like v66, and its v68 has Gemm and MatMul
               per tensor besides. v66 and v73 stand for all of them
    enpu-v6,   Kernels per tensor, activations symmetric and signed on [-128, 127], so that a Relu uses half
    enpu-v7    of the grid. Every common activation is fused with the layer before it. v7 differs from v6 in
               normalizations alone
    enpu-v7-pc Like enpu-v7 with kernels per output channel
    =========  ===========================================================================================

    All configurations quantize the inputs and outputs of the graph. Operators that only move data (Reshape,
    Transpose, MaxPool, ...) keep the grid of their input. Concat and AveragePool share one grid with it. The
    output of Tanh has the fixed range [-1, 1], and those of Sigmoid and Softmax have [0, 1], but not in v66.

    minmax       The extremes of all calibration images (min_max)
    percentile   The values between the percentiles 0.01 and 99.99 of a histogram, for activations; AIMET's
                 own default of 100 is minmax but for the width of a bin. Kernels have minmax
    tf-enhanced  The range with the least cost of rounding and clipping on a histogram, for kernels and
                 activations. It is named after Qualcomm's converter
    cle          Cross-layer equalization first: neighbouring convolutions are rescaled so that their
                 channels have equal ranges. Batch normalization's large biases are absorbed by the next layer

    int4w and int16act change the bits of all kernels or activations. Kernels of normalizations keep at least
    8. An affine grid always contains 0 exactly. Batch normalization is folded into convolutions first, as
    AIMET asks.

    A layer that is left in float gets float16 kernels, which is what an HTP offers besides integers. Its
    result is float16 where only such layers, or nobody, read it. AIMET fuses MatMul and Add into one Gemm
    under a new name. Such a layer is found by its kernel.

Surprises
    Activation ranges are found while kernels are quantized already. Afterwards kernel scales are widened
    where an int32 bias or accumulator would overflow, or a requantization scale would fall below 2^-24.
    Equalization replaces Relu6 by Relu. The quantizers live in the process that made them: an ONNX file
    cannot hold them. `load` builds them again and reads their grids from a file of encodings. AIMET has no
    switch for percentile 99.99 on the level of a model; it is set on each quantizer. A matrix product of two
    activations has its second operand symmetric. AdaRound, SeqMSE and LPBQ are left out: they train or search
    for minutes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qt_jax.backends.protocol import Batch, Compiled, Environment, Refused, Runtime, Scheme, Session, by_name

MODEL, ENCODINGS, FLOAT = "model.onnx", "model.encodings", "float_layers.json"
"""What `compile` leaves: the float graph, the grids of its tensors, and the layers in float16."""
BATCH = 100
PERCENTILE = 99.99

PRODUCTS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gemm": (1,),
    "MatMul": (1,),
    "GRU": (1, 2),
    "LSTM": (1, 2),
    "RNN": (1, 2),
}
"""Operator that multiplies -> which of its inputs are kernels."""
_MOVES = {"Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators that only move data, whose results AIMET does not quantize again."""


class _Settings(NamedTuple):
    """Hold what a scheme asks of AIMET: its configuration, range method, bits, and equalization."""

    configuration: str
    ranges: str
    weight_bits: int
    activation_bits: int
    equalized: bool


_CONFIGURATIONS = {
    "htp-v66": ("htp_v66", False),
    "htp-v73": ("htp_v73", True),
    "enpu-v6": ("enpu_v6", False),
    "enpu-v7": ("enpu_v7", False),
    "enpu-v7-pc": ("enpu_quantsim_config_v7_per_channel.json", True),
}
"""Words of a scheme's name -> the configuration, and whether kernels have a scale per channel."""
_RANGES = {"minmax": "min_max", "percentile": "percentile", "tf-enhanced": "tf_enhanced"}
_CALIBRATIONS = {"minmax": "minmax", "percentile": f"percentile {PERCENTILE}", "tf-enhanced": "tf_enhanced"}
_BITS = {"int8": (8, 8), "int4w": (4, 8), "int16act": (8, 16), "int4w-int16act": (4, 16)}
_COMMON = (
    "int8-minmax",
    "int8-percentile",
    "int8-tf-enhanced",
    "int8-cle-minmax",
    "int4w-minmax",
    "int4w-tf-enhanced",
    "int4w-cle-minmax",
)
_OFFERED = {
    "htp-v66": _COMMON,
    "htp-v73": (*_COMMON, "int16act-minmax", "int4w-int16act-minmax"),
    "enpu-v6": ("int8-minmax",),
    "enpu-v7": ("int8-minmax",),
    "enpu-v7-pc": ("int8-minmax", "int4w-minmax"),
}
"""Words of a scheme's name -> what may follow them."""


def _settings(configuration: str, words: str) -> _Settings:
    """Read the words of a scheme's name behind its configuration.

    >>> _settings("htp-v73", "int4w-cle-minmax")
    _Settings(configuration='htp-v73', ranges='minmax', weight_bits=4, activation_bits=8, equalized=True)
    """
    ranges = next(name for name in _RANGES if words.endswith(name))
    bits = words.removesuffix(f"-{ranges}").removesuffix("-cle")
    return _Settings(configuration, ranges, *_BITS[bits], equalized="-cle-" in words)


_SCHEMES = {
    f"{configuration}-{words}": _settings(configuration, words)
    for configuration, offered in _OFFERED.items()
    for words in offered
}


def _scheme(name: str, settings: _Settings) -> Scheme:
    """Describe a scheme for the harness."""
    calibration = _CALIBRATIONS[settings.ranges]
    return Scheme(
        name,
        settings.weight_bits,
        settings.activation_bits,
        _CONFIGURATIONS[settings.configuration][1],
        f"{calibration}, equalized" if settings.equalized else calibration,
    )


class Aimet:
    """Run Qualcomm's quantizer for its neural accelerators.

    >>> [scheme.name for scheme in BACKEND.schemes][:2]
    ['htp-v66-int8-minmax', 'htp-v66-int8-percentile']
    """

    name = "aimet"
    vendor = "Qualcomm"
    stands_for = "Snapdragon's Hexagon HTP (v66, v73) and Qualcomm's eNPU, as AIMET configures them"
    kind = "vendor quantizer on CPU"
    environment = Environment(
        name="aimet",
        python="3.11",
        requirements=(
            "torch==2.13.0",
            "aimet-onnx==2.42.0",
            "onnx==1.23.2",
            "onnxruntime==1.32.0",
            "onnx-ir==1.1.0",
            "onnxscript==0.7.2",
            "numpy==2.4.6",
        ),
        megabytes=1750,
        licence="BSD-3-Clause (aimet-onnx, torch), MIT (onnxruntime)",
    )
    packages = ("aimet-onnx", "onnxruntime", "onnx", "torch", "numpy")
    schemes = tuple(_scheme(name, settings) for name, settings in _SCHEMES.items())
    runtimes = (
        Runtime("quantsim", f"AIMET's simulation on ONNX Runtime, batch {BATCH}", BATCH, simulated=True),
    )
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
        """Quantize with AIMET, and save the float graph, the encodings and the names of float layers."""
        import onnx

        settings = _SCHEMES[scheme.name]
        model = onnx.load(source)
        (folder / FLOAT).write_text(json.dumps(_kernels(model.graph, float_layers)))
        _prepare(model, settings.equalized)
        onnx.save(model, folder / MODEL, save_as_external_data=True, location="weights.bin")
        sim = _simulation(folder, settings)
        names = [value.name for value in sim.model.graph().input]
        step = _fixed_batch(sim.model.graph()) or BATCH
        sim.compute_encodings(_parts(by_name(calibration, names), step))
        sim.export(
            str(folder),
            Path(ENCODINGS).stem,
            export_model=False,
            encoding_version="1.0.0",
            force_activation_as=None,
        )
        counts = _operators(sim)
        products = [kinds for operator, kinds in counts.items() if operator in PRODUCTS]
        quantized = sum(kinds.get("integer", 0) for kinds in products)
        return Compiled(None, counts, products=(quantized, sum(sum(kinds.values()) for kinds in products)))

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        from aimet_onnx.quantsim import load_encodings_to_sim

        sim = _simulation(folder, _SCHEMES[scheme.name])
        load_encodings_to_sim(sim, str(folder / ENCODINGS), strict=True)
        names = [value.name for value in sim.model.graph().input]
        return lambda batch: sim.session.run(None, by_name(batch, names))


BACKEND = Aimet()


def count_operators(
    nodes: Iterable[tuple[str, Sequence[str], Sequence[str]]],
    floats: Set[str],
    constants: Set[str],
    on_grid: Set[str],
) -> dict[str, dict[str, int]]:
    """Count the operators that compute on floating-point tensors, by whether integers go in and come out.

    An operator counts as integer if all its operands and kernels are on an integer grid, and its result is
    quantized, directly or behind other such operators that are fused with it (Conv and its Relu).

    Args:
      nodes: (operator, inputs, outputs) of each node, in order.
      floats: Floating-point tensors.
      constants: Tensors that do not depend on the graph's inputs.
      on_grid: Tensors that AIMET puts on an integer grid.

    >>> count_operators([("Conv", ["x", "w"], ["c"]), ("Relu", ["c"], ["y"])], set("xcy"), {"w"}, set("xwy"))
    {'Conv': {'integer': 1}, 'Relu': {'integer': 1}}
    """
    computing = [node for node in nodes if any(name in floats for name in node[2])]
    fed, kept = set(on_grid), set(on_grid)
    integer: dict[int, bool] = {}
    for i, (operator, inputs, outputs) in enumerate(computing):
        operands = [name for name in inputs if name in floats and name not in constants]
        kernels = [inputs[at] for at in PRODUCTS.get(operator, ())]
        integer[i] = bool(operands) and fed.issuperset(operands) and fed.issuperset(kernels)
        fed.update(outputs if integer[i] else ())
    counts: dict[str, dict[str, int]] = {}
    for i, (operator, inputs, outputs) in reversed(list(enumerate(computing))):
        integer[i] = integer[i] and (operator in _MOVES or not kept.isdisjoint(outputs))
        kept.update(inputs if integer[i] else ())
        kinds = counts.setdefault(operator, {})
        kind = "integer" if integer[i] else "float"
        kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def _operators(sim: Any) -> dict[str, dict[str, int]]:
    """Count the operators of a simulation, whose quantizers have been calibrated."""
    graph = sim.model.graph()
    quantizers = sim.qc_quantize_op_dict
    original = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QcQuantizeOp"}
    nodes = [
        (node.op_type, [original.get(name, name) for name in node.input], list(node.output))
        for node in graph.node
        if node.op_type != "QcQuantizeOp"
    ]
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for operator, _, outputs in nodes if operator == "Constant" for name in outputs}
    floats = {name for name, dtype in sim.activation_dtypes.items() if np.dtype(dtype).kind == "f"}
    on_grid = {
        name for name, quantizer in quantizers.items() if quantizer.enabled and quantizer.get_encodings()
    }
    return count_operators(nodes, floats, constants, on_grid)


def _prepare(model: Any, equalized: bool) -> None:
    """Fold batch normalization, and equalize convolutions if asked, in place."""
    from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
    from aimet_onnx.cross_layer_equalization import equalize_model
    from onnx import numpy_helper

    for tensor in model.graph.initializer:  # AIMET writes into raw_data, whichever field a tensor uses
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    if equalized:
        equalize_model(model)
    else:
        fold_all_batch_norms_to_weight(model)


def _kernels(graph: Any, layers: Sequence[str]) -> dict[str, list[str]]:
    """Return the initializers that each of these nodes reads."""
    constants = {tensor.name for tensor in graph.initializer}
    inputs = {node.name: list(node.input) for node in graph.node}
    return {layer: [name for name in inputs.get(layer, ()) if name in constants] for layer in layers}


def _simulation(folder: Path, settings: _Settings) -> Any:
    """Return AIMET's simulation of a compiled graph, before its ranges are known."""
    import aimet_onnx
    import onnx

    simulation = aimet_onnx.QuantizationSimModel(
        onnx.load(folder / MODEL),
        param_type=f"int{settings.weight_bits}",
        activation_type=f"int{settings.activation_bits}",
        quant_scheme="tf_enhanced" if settings.ranges == "tf-enhanced" else "min_max",
        config_file=_CONFIGURATIONS[settings.configuration][0],
    )
    if settings.ranges == "percentile":
        percentile = aimet_onnx.common.defs.QuantScheme.post_training_percentile
        for name in simulation.activation_names:
            quantizer = simulation.qc_quantize_op_dict[name]
            quantizer.set_quant_scheme(percentile)
            quantizer.quant_info.tensorQuantizerRef.setPercentileValue(PERCENTILE)
    _leave_in_float(simulation, json.loads((folder / FLOAT).read_text()))
    return simulation


def _leave_in_float(sim: Any, layers: Mapping[str, Sequence[str]]) -> None:
    """Give layers float16 kernels, and a float16 result where no other layer reads it.

    Args:
      sim: AIMET's simulation.
      layers: Name -> the layer's initializers, by which a layer is found that AIMET has renamed.

    Raises:
      Refused: A layer is no longer there.
    """
    from aimet_onnx import float16

    operations = sim.connected_graph.get_all_ops()
    chosen = []
    for name, kernels in layers.items():
        found = [operations[name]] if name in operations else _readers(operations.values(), kernels)
        if not found:
            raise Refused(f"AIMET has fused the node {name!r} into another one, so it cannot stay in float")
        chosen += found
    for operation in chosen:
        inputs, outputs, parameters = sim.get_op_quantizers(operation)
        for quantizer in parameters.values():
            quantizer.set_precision(float16)
        for product in (*operation.inputs, *operation.outputs):
            quantizer = sim.qc_quantize_op_dict.get(product.name)
            ours = product in operation.outputs or product.producer is None
            if quantizer in (*inputs, *outputs) and ours and all(it in chosen for it in product.consumers):
                quantizer.set_precision(float16)


def _readers(operations: Iterable[Any], kernels: Sequence[str]) -> list[Any]:
    """Return the operations that read one of these parameters."""
    return [operation for operation in operations if not set(kernels).isdisjoint(operation.parameters)]


def _fixed_batch(graph: Any) -> int | None:
    """Return the batch size of a graph; None if it is open."""
    sizes = [value.type.tensor_type.shape.dim[0].dim_value for value in graph.input]
    return max(sizes) or None


def _parts(arrays: Mapping[str, np.ndarray], step: int) -> Iterable[dict[str, np.ndarray]]:
    """Cut a batch into parts of at most `step` samples."""
    size = len(next(iter(arrays.values())))
    for start in range(0, size, step):
        yield {name: np.ascontiguousarray(array[start : start + step]) for name, array in arrays.items()}
