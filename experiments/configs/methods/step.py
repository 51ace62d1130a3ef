"""Quant-Trim with another schedule of lambda: step.

Command: python -m experiments.paper --methods step
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("step", tables=("schedule",), changes={"sched": "step"}, rate="quant-trim")
