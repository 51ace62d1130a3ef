"""Plain quantization-aware training: lambda = 1 throughout, W8A8, no reverse pruning.

The straight-through training of Jacob et al. 2018, arXiv 1712.05877, on raw kernels and with this package's
ranges (quantiles, moving averages); `qat-w4-folded` folds batch norm and takes extremes, as they do.

Command: python -m experiments.paper --methods qat
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "plain QAT W8A8", tables=("main", "bits"), changes={"sched": "constant", "reverse_pruning": None}
)
