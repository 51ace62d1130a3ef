"""Quant-Trim trained for 4-bit weights and 4-bit activations.

Command: python -m experiments.paper --methods w4a4
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "trained W4A4", tables=("bits",), changes={"bits": 4, "activation_bits": 4}, rate="quant-trim"
)
