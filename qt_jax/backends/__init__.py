"""Run a float ONNX model through every vendor's toolchain on this machine, each with its own quantizer.

`protocol` defines what a backend is, and one module per vendor implements it (LiteRT has helpers:
`saved_model`, `ai_edge_quantizer` and `tflite`, which Ethos-U reads too). `registry` lists the backends.
`environments` builds the virtual environments they need. `worker` and `steps` run them in separate processes.
`arrays` reads samples, `samples` matches them to a graph's inputs, and `inputs` prepares the graph, of which
`branches` takes out what no sample needs. `judging` says by what outputs are judged, `fidelity` compares them
with the float network, and `measurement` puts both into the keys of a record. `rows` makes one record per
backend, scheme and runtime. `evaluation` runs a model through all of them.
"""

from qt_jax.errors import extra

with extra("backends"):
    from qt_jax.backends.evaluation import evaluate
    from qt_jax.backends.protocol import Backend, Compiled, Environment, Refused, Runtime, Scheme
    from qt_jax.backends.registry import BACKENDS

__all__ = ["BACKENDS", "Backend", "Compiled", "Environment", "Refused", "Runtime", "Scheme", "evaluate"]
