"""Quant-Trim with reverse pruning at the quantile 0.999 instead of 0.95.

Command: python -m experiments.paper --methods p-clip-999
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("p_clip 0.999", tables=("p-clip",), changes={"reverse_pruning": 0.999}, rate="quant-trim")
