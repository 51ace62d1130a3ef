"""Quant-Trim with activations fake-quantized at the outputs of layers instead of their inputs.

Command: python -m experiments.paper --methods output-sites
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.1, INT8 pt 77.2, INT8 pc 77.1,
INT4 pt 72.9, INT4 pc 76.3.
"""

from experiments.configs.method import Method

METHOD = Method("output sites", tables=("points",), changes={"sites": "outputs"}, rate="quant-trim")
