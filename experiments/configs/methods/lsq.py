"""LSQ: the step sizes of weights and activations are learned by gradient.

Source: Esser et al. 2020, "Learned step size quantization", arXiv 1902.08153.

Command: python -m experiments.paper --methods lsq
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 31.9, INT8 pt 31.8, INT8 pc 31.9,
INT4 pt 30.0, INT4 pc 31.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "LSQ W8A8",
    tables=("bits",),
    changes={"quantizer": "lsq", "sched": "constant", "reverse_pruning": None},
    rate="lsq-w4",
)
