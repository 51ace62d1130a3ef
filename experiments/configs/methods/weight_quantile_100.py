"""Quant-Trim with weight scales from the maximum of |w| instead of the quantile 0.999.

Command: python -m experiments.paper --methods weight-quantile-100
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "weight quantile 1.0", tables=("weight-quantile",), changes={"weight_quantile": 1.0}, rate="quant-trim"
)
