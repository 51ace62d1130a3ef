"""One float ONNX model through every vendor toolchain on this machine, each with its own quantizer.

`protocol` says what a backend is, one module a vendor implements it, `registry` lists them, `environments`
builds what they need, `worker` and `steps` run them in processes of their own, `rows` makes a record of
each, `evaluation` runs a model through all of them.
"""

from qt_jax.errors import extra

with extra("backends"):
    from qt_jax.backends.evaluation import evaluate
    from qt_jax.backends.protocol import Backend, Compiled, Environment, Refused, Runtime, Scheme
    from qt_jax.backends.registry import BACKENDS

__all__ = ["BACKENDS", "Backend", "Compiled", "Environment", "Refused", "Runtime", "Scheme", "evaluate"]
