"""The recipe that this project recommends: Quant-Trim where vendors quantize.

As published, but: grids and reverse pruning on the folded kernel; its quantile 0.97, its bounds spread over
one step of INT4 so that no plateau of weights meets the end of a vendor's grid; activation ranges from the
extremes of the sample; batch norm measured anew in the float network. Chosen on the validation split of
CIFAR-10 in some forty single runs of fast8 (exploration.jsonl); the ablations "points" take its parts away
one by one.

Command: python -m experiments.paper --methods recommended
Expected time and score: 4 minutes of one core; on cifar10-fast8, in %: FP32 76.6, INT8 pt 76.6, INT8 pc 76.4,
INT4 pt 74.0, INT4 pc 75.9.
"""

from experiments.configs.method import Method

CHANGES = {
    "folded": True,
    "activation_quantile": 1.0,
    "reverse_pruning": 0.97,
    "reverse_pruning_folded": True,
    "reverse_pruning_spread": 0.13,
    "reestimate": 10_000,
}
METHOD = Method(
    "Quant-Trim, recommended", tables=("main", "bits", "points", "start", "export"), changes=CHANGES
)
