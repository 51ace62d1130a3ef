"""The recommended recipe on 4-bit grids, at every step a random one of those that vendors use.

What fake quantization at 4 bits adds to kernels that reverse pruning has already made fit for INT4.

Command: python -m experiments.paper --methods recommended-w4
Expected time and score: 3 minutes of one core; on cifar10-fast8, in %: FP32 76.5, INT8 pt 76.5, INT8 pc 76.5,
INT4 pt 75.4, INT4 pc 75.5.
"""

from experiments.configs.method import Method
from experiments.configs.methods.recommended import CHANGES

GRIDS = CHANGES | {"bits": 4, "vendor_grids": True}
METHOD = Method(
    "recommended, vendors' W4 grids", tables=("points", "bits"), changes=GRIDS, rate="recommended"
)
