"""Qwix: the peer's quantization-aware training for JAX, exported through our converter.

Source: Qwix, https://github.com/google/qwix.

Command: python -m experiments.paper --methods qwix
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Qwix QAT W8A8",
    tables=("bits",),
    changes={"quantizer": "qwix", "sched": "constant", "reverse_pruning": None, "per_channel": True},
    rate="qwix-w4",
)
