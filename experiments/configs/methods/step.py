"""Quant-Trim with another schedule of lambda: step.

Command: python -m experiments.paper --methods step
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.0, INT8 pt 77.1, INT8 pc 77.0,
INT4 pt 73.5, INT4 pc 76.2.
"""

from experiments.configs.method import Method

METHOD = Method("step", tables=("schedule",), changes={"sched": "step"}, rate="quant-trim")
