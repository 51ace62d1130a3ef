"""The recommended recipe without reverse pruning.

What reverse pruning adds to the right quantization points.

Command: python -m experiments.paper --methods recommended-unpruned
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, no reverse pruning",
    tables=("points",),
    changes=CHANGES | {"reverse_pruning": None, "reverse_pruning_folded": False},
    rate="recommended",
)
