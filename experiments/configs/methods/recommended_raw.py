"""The recommended recipe with its grids and its reverse pruning on raw kernels, as published.

What looking through batch norm buys.

Command: python -m experiments.paper --methods recommended-raw
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended on raw kernels",
    tables=("points",),
    changes=CHANGES | {"folded": False, "reverse_pruning_folded": False},
    rate="recommended",
)
