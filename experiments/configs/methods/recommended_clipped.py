"""The recommended recipe with the published quantiles of activations.

What the tails of activations cost.

Command: python -m experiments.paper --methods recommended-clipped
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 76.2, INT8 pt 76.3, INT8 pc 76.2,
INT4 pt 74.7, INT4 pc 75.2.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, quantile 0.999",
    tables=("points",),
    changes=CHANGES | {"activation_quantile": 0.999},
    rate="recommended",
)
