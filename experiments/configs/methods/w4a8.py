"""Quant-Trim trained for 4-bit weights and 8-bit activations.

Command: python -m experiments.paper --methods w4a8
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("trained W4A8", tables=("bits",), changes={"bits": 4}, rate="quant-trim")
