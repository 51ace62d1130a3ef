"""Quant-Trim with weight scales from the maximum of |w| instead of the quantile 0.999.

Command: python -m experiments.paper --methods weight-quantile-100
Expected time and score: 2 minutes of one core; on cifar10-fast8, in %: FP32 77.3, INT8 pt 77.2, INT8 pc 77.3,
INT4 pt 73.3, INT4 pc 76.1.
"""

from experiments.configs.method import Method

METHOD = Method(
    "weight quantile 1.0", tables=("weight-quantile",), changes={"weight_quantile": 1.0}, rate="quant-trim"
)
