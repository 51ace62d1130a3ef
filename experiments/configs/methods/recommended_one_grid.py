"""The recommended recipe with one grid: per tensor, narrow.

What drawing a vendor's grid at every step buys.

Command: python -m experiments.paper --methods recommended-one-grid
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, one grid",
    tables=("points",),
    changes=CHANGES | {"vendor_grids": False, "weight_quantile": 1.0},
    rate="recommended",
)
