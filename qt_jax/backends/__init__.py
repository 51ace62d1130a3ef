"""One float ONNX model through every vendor toolchain on this machine, each with its own quantizer.

`protocol` says what a backend is, one module a vendor implements it, `registry` lists them, `evaluation`
runs a model through them and returns records.
"""

from qt_jax.backends.evaluation import evaluate
from qt_jax.backends.protocol import Artifact, Backend, Scheme
from qt_jax.backends.registry import BACKENDS

__all__ = ["BACKENDS", "Artifact", "Backend", "Scheme", "evaluate"]
