"""Quant-Trim without reverse pruning.

Command: python -m experiments.paper --methods no-reverse-pruning
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "no reverse pruning", tables=("reverse-pruning",), changes={"reverse_pruning": None}, rate="quant-trim"
)
