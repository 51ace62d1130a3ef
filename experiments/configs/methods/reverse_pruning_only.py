"""Reverse pruning alone: no fake quantization at any time.

Command: python -m experiments.paper --methods reverse-pruning-only
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "reverse pruning alone", tables=("reverse-pruning",), changes={"sched": "none"}, rate="quant-trim"
)
