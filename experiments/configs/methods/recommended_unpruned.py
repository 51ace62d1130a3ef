"""The recommended recipe without reverse pruning.

What reverse pruning adds to the right quantization points.

Command: python -m experiments.paper --methods recommended-unpruned
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.3, INT8 pt 77.3, INT8 pc 77.2,
INT4 pt 64.7, INT4 pc 75.3.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method(
    "recommended, no reverse pruning",
    tables=("points",),
    changes=CHANGES | {"reverse_pruning": None, "reverse_pruning_folded": False},
    rate="recommended",
)
