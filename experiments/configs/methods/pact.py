"""PACT: the clipping level of every activation is learned, with an L2 penalty on it.

Source: Choi et al. 2018, "PACT: parameterized clipping activation", arXiv 1805.06085.

Command: python -m experiments.paper --methods pact
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 65.6, INT8 pt 65.5, INT8 pc 65.4,
INT4 pt 56.1, INT4 pc 63.0.
"""

from experiments.configs.method import Method

METHOD = Method(
    "PACT W8A8",
    tables=("bits",),
    changes={"quantizer": "pact", "sched": "constant", "reverse_pruning": None},
    rate="pact-w4",
)
