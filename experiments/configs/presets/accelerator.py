"""The study on one GPU or TPU: full networks, full budgets, five seeds.

`python -m experiments.paper --preset accelerator`. Hours: not run yet.
"""

from dataclasses import replace

from experiments.configs import segmentation
from experiments.configs.cifar import PRESETS
from experiments.configs.methods import METHODS
from experiments.configs.preset import Preset, Target, Task, methods_of
from experiments.configs.presets import cpu

MAIN = (*cpu.MAIN, Target("tensorrt", "gpu", ("int8-pc-minmax",)))
BASE = PRESETS["gpu"]
COMPARED = methods_of("main")
VIT = replace(BASE, model="vit", learning_rate=0.05, lr_schedule="cosine", epochs=120)

PRESET = Preset(
    name="accelerator",
    tasks=(
        Task("cifar10-resnet18", BASE, tuple(METHODS), MAIN, cpu.ABLATION),
        Task("cifar10-mobilenetv2", replace(BASE, model="mobilenetv2"), COMPARED, MAIN, cpu.ABLATION),
        Task("cifar10-vit", VIT, COMPARED, MAIN, cpu.ABLATION),
        Task("cifar100-resnet18", replace(BASE, dataset="cifar100"), COMPARED, MAIN, cpu.ABLATION),
        Task("composed-unet", segmentation.PRESETS["gpu"], COMPARED, cpu.DENSE, cpu.DENSE),
    ),
    seeds=(0, 1, 2, 3, 4),
    pinned=False,
)
