"""Quant-Trim that starts from the float network, at a tenth of its rate, for two fifths of its epochs.

On top of the float budget: what somebody pays who has a float checkpoint already.

Command: python -m experiments.paper --methods fine-tuned
Expected time and score: 1 minute of one core; on cifar10-fast8, in %: FP32 78.9, INT8 pt 78.9, INT8 pc 78.9,
INT4 pt 74.7, INT4 pc 77.4.
"""

from experiments.configs.method import Method

METHOD = Method(
    "fine-tuned from float",
    tables=("start",),
    scales={"epochs": 0.4, "learning_rate": 0.1},
    start="float",
    rate="quant-trim",
)
