"""Tell what quantization does to each layer of a float ONNX graph, why, and what to do about it.

`report.write_diagnosis` is the entry: it runs everything and writes the page, its pictures and its files.
`subject` loads what is diagnosed, and `loading` gives every layer a kernel of its own. `diagnosis.diagnose`
measures a network and tries remedies: `layers` finds the layers of a graph, `simulation` rounds any choice of
them to any width, `running` runs graphs, `meter` measures them, `remedies` holds what can be changed, and
`advice` tries it. Further sections are made on request: `toolchains` measures the noise that
vendors add in each layer, and `mixed_precision` chooses 4 or 8 bits for each layer within a budget. `page`,
`figures` and `snippets` show what was found. `python -m qt_jax.diagnosis MODEL.onnx` does all of it for a
file.
"""
