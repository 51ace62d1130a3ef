"""Quantization-aware training with a delayed start: lambda jumps from 0 to 1 after the warm-up.

Source: the quantization delay of Jacob et al. 2018, arXiv 1712.05877, section 3.1.

Command: python -m experiments.paper --methods qat-delayed
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method("QAT, delayed start", changes={"sched": "step", "reverse_pruning": None})
