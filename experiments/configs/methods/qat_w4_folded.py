"""Plain quantization-aware training on folded kernels: lambda = 1 throughout, W4A8, ranges from extremes.

The straight-through training of Jacob et al. 2018, arXiv 1712.05877, with batch norm folded by its running
statistics; batch norm is measured anew in the float network, as in the recommended recipe.

Command: python -m experiments.paper --methods qat-w4-folded
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 71.9, INT8 pt 71.8, INT8 pc 71.6,
INT4 pt 68.4, INT4 pc 69.2.
"""

from experiments.configs.method import Method

METHOD = Method(
    "plain QAT W4A8, folded",
    tables=("main", "points"),
    changes={
        "sched": "constant",
        "reverse_pruning": None,
        "bits": 4,
        "folded": True,
        "weight_quantile": 1.0,
        "activation_quantile": 1.0,
        "reestimate": 10_000,
    },
)
