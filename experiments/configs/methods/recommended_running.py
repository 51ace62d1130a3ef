"""The recommended recipe with the running averages of batch norm, as training left them.

What measuring batch norm anew in the float network buys.

Command: python -m experiments.paper --methods recommended-running
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, running averages",
    tables=("points",),
    changes=CHANGES | {"reestimate": 0},
    rate="recommended",
)
