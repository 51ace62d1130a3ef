"""Plain quantization-aware training for 4-bit weights: lambda = 1 throughout, W4A8, no reverse pruning.

As `qat`, with the grid on which compilers lose most; batch norm is
measured anew in the float network, as in the recommended recipe, so that this is no difference between them.

Command: python -m experiments.paper --methods qat-w4
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "plain QAT W4A8",
    tables=("main", "bits"),
    changes={"sched": "constant", "reverse_pruning": None, "bits": 4, "reestimate": 10_000},
)
