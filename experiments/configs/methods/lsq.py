"""LSQ: the step sizes of weights and activations are learned by gradient.

Source: Esser et al. 2020, "Learned step size quantization", arXiv 1902.08153.

Command: python -m experiments.paper --methods lsq
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "LSQ W8A8",
    tables=("bits",),
    changes={"quantizer": "lsq", "sched": "constant", "reverse_pruning": None},
    rate="lsq-w4",
)
