"""Plain quantization-aware training: lambda = 1 throughout, W8A8, no reverse pruning.

The straight-through training of Jacob et al. 2018, arXiv 1712.05877, on raw kernels and with this package's
ranges (quantiles, moving averages); `qat-w4-folded` folds batch norm and takes extremes, as they do.

Command: python -m experiments.paper --methods qat
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 76.3, INT8 pt 76.2, INT8 pc 76.1,
INT4 pt 56.9, INT4 pc 74.3.
"""

from experiments.configs.method import Method

METHOD = Method(
    "plain QAT W8A8", tables=("main", "bits"), changes={"sched": "constant", "reverse_pruning": None}
)
