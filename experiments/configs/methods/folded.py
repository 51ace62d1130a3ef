"""The published recipe with its grids and its reverse pruning on folded kernels.

W8A8, a hard plateau at the threshold: what folding alone does.

Command: python -m experiments.paper --methods folded
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.4, INT8 pt 76.4, INT8 pc 76.4,
INT4 pt 75.2, INT4 pc 75.6.
"""

from experiments.configs.method import Method

METHOD = Method(
    "published, folded kernels",
    tables=("points",),
    changes={"folded": True, "reverse_pruning_folded": True},
    rate="quant-trim",
)
