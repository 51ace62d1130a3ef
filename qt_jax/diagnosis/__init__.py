"""Tell what quantization does to each layer of a float ONNX graph, why, and what to do about it.

`diagnosis.diagnose` runs the whole diagnosis. `layers` finds the layers of a graph, `simulation` rounds any
choice of them to any width, `remedies` holds what can be changed, and `advice` tries it. `page`, `figures`
and `snippets` show what was found. `python -m qt_jax.diagnosis MODEL.onnx` does all of it for a file.
"""
