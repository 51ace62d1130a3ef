"""Qwix for 4-bit weights and 8-bit activations.

As `qwix`, with the grid on which compilers lose most; batch norm is
measured anew in the float network, as in the recommended recipe, so that this is no difference between them.

Command: python -m experiments.paper --methods qwix-w4
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 77.2, INT8 pt 77.1, INT8 pc 77.0,
INT4 pt 69.9, INT4 pc 76.0.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Qwix QAT W4A8",
    tables=("main", "bits"),
    changes={
        "quantizer": "qwix",
        "sched": "constant",
        "reverse_pruning": None,
        "per_channel": True,
        "bits": 4,
        "reestimate": 10_000,
    },
)
