"""Quant-Trim with another schedule of lambda: cosine ramp.

Command: python -m experiments.paper --methods cosine
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.0, INT8 pt 77.0, INT8 pc 77.0,
INT4 pt 73.3, INT4 pc 76.4.
"""

from experiments.configs.method import Method

METHOD = Method("cosine ramp", tables=("schedule",), changes={"sched": "cosine"}, rate="quant-trim")
