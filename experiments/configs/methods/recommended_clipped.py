"""The recommended recipe with the published quantiles of activations.

What the tails of activations cost.

Command: python -m experiments.paper --methods recommended-clipped
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, quantile 0.999",
    tables=("points",),
    changes=CHANGES | {"activation_quantile": 0.999},
    rate="recommended",
)
