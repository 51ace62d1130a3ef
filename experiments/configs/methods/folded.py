"""The published recipe with its grids and its reverse pruning on folded kernels.

W8A8, a hard plateau at the threshold: what folding alone does.

Command: python -m experiments.paper --methods folded
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "published, folded kernels",
    tables=("points",),
    changes={"folded": True, "reverse_pruning_folded": True},
    rate="quant-trim",
)
