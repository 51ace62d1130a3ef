"""The recommended recipe's network with its learned activation ranges as Clip nodes in the graph.

What the clips buy where training took extremes as ranges.

Command: python -m experiments.paper --methods recommended-clips
Expected time and score: 1 minute of one core; on cifar10-fast8, in %: FP32 76.8, INT8 pt 76.8, INT8 pc 76.8,
INT4 pt 74.0, INT4 pc 76.0.
"""

from experiments.configs.method import Method

METHOD = Method(
    "recommended, exported with Clip",
    tables=("export",),
    network="recommended",
    export="clips",
    rate="recommended",
)
