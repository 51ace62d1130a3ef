"""Quant-Trim with reverse pruning at the quantile 0.999 instead of 0.95.

Command: python -m experiments.paper --methods p-clip-999
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.0, INT8 pt 76.9, INT8 pc 76.9,
INT4 pt 69.4, INT4 pc 75.2.
"""

from experiments.configs.method import Method

METHOD = Method("p_clip 0.999", tables=("p-clip",), changes={"reverse_pruning": 0.999}, rate="quant-trim")
