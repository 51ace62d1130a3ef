"""Test TensorRT on a stand-in module: why it is not available, and what it asks of TensorRT."""

import importlib.util
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qt_jax.backends import Refused, tensorrt
from qt_jax.backends.tensorrt import BACKEND, FP16, FP32, INT8

CALIBRATION = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """Change to a scratch folder, because compiling leaves files in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stand_in(monkeypatch):
    """Return a module with TensorRT's names, which builds the engine b"engine" for an input of open batch."""
    module = MagicMock(name="tensorrt")
    builder = module.Builder.return_value
    network = builder.create_network.return_value
    network.num_inputs = 1
    network.get_input.return_value = types.SimpleNamespace(name="input", shape=(-1, 3, 8, 8))
    builder.build_serialized_network.return_value = b"engine"
    module.OnnxParser.return_value.parse.return_value = True
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def source(tmp_path):
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 3, 8, 8] input) => (float[batch, 4] logits) {
        stem = Conv(input, k, b)
        mean = GlobalAveragePool(stem)
        logits = Flatten(mean)
    }""")
    rng = np.random.default_rng(1)
    for name, shape in {"k": (4, 3, 3, 3), "b": (4,)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        )
    onnx.save(model, tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def test_a_missing_driver_is_the_reason(monkeypatch):
    def no_driver(name):
        raise OSError(name)

    monkeypatch.setattr(tensorrt.ctypes, "CDLL", no_driver)
    assert "no NVIDIA GPU answers" in BACKEND.available()


@pytest.mark.parametrize(("status", "devices", "found"), [(0, 1, True), (0, 0, False), (100, 1, False)])
def test_a_gpu_is_what_the_driver_counts(monkeypatch, status, devices, found):
    def count(pointer):
        pointer._obj.value = devices
        return 0

    driver = types.SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=count)
    monkeypatch.setattr(tensorrt.ctypes, "CDLL", lambda name: driver)
    assert tensorrt._has_gpu() is found


@pytest.mark.parametrize(("absent", "remedy"), [("tensorrt", "TensorRT 10"), ("torch", "torch with CUDA")])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, absent, remedy):
    monkeypatch.setattr(tensorrt, "_has_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else object())
    assert BACKEND.available().startswith(f"{absent} is not importable: install {remedy}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert BACKEND.available() is None


@pytest.mark.parametrize(("scheme", "flag"), [(FP32, None), (FP16, "FP16"), (INT8, "INT8")])
def test_build_asks_for_its_precision_and_every_batch(stand_in, source, tmp_path, scheme, flag):
    compiled = BACKEND.compile(source, CALIBRATION, scheme, tmp_path)
    assert compiled.model_bytes == len(b"engine")
    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    builder = stand_in.Builder.return_value
    configuration = builder.create_builder_config.return_value
    flags = [call.args[0] for call in configuration.set_flag.call_args_list]
    assert flags == ([getattr(stand_in.BuilderFlag, flag)] if flag else [])
    configuration.clear_flag.assert_called_once_with(stand_in.BuilderFlag.TF32)
    builder.create_optimization_profile.return_value.set_shape.assert_called_once_with(
        "input", (1, 3, 8, 8), (32, 3, 8, 8), (32, 3, 8, 8)
    )
    content, path = stand_in.OnnxParser.return_value.parse.call_args.args
    parsed = onnx.load_from_string(content)
    assert path.endswith(".onnx")  # beside which TensorRT looks for the weights of a large graph
    assert any(node.op_type == "QuantizeLinear" for node in parsed.graph.node) == (scheme == INT8)


def test_pairs_are_symmetric_int8_and_per_channel(stand_in, source, tmp_path):
    BACKEND.compile(source, CALIBRATION, INT8, tmp_path)
    graph = onnx.load("quantized.onnx").graph
    values = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    pairs = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert all(values[pair.input[2]].dtype == np.int8 and not values[pair.input[2]].any() for pair in pairs)
    kernel = next(pair for pair in pairs if pair.input[0] in values)
    original = numpy_helper.to_array(onnx.load(source).graph.initializer[0])
    largest = np.abs(original).max(axis=(1, 2, 3))
    np.testing.assert_allclose(values[kernel.input[1]], largest / 127, rtol=1e-6)
    images = next(pair for pair in pairs if pair.input[0].startswith("input"))
    np.testing.assert_allclose(values[images.input[1]], np.abs(CALIBRATION).max() / 127, rtol=1e-6)


@pytest.mark.parametrize(("layers", "quantized"), [([], 1), (["stem"], 0)])
def test_layers_stay_in_float_on_request(stand_in, source, tmp_path, layers, quantized):
    model = onnx.load(source)
    model.graph.node[0].name = "stem"
    onnx.save(model, source)
    assert BACKEND.compile(source, CALIBRATION, INT8, tmp_path, layers).products == (quantized, 1)
    with pytest.raises(Refused, match="no node 'head'"):
        BACKEND.compile(source, CALIBRATION, INT8, tmp_path, ["head"])


def test_a_graph_that_does_not_parse_is_refused(stand_in, source, tmp_path):
    parser = stand_in.OnnxParser.return_value
    parser.parse.return_value, parser.num_errors = False, 1
    parser.get_error.return_value = "no plugin Det"
    with pytest.raises(Refused, match="TensorRT's parser: no plugin Det"):
        BACKEND.compile(source, CALIBRATION, FP32, tmp_path)


def test_an_engine_that_is_not_built_is_refused(stand_in, source, tmp_path):
    stand_in.Builder.return_value.build_serialized_network.return_value = None
    with pytest.raises(Refused, match="built no engine"):
        BACKEND.compile(source, CALIBRATION, FP32, tmp_path)


def _load(stand_in, monkeypatch, folder):
    """Return BACKEND's session and its context, on a stand-in engine of two inputs and two outputs."""
    (folder / "model.engine").write_bytes(b"engine")
    engine = stand_in.Runtime.return_value.deserialize_cuda_engine.return_value
    engine.num_io_tensors = 4
    engine.get_tensor_name = ["image", "sound", "map", "logits"].__getitem__
    entry, result = stand_in.TensorIOMode.INPUT, stand_in.TensorIOMode.OUTPUT
    modes = {"image": entry, "sound": entry, "map": result, "logits": result}
    engine.get_tensor_mode = modes.__getitem__
    stand_in.nptype.side_effect = lambda dtype: dtype
    engine.get_tensor_dtype = {"map": np.float32, "logits": np.int64}.__getitem__
    context = engine.create_execution_context.return_value
    context.get_tensor_shape = {"map": (4, 2, 3), "logits": (4, 5)}.__getitem__
    torch = MagicMock(name="torch")
    torch.float32, torch.int64 = np.float32, np.int64
    torch.tensor.side_effect = lambda values, device: MagicMock(shape=values.shape)
    torch.empty.side_effect = lambda shape, dtype, device: MagicMock(
        **{"cpu.return_value.numpy.return_value": np.zeros(shape, dtype)}
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    return BACKEND.load(folder, FP32, BACKEND.runtimes[0]), context


def test_session_binds_tensors_by_name_and_runs(stand_in, monkeypatch, tmp_path):
    session, context = _load(stand_in, monkeypatch, tmp_path)
    batch = {"sound": np.zeros((4, 7), np.float32), "image": np.zeros((4, 3), np.float32)}
    outputs = session(batch)
    assert [(output.shape, output.dtype.name) for output in outputs] == [
        ((4, 2, 3), "float32"),
        ((4, 5), "int64"),
    ]
    shapes = [call.args for call in context.set_input_shape.call_args_list]
    assert sorted(shapes) == [("image", (4, 3)), ("sound", (4, 7))]
    bound = [call.args[0] for call in context.set_tensor_address.call_args_list]
    assert sorted(bound) == ["image", "logits", "map", "sound"]
    assert context.execute_async_v3.call_count == 1


def test_a_failed_execution_is_an_error(stand_in, monkeypatch, tmp_path):
    session, context = _load(stand_in, monkeypatch, tmp_path)
    context.execute_async_v3.return_value = False
    with pytest.raises(RuntimeError, match="did not execute"):
        session({"image": np.zeros((2, 3), np.float32), "sound": np.zeros((2, 7), np.float32)})


def test_an_engine_of_another_gpu_is_an_error(stand_in, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", MagicMock(name="torch"))
    (tmp_path / "model.engine").write_bytes(b"engine")
    stand_in.Runtime.return_value.deserialize_cuda_engine.return_value = None
    with pytest.raises(RuntimeError, match="one GPU and version only"):
        BACKEND.load(tmp_path, FP32, BACKEND.runtimes[0])
