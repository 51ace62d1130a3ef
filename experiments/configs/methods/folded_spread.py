"""The published recipe on folded kernels, with the bounds of reverse pruning spread.

What a plateau of weights does on vendors' grids, seen beside `folded`.

Command: python -m experiments.paper --methods folded-spread
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "published, folded and spread",
    tables=("points",),
    changes={"folded": True, "reverse_pruning_folded": True, "reverse_pruning_spread": 0.13},
    rate="quant-trim",
)
