"""The recommended recipe on one 4-bit grid: per tensor, narrow.

What drawing a vendor's grid at every step buys, seen beside `recommended-w4`.

Command: python -m experiments.paper --methods recommended-one-grid
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 75.3, INT8 pt 75.2, INT8 pc 75.3,
INT4 pt 74.7, INT4 pc 74.8.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, one W4 grid",
    tables=("points",),
    changes=CHANGES | {"bits": 4, "weight_quantile": 1.0},
    rate="recommended",
)
