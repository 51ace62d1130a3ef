"""Rescale the channels of a float ONNX graph, so that it rounds better and computes the same function.

`neutral.equalize` is the entry. `labels` says which elements of a graph's tensors must share a factor.
`walk` labels a graph node by node, by the rules of `channels` for each operator: this gives the factors that
are left free, and the constants that absorb them. `rescaling` applies factors to the graph and chooses them
in closed form. `learned` chooses them by the error that simulated grids of vendors make, for which
`evaluator` runs the graph in JAX. `command` does all of it for a file: `python -m qt_jax.equalize`.
"""
