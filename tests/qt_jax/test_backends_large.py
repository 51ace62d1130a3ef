"""Check that vendors' toolchains get a graph whose weights need a second file, or refuse it by name."""

import sys
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qt_jax.backends import Refused, k230, saved_model, sophgo
from qt_jax.export import storage


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Write a graph of 36 kB as two files, in a working directory of its own."""
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 96] input) => (float[batch, 96] logits) { logits = MatMul(input, kernel) }""")
    kernel = np.random.default_rng(0).normal(size=(96, 96)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(kernel, "kernel"))
    monkeypatch.setattr(storage, "LARGEST", 1000)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "float.onnx"
    storage.save(model, path)
    assert storage.data_path(path).exists()
    return path


def kernel_in(path):
    """Return the kernel of a graph in two files."""
    assert onnx.load(path, load_external_data=False).graph.initializer[0].external_data
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def test_onnx2tf_gets_two_files(source, tmp_path, monkeypatch):
    read = []
    fake = ModuleType("onnx2tf")
    fake.convert = lambda path, **settings: read.append(kernel_in(path))
    monkeypatch.setitem(sys.modules, "onnx2tf", fake)
    saved_model.write_saved_model(source, np.ones((1, 96), np.float32), tmp_path / "saved_model")
    np.testing.assert_array_equal(read, [kernel_in(source)])


def test_tpu_mlir_gets_two_files(source, tmp_path, monkeypatch):
    read = []

    def tool(name, work, *arguments):
        if name == "model_transform":
            read.append(kernel_in(arguments[arguments.index("--model_def") + 1]))
            (work / "net.mlir").write_text("return %4 : tensor<1x96xf32> loc(#loc4)\n")

    monkeypatch.setattr(sophgo, "_tool", tool)
    target = tmp_path / "converted"
    target.mkdir()
    sophgo._convert(source, np.ones((1, 96), np.float32), target)
    assert read
    for found in read:
        np.testing.assert_array_equal(found, kernel_in(source))


def test_nncase_reads_one_piece(source, tmp_path):
    with pytest.raises(Refused, match="weights of 2 GB or more"):
        k230._fix_shapes(source, tmp_path / "fixed.onnx", np.ones((1, 96), np.float32))
