"""PACT: the clipping level of every activation is learned, with an L2 penalty on it.

Source: Choi et al. 2018, "PACT: parameterized clipping activation", arXiv 1805.06085.

Command: python -m experiments.paper --methods pact
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "PACT W8A8",
    tables=("bits",),
    changes={"quantizer": "pact", "sched": "constant", "reverse_pruning": None},
    rate="pact-w4",
)
