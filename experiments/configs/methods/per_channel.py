"""Quant-Trim with one weight scale an output channel in training.

Command: python -m experiments.paper --methods per-channel
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.0, INT8 pt 76.9, INT8 pc 77.0,
INT4 pt 73.5, INT4 pc 76.2.
"""

from experiments.configs.method import Method

METHOD = Method("per-channel weights", tables=("points",), changes={"per_channel": True}, rate="quant-trim")
