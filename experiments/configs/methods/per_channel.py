"""Quant-Trim with one weight scale an output channel in training.

Command: python -m experiments.paper --methods per-channel
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("per-channel weights", tables=("points",), changes={"per_channel": True}, rate="quant-trim")
