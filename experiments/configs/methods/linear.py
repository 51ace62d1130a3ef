"""Quant-Trim with another schedule of lambda: linear ramp.

Command: python -m experiments.paper --methods linear
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("linear ramp", tables=("schedule",), changes={"sched": "linear"}, rate="quant-trim")
