"""Quant-Trim without reverse pruning.

Command: python -m experiments.paper --methods no-reverse-pruning
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.5, INT8 pt 76.5, INT8 pc 76.4,
INT4 pt 66.1, INT4 pc 74.6.
"""

from experiments.configs.method import Method

METHOD = Method(
    "no reverse pruning", tables=("reverse-pruning",), changes={"reverse_pruning": None}, rate="quant-trim"
)
