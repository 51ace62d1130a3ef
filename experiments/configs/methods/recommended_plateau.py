"""The recommended recipe with all clipped weights exactly at the threshold.

What spreading their bounds buys.

Command: python -m experiments.paper --methods recommended-plateau
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, no spread",
    tables=("points",),
    changes=CHANGES | {"reverse_pruning_spread": 0.0},
    rate="recommended",
)
