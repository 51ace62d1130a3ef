"""Run NVIDIA TensorRT 10, on machines that have a GPU. This file has NEVER RUN ON A GPU here.

It was written from TensorRT's Python API, and tests drive it with a stand-in module. No number of it has been
seen. The user installs the driver, TensorRT and a `torch` with CUDA, which holds the buffers.

Numerics
    int8-pc-minmax    Explicit quantization. ONNX Runtime inserts QuantizeLinear and DequantizeLinear with
                      symmetric int8 and zero points 0, for activations (one scale max|x| / 127 per tensor,
                      minmax over the calibration images) and kernels (one scale max|w| / 127 per output
                      channel): the grid that TensorRT takes. Biases stay float. TensorRT fuses the pairs into
                      int8 kernels and computes in float what is left. Its own calibrators are deprecated and
                      not used.
    fp16              Tensors and arithmetic in IEEE half, wherever TensorRT finds that faster.
    fp32              float32, with TF32 switched off.

Timing includes the copies to and from the GPU, because a caller waits for them.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Mapping, Sequence
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

ENGINE = "model.engine"
BATCH = 32
WORKSPACE = 2 << 30
"""Bytes that TensorRT may use while it builds."""

FP32 = Scheme("fp32", 32, 32, number_format="float")
FP16 = Scheme("fp16", 16, 16, number_format="float")
INT8 = Scheme("int8-pc-minmax", 8, 8, True, "minmax")


class TensorRT:
    """Run TensorRT on an NVIDIA GPU.

    >>> [scheme.name for scheme in BACKEND.schemes]
    ['fp32', 'fp16', 'int8-pc-minmax']
    """

    name = "tensorrt"
    vendor = "NVIDIA"
    stands_for = "NVIDIA GPUs and Jetson modules, as TensorRT compiles for the one that is there"
    kind = "device"
    environment = None
    packages = ("tensorrt", "torch", "onnxruntime", "onnx")
    leaves_float = True
    schemes = (FP32, FP16, INT8)
    runtimes = (Runtime("gpu", "TensorRT engine on GPU 0, copies included", batch=BATCH, timed=True),)

    def available(self) -> str | None:
        """Check for a GPU that the driver shows, TensorRT, and the torch that holds its buffers."""
        if not _has_gpu():
            return "no NVIDIA GPU answers (libcuda's cuInit): it takes one, and NVIDIA's driver"
        for package, remedy in (
            ("tensorrt", "TensorRT 10 with its Python package"),
            ("torch", "torch with CUDA"),
        ):
            if importlib.util.find_spec(package) is None:
                return f"{package} is not importable: install {remedy}, to match the driver"
        return None

    def compile(
        self,
        source: Path,
        calibration: Batch,
        scheme: Scheme,
        folder: Path,
        float_layers: Sequence[str] = (),
    ) -> Compiled:
        """Build an engine for this GPU and TensorRT version, for batches of 1 to `BATCH`."""
        arrays = by_name(calibration, _input_names(source))
        products = None
        if scheme == INT8:
            products = _insert_pairs(source, Path("quantized.onnx"), arrays, float_layers)
            source = Path("quantized.onnx")
        engine = _build(source, {name: values.shape[1:] for name, values in arrays.items()}, scheme)
        (folder / ENGINE).write_bytes(engine)
        return Compiled(len(engine), products=products)

    def load(self, folder: Path, scheme: Scheme, runtime: Runtime) -> Session:
        import tensorrt
        import torch

        player = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        engine = player.deserialize_cuda_engine((folder / ENGINE).read_bytes())
        if engine is None:
            raise RuntimeError("TensorRT does not take the engine, which fits one GPU and version only")
        context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        modes = [engine.get_tensor_mode(name) for name in names]
        entries = [n for n, mode in zip(names, modes, strict=True) if mode == tensorrt.TensorIOMode.INPUT]
        results = [n for n, mode in zip(names, modes, strict=True) if mode == tensorrt.TensorIOMode.OUTPUT]
        stream = torch.cuda.Stream()

        def session(batch: Batch) -> list[np.ndarray]:
            with torch.cuda.stream(stream):
                inputs = {
                    name: torch.tensor(values, device="cuda")
                    for name, values in by_name(batch, entries).items()
                }
                for name, tensor in inputs.items():
                    context.set_input_shape(name, tuple(tensor.shape))
                    context.set_tensor_address(name, tensor.data_ptr())
                outputs = {name: _empty(engine, context, name) for name in results}
                for name, tensor in outputs.items():
                    context.set_tensor_address(name, tensor.data_ptr())
                if not context.execute_async_v3(stream.cuda_stream):
                    raise RuntimeError("TensorRT did not execute its engine; its log says why")
                return [tensor.cpu().numpy() for tensor in outputs.values()]  # waits for the stream

        return session


BACKEND = TensorRT()


def _has_gpu() -> bool:
    """Tell whether the driver initialises and counts at least one device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _empty(engine: Any, context: Any, name: str) -> Any:
    """Return an empty tensor on the GPU for an output of the engine."""
    import tensorrt
    import torch

    dtype = getattr(torch, np.dtype(tensorrt.nptype(engine.get_tensor_dtype(name))).name)
    return torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")


def _input_names(source: Path) -> list[str]:
    """Return the names of the graph's inputs, in order."""
    import onnx

    graph = onnx.load(source, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    return [value.name for value in graph.input if value.name not in weights]


def _build(model: Path, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> bytes:
    """Build the serialized engine of an ONNX file. Raises Refused with what the parser or builder says."""
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(model.read_bytes(), str(model)):  # the weights of a large graph stand beside it
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise Refused(f"TensorRT's parser: {'; '.join(errors)}")
    configuration = builder.create_builder_config()
    configuration.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, WORKSPACE)
    configuration.clear_flag(tensorrt.BuilderFlag.TF32)
    if scheme == FP16:
        configuration.set_flag(tensorrt.BuilderFlag.FP16)
    if scheme == INT8:
        configuration.set_flag(tensorrt.BuilderFlag.INT8)
    entries = [network.get_input(i) for i in range(network.num_inputs)]
    if any(-1 in tuple(entry.shape) for entry in entries):
        profile = builder.create_optimization_profile()
        for entry in entries:
            shape = shapes[entry.name]
            profile.set_shape(entry.name, (1, *shape), (BATCH, *shape), (BATCH, *shape))
        configuration.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, configuration)
    if engine is None:
        raise Refused("TensorRT built no engine; its log says why")
    return bytes(engine)


def _insert_pairs(
    source: Path, target: Path, arrays: Mapping[str, np.ndarray], float_layers: Sequence[str]
) -> tuple[int, int]:
    """Write the model with ONNX Runtime's symmetric QuantizeLinear and DequantizeLinear pairs.

    Returns:
      How many convolutions, matmuls and recurrent cells have both operands quantized, and how many there are.

    Raises:
      Refused: The graph has no node of a name in `float_layers`.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    from qt_jax.export.storage import data_path

    lost = set(float_layers) - {node.name for node in onnx.load(source, load_external_data=False).graph.node}
    if lost:
        raise Refused(f"the graph has no node {min(lost)!r} to leave in float")
    pending = iter(range(len(next(iter(arrays.values())))))

    class Samples(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            i = next(pending, None)
            if i is None:
                return None
            return {name: np.ascontiguousarray(values[i : i + 1]) for name, values in arrays.items()}

    quantize_static(
        source,
        target,
        Samples(),
        use_external_data_format=data_path(source).exists(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        nodes_to_exclude=list(float_layers),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": False,
        },
    )
    nodes = onnx.load(target, load_external_data=False).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    found = [dequantized.issuperset(node.input[:2]) for node in nodes if node.op_type in ONNX_PRODUCTS]
    return sum(found), len(found)
