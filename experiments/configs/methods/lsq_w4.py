"""LSQ for 4-bit weights and 8-bit activations: learned step sizes.

As `lsq`, with the grid on which compilers lose most; batch norm is
measured anew in the float network, as in the recommended recipe, so that this is no difference between them.

Command: python -m experiments.paper --methods lsq-w4
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 75.0, INT8 pt 75.0, INT8 pc 74.8,
INT4 pt 70.8, INT4 pc 73.5.
"""

from experiments.configs.method import Method

METHOD = Method(
    "LSQ W4A8",
    tables=("main", "bits"),
    changes={
        "quantizer": "lsq",
        "sched": "constant",
        "reverse_pruning": None,
        "bits": 4,
        "reestimate": 10_000,
    },
)
