"""Plain quantization-aware training for 4-bit weights: lambda = 1 throughout, W4A8, no reverse pruning.

As `qat`, with the grid on which compilers lose most; batch norm is
measured anew in the float network, as in the recommended recipe, so that this is no difference between them.

Command: python -m experiments.paper --methods qat-w4
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 75.7, INT8 pt 75.8, INT8 pc 75.6,
INT4 pt 67.6, INT4 pc 73.7.
"""

from experiments.configs.method import Method

METHOD = Method(
    "plain QAT W4A8",
    tables=("main", "bits"),
    changes={"sched": "constant", "reverse_pruning": None, "bits": 4, "reestimate": 10_000},
)
