"""Quant-Trim trained for 4-bit weights and 4-bit activations.

Command: python -m experiments.paper --methods w4a4
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 75.1, INT8 pt 75.1, INT8 pc 75.1,
INT4 pt 73.0, INT4 pc 74.7.
"""

from experiments.configs.method import Method

METHOD = Method(
    "trained W4A4", tables=("bits",), changes={"bits": 4, "activation_bits": 4}, rate="quant-trim"
)
