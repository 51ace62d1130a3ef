"""Quant-Trim with weight scales from the quantile 0.99 of |w| instead of the quantile 0.999.

Command: python -m experiments.paper --methods weight-quantile-99
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 76.9, INT8 pt 76.9, INT8 pc 77.0,
INT4 pt 74.1, INT4 pc 76.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "weight quantile 0.99", tables=("weight-quantile",), changes={"weight_quantile": 0.99}, rate="quant-trim"
)
