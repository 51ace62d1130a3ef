"""Quantization-aware training with a delayed start: lambda jumps from 0 to 1 after the warm-up.

Source: the quantization delay of Jacob et al. 2018, arXiv 1712.05877, section 3.1.

Command: python -m experiments.paper --methods qat-delayed
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 76.3, INT8 pt 76.2, INT8 pc 76.3,
INT4 pt 58.3, INT4 pc 74.2.
"""

from experiments.configs.method import Method

METHOD = Method("QAT, delayed start", changes={"sched": "step", "reverse_pruning": None})
