"""The recommended recipe with grids at residual sums and outputs, too.

What placing activations' grids where vendors requantize buys.

Command: python -m experiments.paper --methods recommended-fused
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, fused outputs",
    tables=("points",),
    changes=CHANGES | {"fused_outputs": True},
    rate="recommended",
)
