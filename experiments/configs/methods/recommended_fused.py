"""The recommended recipe with grids at residual sums and outputs, too.

What placing activations' grids where vendors requantize buys.

Command: python -m experiments.paper --methods recommended-fused
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 76.7, INT8 pt 76.7, INT8 pc 76.7,
INT4 pt 74.4, INT4 pc 75.4.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, fused outputs",
    tables=("points",),
    changes=CHANGES | {"fused_outputs": True},
    rate="recommended",
)
