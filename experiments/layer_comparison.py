"""The deployments in which layers are compared, as onnxruntime's quantizer makes them."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
import onnx

from qt_jax.backends import ort
from qt_jax.backends.protocol import Scheme

SCHEMES = {
    offer.name: offer
    for offer in ort.BACKEND.schemes
    if offer.name in ("int8-pt-minmax", "int4w-pt-minmax", "int4w-pc-minmax")
}
"""Those in which layers are compared."""


def quantized(graph: onnx.ModelProto, calibration: np.ndarray, scheme: Scheme) -> onnx.ModelProto:
    """What onnxruntime's quantizer makes of a float graph."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        source, target = Path("float.onnx"), Path("quantized")
        target.mkdir()
        onnx.save(graph, source)
        ort.BACKEND.compile(source, calibration, scheme, target)
        return onnx.load(target / ort.MODEL)
