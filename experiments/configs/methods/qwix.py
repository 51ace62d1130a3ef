"""Qwix: the peer's quantization-aware training for JAX, exported through our converter.

Source: Qwix, https://github.com/google/qwix.

Command: python -m experiments.paper --methods qwix
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 77.2, INT8 pt 77.0, INT8 pc 77.3,
INT4 pt 71.1, INT4 pc 75.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "Qwix QAT W8A8",
    tables=("bits",),
    changes={"quantizer": "qwix", "sched": "constant", "reverse_pruning": None, "per_channel": True},
    rate="qwix-w4",
)
