"""Quant-Trim with another schedule of lambda: cosine ramp.

Command: python -m experiments.paper --methods cosine
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("cosine ramp", tables=("schedule",), changes={"sched": "cosine"}, rate="quant-trim")
