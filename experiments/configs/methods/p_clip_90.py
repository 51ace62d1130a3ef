"""Quant-Trim with reverse pruning at the quantile 0.9 instead of 0.95.

Command: python -m experiments.paper --methods p-clip-90
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.9, INT8 pt 76.8, INT8 pc 76.8,
INT4 pt 74.3, INT4 pc 76.2.
"""

from experiments.configs.method import Method

METHOD = Method("p_clip 0.9", tables=("p-clip",), changes={"reverse_pruning": 0.9}, rate="quant-trim")
