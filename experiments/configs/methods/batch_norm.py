"""The published recipe's network with batch norm estimated again on the float graph.

Command: python -m experiments.paper --methods batch-norm
Expected time and score: 1 minute of one core; on cifar10-fast8, in %: FP32 77.1, INT8 pt 77.1, INT8 pc 77.1,
INT4 pt 72.4, INT4 pc 76.1.
"""

from experiments.configs.method import Method

METHOD = Method(
    "batch norm re-estimated",
    tables=("export",),
    network="quant-trim",
    export="batch-norm",
    rate="quant-trim",
)
