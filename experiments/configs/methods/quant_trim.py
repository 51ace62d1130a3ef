"""Quant-Trim as published: the three-phase lambda, reverse pruning at 0.95, W8A8, input sites.

Source: arXiv 2511.15300. The base of every task holds this recipe, so that nothing is changed here.

Command: python -m experiments.paper --methods quant-trim
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 77.1, INT8 pt 77.0, INT8 pc 76.8,
INT4 pt 73.3, INT4 pc 75.8.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Quant-Trim (published)",
    tables=(
        *("main", "reverse-pruning", "schedule", "p-clip", "weight-quantile", "points", "bits", "start"),
        "export",
    ),
)
