"""Float training; the vendor quantizes afterwards (PTQ): what most practitioners do.

Command: python -m experiments.paper --methods float
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 77.8, INT8 pt 77.7, INT8 pc 77.6,
INT4 pt 67.1, INT4 pc 75.1.
"""

from experiments.configs.method import Method

METHOD = Method("float + PTQ", changes={"sched": "none", "reverse_pruning": None})
