"""Quant-Trim with another schedule of lambda: quartic ramp only.

Command: python -m experiments.paper --methods quartic-only
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "quartic ramp only", tables=("schedule",), changes={"sched": "quartic-only"}, rate="quant-trim"
)
