"""The recommended recipe's network with its learned activation ranges as Clip nodes in the graph.

What the clips buy where training took extremes as ranges.

Command: python -m experiments.paper --methods recommended-clips
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "recommended, exported with Clip",
    tables=("export",),
    network="recommended",
    export="clips",
    rate="recommended",
)
