"""Float training; the vendor quantizes afterwards (PTQ): what most practitioners do.

Command: python -m experiments.paper --methods float
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("float + PTQ", changes={"sched": "none", "reverse_pruning": None})
