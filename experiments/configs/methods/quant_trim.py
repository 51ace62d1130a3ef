"""Quant-Trim as published: the three-phase lambda, reverse pruning at 0.95, W8A8, input sites.

Source: arXiv 2511.15300. The base of every task holds this recipe, so that nothing is changed here.

Command: python -m experiments.paper --methods quant-trim
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Quant-Trim (published)",
    tables=(
        *("main", "reverse-pruning", "schedule", "p-clip", "weight-quantile", "points", "bits", "start"),
        "export",
    ),
)
