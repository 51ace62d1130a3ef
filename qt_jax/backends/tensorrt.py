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
from pathlib import Path

import numpy as np

from qt_jax.backends.protocol import Compiled, Refused, Runtime, Scheme, Session

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

    def compile(self, source: Path, calibration: np.ndarray, scheme: Scheme, folder: Path) -> Compiled:
        """Build an engine for this GPU and TensorRT version, for batches of 1 to `BATCH`."""
        if scheme == INT8:
            _insert_pairs(source, Path("quantized.onnx"), calibration)
            source = Path("quantized.onnx")
        engine = _build(source, calibration.shape[1:], scheme)
        (folder / ENGINE).write_bytes(engine)
        return Compiled(len(engine))

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
        [entry] = [n for n, mode in zip(names, modes, strict=True) if mode == tensorrt.TensorIOMode.INPUT]
        [result] = [n for n, mode in zip(names, modes, strict=True) if mode == tensorrt.TensorIOMode.OUTPUT]
        fixed = engine.get_tensor_shape(entry)[0]
        stream = torch.cuda.Stream()

        def run(images: np.ndarray) -> np.ndarray:
            with torch.cuda.stream(stream):
                inputs = torch.tensor(images, device="cuda")
                context.set_input_shape(entry, tuple(images.shape))
                logits = torch.empty(tuple(context.get_tensor_shape(result)), device="cuda")
                context.set_tensor_address(entry, inputs.data_ptr())
                context.set_tensor_address(result, logits.data_ptr())
                if not context.execute_async_v3(stream.cuda_stream):
                    raise RuntimeError("TensorRT did not execute its engine; its log says why")
                return logits.cpu().numpy()  # waits for the stream

        def session(images: np.ndarray) -> np.ndarray:
            step = len(images) if fixed == -1 else fixed
            return np.concatenate([run(images[i : i + step]) for i in range(0, len(images), step)])

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


def _build(model: Path, shape: tuple[int, ...], scheme: Scheme) -> bytes:
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
    entry = network.get_input(0)
    if -1 in tuple(entry.shape):
        profile = builder.create_optimization_profile()
        profile.set_shape(entry.name, (1, *shape), (BATCH, *shape), (BATCH, *shape))
        configuration.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, configuration)
    if engine is None:
        raise Refused("TensorRT built no engine; its log says why")
    return bytes(engine)


def _insert_pairs(source: Path, target: Path, calibration: np.ndarray) -> None:
    """Write the model with ONNX Runtime's symmetric QuantizeLinear and DequantizeLinear pairs."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    from qt_jax.export.storage import data_path

    graph = onnx.load(source, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    [name] = [value.name for value in graph.input if value.name not in weights]
    pending = iter(calibration)

    class Images(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(pending, None)
            return None if image is None else {name: np.ascontiguousarray(image[None])}

    quantize_static(
        source,
        target,
        Images(),
        use_external_data_format=data_path(source).exists(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": False,
        },
    )
