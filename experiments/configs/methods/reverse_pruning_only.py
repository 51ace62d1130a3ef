"""Reverse pruning alone: no fake quantization at any time.

Command: python -m experiments.paper --methods reverse-pruning-only
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.4, INT8 pt 77.4, INT8 pc 77.4,
INT4 pt 74.9, INT4 pc 76.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "reverse pruning alone", tables=("reverse-pruning",), changes={"sched": "none"}, rate="quant-trim"
)
