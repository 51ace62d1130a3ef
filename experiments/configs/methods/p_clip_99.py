"""Quant-Trim with reverse pruning at the quantile 0.99 instead of 0.95.

Command: python -m experiments.paper --methods p-clip-99
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.7, INT8 pt 76.7, INT8 pc 76.7,
INT4 pt 72.3, INT4 pc 75.5.
"""

from experiments.configs.method import Method

METHOD = Method("p_clip 0.99", tables=("p-clip",), changes={"reverse_pruning": 0.99}, rate="quant-trim")
