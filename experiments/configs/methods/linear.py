"""Quant-Trim with another schedule of lambda: linear ramp.

Command: python -m experiments.paper --methods linear
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.0, INT8 pt 77.0, INT8 pc 77.0,
INT4 pt 73.2, INT4 pc 76.3.
"""

from experiments.configs.method import Method

METHOD = Method("linear ramp", tables=("schedule",), changes={"sched": "linear"}, rate="quant-trim")
