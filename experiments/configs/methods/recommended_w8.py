"""The recommended recipe on 8-bit grids.

What training for INT4 costs at INT8, and buys at INT4.

Command: python -m experiments.paper --methods recommended-w8
Expected time and score: not run yet.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

METHOD = Method("recommended, W8A8", tables=("points",), changes=CHANGES | {"bits": 8}, rate="recommended")
