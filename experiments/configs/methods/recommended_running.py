"""The recommended recipe with the running averages of batch norm, as training left them.

What measuring batch norm anew in the float network buys.

Command: python -m experiments.paper --methods recommended-running
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.6, INT8 pt 76.6, INT8 pc 76.6,
INT4 pt 74.5, INT4 pc 76.0.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, running averages",
    tables=("points",),
    changes=CHANGES | {"reestimate": 0},
    rate="recommended",
)
