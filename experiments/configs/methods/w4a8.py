"""Quant-Trim trained for 4-bit weights and 8-bit activations.

Command: python -m experiments.paper --methods w4a8
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 75.9, INT8 pt 76.0, INT8 pc 75.9,
INT4 pt 72.6, INT4 pc 74.9.
"""

from experiments.configs.method import Method

METHOD = Method("trained W4A8", tables=("bits",), changes={"bits": 4}, rate="quant-trim")
