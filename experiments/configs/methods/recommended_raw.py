"""The recommended recipe with its grids and its reverse pruning on raw kernels, as published.

What looking through batch norm buys.

Command: python -m experiments.paper --methods recommended-raw
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.1, INT8 pt 77.1, INT8 pc 77.2,
INT4 pt 73.1, INT4 pc 76.1.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended on raw kernels",
    tables=("points",),
    changes=CHANGES | {"folded": False, "reverse_pruning_folded": False},
    rate="recommended",
)
