"""Quant-Trim with activations fake-quantized at the outputs of layers instead of their inputs.

Command: python -m experiments.paper --methods output-sites
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("output sites", tables=("points",), changes={"sites": "outputs"}, rate="quant-trim")
