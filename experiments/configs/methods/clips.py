"""The published recipe's network with its learned activation ranges as Clip nodes in the graph.

Command: python -m experiments.paper --methods clips
Expected time and score: 1 minute of one core; on cifar10-fast8, in %: FP32 77.2, INT8 pt 77.2, INT8 pc 77.2,
INT4 pt 73.0, INT4 pc 76.2.
"""

from experiments.configs.method import Method

METHOD = Method(
    "exported with Clip", tables=("export",), network="quant-trim", export="clips", rate="quant-trim"
)
