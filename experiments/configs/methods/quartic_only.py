"""Quant-Trim with another schedule of lambda: quartic ramp only.

Command: python -m experiments.paper --methods quartic-only
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.2, INT8 pt 77.2, INT8 pc 77.1,
INT4 pt 73.7, INT4 pc 76.1.
"""

from experiments.configs.method import Method

METHOD = Method(
    "quartic ramp only", tables=("schedule",), changes={"sched": "quartic-only"}, rate="quant-trim"
)
