"""LSQ for 4-bit weights and 8-bit activations: learned step sizes.

As `lsq`, with the grid on which compilers lose most.

Command: python -m experiments.paper --methods lsq-w4
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "LSQ W4A8",
    tables=("main", "bits"),
    changes={"quantizer": "lsq", "sched": "constant", "reverse_pruning": None, "bits": 4},
)
