"""Check the face of the package: which names it has, and what its import leaves for later."""

import subprocess
import sys

import qt_jax as qt
from qt_jax import backends, export


def test_training_imports_nothing_of_deployment():
    late = {"onnx", "onnxruntime", "qt_jax.export", "qt_jax.backends"}
    program = f"import sys, qt_jax; print(*sorted({late} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert not found.strip()


def test_names_of_deployment_are_those_of_their_packages():
    assert (qt.to_onnx, qt.to_qdq, qt.evaluate) == (export.to_onnx, export.to_qdq, backends.evaluate)
    assert all(hasattr(qt, name) for name in qt.__all__)
