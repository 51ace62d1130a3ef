"""The published recipe on folded kernels, with the bounds of reverse pruning spread.

What a plateau of weights does on vendors' grids, seen beside `folded`.

Command: python -m experiments.paper --methods folded-spread
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.2, INT8 pt 76.2, INT8 pc 76.3,
INT4 pt 74.8, INT4 pc 75.9.
"""

from experiments.configs.method import Method

METHOD = Method(
    "published, folded and spread",
    tables=("points",),
    changes={"folded": True, "reverse_pruning_folded": True, "reverse_pruning_spread": 0.13},
    rate="quant-trim",
)
