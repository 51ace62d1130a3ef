"""The published recipe's network with its learned activation ranges as Clip nodes in the graph.

Command: python -m experiments.paper --methods clips
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "exported with Clip", tables=("export",), network="quant-trim", export="clips", rate="quant-trim"
)
