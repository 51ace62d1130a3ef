"""The published recipe's network with batch norm estimated again on the float graph.

Command: python -m experiments.paper --methods batch-norm
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "batch norm re-estimated",
    tables=("export",),
    network="quant-trim",
    export="batch-norm",
    rate="quant-trim",
)
