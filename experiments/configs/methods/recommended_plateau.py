"""The recommended recipe with all clipped weights exactly at the threshold.

What spreading their bounds buys.

Command: python -m experiments.paper --methods recommended-plateau
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.2, INT8 pt 77.2, INT8 pc 77.2,
INT4 pt 75.5, INT4 pc 76.4.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, no spread",
    tables=("points",),
    changes=CHANGES | {"reverse_pruning_spread": 0.0},
    rate="recommended",
)
