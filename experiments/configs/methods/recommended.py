"""The recipe that this project recommends: Quant-Trim where and how vendors quantize.

W4 grids over the folded kernel, at every step a random one of those that vendors use; reverse pruning of the
folded kernel, its bounds spread over one step of INT4 so that no plateau of weights meets the end of a
vendor's grid; activation ranges from the extremes of the sample; batch norm measured anew in the float
network. Chosen on the validation split of CIFAR-10 in some twenty single runs of fast8 (the quantile from
0.85, 0.9, 0.95 and 0.98, the spread from 0, 0.13 and 0.2, the ramp, the momentum of the ranges); the
ablations "points" take its parts away one by one.

Command: python -m experiments.paper --methods recommended
Expected time and score: not run yet.
"""

from experiments.configs.method import Method

CHANGES = {
    "bits": 4,
    "folded": True,
    "vendor_grids": True,
    "activation_quantile": 1.0,
    "reverse_pruning": 0.9,
    "reverse_pruning_folded": True,
    "reverse_pruning_spread": 0.13,
    "reestimate": 10_000,
}
METHOD = Method(
    "Quant-Trim, recommended", tables=("main", "bits", "points", "start", "export"), changes=CHANGES
)
