"""Quant-Trim with weight scales from the quantile 0.99 of |w| instead of the quantile 0.999.

Command: python -m experiments.paper --methods weight-quantile-99
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "weight quantile 0.99", tables=("weight-quantile",), changes={"weight_quantile": 0.99}, rate="quant-trim"
)
