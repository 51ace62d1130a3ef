"""PACT for 4-bit weights and 8-bit activations: learned clips.

As `pact`, with the grid on which compilers lose most; batch norm is
measured anew in the float network, as in the recommended recipe, so that this is no difference between them.

Command: python -m experiments.paper --methods pact-w4
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 72.2, INT8 pt 72.2, INT8 pc 72.4,
INT4 pt 67.9, INT4 pc 71.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "PACT W4A8",
    tables=("main", "bits"),
    changes={
        "quantizer": "pact",
        "sched": "constant",
        "reverse_pruning": None,
        "bits": 4,
        "reestimate": 10_000,
    },
)
