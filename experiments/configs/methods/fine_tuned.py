"""Quant-Trim that starts from the float network, at a tenth of its rate, for two fifths of its epochs.

On top of the float budget: what somebody pays who has a float checkpoint already.

Command: python -m experiments.paper --methods fine-tuned
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

METHOD = Method(
    "fine-tuned from float",
    tables=("start",),
    scales={"epochs": 0.4, "learning_rate": 0.1},
    start="float",
    rate="quant-trim",
)
