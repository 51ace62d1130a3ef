"""Qwix for 4-bit weights and 8-bit activations.

As `qwix`, with the grid on which compilers lose most.

Command: python -m experiments.paper --methods qwix-w4
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Qwix QAT W4A8",
    tables=("main", "bits"),
    changes={"quantizer": "qwix", "sched": "constant", "reverse_pruning": None, "bits": 4},
)
